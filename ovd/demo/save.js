// SPDX-License-Identifier: Apache-2.0
// Part of the result's script, after view.js: what is shown is what is saved.

function save(name, blob) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function savePng() {
  const canvas = make("canvas");
  canvas.width = picture.naturalWidth;
  canvas.height = picture.naturalHeight;
  const c = canvas.getContext("2d"), scale = canvas.width / answer.size[0];
  c.drawImage(picture, 0, 0);
  const line = Math.max(2, canvas.width / 320), size = Math.max(12, Math.round(canvas.width / 55));
  for (const i of shown().reverse()) {
    const d = answer.detections[i], entry = answer.classes[d.class];
    const [x1, y1, x2, y2] = d.box.map((v) => v * scale);
    c.fillStyle = entry.colour;
    if (one(".wordbox-show-masks").checked) {
      c.globalAlpha = 0.35;
      for (const points of d.polygons) {
        c.beginPath();
        for (let k = 0; k < points.length; k += 2) c.lineTo(points[k] * scale, points[k + 1] * scale);
        c.fill();
      }
      c.globalAlpha = 1;
    }
    c.setLineDash([]);
    c.lineWidth = line * 1.9; c.strokeStyle = "rgba(255,255,255,.75)"; c.strokeRect(x1, y1, x2 - x1, y2 - y1);
    c.lineWidth = line; c.strokeStyle = entry.colour; c.setLineDash(entry.dash.map((v) => v * line)); c.strokeRect(x1, y1, x2 - x1, y2 - y1);
    if (!one(".wordbox-show-labels").checked) continue;
    c.font = `600 ${size}px system-ui, sans-serif`;
    const text = `${entry.name} ${two(d.score)}`, w = c.measureText(text).width + size, h = size * 1.5;
    const x = Math.max(0, Math.min(x1, canvas.width - w)), y = y1 - h >= 0 ? y1 - h : y1;
    c.fillRect(x, y, w, h);
    c.fillStyle = entry.ink;
    c.fillText(text, x + size / 2, y + size * 1.1);
  }
  canvas.toBlob((blob) => save("detections.png", blob), "image/png");
}

function saveJson() {
  const annotations = shown().map((i, k) => {
    const d = answer.detections[i], [x1, y1, x2, y2] = d.box, w = x2 - x1, h = y2 - y1;
    const r = (v) => Math.round(v * 100) / 100;
    return { id: k + 1, image_id: 1, category_id: d.class + 1, bbox: [x1, y1, w, h].map(r), area: r(w * h), iscrowd: 0, segmentation: d.polygons, score: d.score };
  });
  const used = new Set(annotations.map((a) => a.category_id));
  const data = {
    info: { description: "Found by an open-vocabulary detector", model: answer.model, threshold: level },
    images: [{ id: 1, width: answer.size[0], height: answer.size[1], file_name: "picture" }],
    categories: answer.classes.filter((c) => used.has(c.id + 1) || answer.classes.length <= 1000).map((c) => ({ id: c.id + 1, name: c.name })),
    annotations,
  };
  save("detections.json", new Blob([JSON.stringify(data, null, 1)], { type: "application/json" }));
}

function saveCsv() {
  // A spreadsheet runs cells that begin with = + - @ as formulas; an apostrophe stops it.
  const cell = (text) => `"${(/^[=+\-@\t\r]/.test(text) ? "'" + text : text).replaceAll('"', '""')}"`;
  const lines = ["class,score,x1,y1,x2,y2"];
  for (const i of shown()) {
    const d = answer.detections[i];
    lines.push([cell(nameOf(d)), d.score, ...d.box].join(","));
  }
  save("detections.csv", new Blob(["\ufeff" + lines.join("\r\n") + "\r\n"], { type: "text/csv" }));
}

one(".wordbox-downloads").addEventListener("click", (event) => {
  const kind = event.target.closest("button")?.dataset.save;
  if (answer && kind) ({ png: savePng, json: saveJson, csv: saveCsv })[kind]();
});
