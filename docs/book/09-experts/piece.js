"use strict";
// A router that the reader turns: number of chosen experts, capacity, load and balance loss.

const EXPERTS = 4;
const CAPACITIES = [0.5, 0.75, 1, 1.25, 1.5, 2, Infinity];
const STEP = 1; // learning rate of the button

function softmax(values) {
  const highest = Math.max(...values);
  const powers = values.map((value) => Math.exp(value - highest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

/** Route each row of logits to its `number` best experts; compute the balance loss. */
function route(logits, number, biases) {
  const shifted = logits.map((row) => row.map((value, e) => value + biases[e]));
  const chosen = shifted.map((row) =>
    [0, 1, 2, 3].sort((a, b) => row[b] - row[a] || a - b).slice(0, number));
  const weights = chosen.map((experts, t) => softmax(experts.map((e) => shifted[t][e])));
  const probabilities = shifted.map(softmax);
  const f = new Array(EXPERTS).fill(0);
  for (const experts of chosen) for (const e of experts) f[e] += 1 / (number * logits.length);
  const p = f.map((_, e) => probabilities.reduce((sum, row) => sum + row[e] / logits.length, 0));
  const balance = EXPERTS * f.reduce((sum, share, e) => sum + share * p[e], 0);
  const gradient = f.map((share, e) => EXPERTS * probabilities.reduce((sum, row) =>
    sum + row[e] * (share - row.reduce((mean, q, j) => mean + q * f[j], 0)) / logits.length, 0));
  return { chosen, weights, f, balance, gradient };
}

function bookPiece(root, data, lang) {
  const say = (en, zh) => (lang === "zh" ? zh : en);
  let biases = new Array(EXPERTS).fill(0);
  root.innerHTML = `
    <label>${say("Router of the model trained", "路由器取自")}
      <select data-id="run">
        <option value="0.01">${say("with the balance loss", "用均衡损失训练的模型")}</option>
        <option value="0">${say("without it", "不用均衡损失训练的模型")}</option>
      </select></label>
    <label>${say("experts per letter, K: ", "每个字母的专家数 K：")}<output data-id="number-value"></output><br>
      <input type="range" data-id="number" min="1" max="4" step="1" value="2"></label>
    <label>${say("capacity factor: ", "容量系数：")}<output data-id="capacity-value"></output><br>
      <input type="range" data-id="capacity" min="0" max="${CAPACITIES.length - 1}" step="1"
        value="${CAPACITIES.length - 1}"></label>
    <label>${say("bias of expert 0: ", "专家 0 的偏置：")}<output data-id="bias-value"></output><br>
      <input type="range" data-id="bias" min="-4" max="4" step="0.1" value="0"></label>
    <p><button data-id="step">${say("Ten steps down the balance loss", "沿均衡损失下降十步")}</button>
      <button data-id="reset">${say("Reset", "复位")}</button></p>
    <div data-id="experts"></div>
    <p><b data-id="balance"></b></p>
    <p data-id="summary"></p>
    <p class="note" data-id="token"></p>`;
  const part = (id) => root.querySelector(`[data-id="${id}"]`);
  const shown = (letter) => (letter === " " ? "␣" : letter);

  function expertRow(result, e, capacity) {
    const rows = result.chosen.flatMap((experts, t) => (experts.includes(e) ? [t] : []));
    const row = document.createElement("div");
    const title = document.createElement("div");
    title.dataset.load = rows.length;
    title.textContent = `${say("expert", "专家")} ${e}${say(": ", "：")}${rows.length} ` +
      `(${(100 * result.f[e]).toFixed(0)} %)`;
    const bar = document.createElement("span");
    bar.className = "bar";
    bar.style.width = `${(8 * result.f[e] * Number(part("number").value)).toFixed(2)}em`;
    title.append(" ", bar);
    row.append(title);
    for (const [place, t] of rows.entries()) {
      const token = document.createElement("span");
      token.className = "token";
      token.textContent = shown(data.letters[t]);
      if (place >= capacity) {
        token.style.opacity = 0.35;
        token.style.textDecoration = "line-through";
        token.dataset.dropped = t;
      }
      token.addEventListener("mouseenter", () => describe(result, t));
      token.addEventListener("click", () => describe(result, t));
      row.append(token);
    }
    return row;
  }

  function describe(result, t) {
    const parts = result.chosen[t].map((e, i) =>
      `${say("expert", "专家")} ${e} × ${result.weights[t][i].toFixed(2)}`);
    part("token").textContent =
      `${say("letter", "字母")} ${t + 1} “${shown(data.letters[t])}”${say(": ", "：")}${parts.join(" + ")}`;
  }

  function show() {
    const number = Number(part("number").value);
    const factor = CAPACITIES[Number(part("capacity").value)];
    const result = route(data.runs[part("run").value], number, biases);
    const capacity = Math.ceil((factor * number * data.letters.length) / EXPERTS);
    part("number-value").textContent = number;
    part("capacity-value").textContent = factor === Infinity
      ? say("none", "不限") : `${factor} (${capacity} ${say("rows per expert", "行/专家")})`;
    part("bias").value = biases[0];
    part("bias-value").textContent = Number(biases[0]).toFixed(1);
    part("experts").replaceChildren(...[0, 1, 2, 3].map((e) => expertRow(result, e, capacity)));
    const dropped = part("experts").querySelectorAll("[data-dropped]").length;
    part("balance").textContent =
      `${say("balance loss", "均衡损失")} ${result.balance.toFixed(3)}`;
    part("summary").textContent =
      `${say("rows dropped: ", "丢弃的行：")}${dropped} / ${number * data.letters.length}${say("; ", "；")}` +
      `${say("routed parameters used per letter: ", "每个字母用到的路由专家参数：")}` +
      `${(100 * number / EXPERTS).toFixed(0)} %`;
    describe(result, 0);
  }

  function descend() {
    for (let step = 0; step < 10; step++) {
      const { gradient } = route(data.runs[part("run").value], Number(part("number").value), biases);
      biases = biases.map((bias, e) => bias - STEP * gradient[e]);
    }
    show();
  }

  for (const id of ["run", "number", "capacity"]) part(id).addEventListener("input", show);
  part("bias").addEventListener("input", () => {
    biases[0] = Number(part("bias").value);
    show();
  });
  part("step").addEventListener("click", descend);
  part("reset").addEventListener("click", () => {
    biases = new Array(EXPERTS).fill(0);
    show();
  });
  show();
}
