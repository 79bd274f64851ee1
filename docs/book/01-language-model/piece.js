"use strict";
// Next-byte explorer: the NGram model of chapter.py, counted in the browser on the same text.

class NGram {
  constructor(text, order) {
    this.order = order;
    this.followers = new Map();
    for (let i = 0; i < text.length; i++) {
      for (let n = 0; n <= Math.min(order, i); n++) {
        const context = text.slice(i - n, i);
        if (!this.followers.has(context)) this.followers.set(context, { total: 0, of: new Map() });
        const seen = this.followers.get(context);
        seen.total += 1;
        seen.of.set(text[i], (seen.of.get(text[i]) || 0) + 1);
      }
    }
  }

  probability(character, context) {
    let p = 1 / 256;
    for (let n = 0; n <= Math.min(this.order, context.length); n++) {
      const seen = this.followers.get(context.slice(context.length - n));
      p = seen ? ((seen.of.get(character) || 0) + p) / (seen.total + 1) : p;
    }
    return p;
  }
}

function bookPiece(root, data, lang) {
  const say = (en, zh) => (lang === "zh" ? zh : en);
  root.innerHTML = `
    <label>${say("Text", "文本")}
      <input type="text" data-id="text" maxlength="80" value="You may reproduce the ">
    </label>
    <label>${say("Context, in bytes: ", "上文长度（字节）：")}<output data-id="order-value"></output><br>
      <input type="range" data-id="order" min="0" max="6" value="3">
    </label>
    <p data-id="spans"></p>
    <p><b data-id="bits"></b></p>
    <div>${say("The most probable next bytes; choose one:", "最可能的后续字节，点击即可续写：")}</div>
    <table><tbody data-id="next"></tbody></table>
    <button type="button" data-id="draw">${say("Draw one at random", "按概率随机抽一个")}</button>
    <p class="note">${say("Colour: surprise of each byte. Only ASCII characters are used.",
      "颜色越深，表示该字节越出乎模型意料。此处只使用 ASCII 字符。")}</p>`;
  const part = (id) => root.querySelector(`[data-id="${id}"]`);
  const models = new Map();
  const modelOf = (order) => {
    if (!models.has(order)) models.set(order, new NGram(data.training, order));
    return models.get(order);
  };
  const alphabet = [...new Set(data.training)];
  const visible = (character) => (character === " " ? "␣" : character);

  function ranked(text) {
    const model = modelOf(Number(part("order").value));
    return alphabet.map((character) => [character, model.probability(character, text)])
      .sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
  }

  function append(character) {
    part("text").value += character;
    show();
  }

  function show() {
    const text = part("text").value.replace(/[^\x20-\x7e]/g, "");
    const model = modelOf(Number(part("order").value));
    part("order-value").textContent = part("order").value;
    let total = 0;
    part("spans").replaceChildren(...[...text].map((character, i) => {
      const bits = -Math.log2(model.probability(character, text.slice(0, i)));
      total += bits;
      const span = document.createElement("span");
      span.className = "token";
      span.style.background = `rgb(59 138 216 / ${Math.min(bits / 12, 0.75).toFixed(2)})`;
      span.title = `${bits.toFixed(2)} ${say("bits", "比特")}`;
      span.textContent = visible(character);
      return span;
    }));
    part("bits").textContent = text
      ? `${total.toFixed(2)} ${say("bits", "比特")} / ${text.length} ${say("bytes", "字节")} = ` +
        `${(total / text.length).toFixed(2)} ${say("bits per byte", "比特／字节")}`
      : "";
    const full = text.length >= part("text").maxLength;
    part("draw").disabled = full;
    part("next").replaceChildren(...ranked(text).slice(0, 6).map(([character, p]) => {
      const row = document.createElement("tr");
      row.innerHTML = `<td><button type="button"></button></td><td>${(100 * p).toFixed(1)} %</td>
        <td><span class="bar" style="width:${(8 * p).toFixed(2)}em"></span></td>`;
      const button = row.querySelector("button");
      button.textContent = visible(character);
      button.disabled = full;
      button.addEventListener("click", () => append(character));
      return row;
    }));
  }

  part("draw").addEventListener("click", () => {
    const candidates = ranked(part("text").value);
    let rest = Math.random() * candidates.reduce((sum, [, p]) => sum + p, 0);
    append((candidates.find(([, p]) => (rest -= p) <= 0) || candidates[0])[0]);
  });
  part("text").addEventListener("input", show);
  part("order").addEventListener("input", show);
  show();
}
