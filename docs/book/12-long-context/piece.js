"use strict";
// RoPE frequencies under scaling: angles reached, and the scores of the head of chapter.py.

const PAIRS = 32;
const THETA = 10000;
const TRAINED = 512;
const LENGTHS = [512, 768, 1024, 2048, 4096, 8192, 16384];
const DIALS = [0, 8, 12, 16, 20, 24, 28, 31];
const TURN = 2 * Math.PI;

/** Frequencies in radians per position, as minimind/model/rope.py computes them. */
function ropeFrequencies(kind, length) {
  const factor = length / TRAINED;
  const plain = (base) => Array.from({ length: PAIRS }, (_, i) => base ** (-i / PAIRS));
  const trained = plain(THETA);
  if (kind === "linear") return trained.map((frequency) => frequency / factor);
  if (kind === "dynamic") {
    const dynamic = (factor * length) / TRAINED - (factor - 1);
    return plain(THETA * dynamic ** (PAIRS / (PAIRS - 1)));
  }
  if (kind === "yarn") {
    const pairIndex = (turns) => (PAIRS * Math.log(TRAINED / (turns * TURN))) / Math.log(THETA);
    const low = Math.max(Math.floor(pairIndex(32)), 0), high = Math.ceil(pairIndex(1));
    return trained.map((frequency, i) => {
      const divided = Math.min(Math.max((i - low) / (high - low), 0), 1);
      return (frequency / factor) * divided + frequency * (1 - divided);
    });
  }
  return trained;
}

function bookPiece(root, data, lang) {
  const say = (en, zh) => (lang === "zh" ? zh : en);
  root.innerHTML = `
    <label>${say("Method ", "方法 ")}
      <select data-id="kind">
        <option value="none">${say("no scaling", "不缩放")}</option>
        <option value="linear">linear</option>
        <option value="dynamic">dynamic (NTK)</option>
        <option value="yarn">yarn</option>
      </select>
    </label>
    <label>${say("Tokens, after training on 512: ", "词元数（训练时为 512）：")}<output data-id="length-value"></output><br>
      <input type="range" data-id="length" min="0" max="${LENGTHS.length - 1}" value="3">
    </label>
    <div>${say("Angles of eight pairs. Blue: seen in training. Orange: reached now, never seen.",
      "八对的角。蓝色：训练中见过；橙色：现在转到、从未见过。")}</div>
    <svg data-id="dials" viewBox="0 0 416 66" width="100%" role="img" aria-label="${
      say("one dial per pair", "每对一个表盘")}"></svg>
    <p><b data-id="unseen"></b></p>
    <div>${say("Score of the head over the distance; left of the dashes: trained",
      "注意力头的得分随距离的变化；虚线左边训练过")}</div>
    <svg viewBox="0 0 416 120" width="100%" role="img" aria-label="${
      say("score over the distance", "得分随距离的变化")}">
      <line data-id="border" y1="0" y2="120" stroke="#888" stroke-dasharray="4 4"></line>
      <polyline data-id="curve" fill="none" stroke="#3b8ad8" stroke-width="1.5"></polyline></svg>
    <p data-id="scores"></p>
    <p data-id="share"></p>
    <p data-id="back"></p>`;
  const part = (id) => root.querySelector(`[data-id="${id}"]`);
  const trained = ropeFrequencies("none", TRAINED);

  const score = (frequencies, distance) => frequencies.reduce((sum, frequency, i) =>
    sum + data.weights[i] * Math.cos(frequency * distance) +
    data.weights[PAIRS + i] * Math.sin(frequency * distance), 0);

  function shape(name, attributes) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  /** Return an arc from angle `from` to `to`, in radians from the top. */
  function arc(x, from, to, color) {
    const radius = 20, y = 26, style = { fill: "none", stroke: color, "stroke-width": 7 };
    if (to - from >= TURN - 1e-6) return shape("circle", { cx: x, cy: y, r: radius, ...style });
    const at = (angle) => `${(x + radius * Math.sin(angle)).toFixed(2)} ${(y - radius * Math.cos(angle)).toFixed(2)}`;
    const large = to - from > Math.PI ? 1 : 0;
    return shape("path", { d: `M ${at(from)} A ${radius} ${radius} 0 ${large} 1 ${at(to)}`, ...style });
  }

  function dial(pair, column, frequencies, length) {
    const x = 26 + 52 * column;
    const known = Math.min(trained[pair] * TRAINED, TURN);
    const reached = Math.min(frequencies[pair] * length, TURN);
    const label = shape("text", { x, y: 63, "text-anchor": "middle", "font-size": 12, fill: "currentColor" });
    label.textContent = pair;
    const arcs = [shape("circle", { cx: x, cy: 26, r: 20, fill: "none", stroke: "rgb(128 128 128 / .25)", "stroke-width": 7 }),
      arc(x, 0, known, "#3b8ad8")];
    if (reached > known * (1 + 1e-6)) arcs.push(arc(x, known, reached, "#e8833a"));
    return [...arcs, label];
  }

  function show() {
    const kind = part("kind").value, length = LENGTHS[Number(part("length").value)];
    const frequencies = length > TRAINED ? ropeFrequencies(kind, length) : trained;
    const factor = kind === "yarn" && length > TRAINED ? 0.1 * Math.log(length / TRAINED) + 1 : 1;
    part("length-value").textContent = length.toLocaleString("en");
    part("dials").replaceChildren(...DIALS.flatMap((pair, column) => dial(pair, column, frequencies, length)));
    const unseen = frequencies.filter((frequency, i) =>
      Math.min(frequency * length, TURN) > Math.min(trained[i] * TRAINED, TURN) * (1 + 1e-6)).length;
    part("unseen").textContent = say(
      `${unseen} of ${PAIRS} pairs reach angles that training has not shown.`,
      `${PAIRS} 对中有 ${unseen} 对转到了训练中没见过的角。`);

    const values = Array.from({ length }, (_, distance) => score(frequencies, distance));
    const points = Array.from({ length: 417 }, (_, i) => Math.round((i * (length - 1)) / 416));
    const y = (value) => Math.min(Math.max(8 * (4 - value), -5), 125);
    part("curve").setAttribute("points", points.map((distance, i) => `${i},${y(values[distance]).toFixed(1)}`).join(" "));
    for (const end of ["x1", "x2"]) part("border").setAttribute(end, ((416 * TRAINED) / length).toFixed(1));
    const shown = (value) => value.toFixed(2).replace("-", "−");
    part("scores").textContent = say(
      `Scores at distance 0: ${shown(values[0])}, at 511: ${shown(values[511])}, at the farthest: ${shown(values[length - 1])}`,
      `距离 0 处的得分：${shown(values[0])}，511 处：${shown(values[511])}，最远处：${shown(values[length - 1])}`);
    const highest = Math.max(...values);
    const powers = values.map((value) => Math.exp((value - highest) * factor * factor));
    const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
    part("share").textContent = say(
      `Attention on the nearest 512 tokens: ${((100 * sum(powers.slice(0, TRAINED))) / sum(powers)).toFixed(1)} %`,
      `最近 512 个词元得到的注意力：${((100 * sum(powers.slice(0, TRAINED))) / sum(powers)).toFixed(1)} %`);

    const matches = Array.from({ length }, (_, distance) => 2 * factor * factor * sum(
      frequencies.map((frequency, i) => Math.cos(frequency * distance - trained[i]))));
    const top = Math.max(...matches);
    const previous = matches.map((match) => Math.exp(match - top));
    part("back").textContent = say(
      `A head trained to look 1 token back looks ${matches.indexOf(top)} back; ` +
      `the previous token gets ${((100 * previous[1]) / sum(previous)).toFixed(1)} %.`,
      `训练成往回看 1 个词元的头，现在往回看 ${matches.indexOf(top)} 个；` +
      `前一个词元得到 ${((100 * previous[1]) / sum(previous)).toFixed(1)} %。`);
  }

  for (const id of ["kind", "length"]) part(id).addEventListener("input", show);
  show();
}
