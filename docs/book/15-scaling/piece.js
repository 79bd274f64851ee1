"use strict";
// A budget of time on a machine: tokens, epochs, and the loss by the fitted law.

const MACHINES = [
  { tflops: 1, en: "two laptop cores, 1 TFLOP/s", zh: "笔记本的两个核，1 TFLOP/s" },
  { tflops: 71, en: "RTX 3090, 71 TFLOP/s", zh: "RTX 3090，71 TFLOP/s" },
  { tflops: 989, en: "H100, 989 TFLOP/s", zh: "H100，989 TFLOP/s" },
];
const HOURS = [0.25, 0.5, 1, 2, 4, 8, 24, 100, 1000];
const UNIQUE = [1e6, 3e6, 1e7, 6.8e7, 3e8, 1e9, 1e10, Infinity];
const REPETITIONS = 15.39;
const SIZES = Array.from({ length: 81 }, (_, i) => 10 ** (5 + i / 20));

/** Return what `tokens` from a text of `unique` tokens are worth, as `effective_tokens` does. */
function effectiveTokens(tokens, unique) {
  if (tokens <= unique) return tokens;
  const repetitions = tokens / unique - 1;
  return unique + unique * REPETITIONS * (1 - Math.exp(-repetitions / REPETITIONS));
}

function lossOf(law, parameters, flops, unique) {
  const worth = effectiveTokens(flops / 6 / parameters, unique);
  return law.E + law.A / parameters ** law.alpha + law.B / worth ** law.beta;
}

function short(number) {
  for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (number >= 0.9995 * size) return `${Number((number / size).toPrecision(3))}${unit}`;
  }
  return `${Number(number.toPrecision(3))}`;
}

function bookPiece(root, data, lang) {
  const say = (en, zh) => (lang === "zh" ? zh : en);
  const slider = (id, label, max, value) => `
    <label>${label}<output data-id="${id}-value"></output><br>
      <input type="range" data-id="${id}" min="${id === "use" ? 1 : 0}" max="${max}" value="${value}">
    </label>`;
  root.innerHTML = `
    <label>${say("Machine", "机器")}
      <select data-id="machine">${MACHINES.map((machine, i) =>
        `<option value="${i}">${say(machine.en, machine.zh)}</option>`).join("")}</select>
    </label>
    ${slider("use", say("Utilisation: ", "利用率："), 60, 20)}
    ${slider("hours", say("Hours: ", "小时数："), HOURS.length - 1, 5)}
    ${slider("size", say("Parameters: ", "参数量："), SIZES.length - 1, 20)}
    ${slider("unique", say("Tokens of text: ", "文本的词元数："), UNIQUE.length - 1, 3)}
    <table><tbody data-id="results"></tbody></table>
    <svg viewBox="-8 0 416 150" width="100%" role="img"
      aria-label="${say("bits per byte by the number of parameters, for this budget",
        "此预算下每字节比特数随参数量的变化")}">
      <polyline data-id="curve" fill="none" stroke="#3b8ad8" stroke-width="2"></polyline>
      <circle data-id="chosen" r="5" fill="#3b8ad8"></circle>
      <circle data-id="best-point" r="5" fill="none" stroke="currentColor" stroke-width="2"></circle>
      <g fill="currentColor" font-size="11" opacity="0.75">
        <text x="0" y="148">0.1M</text><text x="95" y="148">1M</text><text x="192" y="148">10M</text>
        <text x="288" y="148">100M</text><text x="380" y="148">1G</text></g></svg>
    <p class="note">${say("Dot: your choice. Circle: the best size for this budget.",
      "圆点是你选的大小，圆圈是此预算下最好的大小。")}</p>
    <p><b data-id="warning"></b></p>`;
  const part = (id) => root.querySelector(`[data-id="${id}"]`);
  const number = (id) => Number(part(id).value);

  function show() {
    const hours = HOURS[number("hours")], unique = UNIQUE[number("unique")];
    const parameters = SIZES[number("size")], use = number("use");
    part("use-value").textContent = `${use} %`;
    part("hours-value").textContent = hours;
    part("size-value").textContent = short(parameters);
    part("unique-value").textContent = unique === Infinity ? say("any number", "不限") : short(unique);

    const flops = MACHINES[number("machine")].tflops * 1e12 * use / 100 * 3600 * hours;
    const tokens = flops / 6 / parameters;
    const losses = SIZES.map((size) => lossOf(data.law, size, flops, unique));
    const best = losses.indexOf(Math.min(...losses));
    const rows = [
      [say("budget", "预算"), `${flops.toExponential(1).replace("+", "")} FLOPs`],
      [say("training tokens", "训练词元数"), short(tokens)],
      [say("tokens per parameter", "每个参数的词元数"), short(tokens / parameters)],
      [say("epochs", "轮数"), unique === Infinity ? "1" : (tokens / unique).toFixed(2)],
      [say("worth, in new tokens", "折合新词元数"), short(effectiveTokens(tokens, unique))],
      [say("bits per byte by the law", "定律给出的每字节比特数"), losses[number("size")].toFixed(3)],
      [say("best size", "最好的大小"), `${short(SIZES[best])}, ${losses[best].toFixed(3)}`],
    ];
    part("results").replaceChildren(...rows.map(([name, value]) => {
      const row = document.createElement("tr");
      row.append(document.createElement("td"), document.createElement("td"));
      row.firstChild.textContent = name;
      row.lastChild.textContent = value;
      return row;
    }));

    const low = Math.min(...losses), high = Math.min(Math.max(...losses), low + 3);
    const x = (i) => 400 * i / (SIZES.length - 1);
    const y = (loss) => 125 - 118 * (Math.min(loss, high) - low) / (high - low);
    part("curve").setAttribute("points",
      losses.map((loss, i) => `${x(i).toFixed(1)},${y(loss).toFixed(1)}`).join(" "));
    for (const [id, i] of [["chosen", number("size")], ["best-point", best]]) {
      part(id).setAttribute("cx", x(i));
      part(id).setAttribute("cy", y(losses[i]));
    }
    const beyond = Math.max(parameters / data.largest.parameters, tokens / data.largest.tokens);
    const below = parameters < data.smallest;
    part("warning").textContent = beyond > 1.05
      ? say(`${short(beyond)} times beyond the largest run of the law: a guess, not a prediction`,
        `是拟合时最大一次的 ${short(beyond)} 倍：只能算猜测，不算预测`)
      : below
        ? say("smaller than every model that the law was fitted to", "比拟合所用的模型都小")
        : say("within the range of the runs", "在拟合的范围之内");
  }

  for (const id of ["machine", "use", "hours", "size", "unique"]) {
    part(id).addEventListener("input", show);
  }
  show();
}
