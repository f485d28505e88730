/* The chain z_T → z_0 of many examples at once, on a canvas: a slider, and play. Levels in between are interpolated. */

const secondsOfPlay = 4;

function drawPaths() {
  if (!content.runs.some((run) => run.path)) {
    const text = "There is no path to show: only a diffusion posterior (ddvi) draws z in steps.";
    section("path").append(element("p", { class: "missing" }, text));
    return;
  }
  sideBySide("path", (run, card, data) => {
    if (!run.path) {
      card.append(element("p", { class: "missing" }, "Not a diffusion posterior: it draws z at once."));
      return;
    }
    drawPath(run, card, data);
  });
}

/* The prior's density as a small picture in the colours of the theme, or nothing where the latent space isn't the plane. */
function priorPicture(latents) {
  if (!latents.prior.density) return null;
  const side = latents.prior.side;
  const values = unpack(latents.prior.density, Uint8Array);
  return () => densityPicture(values, side, (value) => (value / 255) * (dark() ? 0.42 : 0.3));
}

/* Limits around z_T, which is wide, and z_0. */
function pathLimits(z, [x0, x1, y0, y1]) {
  const reach = [];
  for (let i = 0; i < z.length; i += 7) reach.push(Math.abs(z[i] - (i % 2 ? (y0 + y1) / 2 : (x0 + x1) / 2)));
  reach.sort((a, b) => a - b);
  const half = Math.max((x1 - x0) / 2, reach[Math.floor(0.995 * reach.length)] * 1.05);
  return [(x0 + x1) / 2 - half, (y0 + y1) / 2 - half, 2 * half];
}

function drawPath(run, card, data) {
  const { steps, count } = run.path;
  const field = pathPainter(run, data);
  const label = `Latents of ${run.name} on their way from z_T to z_0`;
  const canvas = element("canvas", { class: "field", role: "img", "aria-label": label });
  const slider = element("input", { type: "range", min: "0", max: String(steps), step: "0.01", value: "0", "aria-label": "Step of the chain" });
  const play = element("button", { type: "button" }, "play");
  const said = element("output", { class: "step" });
  const size = run.latents.size > 2 ? "; the first two coordinates" : "";
  const caption = `${count.toLocaleString("en")} test examples, a path each, T = ${steps}${size}.`;
  const film = element("div", { class: "film", role: "group", "aria-label": "Stations of the path" });
  const stations = [...new Set([0, 1, 2, 3, 4, 5].map((k) => Math.round((steps * (5 - k)) / 5)))];
  const stills = stations.map((t) => {
    const still = element("canvas", { class: "field", role: "img", "aria-label": `t = ${t}` });
    const go = () => {
      stop();
      slider.value = String(steps - t);
      draw();
    };
    film.append(element("button", { type: "button", onclick: go }, still, `t = ${t}`));
    return [still, t];
  });
  const left = element("div", { class: "screen" }, element("div", { class: "controls" }, play, slider, said), canvas);
  left.append(element("p", { class: "caption" }, caption));
  card.append(element("div", { class: several ? "" : "one split" }, left, film));

  const draw = () => {
    const t = steps - Number(slider.value);
    said.textContent = `t = ${Math.round(t)} of ${steps}`;
    slider.setAttribute("aria-valuetext", said.textContent);
    field(canvas, t);
  };
  const drawAll = () => {
    draw();
    stills.forEach(([still, t]) => field(still, t));
  };

  let playing = 0;
  const stop = () => {
    cancelAnimationFrame(playing);
    playing = 0;
    play.textContent = "play";
  };
  play.addEventListener("click", () => {
    if (playing) return stop();
    if (Number(slider.value) >= steps) slider.value = "0";
    play.textContent = "pause";
    const from = Number(slider.value);
    let started = null;
    const frame = (now) => {
      started ??= now;
      const due = from + ((now - started) / 1000 / secondsOfPlay) * steps;
      slider.value = String(Math.min(steps, calm ? Math.floor(due) : due));
      draw();
      if (due >= steps) return stop();
      playing = requestAnimationFrame(frame);
    };
    playing = requestAnimationFrame(frame);
  });
  slider.addEventListener("input", () => {
    stop();
    draw();
  });
  slider.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
    if (!move) return;
    event.preventDefault(); // a whole step rather than a hundredth
    stop();
    slider.value = String(Math.round(Number(slider.value)) + move);
    draw();
  });
  data.listeners.push(drawAll);
  redraws.push(drawAll);
  new ResizeObserver(drawAll).observe(canvas);
}

/* What draws the latents of level t, which may lie between two of the chain's, on a canvas of any size. */
function pathPainter(run, data) {
  const count = run.path.count;
  const z = unpack(run.path.z);
  const [left, low, side] = pathLimits(z, run.latents.limits);
  const behind = priorPicture(run.latents);
  return (canvas, t) => {
    const [above, below] = [Math.ceil(t), Math.floor(t)];
    const pixels = Math.min(1400, Math.round(canvas.clientWidth * devicePixelRatio) || 600);
    canvas.width = canvas.height = pixels;
    const context = canvas.getContext("2d");
    const scale = pixels / side;
    const size = Math.max(1.3, pixels / 230);
    if (behind) {
      const [x0, x1, y0, y1] = run.latents.limits;
      context.drawImage(behind(), (x0 - left) * scale, pixels - (y1 - low) * scale, (x1 - x0) * scale, (y1 - y0) * scale);
    }
    context.globalAlpha = 0.8;
    for (const k of classes(data)) {
      if (data.hidden.has(k)) continue;
      const { colour: fill, marker } = look(data, k);
      context.fillStyle = fill;
      for (let i = 0; i < count; i++) {
        if (data.label[i] !== k) continue;
        const [a, b] = [2 * (above * count + i), 2 * (below * count + i)];
        const share = above - t;
        const x = z[a] + share * (z[b] - z[a]);
        const y = z[a + 1] + share * (z[b + 1] - z[a + 1]);
        context.setTransform(size, 0, 0, size, (x - left) * scale, pixels - (y - low) * scale);
        context.fill(shapes[marker]);
      }
    }
  };
}
