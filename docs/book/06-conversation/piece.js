"use strict";
// Chat template: a conversation as token ids with its loss mask, encoded as by chapter.py.

const SPLIT = new RegExp(
  "'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}" +
  "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+", "gu");

class BPE {
  constructor(tokens, special) {
    this.names = tokens.map((hex) => this.text(hex));
    this.special = new Set(special);
    this.ids = new Map();
    tokens.forEach((hex, id) => { if (!this.special.has(id)) this.ids.set(hex, id); });
  }

  text(hex) {
    const bytes = new Uint8Array(hex.match(/../g).map((pair) => parseInt(pair, 16)));
    try {
      return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    } catch {
      return hex.toUpperCase();
    }
  }

  /** Return the ids of a text: in each piece, merge the pair that was learned first. */
  encode(text) {
    return [...text.matchAll(SPLIT)].flatMap(([piece]) => {
      const parts = [...new TextEncoder().encode(piece)]
        .map((byte) => byte.toString(16).padStart(2, "0"));
      for (;;) {
        let best = -1, lowest = Infinity;
        for (let i = 0; i + 1 < parts.length; i++) {
          const id = this.ids.get(parts[i] + parts[i + 1]);
          if (id !== undefined && id < lowest) [best, lowest] = [i, id];
        }
        if (best < 0) return parts.map((hex) => this.ids.get(hex));
        parts.splice(best, 2, parts[best] + parts[best + 1]);
      }
    });
  }
}

/** Return [ids, mask] of messages, as minimind/tokenizer/chat.py does. */
function encodeChat(bpe, messages, generationPrompt) {
  const start = bpe.names.indexOf("<|im_start|>"), end = bpe.names.indexOf("<|im_end|>");
  const ids = [], mask = [];
  const add = (more, label) => {
    ids.push(...more);
    mask.push(...more.map(() => label));
  };
  for (const { role, content, supervised } of messages) {
    if (role === "assistant") {
      add([start, ...bpe.encode("assistant\n")], 0);
      add([...bpe.encode(content), end], supervised ? 1 : 0);
    } else {
      add([start, ...bpe.encode(`${role}\n${content}`), end], 0);
    }
    add(bpe.encode("\n"), 0);
  }
  if (generationPrompt) add([start, ...bpe.encode("assistant\n")], 0);
  return [ids, mask];
}

function bookPiece(root, data, lang) {
  const say = (en, zh) => (lang === "zh" ? zh : en);
  root.innerHTML = `
    <p>
      <button type="button" data-id="one">${say("One turn", "单轮")}</button>
      <button type="button" data-id="two">${say("Two turns", "两轮")}</button>
    </p>
    <div data-id="messages"></div>
    <label><input type="checkbox" data-id="prompt">
      ${say("As a prompt: without the last answer, with the beginning of a new one",
      "作为提示词：去掉最后一个回答，加上新回答的开头")}</label>
    <p data-id="tokens"></p>
    <p><b data-id="count"></b></p>
    <p class="note">${say(
      "Blue: supervised. ↵: line break. Try to write &lt;|im_end|&gt; into a message.",
      "蓝色：监督词元。↵：换行。试着在消息里写入 &lt;|im_end|&gt;。")}</p>`;
  const part = (id) => root.querySelector(`[data-id="${id}"]`);
  const bpe = new BPE(data.tokens, data.special);
  let messages = [];

  function load(number) {
    messages = data.chats[number].map((message) => ({ ...message, supervised: true }));
    part("messages").replaceChildren(...messages.map((message, i) => {
      const label = document.createElement("label");
      label.textContent = message.role;
      const input = document.createElement("input");
      input.type = "text";
      input.dataset.id = `content-${i}`;
      input.value = message.content;
      input.addEventListener("input", () => {
        message.content = input.value;
        show();
      });
      label.append(input);
      if (message.role !== "assistant") return label;
      const box = document.createElement("input");
      box.type = "checkbox";
      box.checked = true;
      box.dataset.id = `supervised-${i}`;
      box.addEventListener("input", () => {
        message.supervised = box.checked;
        show();
      });
      const choice = document.createElement("label");
      choice.append(box, say(" in the loss", " 计入损失"));
      const both = document.createElement("div");
      both.append(label, choice);
      return both;
    }));
    show();
  }

  function show() {
    const asPrompt = part("prompt").checked;
    const [ids, mask] = encodeChat(bpe, asPrompt ? messages.slice(0, -1) : messages, asPrompt);
    part("tokens").replaceChildren(...ids.map((id, i) => {
      const span = document.createElement("span");
      span.className = "token";
      span.textContent = bpe.names[id].replace(/\n/g, "↵").replace(/ /g, "␣");
      span.title = id;
      if (mask[i]) span.style.background = "rgb(59 138 216 / 0.4)";
      if (bpe.special.has(id)) span.style.fontWeight = "bold";
      span.dataset.mask = mask[i];
      return span;
    }));
    const supervised = mask.reduce((sum, label) => sum + label, 0);
    part("count").textContent = say(`${supervised} of ${ids.length} tokens are supervised`,
      `${ids.length} 个词元中有 ${supervised} 个监督词元`);
  }

  part("one").addEventListener("click", () => load(0));
  part("two").addEventListener("click", () => load(1));
  part("prompt").addEventListener("input", show);
  load(0);
}
