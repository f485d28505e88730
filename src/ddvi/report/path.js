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
  for (let i = 0; i < z.length; i += 7) reach.push(Math.max(Math.abs(z[i] - (i % 2 ? (y0 + y1) / 2 : (x0 + x1) / 2))));
  reach.sort((a, b) => a - b);
  const half = Math.max((x1 - x0) / 2, reach[Math.floor(0.995 * reach.length)] * 1.05);
  return [(x0 + x1) / 2 - half, (y0 + y1) / 2 - half, 2 * half];
}

function drawPath(run, card, data) {
  const { steps, count } = run.path;
  const z = unpack(run.path.z);
  const [left, low, side] = pathLimits(z, run.latents.limits);
  const canvas = element("canvas", { class: "field", role: "img", "aria-label": `Latents of ${run.name} on their way from z_T to z_0` });
  canvas.style.maxWidth = "40rem";
  const slider = element("input", { type: "range", min: "0", max: String(steps), step: "0.01", value: "0", "aria-label": "Step of the chain" });
  const play = element("button", { type: "button" }, "play");
  const said = element("output", { class: "step" });
  card.append(element("div", { class: "controls", style: "max-width:40rem" }, play, slider, said), canvas);
  const caption = `${count.toLocaleString("en")} test examples, a path each, T = ${steps}${run.latents.size > 2 ? "; the first two coordinates" : ""}.`;
  card.append(element("p", { class: "caption" }, caption));

  const behind = priorPicture(run.latents);
  const draw = () => {
    const done = Number(slider.value); // steps that have been taken
    const t = steps - done;
    const [above, below] = [Math.ceil(t), Math.floor(t)];
    said.textContent = `t = ${Math.round(t)} of ${steps}`;
    slider.setAttribute("aria-valuetext", said.textContent);
    const pixels = Math.min(1400, Math.round(canvas.clientWidth * devicePixelRatio) || 600);
    canvas.width = canvas.height = pixels;
    const context = canvas.getContext("2d");
    const scale = pixels / side;
    const size = Math.max(1.8, pixels / 230);
    if (behind) {
      const [x0, x1, y0, y1] = run.latents.limits;
      const from = [(x0 - left) * scale, pixels - (y1 - low) * scale];
      context.drawImage(behind(), ...from, (x1 - x0) * scale, (y1 - y0) * scale);
    }
    for (const k of classes(data)) {
      if (data.hidden.has(k)) continue;
      const { colour: fill, marker } = look(data, k);
      context.fillStyle = fill;
      context.globalAlpha = 0.8;
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
    context.setTransform(1, 0, 0, 1, 0, 0);
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
  data.listeners.push(draw);
  redraws.push(draw);
  new ResizeObserver(draw).observe(canvas);
}
