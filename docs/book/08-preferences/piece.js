"use strict";
// The strength of the KL penalty, the policy it leads to, and the loss of one pair.

const BETAS = [0.1, 0.3, 0.5, 1, 2, 5, 10];

function optimum(scores, reference, beta) {
  const highest = Math.max(...scores); // a constant cancels, and exp() stays finite
  const weights = scores.map((score, i) => reference[i] * Math.exp((score - highest) / beta));
  const total = weights.reduce((a, b) => a + b);
  return weights.map((weight) => weight / total);
}

function pairLoss(kind, beta, smoothing, d) {
  if (kind === "ipo") {
    const distance = d - 1 / (2 * beta);
    return [distance * distance, 2 * distance];
  }
  const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x))); // -log sigmoid(-x)
  const sigmoid = (x) => 1 / (1 + Math.exp(-x));
  const scaled = beta * d;
  const loss = (1 - smoothing) * softplus(-scaled) + smoothing * softplus(scaled);
  return [loss, beta * (smoothing * sigmoid(scaled) - (1 - smoothing) * sigmoid(-scaled))];
}

function bookPiece(root, data, lang) {
  const say = (en, zh) => (lang === "zh" ? zh : en);
  const slider = (id, label, min, max, step, value) => `
    <label>${label}<output data-id="${id}-value"></output><br>
      <input type="range" data-id="${id}" min="${min}" max="${max}" step="${step}" value="${value}">
    </label>`;
  root.innerHTML = `
    ${slider("beta", say("beta: ", "beta："), 0, BETAS.length - 1, 1, 2)}
    <div>${say("The best policy for the four answers:", "四个回答的最优策略：")}</div>
    <table><tbody data-id="policy"></tbody></table>
    <p data-id="kl"></p>
    <label>${say("Loss of one pair", "一对回答的损失")}
      <select data-id="kind"><option value="sigmoid">sigmoid</option><option value="ipo">ipo</option></select>
    </label>
    ${slider("chosen", say("r(chosen), nats: ", "r(chosen)，奈特："), -20, 20, 0.5, 0)}
    ${slider("rejected", say("r(rejected), nats: ", "r(rejected)，奈特："), -20, 20, 0.5, 0)}
    ${slider("smoothing", say("label smoothing: ", "标签平滑："), 0, 0.4, 0.1, 0)}
    <p data-id="rewards"></p>
    <p><b data-id="loss"></b></p>`;
  const part = (id) => root.querySelector(`[data-id="${id}"]`);
  const number = (id) => Number(part(id).value);

  function show() {
    const beta = BETAS[number("beta")];
    part("beta-value").textContent = beta;
    for (const id of ["chosen", "rejected", "smoothing"]) {
      part(`${id}-value`).textContent = part(id).value;
    }
    const policy = optimum(data.scores, data.reference, beta);
    part("policy").replaceChildren(...data.answers.map((answer, i) => {
      const row = document.createElement("tr");
      row.innerHTML = `<td></td><td>${policy[i].toFixed(2)}</td>
        <td><span class="bar" style="width:${(4 * policy[i]).toFixed(2)}em"></span></td>`;
      row.firstChild.textContent = answer;
      return row;
    }));
    const mean = (value) => policy.reduce((sum, p, i) => sum + (p ? p * value(p, i) : 0), 0);
    const reward = mean((p, i) => data.scores[i]);
    const kl = mean((p, i) => Math.log(p / data.reference[i]));
    part("kl").textContent =
      `${say("expected reward", "期望奖励")} ${reward.toFixed(2)}, KL ${kl.toFixed(2)}`;

    const kind = part("kind").value;
    part("smoothing").disabled = kind === "ipo";
    const d = number("chosen") - number("rejected");
    const [loss, gradient] = pairLoss(kind, beta, number("smoothing"), d);
    const shown = (value) => value.toFixed(3).replace(/^-0\.000$/, "0.000");
    part("rewards").textContent =
      `${say("rewards", "奖励")} ${shown(beta * number("chosen"))}, ` +
      `${shown(beta * number("rejected"))}; d = ${d}`;
    part("loss").textContent =
      `${say("loss", "损失")} ${shown(loss)}, ${say("gradient", "梯度")} ${shown(gradient)}`;
  }

  for (const id of ["beta", "kind", "chosen", "rejected", "smoothing"]) {
    part(id).addEventListener("input", show);
  }
  show();
}
