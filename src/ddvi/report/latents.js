/* The latent space: one plot a run, the example beside the pointer, the selected ones in a gallery. */

const mostShown = 400; // tiles in a gallery

function densityScale() {
  const ink = colour("density");
  return [
    [0, `rgba(${ink}, 0)`],
    [1, `rgba(${ink}, ${dark() ? 0.42 : 0.3})`],
  ];
}

/* What is behind the draws: the prior's density in the plane, else some of its own draws. */
function priorTrace(latents) {
  const [x0, x1, y0, y1] = latents.limits;
  if (latents.prior.draws) {
    const z = unpack(latents.prior.draws);
    const of = (k) => Array.from({ length: z.length / 2 }, (_, i) => z[2 * i + k]);
    const marker = { size: 3, color: `rgba(${colour("density")}, .3)` };
    return { type: "scatter", mode: "markers", x: of(0), y: of(1), marker, hoverinfo: "skip" };
  }
  const side = latents.prior.side;
  const values = unpack(latents.prior.density, Uint8Array);
  const rows = Array.from({ length: side }, (_, i) => Array.from(values.subarray(i * side, (i + 1) * side)));
  const step = (x1 - x0) / side;
  const place = { x0: x0 + step / 2, dx: step, y0: y0 + step / 2, dy: step };
  return { type: "heatmap", z: rows, ...place, colorscale: densityScale(), showscale: false, zsmooth: "best", hoverinfo: "skip" };
}

function axis(range, title) {
  const faint = colour("line");
  return {
    range, title: { text: title, font: { size: 13 } }, gridcolor: faint, zeroline: false, linecolor: faint, mirror: true,
    showline: true, tickfont: { color: colour("soft"), size: 11 }, showgrid: false, nticks: 6,
  };
}

function layout(more) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: { family: getComputedStyle(document.body).fontFamily, color: colour("ink"), size: 12 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("soft"), activecolor: colour("accent") },
    ...more,
  };
}

/* Draws by class, or by what the classifier says: a trace each, with its own marker. */
function traces(run, data, by) {
  const z = run.z;
  const of = by === "guess" ? run.guessed : data.label;
  const size = Math.min(7, Math.max(4.5, 260 / Math.sqrt(z.length / 2)));
  return classes(data).map((k) => {
    const rows = [];
    for (let i = 0; i < run.latents.count; i++) if (of[i] === k) rows.push(i);
    const { colour: fill, marker } = look(data, k);
    return {
      type: "scatter", mode: "markers", customdata: rows, name: plain(className(data, k)), visible: !data.hidden.has(k),
      x: rows.map((i) => z[2 * i]), y: rows.map((i) => z[2 * i + 1]), hoverinfo: "none",
      marker: { size, color: fill, symbol: marker, opacity: 0.8, line: { width: 0.4, color: colour("card") } },
      selected: { marker: { opacity: 1 } }, unselected: { marker: { opacity: 0.12 } },
    };
  });
}

function showHover(event, data, run, row) {
  const box = document.getElementById("hover");
  const said = [describe(data, row)];
  if (run.guessed) said.push(`predicted ${className(data, run.guessed[row])}, ${run.confidence[row]}% sure`);
  box.replaceChildren(tile(data, row, 112), ...said.map((text) => element("div", {}, text)));
  box.hidden = false;
  const { clientX: x, clientY: y } = event;
  const { width, height } = box.getBoundingClientRect();
  box.style.left = `${Math.max(4, x + 18 + width > innerWidth ? x - width - 18 : x + 18)}px`;
  box.style.top = `${Math.min(Math.max(4, y - height / 2), innerHeight - height - 4)}px`;
}

function hideHover() {
  document.getElementById("hover").hidden = true;
  document.querySelectorAll(".ring").forEach((ring) => ring.remove());
}

/* The same example in every run of the same data. */
function ring(data, row) {
  document.querySelectorAll(".ring").forEach((ring) => ring.remove());
  for (const run of content.runs) {
    if (content.data[run.data] !== data || !run.plot || row >= run.latents.count) continue;
    const { xaxis, yaxis } = run.plot._fullLayout;
    const x = xaxis._offset + xaxis.l2p(run.z[2 * row]);
    const y = yaxis._offset + yaxis.l2p(run.z[2 * row + 1]);
    run.plot.append(element("div", { class: "ring", style: `left:${x}px;top:${y}px` }));
  }
}

function gallery(data) {
  const box = element("div", { class: "gallery", "aria-live": "polite" });
  const show = (rows, what) => {
    if (!rows.length) {
      const said = element("p", {}, "Draw a loop in the plot, or choose a class, and its examples appear here.");
      box.replaceChildren(said);
      if (several) return;
      const first = [...Array(Math.min(data.image ? 180 : 25, data.sprite.count)).keys()];
      said.append(` Till then the first ${first.length} of all.`);
      box.append(data.image ? images(data, first) : strips(data, first));
      return;
    }
    const shown = rows.slice(0, mostShown);
    const counts = classes(data).map((k) => [k, rows.filter((row) => data.label[row] === k).length]);
    const listed = counts.filter(([, n]) => n).sort((a, b) => b[1] - a[1]).slice(0, 8);
    const words = data.classes.length ? `: ${listed.map(([k, n]) => `${className(data, k)} × ${n}`).join(", ")}` : "";
    const more = rows.length > shown.length ? ` The first ${shown.length} are shown.` : "";
    const text = `${rows.length.toLocaleString("en")} ${what}${words}.${more}`;
    box.replaceChildren(element("p", {}, text), data.image ? images(data, shown) : strips(data, shown));
  };
  show([]);
  return { box, show };
}

function images(data, rows) {
  const [width, height] = tileSize(data, 30);
  const columns = Math.min(rows.length, Math.max(6, Math.floor(560 / (width + 2))));
  const size = { width: columns * (width + 2), height: Math.ceil(rows.length / columns) * (height + 2) };
  const canvas = element("canvas", { ...size, role: "img", "aria-label": `${rows.length} images` });
  data.ready.then(() => {
    const context = canvas.getContext("2d");
    rows.forEach((row, i) => {
      const [x, y] = [(i % columns) * (width + 2), Math.floor(i / columns) * (height + 2)];
      drawTile(context, data, row, x, y, width, height);
    });
  });
  return canvas;
}

function strips(data, rows) {
  const lines = rows.slice(0, 100).map((row) => element("div", {}, tile(data, row, 120), element("small", {}, describe(data, row))));
  return element("div", { class: "strips", tabindex: "0" }, ...lines);
}

function drawLatents() {
  const groups = new Map();
  content.runs.forEach((run) => groups.set(run.data, [...(groups.get(run.data) || []), run]));
  for (const key of groups.keys()) if (content.data[key].classes.length) section("latents").append(legend(content.data[key]));
  sideBySide("latents", drawLatent);
}

function drawLatent(run, card, data) {
  run.z = unpack(run.latents.z);
  run.guessed = run.guess && unpack(run.guess.label, Int16Array);
  run.confidence = run.guess && unpack(run.guess.confidence, Uint8Array);
  const [x0, x1, y0, y1] = run.latents.limits;
  const plot = element("div", { class: "plot", role: "img", "aria-label": `Latent space of ${run.name}` });
  const { box, show } = gallery(data);
  const controls = element("div", { class: "controls" });
  let by = "true";
  const touch = matchMedia("(pointer: coarse)").matches;
  const config = {
    displaylogo: false, scrollZoom: false,
    modeBarButtons: [["lasso2d", "select2d", "zoom2d", "pan2d"], ["resetScale2d", "toImage"]], // none that needs a network
  };
  const draw = () => {
    const shape = {
      margin: { l: 42, r: 8, t: 28, b: 40 }, dragmode: touch ? false : "lasso", hovermode: "closest", hoverdistance: 12,
      xaxis: axis([x0, x1], run.latents.size > 1 ? "z₁" : "z"),
      yaxis: { ...axis([y0, y1], run.latents.size > 1 ? "z₂" : "spread out at random"), scaleanchor: "x" },
      uirevision: "kept",
    };
    Plotly.react(plot, [priorTrace(run.latents), ...traces(run, data, by)], layout(shape), config);
  };
  const choice = (label, options, change) => {
    const select = element("select", {}, ...options.map(([value, text]) => element("option", { value }, text)));
    select.addEventListener("change", () => change(select.value));
    controls.append(element("label", {}, label, select));
  };
  if (run.guessed) {
    choice("Coloured by", [["true", "true label"], ["guess", "predicted label"]], (value) => {
      by = value;
      draw();
    });
  }
  if (data.classes.length) {
    const options = [["", "choose …"], ...classes(data).map((k) => [String(k), className(data, k)])];
    choice("Examples of class", options, (value) => {
      const rows = [...Array(run.latents.count).keys()].filter((row) => value !== "" && data.label[row] === Number(value));
      show(rows, "examples");
    });
  }
  const left = element("div", {}, controls, plot);
  const place = element("div", { class: several ? "" : "one split" }, left, box);
  card.append(place);
  if (run.latents.size > 2) left.append(element("p", { class: "caption" }, `The first two of ${run.latents.size} coordinates.`));
  run.plot = plot;
  draw();
  redraws.push(draw);
  new ResizeObserver(() => Plotly.Plots.resize(plot)).observe(plot);
  data.listeners.push(() => {
    const shown = classes(data).map((k) => !data.hidden.has(k));
    Plotly.restyle(plot, { visible: shown }, shown.map((_, i) => i + 1));
  });
  plot.on("plotly_hover", (event) => {
    const row = event.points[0].customdata;
    showHover(event.event, data, run, row);
    ring(data, row);
  });
  plot.on("plotly_unhover", hideHover);
  plot.on("plotly_selected", (event) => event && show(event.points.map((point) => point.customdata).filter(Number.isInteger), "selected"));
  plot.on("plotly_deselect", () => show([]));
}
