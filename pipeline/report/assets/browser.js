// The label browser: sorts, filters and draws the records of data/browser.js.
// All text of data sets goes through textContent, so a name is never markup.
"use strict";
(() => {
  const data = (window.mealv2Data || {}).browser;
  const form = document.getElementById("browser-form");
  if (!data || !form) return;
  const list = document.getElementById("browser-images");
  const count = document.getElementById("browser-count");
  const more = document.getElementById("browser-more");
  const PER_PAGE = 8, NUM_COLOURS = 7, DASHES = ["none", "7 3", "2 2"];
  const SVG = "http://www.w3.org/2000/svg";

  // --- elements -------------------------------------------------------------------------------

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function shape(name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  const isolated = (text) => element("bdi", {}, text);
  const nameOf = (id) => (id === null ? "none" : data.classes[id]);
  const percent = (prob) => `${(100 * prob).toFixed(prob < 0.0995 ? 1 : 0)}\u00a0%`;
  const plural = (number, unit) => `${number} ${unit}${number === 1 ? "" : unit.endsWith("s") ? "es" : "s"}`;
  const colourOf = (number) => `var(--series-${number % NUM_COLOURS})`;
  const dashOf = (number) => DASHES[Math.floor(number / NUM_COLOURS) % DASHES.length];

  // --- one image ------------------------------------------------------------------------------

  function drawing(record) {
    const [width, height] = record.size || [0, 0];
    const frame = element("div", { class: "frame" });
    if (record.image) {
      const [w, h] = record.shown_size;
      const image = element("img", {
        src: record.image, width: w, height: h, loading: "lazy", decoding: "async",
        alt: `Image ${record.key}, labelled ${nameOf(record.hard)}`,
      });
      if (Math.max(w, h) < 100) image.classList.add("pixels");
      frame.append(image);
    }
    if (!width) return frame;
    const boxes = record.views.map((view) => view.box);
    const picture = shape("svg", {
      viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": `The boxes of ${plural(record.views.length, "view")} on the image`,
    });
    if (!record.image) frame.style.aspectRatio = `${width} / ${height}`;
    const unit = Math.max(width, height);
    record.views.forEach((view, number) => {
      if (!boxes[number]) return;
      const [top, left, boxHeight, boxWidth] = boxes[number];
      const group = shape("g", { "data-view": view.view });
      const box = { x: left, y: top, width: boxWidth, height: boxHeight, fill: "none" };
      group.append(
        shape("rect", { ...box, class: "halo" }),
        shape("rect", { ...box, class: "box", style: `stroke: ${colourOf(number)}`, "stroke-dasharray": dashOf(number) }),
      );
      const size = unit * 0.065;
      // the corners take turns: the numbers of similar boxes lie apart
      const isRight = number % 2 === 1, isLow = number % 4 > 1;
      const x = isRight ? Math.min(left + boxWidth, width) - size * 0.25 : Math.max(left, 0) + size * 0.25;
      const y = isLow ? Math.min(top + boxHeight, height) - size * 0.25 : Math.max(top, 0) + size;
      const place = { x, y, "font-size": size, "text-anchor": isRight ? "end" : "start" };
      group.append(shape("text", { ...place, style: `fill: ${colourOf(number)}` }, String(view.view)));
      picture.append(group);
    });
    frame.append(picture);
    return frame;
  }

  function bar(label, prob, classes) {
    const fill = element("span", { class: "fill" });
    fill.style.width = `${Math.max(0, Math.min(100, 100 * prob))}%`;
    return element(
      "li", { class: classes, title: label.map((part) => part.textContent ?? part).join("") },
      element("span", { class: "label" }, ...label),
      element("span", { class: "value" }, percent(prob)),
      element("span", { class: "track", "aria-hidden": "true" }, fill),
    );
  }

  // the likeliest classes, the hard label wherever it ranks, and all others together
  function bars(top, hard, hardProb) {
    const shown = [...top];
    if (hard !== null && !top.some(([id]) => id === hard)) shown.push([hard, hardProb]);
    const rest = Math.max(0, 1 - shown.reduce((sum, [, prob]) => sum + prob, 0));
    const numOthers = data.numClasses - shown.length;
    const items = shown.map(([id, prob]) => {
      const isHard = id === hard;
      const label = [isolated(nameOf(id))];
      if (isHard) label.push(element("span", { class: "hard" }, " ✓ hard label"));
      return bar(label, prob, isHard ? "is-hard" : "");
    });
    if (numOthers > 0) items.push(bar([plural(numOthers, "other class")], rest, "is-rest"));
    return element("ul", { class: "bars" }, ...items);
  }

  function viewFigure(record, view, number) {
    const figure = element("figure", { class: "view", "data-view": view.view });
    if (view.crop) {
      const crop = element("img", {
        src: view.crop, width: view.crop_side, height: view.crop_side, loading: "lazy",
        decoding: "async", alt: `View ${view.view}: the crop as the teachers saw it`,
      });
      if (view.crop_side < 64) crop.classList.add("pixels");
      figure.append(crop);
    }
    const swatch = shape("svg", { viewBox: "0 0 24 8", class: "swatch", "aria-hidden": "true" });
    swatch.append(shape("line", { x1: 0, x2: 24, y1: 4, y2: 4, "stroke-dasharray": dashOf(number), style: `stroke: ${colourOf(number)}` }));
    const facts = [`entropy ${view.entropy.toFixed(2)}`];
    if (view.flip) facts.push("flipped");
    if (view.vflip) facts.push("upside down");
    if (view.operations) facts.push(plural(view.operations, "operation"));
    const caption = element("figcaption", {}, swatch, `View ${view.view}`, element("small", {}, ` ${facts.join(", ")}`));
    if (view.contradicts) caption.append(element("strong", { class: "contradicts" }, "≠ hard label"));
    figure.append(caption, bars(view.top, record.hard, view.hard_prob));
    if (view.num_kept < data.numClasses) {
      figure.append(element("small", { class: "tail" }, `${plural(view.num_kept, "class")} stored, tail ${percent(view.tail)}`));
    }
    return figure;
  }

  function article(record) {
    const number = data.images.indexOf(record);
    const title = element("h4", { id: `image-${number}`, tabindex: "-1" }, isolated(record.key));
    const facts = element("p", { class: "facts" });
    facts.append("hard label ", element("strong", {}, isolated(nameOf(record.hard))));
    if (record.hard_prob !== null) facts.append(` (mean probability ${percent(record.hard_prob)}; ${record.contradicting} of ${plural(record.num_views, "view")} contradict it)`);
    facts.append(`; mean entropy ${record.entropy.toFixed(2)} nats, disagreement between views ${record.disagreement.toFixed(3)} nats`);
    const made = element("article", { "aria-labelledby": `image-${number}` }, title, facts);
    if (record.suggested !== null) {
      made.append(element("p", { class: "suspected" }, "Suspected label error: the views suggest ", element("strong", {}, isolated(nameOf(record.suggested))), "."));
    }
    if (record.problem) made.append(element("p", { class: "missing" }, "The image is not shown: ", isolated(record.problem)));
    const left = element("div", { class: "left" }, drawing(record));
    left.append(element("p", { class: "mean" }, `Mean of ${plural(record.num_views, "view")}`));
    left.append(bars(record.mean, record.hard, record.hard_prob));
    const views = element("div", { class: "views" });
    record.views.forEach((view, at) => views.append(viewFigure(record, view, at)));
    const reasons = record.reasons.map((reason) => data.reasons[reason]).join(", ");
    made.append(element("div", { class: "columns" }, left, views), element("p", { class: "why" }, `Shown for: ${reasons}.`));
    const mark = (view, isOn) => {
      for (const other of made.querySelectorAll("g[data-view]")) other.classList.toggle("dim", isOn && other.dataset.view !== view);
    };
    views.addEventListener("pointerover", (event) => {
      const figure = event.target.closest("figure");
      if (figure) mark(figure.dataset.view, true);
    });
    views.addEventListener("pointerleave", () => mark("", false));
    return element("li", {}, made);
  }

  // --- sorting and filtering ------------------------------------------------------------------

  const ORDERS = {
    entropy: (a, b) => b.entropy - a.entropy,
    hard: (a, b) => (a.hard_prob ?? 2) - (b.hard_prob ?? 2),
    views: (a, b) => b.disagreement - a.disagreement,
    key: (a, b) => (a.key < b.key ? -1 : a.key > b.key ? 1 : 0),
  };
  const FILTERS = {
    contradicted: ["contradicted by a view", (record) => record.contradicting > 0],
    suspected: ["suspected label errors", (record) => record.suggested !== null],
    disagreeing: ["views disagree on the likeliest class", (record) => new Set(record.views.map((view) => view.top[0][0])).size > 1],
    random: ["random choice", (record) => record.reasons.includes("random")],
  };
  const textOf = new Map(data.images.map((record) => {
    const ids = new Set([record.hard, record.suggested, ...record.mean.map(([id]) => id)]);
    for (const view of record.views) for (const [id] of view.top.slice(0, 3)) ids.add(id);
    ids.delete(null);
    return [record, [record.key, ...[...ids].map(nameOf)].join("\n").toLowerCase()];
  }));
  let found = [], numShown = 0;

  function showMore() {
    const next = found.slice(numShown, numShown + PER_PAGE);
    list.append(...next.map(article));
    numShown += next.length;
    more.hidden = numShown >= found.length;
    more.textContent = `Show more images (${found.length - numShown} left)`;
    const views = found.reduce((sum, record) => sum + record.views.length, 0);
    count.textContent = found.length
      ? `${found.length} of ${plural(data.images.length, "image")} with ${plural(views, "view")}; ${numShown} drawn.`
      : "No image matches: change the filter.";
  }

  function update() {
    const { sort, reason, class: hard, text } = Object.fromEntries(new FormData(form));
    const words = text.toLowerCase().trim();
    found = data.images.filter((record) =>
      (!reason || FILTERS[reason][1](record)) &&
      (!hard || String(record.hard) === hard) &&
      (!words || textOf.get(record).includes(words)));
    found.sort(ORDERS[sort]);
    list.replaceChildren();
    numShown = 0;
    showMore();
  }

  function showImage(number) {
    form.reset();
    update();
    const record = data.images[number];
    found = [record, ...found.filter((other) => other !== record)];
    list.replaceChildren();
    numShown = 0;
    showMore();
    const title = document.getElementById(`image-${number}`);
    title.scrollIntoView({ block: "start" });
    title.focus({ preventScroll: true });
  }

  // --- start ----------------------------------------------------------------------------------

  for (const [value, [label, matches]] of Object.entries(FILTERS)) {
    const number = data.images.filter(matches).length;
    if (number) form.elements.reason.append(element("option", { value }, `${label} (${number})`));
  }
  const labels = [...new Set(data.images.map((record) => record.hard))].filter((id) => id !== null);
  labels.sort((a, b) => (nameOf(a) < nameOf(b) ? -1 : 1));
  for (const id of labels) form.elements.class.append(element("option", { value: id, dir: "auto" }, nameOf(id)));
  form.addEventListener("input", update);
  form.addEventListener("reset", () => setTimeout(update));
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    const first = found[numShown];
    showMore();
    document.getElementById(`image-${data.images.indexOf(first)}`).focus();
  });
  for (const button of document.querySelectorAll("button[data-image]")) {
    button.hidden = false;
    button.addEventListener("click", () => showImage(Number(button.dataset.image)));
  }
  form.hidden = false;
  update();
})();
