"use strict";
// Many exams of one model: accuracies, their intervals, and chance.

const EXAMS = 52;
const SIZES = [10, 26, 50, 100, 200, 400, 1346, 5000, 11582];
const Z = 1.959964;

function wilson(correct, questions) {
  const share = correct / questions, weight = Z * Z / questions;
  const center = (share + weight / 2) / (1 + weight);
  const margin = Math.sqrt(share * (1 - share) * weight + weight * weight / 4) / (1 + weight);
  return [Math.max(center - margin, 0), Math.min(center + margin, 1)];
}

/** Random numbers from 0 to 1, the same for the same seed (mulberry32). */
function randomNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

function bookPiece(root, data, lang) {
  const say = (en, zh) => (lang === "zh" ? zh : en);
  const slider = (id, label, min, max, step, value) => `
    <label>${label}<output data-id="${id}-value"></output><br>
      <input type="range" data-id="${id}" min="${min}" max="${max}" step="${step}" value="${value}">
    </label>`;
  root.innerHTML = `
    ${slider("size", say("Questions in an exam: ", "每次考试的题数："), 0, SIZES.length - 1, 1, 1)}
    ${slider("options", say("Options per question: ", "每题的选项数："), 2, 5, 1, 4)}
    ${slider("knows", say("The model knows the answer to ", "模型会做的题占 "), 0, 100, 5, 0)}
    <p data-id="truth"></p>
    <svg data-id="plot" viewBox="0 0 416 168" width="100%" role="img" aria-label="${
      say("the interval of each exam, with chance and the true accuracy",
        "每次考试的置信区间，以及随机猜测和真实的准确率")}"></svg>
    <p><button type="button" data-id="again">${say("Other exams", "换一批考试")}</button></p>
    <p><b data-id="covered"></b><br><b data-id="above"></b><br><span data-id="best"></span></p>
    <p class="note">${say(
      "52 exams, sorted. Grey dashes: chance. Green: the true accuracy. Orange intervals miss it.",
      "共 52 次考试，从低到高排列。灰色虚线为随机猜测，绿线为真实准确率，橙色区间没有包含它。")}</p>
    <label>${say("A result of your own: right ", "你自己的结果：答对 ")}
      <input type="text" inputmode="numeric" data-id="right" value="${data.right}" style="width:6em">
      ${say(" of ", " 题，共 ")}
      <input type="text" inputmode="numeric" data-id="questions" value="${data.questions}" style="width:6em">
      ${say("", " 题")}
    </label>
    <p><b data-id="own"></b></p>`;
  const part = (id) => root.querySelector(`[data-id="${id}"]`);
  const number = (id) => Number(part(id).value);
  const percent = (value) => `${(100 * value).toFixed(1)} %`;
  let seed = 1;

  function element(name, attributes) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  function showExams() {
    const questions = SIZES[number("size")], options = number("options");
    const knows = number("knows") / 100, truth = knows + (1 - knows) / options;
    part("size-value").textContent = questions.toLocaleString("en");
    part("options-value").textContent = options;
    part("knows-value").textContent = `${number("knows")} %`;
    part("truth").textContent = say(
      `It guesses the rest: ${percent(knows)} + ${percent(1 - knows)} / ${options} = ${percent(truth)}`,
      `其余靠猜：${percent(knows)} + ${percent(1 - knows)} / ${options} = ${percent(truth)}`);
    const random = randomNumbers(seed);
    const results = Array.from({ length: EXAMS }, () => {
      let right = 0;
      for (let i = 0; i < questions; i++) right += random() < truth;
      return right;
    }).sort((a, b) => a - b);
    const y = (value) => (160 - 156 * value).toFixed(1);
    const level = (value, color, dash) => element("line", { x1: 40, x2: 416, y1: y(value), y2: y(value),
      stroke: color, "stroke-width": 1.5, "stroke-dasharray": dash });
    let covered = 0, above = 0;
    const marks = results.flatMap((right, i) => {
      const [low, high] = wilson(right, questions), x = 44 + 7.2 * i;
      const covers = low <= truth && truth <= high, color = covers ? "#3b8ad8" : "#e8833a";
      covered += covers;
      above += low > 1 / options;
      return [
        element("line", { x1: x, x2: x, y1: y(low), y2: y(high), stroke: color, "stroke-width": 2 }),
        element("circle", { cx: x, cy: y(right / questions), r: 2.5, fill: color }),
      ];
    });
    const ticks = [0, 0.5, 1].map((share) => {
      const tick = element("text", { x: 36, y: Number(y(share)) + (share === 1 ? 10 : 4), "text-anchor": "end", "font-size": 13, fill: "currentColor", opacity: 0.7 });
      tick.textContent = `${100 * share} %`;
      return tick;
    });
    part("plot").replaceChildren(...ticks, level(1 / options, "#888", "5 4"), level(truth, "#2e9e5b", ""), ...marks);
    part("covered").textContent = say(`${covered} of 52 intervals contain the true accuracy.`,
      `52 个区间中有 ${covered} 个包含真实准确率。`);
    part("above").textContent = say(`${above} of 52 lie above chance.`,
      `52 个区间中有 ${above} 个整个高于随机猜测。`);
    part("best").textContent = say(
      `Best exam: ${percent(results[EXAMS - 1] / questions)}, worst: ${percent(results[0] / questions)}`,
      `最好的一次：${percent(results[EXAMS - 1] / questions)}，最差的一次：${percent(results[0] / questions)}`);
  }

  function showOwn() {
    const right = number("right"), questions = number("questions");
    if (!(questions >= 1 && right >= 0 && right <= questions)) {
      part("own").textContent = say("Not a possible result.", "不可能有这样的结果。");
      return;
    }
    const [low, high] = wilson(right, questions);
    part("own").textContent = say(
      `${percent(right / questions)}, interval ${percent(low)} to ${percent(high)}`,
      `${percent(right / questions)}，区间 ${percent(low)} 到 ${percent(high)}`);
  }

  for (const id of ["size", "options", "knows"]) part(id).addEventListener("input", showExams);
  for (const id of ["right", "questions"]) part(id).addEventListener("input", showOwn);
  part("again").addEventListener("click", () => {
    seed += 1;
    showExams();
  });
  showExams();
  showOwn();
}
