"use strict";
// A zoomable picture of layers of tiles, coarse to fine; every tile is part of the page.
for (const box of document.querySelectorAll(".preview")) {
  const data = JSON.parse(document.getElementById(box.dataset.preview).textContent);
  const canvas = box.appendChild(document.createElement("canvas")), pen = canvas.getContext("2d");
  const view = { x: 0, y: 0, zoom: 1 }, images = new Map();
  let width = 0, height = 0, wanted = 0;
  const image = (uri) => {
    if (!images.has(uri)) {
      const made = new Image();
      made.onload = draw;
      made.src = uri;
      images.set(uri, made);
    }
    return images.get(uri);
  };
  const drawLevel = (level) => {
    // Pixels of the whole picture in one of the level.
    const step = data.width / level.width, side = level.tile * step;
    const first = [Math.floor(view.x / side), Math.floor(view.y / side)];
    const last = [(view.x + width / view.zoom) / side, (view.y + height / view.zoom) / side];
    for (let row = Math.max(0, first[1]); row < Math.min(level.rows, last[1]); row++) {
      for (let col = Math.max(0, first[0]); col < Math.min(level.cols, last[0]); col++) {
        const tile = image(level.tiles[row * level.cols + col]);
        if (!tile.complete || !tile.naturalWidth) continue;
        const left = Math.floor((col * side - view.x) * view.zoom), top = Math.floor((row * side - view.y) * view.zoom);
        const right = Math.ceil((col * side + tile.naturalWidth * step - view.x) * view.zoom);
        const bottom = Math.ceil((row * side + tile.naturalHeight * step - view.y) * view.zoom);
        pen.drawImage(tile, left, top, right - left, bottom - top);
      }
    }
  };
  const drawShapes = (layer) => {
    pen.lineWidth = Math.max(1.5, Math.min(3, view.zoom));
    for (const [color, points] of layer.shapes) {
      pen.strokeStyle = color;
      pen.beginPath();
      for (let i = 0; i < points.length; i += 2) {
        pen.lineTo((points[i] - view.x) * view.zoom, (points[i + 1] - view.y) * view.zoom);
      }
      pen.stroke();
    }
  };
  const drawNow = () => {
    wanted = 0;
    pen.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    pen.clearRect(0, 0, width, height);
    for (const layer of data.layers) {
      if (!layer.shown) continue;
      pen.globalAlpha = layer.opacity;
      // Pixels of classes stay sharp; imagery is smooth until its pixels are seen.
      pen.imageSmoothingEnabled = layer.smooth && view.zoom < 2;
      if (layer.shapes) drawShapes(layer);
      const levels = layer.levels || [];
      const fine = levels.findIndex((level) => (level.width / data.width) * 1.5 >= view.zoom * devicePixelRatio);
      const chosen = fine < 0 ? levels.length - 1 : fine;
      // A transparent layer would be doubled by coarser tiles under it.
      if (layer.smooth && chosen > 0) drawLevel(levels[0]);
      if (levels.length) drawLevel(levels[chosen]);
    }
    pen.globalAlpha = 1;
    if (data.unit_per_px) showScale();
  };
  const draw = () => { wanted = wanted || requestAnimationFrame(drawNow); };
  const scale = box.appendChild(document.createElement("span"));
  const showScale = () => {
    const least = (data.unit_per_px / view.zoom) * 70, power = 10 ** Math.floor(Math.log10(least));
    const value = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= least);
    scale.className = "scale";
    scale.style.width = `${(value / data.unit_per_px) * view.zoom}px`;
    const big = data.unit === "m" ? [1000, "km"] : data.unit === "\u00b5m" ? [1000, "mm"] : [Infinity, ""];
    const shown = value >= big[0] ? [value / big[0], big[1]] : [value, data.unit];
    scale.textContent = `${+shown[0].toPrecision(3)} ${shown[1]}`;
  };
  const fit = () => {
    view.zoom = Math.min(width / data.width, height / data.height);
    view.x = (data.width - width / view.zoom) / 2;
    view.y = (data.height - height / view.zoom) / 2;
    draw();
  };
  const zoomAt = (factor, x, y) => {
    const least = Math.min(width / data.width, height / data.height) / 2;
    const zoom = Math.min(16, Math.max(least, view.zoom * factor));
    view.x += x / view.zoom - x / zoom;
    view.y += y / view.zoom - y / zoom;
    view.zoom = zoom;
    draw();
  };
  const tools = box.appendChild(document.createElement("div"));
  tools.className = "tools";
  const actions = { "+": () => zoomAt(1.5, width / 2, height / 2), "\u2212": () => zoomAt(1 / 1.5, width / 2, height / 2), "fit": fit };
  const names = { "+": "zoom in", "\u2212": "zoom out", "fit": "show all" };
  for (const [text, act] of Object.entries(actions)) {
    const button = tools.appendChild(document.createElement("button"));
    button.textContent = text;
    button.title = button.ariaLabel = names[text];
    button.onclick = act;
  }
  const panel = box.appendChild(document.createElement("div"));
  panel.className = "layers";
  for (const layer of data.layers) {
    const label = panel.appendChild(document.createElement("label"));
    const check = label.appendChild(document.createElement("input"));
    Object.assign(check, { type: "checkbox", checked: layer.shown, onchange: () => { layer.shown = check.checked; draw(); } });
    label.append(layer.name);
    if (layer.smooth) continue;
    const slider = label.appendChild(document.createElement("input"));
    Object.assign(slider, { type: "range", min: 0, max: 1, step: 0.05, value: layer.opacity, title: "opacity" });
    slider.oninput = () => { layer.opacity = +slider.value; draw(); };
  }
  for (const part of [tools, panel]) part.addEventListener("pointerdown", (event) => event.stopPropagation());
  const held = new Map();
  box.addEventListener("pointerdown", (event) => {
    held.set(event.pointerId, [event.clientX, event.clientY]);
    box.setPointerCapture(event.pointerId);
    box.classList.add("dragged");
  });
  box.addEventListener("pointermove", (event) => {
    const before = held.get(event.pointerId);
    if (!before) return;
    const now = [event.clientX, event.clientY], others = [...held].filter(([id]) => id !== event.pointerId);
    if (others.length) {
      const [x, y] = others[0][1], place = box.getBoundingClientRect();
      const ratio = Math.hypot(now[0] - x, now[1] - y) / Math.max(1, Math.hypot(before[0] - x, before[1] - y));
      zoomAt(ratio, x - place.left, y - place.top);
    } else {
      view.x -= (now[0] - before[0]) / view.zoom;
      view.y -= (now[1] - before[1]) / view.zoom;
      draw();
    }
    held.set(event.pointerId, now);
  });
  for (const name of ["pointerup", "pointercancel"]) {
    box.addEventListener(name, (event) => { held.delete(event.pointerId); box.classList.toggle("dragged", held.size > 0); });
  }
  box.addEventListener("wheel", (event) => {
    event.preventDefault();
    const place = box.getBoundingClientRect();
    zoomAt(Math.exp(-event.deltaY / 400), event.clientX - place.left, event.clientY - place.top);
  }, { passive: false });
  box.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [-80, 0], ArrowRight: [80, 0], ArrowUp: [0, -80], ArrowDown: [0, 80] };
    const keys = { "+": actions["+"], "=": actions["+"], "-": actions["\u2212"], 0: fit };
    if (event.target !== box || !(event.key in steps || event.key in keys)) return;
    event.preventDefault();
    if (event.key in keys) return keys[event.key]();
    view.x += steps[event.key][0] / view.zoom;
    view.y += steps[event.key][1] / view.zoom;
    draw();
  });
  new ResizeObserver(() => {
    const first = width === 0;
    [width, height] = [box.clientWidth, box.clientHeight];
    [canvas.width, canvas.height] = [width * devicePixelRatio, height * devicePixelRatio];
    first ? fit() : draw();
  }).observe(box);
}
