"use strict";
// Attention heat map: the heads of chapter.py, which are built by hand, on the reader's words.

const HEAD_DIM = 32;
const FREQUENCIES = Array.from({ length: HEAD_DIM / 2 }, (_, i) => 10000 ** ((-2 * i) / HEAD_DIM));

function softmax(scores) {
  const highest = Math.max(...scores);
  const powers = scores.map((score) => Math.exp(score - highest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

/** Weights of each word on itself and the words before it; score(t, n) of query t and key n. */
function causalWeights(words, score) {
  return words.map((_, t) => softmax(words.slice(0, t + 1).map((_, n) => score(t, n))));
}

function positionHead(words, factor, offset, rotates) {
  const score = (t, n) => FREQUENCIES.reduce(
    (sum, frequency) => sum + 2 * Math.cos(rotates ? frequency * (t - offset - n) : 0), 0);
  return causalWeights(words, (t, n) => (factor * score(t, n)) / Math.sqrt(HEAD_DIM));
}

function sameWordHead(words, factor) {
  const size = Math.sqrt(new Set(words).size);
  return causalWeights(words, (t, n) => (factor * Number(words[t] === words[n])) / size);
}

function followingHead(words, factor, rotates) {
  const size = Math.sqrt(new Set(words).size);
  const previous = positionHead(words, factor, 1, rotates);
  const matches = (t, n) => previous[n].reduce(
    (sum, weight, m) => sum + (words[m] === words[t] ? weight : 0), 0);
  return causalWeights(words, (t, n) => (factor * matches(t, n)) / size);
}

function bookPiece(root, data, lang) {
  const say = (en, zh) => (lang === "zh" ? zh : en);
  root.innerHTML = `
    <label>${say("Words, separated by spaces (at most 12)", "词，用空格隔开（最多 12 个）")}
      <input type="text" data-id="words" maxlength="100">
    </label>
    <label>${say("Head ", "注意力头 ")}
      <select data-id="head">
        <option value="position">${say("looks back by position", "按位置往回看")}</option>
        <option value="same">${say("looks for the same word", "找相同的词")}</option>
        <option value="following">${say("looks for what followed last time", "找上次后面的词")}</option>
      </select>
    </label>
    <label>${say("Positions to look back: ", "往回看几个位置：")}<output data-id="offset-value"></output><br>
      <input type="range" data-id="offset" min="0" max="6" value="1">
    </label>
    <label>${say("Factor of the queries: ", "查询的倍数：")}<output data-id="factor-value"></output><br>
      <input type="range" data-id="factor" min="0" max="60" value="30">
    </label>
    <label><input type="checkbox" data-id="rotates" checked> ${say("rotate (RoPE)", "旋转（RoPE）")}</label>
    <div data-id="map" style="display:grid;gap:1px;margin:.8em 0"></div>
    <label>${say("Query: ", "查询：")}<b data-id="query-word"></b><br>
      <input type="range" data-id="query" min="0">
    </label>
    <p data-id="weights"></p>`;
  const part = (id) => root.querySelector(`[data-id="${id}"]`);

  function headWeights(words) {
    const factor = Number(part("factor").value);
    const rotates = part("rotates").checked;
    if (part("head").value === "same") return sameWordHead(words, factor);
    if (part("head").value === "following") return followingHead(words, factor, rotates);
    return positionHead(words, factor, Number(part("offset").value), rotates);
  }

  function element(text, css, title) {
    const span = document.createElement("span");
    span.textContent = text;
    span.style.cssText = css;
    if (title) span.title = title;
    return span;
  }

  function show() {
    const words = ["<s>", ...part("words").value.split(/\s+/).filter(Boolean).slice(0, 12)];
    const weights = headWeights(words);
    part("offset").disabled = part("head").value !== "position";
    part("offset-value").textContent = part("offset").value;
    part("factor-value").textContent = part("factor").value;
    part("query").max = words.length - 1;
    const query = Math.min(Number(part("query").value), words.length - 1);
    part("query-word").textContent = `${words[query]} (${query})`;
    part("map").style.gridTemplateColumns = `minmax(0, 5em) repeat(${words.length}, minmax(0, 2em))`;
    part("map").replaceChildren(...words.flatMap((word, t) => [
      element(word, `overflow:hidden;white-space:nowrap;${t === query ? "font-weight:bold" : ""}`),
      ...words.map((_, n) => {
        const weight = n <= t ? weights[t][n] : null;
        const color = weight === null ? "transparent" : `rgb(59 138 216 / ${weight.toFixed(3)})`;
        const border = weight === null ? "" : "outline:1px solid rgb(128 128 128 / .3)";
        const cell = element("", `background:${color};${border}`);
        if (weight !== null) cell.dataset.weight = weight.toFixed(3);
        return cell;
      }),
    ]));
    part("weights").replaceChildren(...words.slice(0, query + 1)
      .map((word, n) => [word, weights[query][n]])
      .filter(([, weight]) => weight >= 0.01)
      .map(([word, weight]) => {
        const chip = element(`${word} ${weight.toFixed(2)}`, "");
        chip.className = "token";
        return chip;
      }));
  }

  part("words").value = data.words;
  part("query").max = data.words.split(" ").length;
  part("query").value = part("query").max;
  for (const id of ["words", "head", "offset", "factor", "rotates", "query"]) {
    part(id).addEventListener("input", show);
  }
  show();
}
