"use strict";
// Packing playground: the function `pack` of chapter.py, drawn as bars.

const total = (sizes) => sizes.reduce((sum, size) => sum + size, 0);

function packSizes(sizes, seqLen, strategy) {
  const sequences = [];
  for (const size of sizes) {
    const candidates = { "one each": [], "next fit": sequences.slice(-1), "best fit": sequences }[strategy];
    const fitting = candidates.filter((sequence) => total(sequence) + size <= seqLen);
    if (fitting.length) fitting.reduce((a, b) => (total(b) > total(a) ? b : a)).push(size);
    else sequences.push([size]);
  }
  return sequences;
}

function bookPiece(root, data, lang) {
  const say = (en, zh) => (lang === "zh" ? zh : en);
  root.innerHTML = `
    <label>${say("Lengths of the conversations, in tokens", "各段对话的长度（词元数）")}
      <input type="text" data-id="sizes" maxlength="200">
    </label>
    <label>${say("Length of a sequence: ", "序列长度：")}<output data-id="length-value"></output><br>
      <input type="range" data-id="length" min="8" max="32">
    </label>
    <label>${say("Strategy ", "策略 ")}
      <select data-id="strategy">
        <option value="one each">${say("one per sequence", "每段一条")}</option>
        <option value="next fit">${say("next fit: only the last sequence", "下次适应：只看最后一条")}</option>
        <option value="best fit">${say("best fit: the fullest that has room", "最佳适应：放得下的里面最满的")}</option>
      </select>
    </label>
    <p>
      <button type="button" data-id="sort">${say("Longest first", "由长到短")}</button>
      <button type="button" data-id="shuffle">${say("Shuffle", "打乱")}</button>
      <button type="button" data-id="reset">${say("Start again", "重新开始")}</button>
    </p>
    <p><b data-id="result"></b> <span data-id="truncated"></span></p>
    <div data-id="rows"></div>`;
  const part = (id) => root.querySelector(`[data-id="${id}"]`);
  const sizesOf = () => (part("sizes").value.match(/\d+/g) || []).map(Number).filter(Boolean);

  function row(sequence, seqLen) {
    const bar = document.createElement("div");
    bar.style.cssText = "display:flex;margin:.2em 0;background:rgb(128 128 128 / .2)";
    bar.append(...sequence.map((size) => {
      const item = document.createElement("span");
      item.style.cssText = `width:${(100 * size) / seqLen}%;background:#3b8ad8;color:#fff;` +
        "box-sizing:border-box;border-right:2px solid #fff;text-align:center;overflow:hidden";
      item.textContent = size;
      return item;
    }));
    return bar;
  }

  function show() {
    const seqLen = Number(part("length").value);
    const given = sizesOf();
    const sizes = given.map((size) => Math.min(size, seqLen));
    const packed = packSizes(sizes, seqLen, part("strategy").value);
    const used = total(sizes);
    const truncated = given.filter((size) => size > seqLen).length;
    part("length-value").textContent = seqLen;
    part("rows").replaceChildren(...packed.map((sequence) => row(sequence, seqLen)));
    part("result").textContent = packed.length
      ? `${used} / (${packed.length} × ${seqLen}) = ${((100 * used) / packed.length / seqLen).toFixed(0)} %`
      : say("Type some numbers.", "请输入一些数。");
    part("truncated").textContent = truncated
      ? say(`${truncated} too long: the end is lost.`, `${truncated} 段过长，末尾被截去。`)
      : "";
  }

  function reorder(change) {
    part("sizes").value = change(sizesOf()).join(" ");
    show();
  }

  function shuffled(sizes) {
    for (let i = sizes.length - 1; i > 0; i--) {
      const j = Math.floor(Math.random() * (i + 1));
      [sizes[i], sizes[j]] = [sizes[j], sizes[i]];
    }
    return sizes;
  }

  part("sort").addEventListener("click", () => reorder((sizes) => sizes.sort((a, b) => b - a)));
  part("shuffle").addEventListener("click", () => reorder(shuffled));
  part("reset").addEventListener("click", () => {
    part("length").value = data.seq_len;
    part("strategy").value = "next fit";
    reorder(() => data.sizes);
  });
  for (const id of ["sizes", "length", "strategy"]) part(id).addEventListener("input", show);
  part("reset").click();
}
