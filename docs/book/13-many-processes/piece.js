"use strict";
// A ring all-reduce, step by step, with the numbers of the chapter: rank r starts with 10^r.

/** Return the chunk that each rank sends in a step: as `reduce_scatter` and `all_gather` do. */
function chunksSent(size, step) {
  const reduces = step < size - 1;
  const shift = reduces ? step + 1 : step - (size - 1);
  return Array.from({ length: size }, (_, rank) => (rank - shift + size) % size);
}

/** Let each rank send its chunk to the next one; return the new buffers [rank][chunk]. */
function passOn(buffers, step) {
  const size = buffers.length;
  const next = buffers.map((row) => [...row]);
  chunksSent(size, step).forEach((chunk, rank) => {
    const to = (rank + 1) % size;
    const adds = step < size - 1;
    next[to][chunk] = buffers[rank][chunk] + (adds ? buffers[to][chunk] : 0);
  });
  return next;
}

function allReduceSeconds(bytes, size, bandwidth, latency) {
  const messages = 2 * (size - 1);
  return messages * latency + ((messages / size) * bytes) / bandwidth;
}

function bookPiece(root, data, lang) {
  const say = (en, zh) => (lang === "zh" ? zh : en);
  const options = (names) => names.map((name) => `<option>${name}</option>`).join("");
  root.innerHTML = `
    <label>${say("Ranks: ", "rank 数：")}<output data-id="size-value"></output><br>
      <input type="range" data-id="size" min="2" max="5" value="3">
    </label>
    <div>
      <button data-id="next">${say("Next step", "下一步")}</button>
      <button data-id="end">${say("To the end", "走到底")}</button>
      <button data-id="reset">${say("Start again", "重新开始")}</button>
    </div>
    <p data-id="phase"></p>
    <table data-id="grid" style="white-space:nowrap"></table>
    <p data-id="messages" class="note"></p>
    <p data-id="sent"></p>
    <label>${say("Model: ", "模型：")}<select data-id="model">${options(Object.keys(data.models))}</select></label>
    <label>${say("Link: ", "连接：")}<select data-id="link">${options(Object.keys(data.links))}</select></label>
    <label>${say("TFLOP/s per process: ", "每个进程的 TFLOP/s：")}<output data-id="speed-value"></output><br>
      <input type="range" data-id="speed" min="-1" max="3" step="0.5" value="2">
    </label>
    <p data-id="time"></p>
    <p><b data-id="speedup"></b></p>`;
  const part = (id) => root.querySelector(`[data-id="${id}"]`);
  let buffers = [];
  let step = 0;

  function reset() {
    const size = Number(part("size").value);
    buffers = Array.from({ length: size }, (_, rank) => Array(size).fill(10 ** rank));
    step = 0;
    show();
  }

  function advance() {
    buffers = passOn(buffers, step);
    step += 1;
  }

  function showGrid(size, last) {
    const complete = (10 ** size - 1) / 9;
    const received = step ? chunksSent(size, step - 1) : [];
    const head = Array.from({ length: size }, (_, chunk) => `<th style="padding:.1em .35em!important">${say("chunk", "块")} ${chunk}</th>`).join("");
    const rows = buffers.map((row, rank) => {
      const cells = row.map((value, chunk) => {
        const share = String(value).split("").filter((digit) => digit === "1").length / size;
        const isNew = step > 0 && received[(rank - 1 + size) % size] === chunk;
        const color = `rgb(59 138 216 / ${value === complete ? 0.5 : 0.22 * share})`;
        const border = isNew ? "outline:2px solid #d9822b;outline-offset:-2px" : "";
        return `<td style="background:${color};${border};padding:.1em .35em!important">${value}</td>`;
      });
      return `<tr><th>${rank}</th>${cells.join("")}</tr>`;
    });
    part("grid").innerHTML = `<tr><th>rank</th>${head}</tr>${rows.join("")}`;
    part("next").disabled = part("end").disabled = step === last;
  }

  function show() {
    const size = buffers.length;
    const last = 2 * (size - 1);
    part("size-value").textContent = size;
    const phase = ["reduce-scatter", "all-gather"][Number(step > size - 1)];
    part("phase").textContent = say(
      `Step ${step} of ${last}${step ? `: ${phase}` : ""}`,
      `第 ${step} 步，共 ${last} 步${step ? `：${phase}` : ""}`);
    showGrid(size, last);
    const moved = step ? chunksSent(size, step - 1) : [];
    part("messages").textContent = moved
      .map((chunk, rank) => `${rank}→${(rank + 1) % size}: ${say("chunk", "块")} ${chunk}`).join(" · ");
    part("sent").textContent = say(
      `Each rank has sent ${step} chunks, ${(step / size).toFixed(2)} gradients.`,
      `每个 rank 已发出 ${step} 块，合 ${(step / size).toFixed(2)} 份梯度。`);
    showTime(size);
  }

  function showTime(size) {
    const [bandwidth, latency] = data.links[part("link").value];
    const model = part("model").value;
    const teraflops = 10 ** Number(part("speed").value);
    part("speed-value").textContent = teraflops.toPrecision(2) * 1;
    const exchange = allReduceSeconds(4 * data.models[model], size, bandwidth, latency);
    const alone = data.flops[model] / (teraflops * 1e12);
    const ms = (seconds) => `${(1000 * seconds).toPrecision(3) * 1} ms`;
    part("time").textContent = say(
      `A step of 65,536 tokens: ${ms(alone / size)} of computation and ${ms(exchange)} of all-reduce`,
      `65,536 个词元的一步：计算 ${ms(alone / size)}，全归约 ${ms(exchange)}`);
    part("speedup").textContent = say(
      `${(alone / (alone / size + exchange)).toFixed(1)} times as fast as one process`,
      `速度是一个进程的 ${(alone / (alone / size + exchange)).toFixed(1)} 倍`);
  }

  part("next").addEventListener("click", () => { advance(); show(); });
  part("end").addEventListener("click", () => {
    while (step < 2 * (buffers.length - 1)) advance();
    show();
  });
  part("reset").addEventListener("click", reset);
  part("size").addEventListener("input", reset);
  for (const id of ["model", "link", "speed"]) part(id).addEventListener("input", show);
  reset();
}
