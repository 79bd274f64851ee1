"use strict";
// A language model in about a hundred lines: a GGUF file (q8_0) is read, and its transformer
// computes in float32. `dot` below is WebAssembly, everything else plain JavaScript.

// --8<-- [start:dot]
const DOT = new Uint8Array([
  0x00, 0x61, 0x73, 0x6d, 0x01, 0x00, 0x00, 0x00, // "\0asm", version 1
  0x01, 0x08, 0x01, 0x60, 0x03, 0x7f, 0x7f, 0x7f, 0x01, 0x7d, // type (i32, i32, i32) -> f32
  0x03, 0x02, 0x01, 0x00, // one function, of type 0
  0x05, 0x03, 0x01, 0x00, 0x01, // a memory of at least one page, 64 KiB
  0x07, 0x0d, 0x02, 0x03, 0x6d, 0x65, 0x6d, 0x02, 0x00, // export the memory as "mem"
  0x03, 0x64, 0x6f, 0x74, 0x00, 0x00, // and the function as "dot"
  0x0a, 0x33, 0x01, 0x31, 0x01, 0x01, 0x7d, // code, with one local variable: the f32 sum
  0x03, 0x40, // loop
  0x20, 0x03, 0x20, 0x00, 0x2a, 0x02, 0x00, //   sum, the float at x
  0x20, 0x01, 0x2c, 0x00, 0x00, 0xb2, //   the byte at q, as a float
  0x94, 0x92, 0x21, 0x03, //   sum += product
  0x20, 0x00, 0x41, 0x04, 0x6a, 0x21, 0x00, //   x += 4
  0x20, 0x01, 0x41, 0x01, 0x6a, 0x21, 0x01, //   q += 1
  0x20, 0x02, 0x41, 0x01, 0x6b, 0x22, 0x02, //   n -= 1
  0x0d, 0x00, 0x0b, // repeat while n is not 0
  0x20, 0x03, 0x0b, // return the sum
]);
// --8<-- [end:dot]
const BLOCK = 32;

// --8<-- [start:gguf]
/** Return the metadata of a GGUF file, and its tensors {dimensions, type, start} by name. */
function readGGUF(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let at = 8; // after "GGUF" and the version
  const u32 = () => view.getUint32((at += 4) - 4, true);
  const u64 = () => Number(view.getBigUint64((at += 8) - 8, true));
  const text = () => {
    const length = u64();
    return new TextDecoder().decode(bytes.subarray(at, (at += length)));
  };
  const value = (type) => {
    if (type === 8) return text();
    if (type === 9) { const inner = u32(); return Array.from({ length: u64() }, () => value(inner)); }
    if (type === 6) return view.getFloat32((at += 4) - 4, true);
    if (type === 7) return bytes[at++] === 1;
    return type < 6 ? u32() : u64(); // minimind writes no numbers of one or two bytes
  };
  const [numTensors, numKeys] = [u64(), u64()];
  const metadata = {};
  for (let i = 0; i < numKeys; i++) { const key = text(); metadata[key] = value(u32()); }
  const tensors = {};
  for (let i = 0; i < numTensors; i++) {
    const name = text();
    const dimensions = Array.from({ length: u32() }, u64);
    tensors[name] = { dimensions, type: u32(), start: u64() };
  }
  const start = Math.ceil(at / 32) * 32;
  for (const tensor of Object.values(tensors)) tensor.start += start;
  return { metadata, tensors, view };
}
// --8<-- [end:gguf]

function halfToFloat(half) {
  const [exponent, fraction] = [(half >> 10) & 31, half & 1023];
  const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction / 1024 * 2 ** -14;
  return half & 0x8000 ? -size : size;
}

/** Copy the matrices into the memory of the WebAssembly module; return the parts of the model. */
function loadModel(bytes) {
  const { metadata, tensors, view } = readGGUF(bytes);
  const { mem, dot } = new WebAssembly.Instance(new WebAssembly.Module(DOT)).exports;
  const size = (tensor) => tensor.dimensions.reduce((a, b) => a * b, 1);
  const matrices = Object.values(tensors).filter((tensor) => tensor.type === 8);
  let free = 4096; // bytes of the memory for the vector x of a product
  mem.grow(Math.ceil(matrices.reduce((sum, tensor) => sum + size(tensor), free) / 65536));
  const [floats, integers] = [new Float32Array(mem.buffer), new Int8Array(mem.buffer)];
  const weights = {};
  for (const [name, tensor] of Object.entries(tensors)) {
    const key = name.replace(/\.weight$/, "");
    if (tensor.type === 0) {
      weights[key] = Float32Array.from({ length: size(tensor) }, (_, i) => view.getFloat32(tensor.start + 4 * i, true));
      continue;
    }
    const blocks = size(tensor) / BLOCK; // 34 bytes each: the scale, 32 integers
    const scales = Float32Array.from({ length: blocks }, (_, b) => halfToFloat(view.getUint16(tensor.start + 34 * b, true)));
    for (let b = 0; b < blocks; b++) {
      integers.set(new Int8Array(view.buffer, view.byteOffset + tensor.start + 34 * b + 2, BLOCK), free + BLOCK * b);
    }
    weights[key] = { start: free, scales, columns: tensor.dimensions[0], rows: tensor.dimensions[1] };
    free += BLOCK * blocks;
  }
  const key = (name) => metadata[`llama.${name}`];
  return {
    metadata, weights, floats, integers, dot, useWasm: true,
    layers: key("block_count"), heads: key("attention.head_count"),
    groups: key("attention.head_count_kv"), width: key("attention.key_length"),
    eps: key("attention.layer_norm_rms_epsilon"), theta: key("rope.freq_base"),
    context: key("context_length"), tokens: metadata["tokenizer.ggml.tokens"],
  };
}

// --8<-- [start:product]
/** Return matrix · x. Each block of 32 integers has one scale. */
function product(model, matrix, x) {
  model.floats.set(x);
  const blocks = matrix.columns / BLOCK;
  return Float32Array.from({ length: matrix.rows }, (_, row) => {
    let sum = 0;
    for (let b = 0; b < blocks; b++) {
      const q = matrix.start + row * matrix.columns + BLOCK * b;
      sum += matrix.scales[row * blocks + b] * dotBlock(model, BLOCK * b, q);
    }
    return sum;
  });
}

function dotBlock(model, x, q) {
  if (model.useWasm) return model.dot(4 * x, q, BLOCK);
  let sum = 0; // the same in JavaScript
  for (let i = 0; i < BLOCK; i++) sum += model.floats[x + i] * model.integers[q + i];
  return sum;
}
// --8<-- [end:product]

// --8<-- [start:forward]
function rmsNorm(model, x, weight) {
  const meanSquare = x.reduce((sum, v) => sum + v * v, 0) / x.length;
  return x.map((v, i) => (v * weight[i]) / Math.sqrt(meanSquare + model.eps));
}

/** Rotate neighbouring pairs of each head by the angles of a position (RoPE), in place. */
function rotate(model, x, position) {
  for (let i = 0; i < x.length; i += 2) {
    const angle = position * model.theta ** (-(i % model.width) / model.width);
    const [cos, sin, a, b] = [Math.cos(angle), Math.sin(angle), x[i], x[i + 1]];
    [x[i], x[i + 1]] = [a * cos - b * sin, a * sin + b * cos];
  }
  return x;
}

/** Attend from the query to all keys of a layer's cache; each group of heads shares keys. */
function attend(model, query, { keys, values }) {
  const { heads, groups, width } = model;
  const out = new Float32Array(query.length);
  for (let head = 0; head < heads; head++) {
    const [own, shared] = [head * width, Math.floor(head / (heads / groups)) * width];
    const scores = keys.map((key) => {
      let score = 0;
      for (let i = 0; i < width; i++) score += query[own + i] * key[shared + i];
      return score / Math.sqrt(width);
    });
    softmax(scores).forEach((weight, t) => {
      for (let i = 0; i < width; i++) out[own + i] += weight * values[t][shared + i];
    });
  }
  return out;
}

function softmax(scores) {
  const highest = Math.max(...scores);
  const powers = Array.from(scores, (score) => Math.exp(score - highest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

/** Return the logits after one more token. cache: {keys, values} per layer, which grow. */
function forward(model, token, cache) {
  const w = model.weights;
  const add = (a, b) => a.map((v, i) => v + b[i]);
  let x = embedding(model, token);
  for (let layer = 0; layer < model.layers; layer++) {
    const at = (name) => w[`blk.${layer}.${name}`];
    const { keys, values } = (cache[layer] ??= { keys: [], values: [] });
    const position = keys.length;
    const h = rmsNorm(model, x, at("attn_norm"));
    const query = rotate(model, product(model, at("attn_q"), h), position);
    keys.push(rotate(model, product(model, at("attn_k"), h), position));
    values.push(product(model, at("attn_v"), h));
    x = add(x, product(model, at("attn_output"), attend(model, query, cache[layer])));
    const f = rmsNorm(model, x, at("ffn_norm"));
    const [gate, up] = [product(model, at("ffn_gate"), f), product(model, at("ffn_up"), f)];
    x = add(x, product(model, at("ffn_down"), gate.map((g, i) => (g / (1 + Math.exp(-g))) * up[i])));
  }
  return product(model, w.token_embd, rmsNorm(model, x, w.output_norm)); // the head is tied
}
// --8<-- [end:forward]

function embedding(model, token) {
  const { start, columns, scales } = model.weights.token_embd;
  return Float32Array.from({ length: columns }, (_, i) =>
    model.integers[start + token * columns + i] * scales[(token * columns + i) / BLOCK | 0]);
}

/** GPT-2's names of the 256 bytes, which the vocabulary of a GGUF file uses. */
function byteNames() {
  const printable = (b) => (b > 32 && b < 127) || (b > 160 && b < 173) || b > 173;
  let extra = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(printable(b) ? b : extra++));
}

/** Byte-pair encoding (chapter 2): join the pair that was merged first in training, repeatedly. */
function tokenizerOf(model) {
  const names = byteNames();
  const byteOf = new Map(names.map((name, b) => [name, b]));
  const idOf = new Map(model.tokens.map((token, id) => [token, id]));
  const ranks = new Map(model.metadata["tokenizer.ggml.merges"].map((pair, rank) => [pair, rank]));
  const split = /'(?:[sdmt]|re|ve|ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+/giu;
  const encode = (text) => (text.match(split) ?? []).flatMap((piece) => {
    let parts = Array.from(new TextEncoder().encode(piece), (b) => names[b]);
    for (;;) {
      const rank = (i) => ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
      let best = 0;
      for (let i = 1; i < parts.length - 1; i++) if (rank(i) < rank(best)) best = i;
      if (parts.length < 2 || rank(best) === Infinity) break;
      parts.splice(best, 2, parts[best] + parts[best + 1]);
    }
    return parts.map((part) => idOf.get(part));
  });
  const isControl = (id) => model.metadata["tokenizer.ggml.token_type"][id] === 3;
  const bytes = (id) => Uint8Array.from(isControl(id) ? "" : model.tokens[id], (name) => byteOf.get(name));
  return { encode, bytes, id: (name) => idOf.get(name) };
}

function chatPrompt(tokenizer, question) {
  const [start, end] = [tokenizer.id("<|im_start|>"), tokenizer.id("<|im_end|>")];
  return [start, ...tokenizer.encode(`user\n${question}`), end, ...tokenizer.encode("\n"),
    start, ...tokenizer.encode("assistant\n")];
}

function drawToken(logits, temperature) {
  const best = logits.indexOf(Math.max(...logits));
  if (!temperature) return [best, softmax(logits)[best]];
  const probabilities = softmax(logits.map((logit) => logit / temperature));
  let rest = Math.random();
  const drawn = probabilities.findIndex((p) => (rest -= p) < 0);
  return drawn < 0 ? [best, probabilities[best]] : [drawn, probabilities[drawn]];
}

function bookPiece(root, data, lang) {
  const say = (en, zh) => (lang === "zh" ? zh : en);
  root.innerHTML = `
    <label>${say("Question", "问题")}<input type="text" data-id="question" maxlength="60"></label>
    <div data-id="examples"></div>
    <label>${say("Temperature: ", "温度：")}<output data-id="temperature-value"></output><br>
      <input type="range" data-id="temperature" min="0" max="2" step="0.1" value="0">
    </label>
    <label><input type="checkbox" data-id="wasm" checked> ${say("inner products in WebAssembly", "用 WebAssembly 算点积")}</label>
    <div><button data-id="ask">${say("Answer", "回答")}</button></div>
    <p><b data-id="answer"></b></p>
    <div data-id="tokens"></div>
    <p data-id="speed" class="note"></p>`;
  const part = (id) => root.querySelector(`[data-id="${id}"]`);
  const model = loadModel(Uint8Array.from(atob(data.gguf), (c) => c.charCodeAt(0)));
  const tokenizer = tokenizerOf(model);
  root.model = model; // for the browser's console: forward($0.model, token, cache)

  async function ask() {
    part("ask").disabled = true;
    part("answer").textContent = "";
    part("tokens").replaceChildren();
    model.useWasm = part("wasm").checked;
    const decoder = new TextDecoder();
    const cache = [];
    const prompt = chatPrompt(tokenizer, part("question").value);
    const started = performance.now();
    let logits;
    for (const id of prompt) logits = forward(model, id, cache);
    let steps = prompt.length;
    while (cache[0].keys.length < model.context) {
      const [id, probability] = drawToken(logits, Number(part("temperature").value));
      if (id === tokenizer.id("<|im_end|>") || id === tokenizer.id("<|endoftext|>")) break;
      const text = decoder.decode(tokenizer.bytes(id), { stream: true });
      part("answer").textContent += text;
      const chip = document.createElement("span");
      chip.className = "token";
      chip.textContent = `${text || "…"} ${probability.toFixed(2)}`;
      part("tokens").append(chip);
      await new Promise((resolve) => setTimeout(resolve));
      logits = forward(model, id, cache);
      steps += 1;
    }
    const rate = (1000 * steps) / (performance.now() - started);
    part("speed").textContent = say(
      `${steps} tokens read or written, ${rate.toFixed(0)} per second`,
      `读写共 ${steps} 个词元，每秒 ${rate.toFixed(0)} 个`);
    part("ask").disabled = false;
  }

  part("examples").replaceChildren(...data.questions.map((question) => {
    const button = document.createElement("button");
    button.textContent = question;
    button.addEventListener("click", () => { part("question").value = question; });
    return button;
  }));
  const show = () => { part("temperature-value").textContent = part("temperature").value; };
  part("temperature").addEventListener("input", show);
  part("ask").addEventListener("click", ask);
  part("question").value = data.questions[lang === "zh" ? 1 : 0];
  show();
}
