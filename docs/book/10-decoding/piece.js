"use strict";
// The model of chapter.py with int8 weights: a forward pass with a KV cache, and the sampling knobs.

function bytesOf(text) {
  return Int8Array.from(atob(text), (character) => character.charCodeAt(0));
}

function rmsNorm(x, weight, eps) {
  const scale = 1 / Math.sqrt(x.reduce((sum, v) => sum + v * v, 0) / x.length + eps);
  return x.map((v, i) => v * scale * weight[i]);
}

/** Weights of the model, and the keys and values of the tokens so far. */
class Model {
  constructor(data) {
    this.norms = data.norms;
    this.shape = data.shape;
    this.matrices = {};
    for (const [name, { columns, scales, data: text }] of Object.entries(data.matrices)) {
      const numbers = bytesOf(text);
      this.matrices[name] = scales.map((scale, row) =>
        Float64Array.from(numbers.subarray(row * columns, (row + 1) * columns), (n) => n * scale));
    }
    this.clear();
  }

  clear() {
    this.cache = Array.from({ length: this.shape.layers }, () => ({ keys: [], values: [] }));
  }

  multiply(name, x) {
    return Float64Array.from(this.matrices[name], (row) =>
      row.reduce((sum, weight, i) => sum + weight * x[i], 0));
  }

  rotate(x, position) {
    const { dim, theta } = this.shape;
    const out = x.slice();
    for (let start = 0; start < x.length; start += dim) {
      for (let i = 0; i < dim / 2; i++) {
        const angle = position * theta ** ((-2 * i) / dim);
        const [a, b] = [x[start + i], x[start + i + dim / 2]];
        out[start + i] = a * Math.cos(angle) - b * Math.sin(angle);
        out[start + i + dim / 2] = b * Math.cos(angle) + a * Math.sin(angle);
      }
    }
    return out;
  }

  attend(layer, x) {
    const { heads, keyHeads, dim } = this.shape;
    const { keys, values } = this.cache[layer];
    const prefix = `model.layers.${layer}.self_attn`;
    const query = this.rotate(this.multiply(`${prefix}.q_proj.weight`, x), keys.length);
    keys.push(this.rotate(this.multiply(`${prefix}.k_proj.weight`, x), keys.length));
    values.push(this.multiply(`${prefix}.v_proj.weight`, x));
    const mixed = new Float64Array(heads * dim);
    for (let head = 0; head < heads; head++) {
      const from = Math.floor(head / (heads / keyHeads)) * dim;
      const scores = keys.map((key) => {
        let sum = 0;
        for (let i = 0; i < dim; i++) sum += query[head * dim + i] * key[from + i];
        return sum / Math.sqrt(dim);
      });
      softmax(scores).forEach((weight, t) => {
        for (let i = 0; i < dim; i++) mixed[head * dim + i] += weight * values[t][from + i];
      });
    }
    return this.multiply(`${prefix}.o_proj.weight`, mixed);
  }

  /** Append a token to the cache and return the logits of the next one. */
  next(token) {
    const embedding = this.matrices["model.embed_tokens.weight"];
    let x = embedding[token];
    for (let layer = 0; layer < this.shape.layers; layer++) {
      const norm = (name, v) => rmsNorm(v, this.norms[`model.layers.${layer}.${name}.weight`], this.shape.eps);
      const mlp = (name, v) => this.multiply(`model.layers.${layer}.mlp.${name}.weight`, v);
      const attention = this.attend(layer, norm("input_layernorm", x));
      x = x.map((v, i) => v + attention[i]);
      const normed = norm("post_attention_layernorm", x);
      const up = mlp("up_proj", normed);
      const inner = mlp("gate_proj", normed).map((z, i) => (z / (1 + Math.exp(-z))) * up[i]);
      const out = mlp("down_proj", inner);
      x = x.map((v, i) => v + out[i]);
    }
    const last = rmsNorm(x, this.norms["model.norm.weight"], this.shape.eps);
    return embedding.map((row) => row.reduce((sum, weight, i) => sum + weight * last[i], 0));
  }
}

function softmax(values) {
  const highest = Math.max(...values);
  const powers = values.map((value) => Math.exp(value - highest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

/** Return the words in descending order with their probabilities; words that are cut have 0. */
function adjust(logits, seen, { temperature, topK, topP, minP, penalty }) {
  const penalized = logits.map((z, i) => (seen.has(i) ? (z > 0 ? z / penalty : z * penalty) : z));
  const order = penalized.map((_, i) => i).sort((a, b) => penalized[b] - penalized[a] || a - b);
  if (temperature === 0) return order.map((word, rank) => [word, Number(rank === 0)]);
  const limit = topK || order.length;
  const powers = softmax(order.slice(0, limit).map((word) => penalized[word] / temperature));
  let before = 0;
  const weights = powers.map((p) => {
    const cut = (topP < 1 && before >= topP) || p < minP * powers[0];
    before += p;
    return cut ? 0 : p;
  });
  const total = weights.reduce((a, b) => a + b, 0);
  return order.map((word, rank) => [word, rank < limit ? weights[rank] / total : 0]);
}

function bookPiece(root, data, lang) {
  const say = (en, zh) => (lang === "zh" ? zh : en);
  const model = new Model(data);
  let tokens = [];
  let logits = [];
  let state = 1;
  const slider = (id, label, min, max, step, value) => `
    <label>${label}<output data-id="${id}-value"></output><br>
      <input type="range" data-id="${id}" min="${min}" max="${max}" step="${step}" value="${value}">
    </label>`;
  root.innerHTML = `
    <label>${say("Beginning", "开头")}
      <select data-id="prompt">${data.prompts.map((text) => `<option>${text}</option>`).join("")}</select>
    </label>
    ${slider("temperature", say("temperature: ", "温度："), 0, 3, 0.1, 1)}
    ${slider("top-k", say("top-k: ", "top-k："), 0, 40, 1, 0)}
    ${slider("top-p", say("top-p: ", "top-p："), 0.05, 1, 0.05, 1)}
    ${slider("min-p", say("min-p: ", "min-p："), 0, 0.5, 0.01, 0)}
    ${slider("penalty", say("repetition penalty: ", "重复惩罚："), 1, 2, 0.1, 1)}
    <p><button data-id="one">${say("Next word", "下一个词")}</button>
      <button data-id="many">${say("20 words", "写 20 个词")}</button>
      <button data-id="again">${say("Start again", "重来")}</button></p>
    <p data-id="text"></p>
    <p><b data-id="summary"></b></p>
    <table><tbody data-id="words"></tbody></table>`;
  const part = (id) => root.querySelector(`[data-id="${id}"]`);
  const number = (id) => Number(part(id).value);

  function random() { // a small generator, so that the text depends on the number of clicks alone
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  }

  function append(token) {
    tokens.push(token);
    logits = model.next(token);
  }

  function start() {
    model.clear();
    tokens = [];
    for (const word of ["<s>", ...part("prompt").value.split(" ")]) append(data.vocabulary.indexOf(word));
    show();
  }

  function distribution() {
    return adjust(logits, new Set(tokens), {
      temperature: number("temperature"), topK: number("top-k"), topP: number("top-p"),
      minP: number("min-p"), penalty: number("penalty"),
    });
  }

  function write(count) {
    for (let i = 0; i < count; i++) {
      const choices = distribution();
      let rest = random();
      const [word] = choices.find(([, p]) => (rest -= p) < 0) || choices[0];
      append(word);
    }
    show();
  }

  function show() {
    for (const id of ["temperature", "top-k", "top-p", "min-p", "penalty"]) {
      part(`${id}-value`).textContent = number(id) || id !== "top-k" ? number(id) : say("off", "关");
    }
    for (const id of ["top-k", "top-p", "min-p"]) part(id).disabled = number("temperature") === 0;
    part("text").textContent = tokens.map((token) => data.vocabulary[token]).join(" ");
    const choices = distribution();
    const allowed = choices.filter(([, p]) => p > 0);
    const entropy = allowed.reduce((sum, [, p]) => sum - p * Math.log(p), 0);
    part("summary").textContent =
      `${say("words that can be drawn: ", "可以抽中的词：")}${allowed.length}${say("; ", "；")}` +
      `${say("perplexity: ", "困惑度：")}${Math.exp(entropy).toFixed(1)}`;
    part("words").replaceChildren(...choices.slice(0, 12).map(([word, p]) => {
      const row = document.createElement("tr");
      row.innerHTML = `<td></td><td>${p.toFixed(3)}</td>
        <td><span class="bar" style="width:${(8 * p).toFixed(2)}em"></span></td>`;
      row.firstChild.textContent = data.vocabulary[word];
      if (!p) row.className = "note";
      return row;
    }));
  }

  for (const id of ["temperature", "top-k", "top-p", "min-p", "penalty"]) {
    part(id).addEventListener("input", show);
  }
  part("prompt").addEventListener("input", start);
  part("one").addEventListener("click", () => write(1));
  part("many").addEventListener("click", () => write(20));
  part("again").addEventListener("click", start);
  start();
}
