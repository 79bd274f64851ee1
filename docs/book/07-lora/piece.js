"use strict";
// Low-rank approximation of a picture, computed in the browser, and the size of an adapter.

// One-sided Jacobi: rotate pairs of columns until all are orthogonal. Returns the terms of the
// singular value decomposition, largest first: {s, u, v} with matrix = sum of s * u v^T.
function decompose(matrix) {
  const n = matrix.length;
  const columns = matrix[0].map((_, j) => matrix.map((row) => row[j]));
  const v = columns.map((_, j) => columns.map((__, i) => (i === j ? 1 : 0)));
  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  for (let sweep = 0, rotated = true; rotated && sweep < 40; sweep++) {
    rotated = false;
    for (let p = 0; p < n; p++) {
      for (let q = p + 1; q < n; q++) {
        const mixed = dot(columns[p], columns[q]);
        const [first, second] = [dot(columns[p], columns[p]), dot(columns[q], columns[q])];
        if (Math.abs(mixed) <= 1e-12 * Math.sqrt(first * second) || Math.abs(mixed) < 1e-14) continue;
        rotated = true;
        const angle = Math.atan2(2 * mixed, first - second) / 2;
        const [c, s] = [Math.cos(angle), Math.sin(angle)];
        for (const pair of [columns, v]) {
          for (let i = 0; i < n; i++) {
            const [a, b] = [pair[p][i], pair[q][i]];
            pair[p][i] = c * a + s * b;
            pair[q][i] = c * b - s * a;
          }
        }
      }
    }
  }
  return columns
    .map((column, j) => {
      const s = Math.sqrt(dot(column, column));
      return { s, u: column.map((value) => (s ? value / s : 0)), v: v[j] };
    })
    .sort((a, b) => b.s - a.s);
}

function approximate(terms, rank) {
  return terms[0].u.map((_, i) =>
    terms[0].v.map((__, j) =>
      terms.slice(0, rank).reduce((sum, { s, u, v }) => sum + s * u[i] * v[j], 0)));
}

function bookPiece(root, data, lang) {
  const say = (en, zh) => (lang === "zh" ? zh : en);
  const size = data.picture.length;
  const pixels = (value) =>
    data.picture.map((row, y) => row.map((_, x) => value(x, y)));
  const pictures = {
    river: [say("river", "河"), () => data.picture.map((row) => [...row])],
    checkerboard: [say("checkerboard", "棋盘格"), () => pixels((x, y) => ((x >> 2) + (y >> 2)) % 2)],
    diagonal: [say("diagonal", "对角线"), () => pixels((x, y) => (x === y ? 1 : 0))],
    noise: [say("noise", "噪声"), () => pixels(() => Math.random())],
    black: [say("black, to draw on", "全黑，供你作画"), () => pixels(() => 0)],
  };
  const options = (entries) =>
    entries.map(([key, label]) => `<option value="${key}">${label}</option>`).join("");
  root.innerHTML = `
    <label>${say("Picture", "图片")}
      <select data-id="picture">${options(Object.entries(pictures).map(([k, [label]]) => [k, label]))}</select>
    </label>
    <label>${say("Rank: ", "秩：")}<output data-id="rank-value"></output><br>
      <input type="range" data-id="rank" min="1" max="${size}" value="4">
    </label>
    <p>
      <canvas data-id="original" width="${size}" height="${size}"></canvas>
      <canvas data-id="approximation" width="${size}" height="${size}"></canvas>
    </p>
    <p class="note">${say("Left: the picture; draw white dots on it. Right: its approximation.",
      "左边是原图，可以在上面点画白点；右边是它的近似。")}</p>
    <p><b data-id="error"></b></p>
    <label>${say("Model", "模型")}
      <select data-id="model">${options(Object.keys(data.presets).map((k) => [k, k]))}</select>
    </label>
    <p data-id="trained"></p>`;
  const part = (id) => root.querySelector(`[data-id="${id}"]`);
  for (const id of ["original", "approximation"]) {
    part(id).style.cssText = "width:45%;max-width:10rem;image-rendering:pixelated;touch-action:none";
  }
  let picture;
  let terms;

  function paint(id, values) {
    const context = part(id).getContext("2d");
    const image = context.createImageData(size, size);
    values.flat().forEach((value, i) => {
      const grey = Math.round(255 * Math.min(Math.max(value, 0), 1));
      image.data.set([grey, grey, grey, 255], 4 * i);
    });
    context.putImageData(image, 0, 0);
  }

  function show() {
    const rank = Number(part("rank").value);
    part("rank-value").textContent = rank;
    paint("original", picture);
    paint("approximation", approximate(terms, rank));
    const squares = (list) => list.reduce((sum, { s }) => sum + s * s, 0);
    const total = squares(terms);
    const error = total ? Math.sqrt(squares(terms.slice(rank)) / total) : 0;
    part("error").textContent =
      `${2 * size * rank} ${say("numbers instead of", "个数，原来是")} ${size * size}` +
      `${say(", error ", "，误差 ")}${(100 * error).toFixed(1)} %`;
    const [whole, perRank] = data.presets[part("model").value];
    const trained = rank * perRank;
    part("trained").textContent =
      `${say("trained parameters: ", "训练的参数量：")}${trained.toLocaleString("en")} / ` +
      `${whole.toLocaleString("en")} = ${((100 * trained) / whole).toFixed(1)} %`;
  }

  function choose(values) {
    picture = values;
    terms = decompose(picture);
    show();
  }

  function draw(event) {
    if (event.type === "pointermove" && !event.buttons) return;
    const box = part("original").getBoundingClientRect();
    const x = Math.floor((size * (event.clientX - box.left)) / box.width);
    const y = Math.floor((size * (event.clientY - box.top)) / box.height);
    if (!picture[y] || picture[y][x] === undefined || picture[y][x] === 1) return;
    picture[y][x] = 1;
    choose(picture);
  }

  part("picture").addEventListener("change", () => choose(pictures[part("picture").value][1]()));
  part("rank").addEventListener("input", show);
  part("model").addEventListener("change", show);
  part("original").addEventListener("pointerdown", draw);
  part("original").addEventListener("pointermove", draw);
  part("model").value = "small";
  choose(pictures.river[1]());
}
