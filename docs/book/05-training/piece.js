"use strict";
// Learning-rate schedules: the table of letter pairs of chapter.py, trained in the browser.

const SIZE = 27;
const STEPS = 400;
const BATCH = 32;

/** Fraction of the peak learning rate, as minimind/training/schedule.py computes it. */
function lrFraction(step, settings) {
  const warmup = Math.round(settings.warmup * STEPS);
  if (step < warmup) return (step + 1) / warmup;
  if (settings.name === "constant") return 1;
  if (settings.name === "cosine") {
    return 0.5 * (1 + Math.cos(Math.PI * (step - warmup) / (STEPS - warmup)));
  }
  const decay = Math.max(1, Math.min(Math.round(settings.decay * STEPS), STEPS - warmup));
  return Math.min(1, (STEPS - step) / decay);
}

function logSumExp(table, row) {
  let largest = -Infinity, sum = 0;
  for (let i = 0; i < SIZE; i++) largest = Math.max(largest, table[row * SIZE + i]);
  for (let i = 0; i < SIZE; i++) sum += Math.exp(table[row * SIZE + i] - largest);
  return largest + Math.log(sum);
}

class Pairs {
  constructor(letters) {
    this.ids = [...letters].map((letter) => " abcdefghijklmnopqrstuvwxyz".indexOf(letter));
    this.length = this.ids.length - 1;
    this.counts = new Float64Array(SIZE * SIZE);
    for (let i = 0; i < this.length; i++) this.counts[this.ids[i] * SIZE + this.ids[i + 1]] += 1;
  }

  loss(table) {
    let total = 0;
    for (let row = 0; row < SIZE; row++) {
      const normalizer = logSumExp(table, row);
      for (let i = 0; i < SIZE; i++) {
        total += this.counts[row * SIZE + i] * (normalizer - table[row * SIZE + i]);
      }
    }
    return total / this.length;
  }

  /** Return the loss over all pairs before each step and after the last. */
  train(peak, settings) {
    const table = new Float64Array(SIZE * SIZE), change = new Float64Array(SIZE * SIZE);
    const losses = [];
    for (let step = 0; step < STEPS; step++) {
      losses.push(this.loss(table));
      change.fill(0);
      for (let k = 0; k < BATCH; k++) {
        const at = ((step * BATCH + k) * 3571) % this.length;
        const row = this.ids[at], normalizer = logSumExp(table, row);
        for (let i = 0; i < SIZE; i++) {
          change[row * SIZE + i] += Math.exp(table[row * SIZE + i] - normalizer);
        }
        change[row * SIZE + this.ids[at + 1]] -= 1;
      }
      const factor = peak * lrFraction(step, settings) / BATCH;
      for (let i = 0; i < change.length; i++) table[i] -= factor * change[i];
    }
    return [...losses, this.loss(table)];
  }
}

function bookPiece(root, data, lang) {
  const say = (en, zh) => (lang === "zh" ? zh : en);
  const rates = [0.3, 1, 3, 10, 30, 100, 300];
  root.innerHTML = `
    <label>${say("Schedule", "调度方式")}
      <select data-id="name">
        <option value="constant">${say("constant", "恒定")}</option>
        <option value="cosine" selected>${say("cosine", "余弦")}</option>
        <option value="wsd">WSD</option>
      </select>
    </label>
    <label>${say("Peak learning rate: ", "最大学习率：")}<output data-id="peak-value"></output><br>
      <input type="range" data-id="peak" min="0" max="${rates.length - 1}" value="4">
    </label>
    <label>${say("Warmup: ", "预热：")}<output data-id="warmup-value"></output><br>
      <input type="range" data-id="warmup" min="0" max="30" value="5">
    </label>
    <label>${say("Decay (only WSD): ", "衰减（仅 WSD）：")}<output data-id="decay-value"></output><br>
      <input type="range" data-id="decay" min="0" max="70" value="30">
    </label>
    <div>${say("Learning rate, as a fraction of the peak", "学习率（相对最大值）")}</div>
    <svg viewBox="0 0 400 60" width="100%" role="img"
      aria-label="${say("learning rate over the steps", "学习率随步数的变化")}">
      <polyline data-id="rate" fill="none" stroke="#3b8ad8" stroke-width="2"></polyline></svg>
    <div>${say("Loss; dashed: the counted table", "损失；虚线为直接统计得到的表")}</div>
    <svg viewBox="0 0 400 120" width="100%" role="img"
      aria-label="${say("loss over the steps", "损失随步数的变化")}">
      <line data-id="floor" x1="0" x2="400" stroke="#888" stroke-dasharray="4 4"></line>
      <polyline data-id="loss" fill="none" stroke="#3b8ad8" stroke-width="2"></polyline></svg>
    <p><b data-id="result"></b></p>
    <p class="note">${say("400 steps of 32 pairs of letters. Losses above 4 leave the picture.",
      "共 400 步，每步 32 对字母。损失超过 4 的部分不在图中。")}</p>`;
  const part = (id) => root.querySelector(`[data-id="${id}"]`);
  const pairs = new Pairs(data.letters);
  const height = (loss) => (118 - 116 * (Math.min(loss, 4) - 2) / 2).toFixed(1);

  function show() {
    const peak = rates[Number(part("peak").value)];
    const settings = { name: part("name").value };
    for (const name of ["warmup", "decay"]) {
      settings[name] = Number(part(name).value) / 100;
      part(`${name}-value`).textContent = `${part(name).value} %`;
    }
    part("decay").disabled = settings.name !== "wsd";
    part("peak-value").textContent = peak;
    const losses = pairs.train(peak, settings);
    part("rate").setAttribute("points", Array.from({ length: STEPS }, (_, step) =>
      `${step},${(58 - 56 * lrFraction(step, settings)).toFixed(1)}`).join(" "));
    part("loss").setAttribute("points", losses.map((loss, step) => `${step},${height(loss)}`).join(" "));
    for (const end of ["y1", "y2"]) part("floor").setAttribute(end, height(data.floor));
    const distance = (losses[STEPS] - data.floor).toFixed(3);
    part("result").textContent = say(`At the end: ${distance} above the counted table`,
      `结束时比直接统计的表高 ${distance}`);
  }

  for (const id of ["name", "peak", "warmup", "decay"]) part(id).addEventListener("input", show);
  show();
}
