/* The other pictures: exact and approximate posteriors, decoded grid, samples, reconstructions, confusion, curves. */

/* Posteriors */

function drawPosteriors() {
  if (!content.runs.some((run) => run.posterior)) {
    const text = "The exact posterior is computed by quadrature, which needs a latent space of two dimensions.";
    section("posterior").append(element("p", { class: "missing" }, text));
    return;
  }
  sideBySide("posterior", (run, card, data) => {
    if (!run.posterior) {
      card.append(element("p", { class: "missing" }, `The latent space has ${run.latents.size} dimensions, not two.`));
      return;
    }
    card.append(element("div", { class: "examples" }, ...run.posterior.map((entry) => posterior(entry, data))));
    if (!run.has_density) {
      const text = "This posterior is a point (circled) and has no density, so there is no gap in nats.";
      card.append(element("p", { class: "caption" }, text));
    }
  });
}

function posterior(entry, data) {
  const gap = "gap" in entry ? `gap ${figure(entry.gap)} ± ${figure(entry.gap_error, 2)} nats` : "no density, no gap";
  const bound = "bound" in entry ? `; the bound ${entry.bound.toFixed(1).replace("-", "−")} loses ${figure(entry.log_likelihood - entry.bound)}` : "";
  const evidence = `log p(x) = ${entry.log_likelihood.toFixed(1).replace("-", "−")}${bound}`;
  const words = element("div", {}, element("b", {}, gap), element("br"), `${describe(data, entry.row)}. ${evidence}.`);
  const exact = unpack(entry.exact);
  const q = entry.approximate && unpack(entry.approximate);
  const [x0, x1, y0, y1] = entry.window.map((value) => figure(value, 2));
  const top = Math.max(...exact);
  const pair = element("div", { class: "pair" }, field(exact, top, entry, "p(z | x)"), field(q, top, entry, `q(z | x)${entry.draws ? `, of ${entry.draws.toLocaleString("en")} draws` : ""}`));
  const where = element("p", { class: "caption" }, `z₁ from ${x0} to ${x1}, z₂ from ${y0} to ${y1}`);
  return element("div", { class: "example" }, element("div", { class: "title" }, tile(data, entry.row, 56), words), pair, where);
}

/* A density on a grid, √ of its share of the top as ink; without one, the point where the encoder puts z. */
function field(values, top, entry, name) {
  const side = entry.side;
  const canvas = element("canvas", { class: "field", width: "256", height: "256", role: "img", "aria-label": name });
  const draw = () => {
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, 256, 256);
    if (!values) {
      const [x0, x1, y0, y1] = entry.window;
      const [x, y] = [((entry.point[0] - x0) / (x1 - x0)) * 256, 256 - ((entry.point[1] - y0) / (y1 - y0)) * 256];
      context.strokeStyle = context.fillStyle = colour("accent");
      context.lineWidth = 3;
      context.beginPath();
      context.arc(x, y, 9, 0, 7);
      context.stroke();
      context.fillRect(x - 1.5, y - 1.5, 3, 3);
      return;
    }
    const small = densityPicture(values, side, (value) => Math.min(1, Math.sqrt(value / top)));
    context.imageSmoothingQuality = "high";
    context.drawImage(small, 0, 0, 256, 256);
  };
  draw();
  redraws.push(draw);
  return element("figure", {}, canvas, element("figcaption", {}, name));
}

/* Values on a grid, from the lowest row up, as a picture whose ink has the opacity that they are given. */
function densityPicture(values, side, opacity) {
  const [r, g, b] = colour("density").split(",").map(Number);
  const small = document.createElement("canvas");
  small.width = small.height = side;
  const context = small.getContext("2d");
  const image = context.createImageData(side, side);
  values.forEach((value, i) => {
    const at = 4 * ((side - 1 - Math.floor(i / side)) * side + (i % side)); // the highest row is drawn first
    image.data.set([r, g, b, 255 * opacity(value)], at);
  });
  context.putImageData(image, 0, 0);
  return small;
}

/* Mosaics */

function mosaic(sprite, label) {
  return element("img", { class: "pixels", src: sprite.url, alt: label });
}

function drawDecoded() {
  sideBySide("decoded", (run, card, data) => {
    const [x0, x1, y0, y1] = run.decoded.limits.map((value) => figure(value, 2));
    const others = run.latents.size > 2 ? "; the other coordinates are 0" : "";
    const second = run.latents.size > 1 ? `, z₂ from ${y0} (bottom) to ${y1} (top)${others}` : "";
    const caption = element("p", { class: "caption" }, `E[x | z] for z₁ from ${x0} (left) to ${x1} (right)${second}.`);
    if (run.decoded.mosaic) {
      card.append(element("div", { class: "mosaic" }, mosaic(run.decoded.mosaic, `Decoded grid of ${run.name}`)), caption);
      return;
    }
    const maps = run.decoded.maps.map((url, i) => {
      return element("figure", {}, mosaic({ url }, `Feature ${i + 1} over the latent space`), element("figcaption", {}, `feature ${i + 1}`));
    });
    card.append(element("div", { class: "maps" }, ...maps), caption);
    const all = run.decoded.features;
    const scale = "From dark (a feature's first percentile in the data) to bright (its last).";
    card.append(element("p", { class: "caption" }, scale + (all > maps.length ? ` ${maps.length} of ${all} features are shown.` : "")));
  });
}

function drawSamples() {
  sideBySide("samples", (run, card, data) => {
    const picture = mosaic(run.samples.mosaic, `Samples of ${run.name}`);
    const box = element("div", { class: "mosaic" }, picture);
    let words = "E[x | z] of draws z ~ p(z)";
    if (run.samples.names.length) {
      words = "E[x | z], z ~ p(z | l): a row a label";
      if (data.image) {
        const names = element("div", { class: "rownames" }, ...run.samples.names.map((name) => element("span", {}, name)));
        names.style.gridTemplateRows = `repeat(${run.samples.names.length}, 1fr)`;
        box.classList.add("labelled");
        box.prepend(names);
      } else words = "E[x | z], z ~ p(z | l), label after label";
    }
    if (!data.image) picture.style.height = "16rem";
    card.append(box, element("p", { class: "caption" }, `${words}${data.image ? "" : "; a row a draw, a column a feature"}.`));
  });
}

function drawReconstructions() {
  sideBySide("reconstructions", (run, card, data) => {
    const { originals, decoded } = run.reconstructions;
    const figures = [[originals, "test examples"], [decoded, "E[x | z], z ~ q(z | x)"]].map(([sprite, name]) => {
      const picture = mosaic(sprite, `${name}, ${run.name}`);
      if (!data.image) picture.style.height = "16rem";
      return element("figure", {}, picture, element("figcaption", {}, name));
    });
    const box = element("div", { class: data.image ? "mosaic" : "mosaic pair" }, ...figures);
    if (data.image) box.style.display = "grid", (box.style.gap = "0.6rem");
    card.append(box);
  });
}

/* Confusion */

function drawConfusion() {
  if (!content.runs.some((run) => run.confusion_matrix)) return dismiss("confusion");
  sideBySide("confusion", (run, card, data) => {
    if (!run.confusion_matrix) {
      card.append(element("p", { class: "missing" }, "It hasn't learnt from labels."));
      return;
    }
    const names = data.classes;
    const head = element("tr", {}, element("td", {}), ...names.map((name) => element("th", { scope: "col" }, name)));
    const rows = run.confusion_matrix.map((counts, i) => {
      const cells = counts.map((n, j) => {
        const title = `${names[i]} taken for ${names[j]}: ${n}`;
        return element("td", { class: i === j ? "right" : "", title }, n ? String(n) : "");
      });
      return element("tr", {}, element("th", { scope: "row" }, names[i]), ...cells);
    });
    const long = names.some((name) => name.length > 4);
    const table = element("table", { class: `confusion${long ? " long" : ""}` }, element("thead", {}, head), element("tbody", {}, ...rows));
    const recolour = () =>
      table.querySelectorAll("tbody tr").forEach((row, i) => {
        const counts = run.confusion_matrix[i];
        const total = Math.max(1, counts.reduce((a, b) => a + b, 0));
        row.querySelectorAll("td").forEach((cell, j) => {
          const share = counts[j] / total;
          cell.style.background = `rgba(${colour("density")}, ${(0.85 * Math.sqrt(share)).toFixed(3)})`;
          cell.style.color = share > 0.3 ? (dark() ? "#15161b" : "#fff") : "inherit";
        });
      });
    recolour();
    redraws.push(recolour);
    const accuracy = `Accuracy ${(100 * run.accuracy).toFixed(1)}%, calibration error ${(100 * run.calibration_error).toFixed(1)}%.`;
    card.append(element("p", {}, accuracy), element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Confusion matrix" }, table));
    card.append(element("p", { class: "caption" }, "A row a true label, a column a predicted one; framed: what is right."));
  });
}

/* Curves */

function drawCurves() {
  const names = [...new Set(content.runs.flatMap((run) => Object.keys(run.history)))].filter((name) => name !== "epoch");
  if (!names.length) return dismiss("curves");
  names.sort((a, b) => (b === "validation_bound") - (a === "validation_bound"));
  const dashes = ["solid", "dash", "dot", "dashdot", "longdash"];
  const box = element("div", { class: "curves" });
  if (several) section("curves").append(curveLegend(dashes));
  section("curves").append(box);
  for (const name of names) {
    const words = name.replaceAll("_", " ");
    const plot = element("div", { class: "curve", role: "img", "aria-label": `Learning curve: ${words}` });
    box.append(element("div", {}, element("h3", {}, words), plot));
    const draw = () => {
      const lines = content.runs.flatMap((run, i) => {
        const y = run.history[name];
        if (!y) return [];
        const line = { color: runColour(i), width: 2, dash: dashes[i % dashes.length] };
        const few = y.filter((value) => value !== null).length < 30;
        return [{ x: run.history.epoch, y, name: plain(run.name), line, mode: few ? "lines+markers" : "lines", marker: { size: 5, symbol: markers[i % markers.length] } }];
      });
      const axes = { gridcolor: colour("line"), zeroline: false, tickfont: { color: colour("soft"), size: 11 }, automargin: true };
      const shape = {
        margin: { l: 48, r: 10, t: 6, b: 36 }, hovermode: "x unified", dragmode: false,
        hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") }, namelength: 24 },
        xaxis: { ...axes, showgrid: false, title: { text: "epoch", font: { size: 11, color: colour("soft") }, standoff: 4 }, nticks: 6, tickformat: "d" },
        yaxis: { ...axes, nticks: 5, range: steady(lines.map((line) => line.y)) },
      };
      Plotly.react(plot, lines, layout(shape), { displayModeBar: false });
    };
    draw();
    new ResizeObserver(() => Plotly.Plots.resize(plot)).observe(plot);
    redraws.push(draw);
  }
  section("curves").append(element("p", { class: "caption" }, "In nats, means per example; validation bound on examples held out of the training set."));
}

/* Limits that the first epochs, which fall from far away, don't flatten. */
function steady(columns) {
  const later = columns.flatMap((y) => y.slice(Math.floor(y.length / 20))).filter((value) => value !== null);
  if (!later.length) return undefined;
  const [low, high] = [Math.min(...later), Math.max(...later)];
  const space = 0.08 * Math.max(high - low, 1e-3);
  return [low - space, high + space];
}

function runColour(i) {
  const given = content.palette[[0, 4, 2, 8, 1, 6, 5, 3, 7, 9][i % 10]];
  return (dark() && onDark[given]) || given;
}

function curveLegend(dashes) {
  const box = element("div", { class: "legend" });
  const patterns = { solid: "", dash: "6 4", dot: "2 3", dashdot: "6 3 2 3", longdash: "10 4" };
  const draw = () => {
    box.replaceChildren(
      ...content.runs.map((run, i) => {
        const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
        svg.setAttribute("viewBox", "0 0 30 10");
        svg.setAttribute("aria-hidden", "true");
        svg.style.cssText = "width:30px;height:10px";
        const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
        line.setAttribute("d", "M0,5H30");
        line.setAttribute("stroke", runColour(i));
        line.setAttribute("stroke-width", "3");
        line.setAttribute("stroke-dasharray", patterns[dashes[i % dashes.length]]);
        svg.append(line);
        return element("span", { style: "display:inline-flex;gap:.5rem;align-items:center;margin-right:1rem" }, svg, run.name);
      }),
    );
  };
  draw();
  redraws.push(draw);
  return box;
}

function startCopying() {
  document.querySelectorAll(".copy").forEach((button) => {
    button.addEventListener("click", async () => {
      const text = button.parentElement.querySelector("code").textContent;
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(button.parentElement.querySelector("code"));
        button.textContent = "selected";
      }
    });
  });
}
