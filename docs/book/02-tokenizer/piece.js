"use strict";
// Byte-pair encoding by hand: the functions of chapter.py, one merge per click.

const toBytes = (word) => [...new TextEncoder().encode(word)].map((byte) => [byte]);
const same = (a, b) => a.length === b.length && a.every((byte, i) => byte === b[i]);

function countPairs(split) {
  const pairs = new Map(); // in the order of first occurrence, as in Python
  for (const tokens of split) {
    for (let i = 0; i + 1 < tokens.length; i++) {
      const key = `${tokens[i]}|${tokens[i + 1]}`;
      const found = pairs.get(key) || { pair: [tokens[i], tokens[i + 1]], count: 0 };
      found.count += 1;
      pairs.set(key, found);
    }
  }
  return [...pairs.values()];
}

function mergePair(tokens, [a, b]) {
  const merged = [];
  for (const token of tokens) {
    const last = merged[merged.length - 1];
    if (last && same(last, a) && same(token, b)) merged[merged.length - 1] = [...last, ...token];
    else merged.push(token);
  }
  return merged;
}

function shownToken(token) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(token)).replace(/ /g, "␣");
  } catch {
    return token.map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ");
  }
}

function bookPiece(root, data, lang) {
  const say = (en, zh) => (lang === "zh" ? zh : en);
  root.innerHTML = `
    <label>${say("Words to learn from, separated by spaces", "用来训练的词，用空格隔开")}
      <textarea data-id="words" rows="2"></textarea>
    </label>
    <p>
      <button type="button" data-id="step">${say("Merge once", "合并一次")}</button>
      <button type="button" data-id="ten">${say("Merge ten times", "合并十次")}</button>
      <button type="button" data-id="reset">${say("Start again", "重新开始")}</button>
    </p>
    <p data-id="next"></p>
    <p data-id="split"></p>
    <p>${say("Merges: ", "合并：")}<b data-id="count"></b> <span data-id="merges"></span></p>
    <label>${say("Text to encode with these merges", "要编码的文字")}
      <input type="text" data-id="text" value="shortest riverbed 长城">
    </label>
    <p data-id="encoded"></p>
    <p data-id="ratio"></p>`;
  const part = (id) => root.querySelector(`[data-id="${id}"]`);
  let split = [];
  let merges = [];

  function chips(tokens) {
    return tokens.map((token) => {
      const chip = document.createElement("span");
      chip.className = "token";
      chip.textContent = shownToken(token);
      return chip;
    });
  }

  function best() {
    return countPairs(split).reduce((a, b) => (a && a.count >= b.count ? a : b), null);
  }

  function show() {
    const next = best();
    part("next").textContent = next
      ? `${say("Most frequent pair: ", "出现最多的词元对：")}` +
        `${next.pair.map(shownToken).join(" + ")} (${next.count})`
      : say("Every word is one token.", "每个词都已是一个词元。");
    part("step").disabled = part("ten").disabled = !next;
    part("split").replaceChildren(...split.flatMap((tokens) => [...chips(tokens), " "]));
    part("count").textContent = merges.length;
    part("merges").replaceChildren(...chips(merges.map(([a, b]) => [...a, ...b])));
    const text = part("text").value;
    const tokens = merges.reduce(mergePair, toBytes(text));
    part("encoded").replaceChildren(...chips(tokens));
    const size = new TextEncoder().encode(text).length;
    part("ratio").textContent = text
      ? `${size} ${say("bytes", "字节")} / ${tokens.length} ${say("tokens", "词元")} = ` +
        (size / tokens.length).toFixed(2)
      : "";
  }

  function step(times) {
    for (let i = 0; i < times; i++) {
      const next = best();
      if (!next) break;
      merges.push(next.pair);
      split = split.map((tokens) => mergePair(tokens, next.pair));
    }
    show();
  }

  function reset() {
    split = part("words").value.split(/\s+/).filter(Boolean).map(toBytes);
    merges = [];
    show();
  }

  part("words").value = data.words.join(" ");
  part("words").addEventListener("input", reset);
  part("text").addEventListener("input", show);
  part("step").addEventListener("click", () => step(1));
  part("ten").addEventListener("click", () => step(10));
  part("reset").addEventListener("click", reset);
  reset();
}
