// The viewer of a report: a canvas for each plane, no library. Cases lie in the page as JSON, see viewer.py.
"use strict";
(() => {
  const root = document.getElementById("viewer");
  if (!root || !window.DecompressionStream) return;  // the stills stay
  document.documentElement.classList.add("scripted");
  const all = (selector) => [...root.querySelectorAll(selector)];
  const one = (selector) => root.querySelector(selector);
  const picker = one("select");
  const panes = all(".pane").map((figure, axis) => ({
    axis, figure, canvas: figure.querySelector("canvas"), slider: figure.querySelector("input"),
    caption: figure.querySelector("figcaption"), pan: [0, 0],
  }));
  const difference = [null, "#ffb000", "#ff5c8a", "#b18cff"];  // too much, missed, another class
  const state = { place: [0, 0, 0], show: { reference: true, prediction: true, difference: false, probability: false }, fill: false, zoom: 1, active: 0 };
  let scene = null;

  // ---- Cases ----

  const unpack = async (text) => {
    const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };

  const pixelsOf = async (facts) => {
    const picture = new Image();
    picture.src = facts.sheet;
    await picture.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [picture.width, picture.height];
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(picture, 0, 0);
    const read = context.getImageData(0, 0, canvas.width, canvas.height).data;
    const [depth, rows, columns] = facts.shape;
    const high = Math.ceil(rows / 8) * 8, wide = Math.ceil(columns / 8) * 8;
    const found = new Uint8ClampedArray(depth * rows * columns * 3);
    let to = 0;
    for (let z = 0; z < depth; z++) {
      const top = Math.floor(z / facts.columns) * high, left = (z % facts.columns) * wide;
      for (let y = 0; y < rows; y++) {
        let from = ((top + y) * canvas.width + left) * 4;
        for (let x = 0; x < columns; x++, from += 4) {
          found[to++] = read[from]; found[to++] = read[from + 1]; found[to++] = read[from + 2];
        }
      }
    }
    return found;
  };

  const open = async (number) => {
    const data = document.getElementById(`case-${number}`);
    if (!data) return;
    const facts = JSON.parse(data.textContent);
    const [pixels, labels] = await Promise.all([pixelsOf(facts), unpack(facts.labels)]);
    const size = labels.length / (facts.probability ? 3 : 2);
    const layers = { reference: labels.subarray(0, size), prediction: labels.subarray(size, 2 * size), probability: labels.subarray(2 * size) };
    one("[data-layer=probability]").hidden = !facts.probability;
    state.show.probability &&= facts.probability;
    layers.difference = layers.reference.map((value, at) => {
      const other = layers.prediction[at];
      return value === other ? 0 : !value ? 1 : !other ? 2 : 3;
    });
    const seen = new Set([...layers.reference, ...layers.prediction]);
    scene = { ...facts, number, pixels, layers, seen, outlines: new Map() };
    picker.value = String(number);
    root.classList.toggle("flat", !facts.volume);
    [state.zoom, state.active] = [1, 0];
    panes.forEach((pane) => { pane.pan = [0, 0]; });
    [one("[data-range=low]").value, one("[data-range=high]").value] = facts.window;
    for (const axis of [0, 1, 2]) {
      state.place[axis] = fullest(axis);
      Object.assign(panes[axis].slider, { max: facts.shape[axis] - 1 });
    }
    legend();
    one(".about").textContent = [facts.title, `Dice ${facts.dice}`].filter(Boolean).join(" · ") + (facts.part ? " · one slice" : "")
      + (facts.outside ? ` · ${facts.outside} % of the prediction lies outside what is shown` : "");
    if (facts.page) {
      const link = document.createElement("a");
      Object.assign(link, { href: facts.page, textContent: "the whole case" });
      one(".about").append(" · ", link);
    }
    root.dataset.case = facts.case;
    draw();
  };

  const fullest = (axis) => {
    const [depth, rows, columns] = scene.shape, counts = new Uint32Array(scene.shape[axis]);
    let found = false;
    for (const layer of ["reference", "prediction"]) {
      let at = 0;
      for (let z = 0; z < depth; z++) for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) {
        if (scene.layers[layer][at++]) { counts[[z, y, x][axis]]++; found = true; }
      }
      if (found) return scene.flipped ? counts.lastIndexOf(Math.max(...counts)) : counts.indexOf(Math.max(...counts));
    }
    return scene.shape[axis] >> 1;
  };

  // ---- Slices: rows and columns of a plane, and where its voxels lie ----

  const plane = (axis) => {
    const [, height, width] = scene.shape, [down, across] = [[1, 2], [0, 2], [0, 1]][axis], steps = [height * width, width, 1];
    return {
      down, across, rows: scene.shape[down], columns: scene.shape[across],
      at: (row, column, index) => index * steps[axis] + row * steps[down] + column * steps[across],
      high: scene.spacing[down], wide: scene.spacing[across],
    };
  };

  const picture = (axis) => {
    const { rows, columns, at } = plane(axis), canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [columns, rows];
    const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
    const low = Number(one("[data-range=low]").value), high = Math.max(low + 1, Number(one("[data-range=high]").value));
    for (let row = 0, to = 0; row < rows; row++) for (let column = 0; column < columns; column++) {
      const from = 3 * at(row, column, state.place[axis]);
      for (let channel = 0; channel < 3; channel++) image.data[to++] = (255 * (scene.pixels[from + channel] - low)) / (high - low);
      image.data[to++] = 255;
    }
    context.putImageData(image, 0, 0);
    return canvas;
  };

  const glow = (axis) => {  // the probability, from transparent over red to yellow
    const { rows, columns, at } = plane(axis), canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [columns, rows];
    const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
    for (let row = 0, to = 0; row < rows; row++) for (let column = 0; column < columns; column++, to += 4) {
      const chance = scene.layers.probability[at(row, column, state.place[axis])];
      image.data.set([255, chance, 0, 0.75 * chance], to);
    }
    context.putImageData(image, 0, 0);
    return canvas;
  };

  // Outlines of every class in a slice by marching squares: half-way between voxels inside and outside, corners rounded.
  const outlines = (layer, axis) => {
    const key = `${layer} ${axis} ${state.place[axis]}`;
    if (scene.outlines.has(key)) return scene.outlines.get(key);
    const { rows, columns, at } = plane(axis), values = scene.layers[layer], span = 2 * columns + 4, next = new Map();
    const value = (row, column) => (row < 0 || column < 0 || row >= rows || column >= columns ? 0 : values[at(row, column, state.place[axis])]);
    const ways = { 1: ["BL"], 2: ["RB"], 3: ["RL"], 4: ["TR"], 5: ["TR", "BL"], 6: ["TB"], 7: ["TL"], 8: ["LT"], 9: ["BT"], 10: ["LT", "RB"], 11: ["RT"], 12: ["LR"], 13: ["BR"], 14: ["LB"] };
    const sides = { T: [1, 0], R: [2, 1], B: [1, 2], L: [0, 1] };
    for (let row = -1; row < rows; row++) for (let column = -1; column < columns; column++) {
      const corners = [value(row, column), value(row, column + 1), value(row + 1, column + 1), value(row + 1, column)];
      if (corners.every((corner) => corner === corners[0])) continue;
      for (const own of new Set(corners)) {
        if (!own) continue;
        if (!next.has(own)) next.set(own, new Map());
        const mask = corners.reduce((bits, corner) => 2 * bits + (corner === own), 0);
        for (const way of ways[mask]) {
          const [from, to] = [...way].map((side) => (2 * row + 2 + sides[side][1]) * span + 2 * column + 2 + sides[side][0]);
          next.get(own).set(from, to);
        }
      }
    }
    const found = new Map([...next].map(([own, steps]) => [own, joined(steps, span)]));
    scene.outlines.set(key, found);
    return found;
  };

  const joined = (steps, span) => {
    const path = new Path2D(), point = (key) => [(key % span) / 2 - 0.5, Math.floor(key / span) / 2 - 0.5];
    while (steps.size) {
      const loop = [];
      for (let key = steps.keys().next().value; steps.has(key);) {
        loop.push(point(key));
        const after = steps.get(key);
        steps.delete(key);
        key = after;
      }
      const middle = (i) => { const a = loop[i], b = loop[(i + 1) % loop.length]; return [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2]; };
      path.moveTo(...middle(loop.length - 1));
      loop.forEach((corner, i) => path.quadraticCurveTo(...corner, ...middle(i)));
      path.closePath();
    }
    return path;
  };

  // ---- Drawing ----

  const places = () => {  // scale and offset of every plane in its canvas; all planes have one scale
    const shown = scene.volume ? panes : panes.slice(0, 1);
    const fits = shown.map(({ axis, canvas }) => {
      const { rows, columns, high, wide } = plane(axis);
      return Math.min(canvas.width / (columns * wide), canvas.height / (rows * high));
    });
    const scale = Math.min(...fits) * state.zoom;
    return shown.map((pane) => {
      const { rows, columns, high, wide } = plane(pane.axis), [across, down] = [scale * wide, scale * high];
      const left = pane.canvas.width / 2 - (columns / 2) * across + pane.pan[0], top = pane.canvas.height / 2 - (rows / 2) * down + pane.pan[1];
      return { pane, matrix: new DOMMatrix([across, 0, 0, down, left, top]), across, down, left, top };
    });
  };

  const draw = () => {
    if (!scene) return;
    for (const pane of panes) {
      const box = pane.canvas.getBoundingClientRect(), dense = window.devicePixelRatio || 1;
      if (!box.width) continue;
      [pane.canvas.width, pane.canvas.height] = [Math.round(box.width * dense), Math.round(box.height * dense)];
    }
    for (const placed of places()) if (placed.pane.canvas.getBoundingClientRect().width) drawPane(placed);
    all("[data-layer]").forEach((button) => button.setAttribute("aria-pressed", state.show[button.dataset.layer]));
    one("[data-do=fill]").setAttribute("aria-pressed", state.fill);
  };

  const drawPane = ({ pane, matrix, across, down, left, top }) => {
    const { axis, canvas } = pane, context = canvas.getContext("2d"), dense = window.devicePixelRatio || 1;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "#000";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.setTransform(matrix);
    Object.assign(context, { imageSmoothingEnabled: true, imageSmoothingQuality: "high" });
    context.drawImage(picture(axis), 0, 0);
    if (state.show.probability) context.drawImage(glow(axis), 0, 0);
    context.setTransform(1, 0, 0, 1, 0, 0);
    const both = state.show.reference && state.show.prediction;
    const stroke = (path, colour, width) => Object.assign(context, { strokeStyle: colour, lineWidth: width * dense, lineJoin: "round" }) && context.stroke(path);
    for (const layer of ["difference", "prediction", "reference"]) {
      if (!state.show[layer]) continue;
      for (const [value, drawn] of outlines(layer, axis)) {
        const path = new Path2D(), colour = layer === "difference" ? difference[value] : scene.classes[value - 1].colour;
        path.addPath(drawn, matrix);
        if (layer === "difference" || (state.fill && !state.show.difference && !(both && layer === "reference"))) {
          context.globalAlpha = layer === "difference" ? 0.6 : 0.4;
          context.fillStyle = colour;
          context.fill(path, "evenodd");
          context.globalAlpha = 1;
        }
        if (layer === "reference" && both) {
          stroke(path, "rgba(0,0,0,.6)", 2.4);
          stroke(path, "#fff", 1.1);
        } else if (layer !== "difference") stroke(path, colour, 1.8);
      }
    }
    if (scene.volume) cross(context, canvas, plane(axis), { across, down, left, top }, dense);
    letters(context, canvas, axis, dense);
    describe(pane);
  };

  const cross = (context, canvas, { down: rowAxis, across: columnAxis }, { across, down, left, top }, dense) => {
    const x = left + (state.place[columnAxis] + 0.5) * across, y = top + (state.place[rowAxis] + 0.5) * down, gap = 14 * dense;
    context.strokeStyle = "rgba(255,255,255,.4)";
    context.lineWidth = dense;
    context.beginPath();
    for (const [from, to] of [[0, x - gap], [x + gap, canvas.width]]) if (to > from) { context.moveTo(from, y); context.lineTo(to, y); }
    for (const [from, to] of [[0, y - gap], [y + gap, canvas.height]]) if (to > from) { context.moveTo(x, from); context.lineTo(x, to); }
    context.stroke();
  };

  const letters = (context, canvas, axis, dense) => {
    if (!scene.canonical) return;
    const [left, right, top, bottom] = ["RLAP", "RLSI", "APSI"][axis], [wide, high] = [canvas.width, canvas.height], edge = 12 * dense;
    Object.assign(context, { font: `600 ${13 * dense}px system-ui, sans-serif`, textAlign: "center", textBaseline: "middle", lineWidth: 3 * dense, strokeStyle: "#000", fillStyle: "#fff" });
    for (const [letter, x, y] of [[left, edge, high / 2], [right, wide - edge, high / 2], [top, wide / 2, edge], [bottom, wide / 2, high - edge]]) {
      context.strokeText(letter, x, y);
      context.fillText(letter, x, y);
    }
  };

  const describe = ({ axis, slider, caption, canvas, figure }) => {
    const place = state.place[axis], name = scene.canonical ? ["Axial", "Coronal", "Sagittal"][axis] : ["Slices along z", "Slices along y", "Slices along x"][axis];
    const stored = scene.flipped ? scene.last[axis] - place * scene.step[axis] : scene.first[axis] + place * scene.step[axis];
    const text = scene.volume ? `${name} · ${Math.min(scene.full[axis], Math.max(0, stored) + 1)} of ${scene.full[axis]}` : scene.case;
    slider.value = place;
    slider.setAttribute("aria-valuetext", text);
    caption.textContent = text;
    canvas.setAttribute("aria-label", `${scene.case}, ${text}: ${Object.keys(state.show).filter((layer) => state.show[layer]).join(" and ") || "image alone"}`);
    figure.classList.toggle("active", axis === state.active && scene.volume);
  };

  const legend = () => {
    const list = one(".legend");
    const entry = (colour, text) => {
      const item = document.createElement("span"), swatch = document.createElement("i");
      swatch.className = "swatch";
      swatch.style.background = colour;
      item.append(swatch, text);
      return item;
    };
    const items = scene.classes.map(({ colour, name }, at) => scene.seen.has(at + 1) && entry(colour, name)).filter(Boolean);
    if (state.show.difference) items.push(...["predicted too much", "missed", "another class"].map((text, at) => entry(difference[at + 1], text)));
    else if (state.show.reference && state.show.prediction) items.push(entry("#fff", "reference (white line)"));
    if (state.show.probability) items.push(entry("#ff2000", "probability of any class: red low, yellow high"));
    list.replaceChildren(...items);
  };

  // ---- Hands ----

  const scroll = (axis, by) => {
    state.place[axis] = Math.min(scene.shape[axis] - 1, Math.max(0, state.place[axis] + by));
    draw();
  };
  const zoom = (by) => {
    state.zoom = Math.min(12, Math.max(1, state.zoom * by));
    if (state.zoom === 1) panes.forEach((pane) => { pane.pan = [0, 0]; });
    else if (scene.volume) {  // about what the planes have in common
      for (const { pane, across, down } of places()) {
        const found = plane(pane.axis), place = (axis, count) => count / 2 - state.place[axis] - 0.5;
        pane.pan = [place(found.across, found.columns) * across, place(found.down, found.rows) * down];
      }
    } else panes[0].pan = panes[0].pan.map((value) => value * by);
    draw();
  };
  const show = (layer) => {
    state.show[layer] = !state.show[layer];
    legend();
    draw();
  };
  const step = (by) => {
    const to = picker.selectedIndex + by;
    if (to >= 0 && to < picker.options.length) open(picker.options[to].value);
  };
  const reset = () => {
    [one("[data-range=low]").value, one("[data-range=high]").value] = scene.window;
    state.zoom = 1;
    zoom(1);
  };
  const deeds = {
    previous: () => step(-1), next: () => step(1), in: () => zoom(1.4), out: () => zoom(1 / 1.4), reset,
    fill: () => { state.fill = !state.fill; draw(); },
  };
  all("[data-do]").forEach((button) => button.addEventListener("click", () => scene && deeds[button.dataset.do]()));
  all("[data-layer]").forEach((button) => button.addEventListener("click", () => scene && show(button.dataset.layer)));
  all("[data-range]").forEach((range) => range.addEventListener("input", draw));
  picker.addEventListener("change", () => open(picker.value));
  new ResizeObserver(() => draw()).observe(root);

  const keys = {
    ArrowUp: () => scroll(state.active, -1), ArrowDown: () => scroll(state.active, 1), PageUp: () => scroll(state.active, -10), PageDown: () => scroll(state.active, 10),
    ArrowLeft: deeds.previous, ArrowRight: deeds.next, r: () => show("reference"), p: () => show("prediction"), d: () => show("difference"),
    f: deeds.fill, o: () => scene.probability && show("probability"), "+": deeds.in, "=": deeds.in, "-": deeds.out, 0: reset,
  };
  root.addEventListener("keydown", (event) => {
    if (!scene || event.ctrlKey || event.metaKey || event.altKey || /^(SELECT|INPUT)$/.test(event.target.tagName)) return;
    if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
  });

  for (const pane of panes) {
    const { axis, canvas, slider } = pane, fingers = new Map();
    slider.addEventListener("input", () => { state.place[axis] = Number(slider.value); draw(); });
    const activate = () => { state.active = axis; if (scene) draw(); };
    canvas.addEventListener("focus", activate);
    slider.addEventListener("focus", activate);
    canvas.addEventListener("wheel", (event) => {  // the page scrolls until a plane is chosen
      if (!scene || document.activeElement !== canvas) return;
      event.preventDefault();
      if (event.ctrlKey || event.metaKey || !scene.volume) zoom(event.deltaY < 0 ? 1.15 : 1 / 1.15);
      else scroll(axis, Math.sign(event.deltaY));
    }, { passive: false });
    const place = (event) => {
      const { across, down, left, top } = places()[axis], box = canvas.getBoundingClientRect(), dense = canvas.width / box.width;
      const found = plane(axis), column = Math.floor(((event.clientX - box.left) * dense - left) / across), row = Math.floor(((event.clientY - box.top) * dense - top) / down);
      if (column >= 0 && row >= 0 && column < found.columns && row < found.rows) [state.place[found.across], state.place[found.down]] = [column, row];
      draw();
    };
    const shift = (event, before) => {
      const dense = window.devicePixelRatio || 1;
      pane.pan = [pane.pan[0] + (event.clientX - before.clientX) * dense, pane.pan[1] + (event.clientY - before.clientY) * dense];
      draw();
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (!scene) return;
      fingers.set(event.pointerId, event);
      if (event.pointerType !== "touch") canvas.setPointerCapture(event.pointerId);
      if (scene.volume && fingers.size === 1 && !event.shiftKey) place(event);
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = fingers.get(event.pointerId);
      if (!before || !scene) return;
      const others = [...fingers.values()].filter((finger) => finger.pointerId !== event.pointerId);
      fingers.set(event.pointerId, event);
      if (others.length) {
        const apart = (finger) => Math.hypot(finger.clientX - others[0].clientX, finger.clientY - others[0].clientY) || 1;
        zoom(apart(event) / apart(before));
        if (!scene.volume) shift(event, before);
      } else if (event.shiftKey || (!scene.volume && state.zoom > 1)) {
        shift(event, before);
      } else if (scene.volume && event.pointerType !== "touch") place(event);
    });
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) canvas.addEventListener(end, (event) => fingers.delete(event.pointerId));
  }

  document.addEventListener("click", (event) => {
    const from = event.target.closest("[data-case]");
    if (!from || root.contains(from)) return;
    event.preventDefault();
    open(from.dataset.case).then(() => {
      root.scrollIntoView({ block: "start", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
      panes[0].canvas.focus({ preventScroll: true });
    });
  });
  if (picker.options.length) open(picker.value);
})();
