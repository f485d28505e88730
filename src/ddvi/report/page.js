/* What every part of the page uses: the data, colours and markers of classes, the theme, tiles of sprites, the legend. */

const content = JSON.parse(document.getElementById("data").textContent);
const several = content.runs.length > 1;
const redraws = []; // called when the theme changes
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;

function element(kind, attributes = {}, ...children) {
  const made = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children); // text stays text
  return made;
}

const section = (name) => document.getElementById(name);
const dismiss = (name) => {
  section(name).remove();
  document.querySelector(`nav a[href="#${name}"]`)?.remove();
};

/* Arrays are base64 of little-endian bytes, as every current machine stores them. */
function unpack(text, kind = Float32Array) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new kind(bytes.buffer);
}

/* Text for plotly, which reads some markup. */
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function figure(value, digits = 3) {
  return value.toLocaleString("en", { maximumSignificantDigits: digits }).replace("-", "−");
}

/* The theme */

function dark() {
  const set = document.documentElement.dataset.theme;
  return set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function startTheme() {
  const button = document.getElementById("theme");
  const show = () => {
    button.textContent = dark() ? "light" : "dark";
    redraws.forEach((redraw) => redraw());
  };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    show();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  button.textContent = dark() ? "light" : "dark";
  let chosen;
  addEventListener("beforeprint", () => {
    chosen = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light"; // paper is white
    show();
  });
  addEventListener("afterprint", () => {
    if (chosen) document.documentElement.dataset.theme = chosen;
    else delete document.documentElement.dataset.theme;
    show();
  });
}

/* Classes: a colour and a marker each, so that neither is needed alone. Outlines are in a square from −1 to 1. */

const outlines = {
  circle: "M1,0A1,1 0 1,1 -1,0A1,1 0 1,1 1,0Z",
  square: "M-.85,-.85H.85V.85H-.85Z",
  diamond: "M0,-1.15L1.15,0L0,1.15L-1.15,0Z",
  cross: "M-.38,-1.1H.38V-.38H1.1V.38H.38V1.1H-.38V.38H-1.1V-.38H-.38Z",
  "triangle-up": "M0,-1.15L1.1,.8H-1.1Z",
  "triangle-down": "M0,1.15L1.1,-.8H-1.1Z",
  x: "M-.55,-1.05L0,-.5L.55,-1.05L1.05,-.55L.5,0L1.05,.55L.55,1.05L0,.5L-.55,1.05L-1.05,.55L-.5,0L-1.05,-.55Z",
  star: "M0,-1.3L.32,-.42L1.24,-.4L.52,.17L.76,1.05L0,.54L-.76,1.05L-.52,.17L-1.24,-.4L-.32,-.42Z",
  hexagon: "M0,-1.1L.95,-.55V.55L0,1.1L-.95,.55V-.55Z",
  "triangle-left": "M-1.15,0L.8,1.1V-1.1Z",
};
const markers = Object.keys(outlines);
const shapes = Object.fromEntries(markers.map((name) => [name, new Path2D(outlines[name])]));
const onDark = { "#332288": "#8f83f0", "#117733": "#3fb56b", "#882255": "#d9679f", "#777777": "#a9a9a9", "#AA4499": "#d07cc4" };

/* The look of class number k (−1: unknown) of a data set. */
function look(data, k) {
  if (!data.classes.length) return { colour: dark() ? "#9aa7b8" : "#3B4A5A", marker: "circle" };
  if (k < 0) return { colour: dark() ? "#6d7078" : "#b5b5b5", marker: "circle" };
  const given = data.colours[k];
  return { colour: (dark() && onDark[given]) || given, marker: markers[k % markers.length] };
}

const classes = (data) => (data.classes.length ? [...data.classes.keys(), ...(data.unknown ? [-1] : [])] : [-1]);
const className = (data, k) => (k < 0 ? (data.classes.length ? "unknown" : "test examples") : data.classes[k]);
const describe = (data, row) =>
  `${data.image ? "test example" : "test row"} ${row + 1}` +
  (data.classes.length ? ` · ${className(data, data.label[row])}` : "");

/* Sprites */

function prepare(data) {
  const count = data.sprite.count;
  data.label = data.labels ? unpack(data.labels, Int16Array) : new Int16Array(count).fill(-1);
  data.unknown = data.label.includes(-1);
  data.hidden = new Set();
  data.listeners = [];
  data.picture = new Image();
  data.ready = new Promise((done) => (data.picture.onload = done));
  data.picture.src = data.sprite.url;
}

/* How large a tile is drawn: whole multiples keep pixels square; a strip is stretched. */
function tileSize(data, wanted) {
  const { width, height } = data.sprite;
  if (!data.image) return [Math.max(120, wanted * 2), 16];
  const factor = Math.max(1, Math.round(wanted / Math.max(width, height)));
  return [width * factor, height * factor];
}

function drawTile(context, data, row, x, y, width, height) {
  const sprite = data.sprite;
  const left = (row % sprite.columns) * sprite.width;
  const top = Math.floor(row / sprite.columns) * sprite.height;
  context.imageSmoothingEnabled = false;
  context.drawImage(data.picture, left, top, sprite.width, sprite.height, x, y, width, height);
}

function tile(data, row, wanted) {
  const [width, height] = tileSize(data, wanted);
  const canvas = element("canvas", { width, height, role: "img", "aria-label": describe(data, row) });
  data.ready.then(() => drawTile(canvas.getContext("2d"), data, row, 0, 0, width, height));
  return canvas;
}

/* The legend of a data set; every picture of it listens, so a class is switched everywhere at once. */
function legend(data) {
  const box = element("div", { class: "legend", role: "group", "aria-label": `Classes of ${data.name}` });
  const counts = new Map();
  data.label.forEach((k) => counts.set(k, (counts.get(k) || 0) + 1));
  const buttons = new Map();
  const icon = (k) => {
    const { colour: fill, marker } = look(data, k);
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "-1.3 -1.3 2.6 2.6");
    svg.setAttribute("aria-hidden", "true");
    const outline = document.createElementNS("http://www.w3.org/2000/svg", "path");
    outline.setAttribute("d", outlines[marker]);
    outline.setAttribute("fill", fill);
    svg.append(outline);
    return svg;
  };
  const changed = () => {
    buttons.forEach((button, k) => button.setAttribute("aria-pressed", String(!data.hidden.has(k))));
    data.listeners.forEach((listener) => listener());
  };
  for (const k of classes(data)) {
    const toggle = () => {
      data.hidden.has(k) ? data.hidden.delete(k) : data.hidden.add(k);
      changed();
    };
    const count = element("span", { class: "count" }, (counts.get(k) || 0).toLocaleString("en"));
    const button = element("button", { type: "button", "aria-pressed": "true", onclick: toggle }, icon(k), className(data, k), count);
    buttons.set(k, button);
    box.append(button);
  }
  redraws.push(() => buttons.forEach((button, k) => button.querySelector("svg").replaceWith(icon(k))));
  if (buttons.size > 2) {
    const every = () => {
      data.hidden.size ? data.hidden.clear() : classes(data).forEach((k) => data.hidden.add(k));
      changed();
    };
    box.append(element("button", { type: "button", onclick: every }, "all / none"));
  }
  return box;
}

/* A part of the page: what `draw` makes of each run, side by side; runs of which it makes nothing say why. */
function sideBySide(name, draw, wide = false) {
  const box = element("div", { class: several ? `runs${wide ? " wide" : ""}` : "one" });
  const cards = content.runs.map((run, number) => {
    const card = element("article", { class: "run" });
    if (several) card.append(element("h3", name === "latents" ? { id: `run-${number}` } : {}, run.name));
    return card;
  });
  box.append(...cards); // all of them first, so that pictures know their width
  section(name).append(box);
  content.runs.forEach((run, number) => draw(run, cards[number], content.data[run.data]));
  return box;
}

/* The plotting library is compressed; it is unpacked and run as a script of this page. */
async function loadLibrary() {
  const holder = document.getElementById("library");
  const stream = new Blob([unpack(holder.textContent, Uint8Array)]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  holder.remove();
}

async function start() {
  startTheme();
  Object.values(content.data).forEach(prepare);
  drawPaths();
  drawPosteriors();
  drawDecoded();
  drawSamples();
  drawReconstructions();
  drawConfusion();
  startCopying();
  try {
    await loadLibrary();
  } catch (error) {
    const said = "This browser can't unpack the plotting library; a current Chrome, Edge, Firefox or Safari can.";
    section("latents").append(element("p", { class: "missing" }, said));
    dismiss("curves");
    throw error;
  }
  drawLatents();
  drawCurves();
  document.documentElement.dataset.ready = "true";
}
