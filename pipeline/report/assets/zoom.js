// Zooms a curve: draws its runs with uPlot in a dialog, from data/curves.js.
// The figure of the page stays what is printed and what a screen reader reads.
"use strict";
(() => {
  const data = (window.mealv2Data || {}).curves;
  const dialog = document.getElementById("zoom");
  if (!data || !dialog || !dialog.showModal || !window.uPlot) return;
  const [chart, title, range, list] = ["chart", "title", "range", "lines"].map((name) => document.getElementById(`zoom-${name}`));
  const keys = document.querySelectorAll("#curves .key > li"); // the lines of the methods
  const MIN_EPOCHS = 2, STEP = 0.25;
  let plot = null, shown = null, opener = null;

  const colour = (name) => getComputedStyle(dialog).getPropertyValue(name).trim();
  const strokeOf = (line) => keys[line.method].querySelector("line").style.stroke.slice(4, -1);
  const dashOf = (line) => keys[line.method].querySelector("line").getAttribute("stroke-dasharray");
  const dashes = (line) => (dashOf(line) === "none" ? [] : dashOf(line).split(" ").map(Number));
  const digits = (value, most = 5) => (value === null || value === undefined ? "–" : Number(value.toPrecision(most)).toString());

  // --- the chart ------------------------------------------------------------------------------

  function levels(u) {
    const { left, width } = u.bbox, { ctx } = u;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = colour("--muted");
    ctx.setLineDash([2, 4]);
    ctx.font = `${12 * devicePixelRatio}px ${getComputedStyle(dialog).fontFamily}`;
    ctx.textAlign = "right";
    for (const [name, value] of Object.entries(shown.levels)) {
      if (value < u.scales.y.min || value > u.scales.y.max) continue;
      const y = u.valToPos(value, "y", true);
      ctx.beginPath();
      ctx.moveTo(left, y);
      ctx.lineTo(left + width, y);
      ctx.stroke();
      ctx.fillText(`${name} ${digits(value, 3)}`, left + width - 4, y - 6 * devicePixelRatio);
    }
    ctx.restore();
  }

  function axis(label) {
    const [stroke, grid] = [colour("--muted"), { stroke: colour("--grid"), width: 1 }];
    const font = `12px ${getComputedStyle(dialog).fontFamily}`;
    return { label, stroke, grid, ticks: grid, font, labelFont: font, labelSize: 20 };
  }

  function draw() {
    const kept = plot && { min: plot.scales.x.min, max: plot.scales.x.max };
    plot?.destroy();
    const boxes = list.querySelectorAll("input");
    const series = shown.lines.map((line, number) => ({
      label: line.name, stroke: colour(strokeOf(line)), width: 2, dash: dashes(line), spanGaps: true,
      show: boxes[number].checked,
    }));
    plot = new uPlot({
      ...size(), series: [{}, ...series], legend: { show: false },
      scales: { x: { time: false } },
      axes: [axis("epoch"), { ...axis(shown.unit), size: 60 }],
      cursor: { drag: { x: true, y: false }, points: { size: 7 } },
      hooks: { draw: [levels], setCursor: [values], setScale: [(_, name) => name === "x" && values()] },
    }, [shown.x, ...shown.lines.map((line) => line.values)], chart);
    if (kept) plot.setScale("x", kept);
  }

  function size() {
    return { width: Math.max(240, chart.clientWidth), height: Math.max(180, Math.min(0.5 * innerHeight, 0.75 * chart.clientWidth)) };
  }

  // the values at the pointer, else at the last epoch that is shown
  function values() {
    if (!plot) return;
    const { min, max } = plot.scales.x;
    const at = plot.cursor.idx ?? shown.x.findLastIndex((x) => x <= max);
    list.querySelectorAll("output").forEach((output, number) => { output.textContent = digits(shown.lines[number].values[at]); });
    const text = `Epochs ${digits(min, 3)} to ${digits(max, 3)}`;
    if (range.textContent !== text) range.textContent = text;
  }

  // --- what is shown --------------------------------------------------------------------------

  function move(action) {
    const [first, last] = [shown.x[0], shown.x.at(-1)];
    let { min, max } = plot.scales.x;
    const width = max - min, step = STEP * width;
    if (action === "in" && width > MIN_EPOCHS) [min, max] = [min + step, max - step];
    if (action === "out") [min, max] = [min - 2 * step, max + 2 * step];
    if (action === "left") [min, max] = [min - step, max - step];
    if (action === "right") [min, max] = [min + step, max + step];
    const wide = Math.min(max - min, last - first);
    if (min < first) [min, max] = [first, first + wide];
    if (max > last) [min, max] = [last - wide, last];
    if (action === "all") [min, max] = [first, last];
    plot.setScale("x", { min, max });
  }

  function entry(line, number) {
    const [item, label, box, name, output] = ["li", "label", "input", "bdi", "output"].map((tag) => document.createElement(tag));
    box.type = "checkbox";
    box.checked = true;
    box.addEventListener("change", () => plot.setSeries(number + 1, { show: box.checked }));
    name.textContent = line.name;
    label.append(box, keys[line.method].querySelector("svg").cloneNode(true), name, output);
    item.append(label);
    return item;
  }

  function open(figure, button) {
    shown = data[figure];
    opener = button;
    title.textContent = document.querySelector(`#figure-${figure} figcaption`).textContent;
    list.replaceChildren(...shown.lines.map(entry));
    plot?.destroy();
    plot = null;
    dialog.showModal();
    draw();
    values();
  }

  for (const figure of Object.keys(data)) {
    const files = document.querySelector(`#figure-${figure} .files`);
    if (!files || data[figure].x.length < MIN_EPOCHS) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Zoom";
    button.setAttribute("aria-label", `Zoom: ${document.querySelector(`#figure-${figure} figcaption`).textContent}`);
    button.addEventListener("click", () => open(figure, button));
    files.prepend(button, " ");
  }
  for (const button of dialog.querySelectorAll("[data-zoom]")) button.addEventListener("click", () => move(button.dataset.zoom));
  const KEYS = { "+": "in", "=": "in", "-": "out", ArrowLeft: "left", ArrowRight: "right", 0: "all" };
  dialog.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return;
    event.preventDefault();
    move(KEYS[event.key]);
  });
  dialog.addEventListener("close", () => opener?.focus());
  addEventListener("resize", () => dialog.open && plot.setSize(size()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dialog.open && draw());
})();
