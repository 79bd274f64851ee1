"use strict";
// A map of the package along the road: each stage with its chapter, files and command.

function bookPiece(root, data, lang) {
  const say = (en, zh) => (lang === "zh" ? zh : en);
  root.innerHTML = `
    <div data-id="stages"></div>
    <h3 data-id="name"></h3>
    <table><tbody>
      <tr><td>${say("chapter", "章")}</td><td><a data-id="chapter"></a></td></tr>
      <tr><td>${say("files", "文件")}</td><td data-id="files"></td></tr>
      <tr><td>${say("command", "命令")}</td><td><code data-id="command"></code></td></tr>
    </tbody></table>
    <button data-id="back">←</button><button data-id="next">→</button>`;
  const part = (id) => root.querySelector(`[data-id="${id}"]`);
  const name = (stage) => say(...stage.names);
  let current = 0;

  const buttons = data.map((stage, i) => {
    const button = document.createElement("button");
    button.textContent = name(stage);
    button.addEventListener("click", () => show(i));
    return button;
  });
  part("stages").append(...buttons);

  function show(i) {
    current = i;
    const stage = data[i];
    buttons.forEach((button, j) => {
      button.setAttribute("aria-pressed", String(i === j));
      button.style.borderColor = i === j ? "#3b8ad8" : "";
      button.style.borderWidth = i === j ? "2px" : "";
    });
    part("name").textContent = `${i + 1}. ${name(stage)}`;
    part("chapter").textContent = Number(stage.chapter.slice(0, 2));
    part("chapter").href = `${stage.chapter}.html`;
    part("files").replaceChildren(...stage.files.map((file) => {
      const line = document.createElement("div");
      line.textContent = `minimind/${file}`;
      return line;
    }));
    part("command").textContent = `minimind ${stage.command}`;
    part("back").disabled = i === 0;
    part("next").disabled = i === data.length - 1;
  }

  part("back").addEventListener("click", () => show(current - 1));
  part("next").addEventListener("click", () => show(current + 1));
  show(0);
}
