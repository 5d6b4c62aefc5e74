"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// --- figures ------------------------------------------------------------------------------------

const dark = matchMedia("(prefers-color-scheme: dark)");

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** The same figure with "c0".."c7" and "muted" replaced by the theme's colours. */
function themed(value) {
  if (Array.isArray(value)) return value.map(themed);
  if (value && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([key, item]) =>
      [key, /color$/i.test(key) && typeof item === "string" ? colour(item) : themed(item)]));
  return value;
}

function layoutOf(figure) {
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("muted"), linecolor: colour("line") };
  const layout = figure.layout;
  return {
    ...layout, autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("ink"), size: 12 }, margin: { l: 55, r: 12, t: 12, b: 45 },
    xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
    legend: { orientation: "h", y: -0.25 }, hoverlabel: { font: { size: 12 } },
  };
}

function drawIn(place) {
  const figure = data.figures[place.dataset.section][Number(place.dataset.number)];
  Plotly.react(place, themed(figure.data), layoutOf(figure),
    { responsive: true, displayModeBar: false });
}

/** Plotly takes longer to compile than all the rest: it lies in the page as text until then. */
function loadPlotly() {
  if (window.Plotly) return;
  const script = document.createElement("script");
  script.textContent = byId("plotly").textContent;
  document.head.append(script);
}

/** Once the page is there, one figure after the other, so that the page can be used meanwhile. */
function draw() {
  const places = [...document.querySelectorAll(".plot")];
  const next = () => {
    if (!places.length) return;
    loadPlotly();
    drawIn(places.shift());
    setTimeout(next);
  };
  setTimeout(next);
}

dark.addEventListener("change", () => { draw(); showDetail(); });

// --- what is shown ------------------------------------------------------------------------------

const PAGE = 40;
const state = { shown: [], visible: PAGE, current: null };
const filters = ["collection", "step", "kind", "term", "order", "least", "most", "words"];

function options(select, values, kept) {
  select.replaceChildren(...values.map(([value, text]) => new Option(text, value)));
  if (values.some(([value]) => value === kept)) select.value = kept;
}

function items() { return data.collections[byId("collection").value] || []; }

function valueOf(item) {
  const term = byId("term").value;
  const value = term === "" ? item.score : item.terms[term];
  return typeof value === "number" ? value : null;
}

/** Choices that depend on the collection: steps and terms. */
function offer() {
  const steps = [...new Set(items().map((item) => item.step).filter((s) => s !== null))];
  options(byId("step"), [["", "all"], ...steps.map((s) => [String(s), String(s)])], byId("step").value);
  byId("step").parentElement.hidden = steps.length === 0;
  const terms = [...new Set(items().flatMap((item) => Object.keys(item.terms)))].sort();
  options(byId("term"), [["", "score"], ...terms.map((t) => [t, t])], byId("term").value);
}

const KINDS = {
  all: () => true,
  truncated: (item) => item.truncated,
  unscored: (item) => item.score === null,
  invalid: (item) => item.cited.some((cited) => !cited[2]),
  uncited: (item) => item.cited.length === 0,
};

function passes(item) {
  const step = byId("step").value;
  const words = byId("words").value.trim().toLowerCase();
  const least = byId("least").valueAsNumber, most = byId("most").valueAsNumber;
  const value = valueOf(item);
  return (step === "" || String(item.step) === step) && KINDS[byId("kind").value](item)
    && (Number.isNaN(least) || (value !== null && value >= least))
    && (Number.isNaN(most) || (value !== null && value <= most))
    && (!words || `${item.name} ${item.question} ${item.text}`.toLowerCase().includes(words));
}

function refresh() {
  const order = byId("order").value;
  const shown = items().filter(passes);
  if (order !== "given") {
    const sign = order === "worst" ? 1 : -1;
    const key = (item) => valueOf(item) === null ? Infinity : sign * valueOf(item);
    shown.sort((a, b) => key(a) - key(b));
  }
  state.shown = shown;
  state.visible = PAGE;
  byId("count").textContent = `${shown.length} of ${items().length}`;
  list();
  if (!shown.includes(state.current)) choose(shown[0] || null, false);
}

function list() {
  const entries = state.shown.slice(0, state.visible).map((item) => {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-current", String(item === state.current));
    button.append(`${number(valueOf(item))}${item.step === null ? "" : `, step ${item.step}`}`);
    const about = document.createElement("small");
    about.textContent = item.question || item.name;
    button.append(about);
    button.addEventListener("click", () => choose(item, true));
    const entry = document.createElement("li");
    entry.append(button);
    return entry;
  });
  byId("list").replaceChildren(...entries);
  byId("more").hidden = state.visible >= state.shown.length;
}

function choose(item, focus) {
  state.current = item;
  for (const [i, entry] of [...byId("list").children].entries())
    entry.firstChild.setAttribute("aria-current", String(state.shown[i] === item));
  showDetail();
  if (focus && item) byId("detail").focus({ preventScroll: innerWidth > 760 });
}

function number(value) { return value === null ? "no score" : value.toFixed(3); }

// --- one answer ---------------------------------------------------------------------------------

const player = { audio: null, end: null };
const addresses = new Map();  // clip number -> address of its sound

function address(clipNumber) {
  if (!addresses.has(clipNumber)) {
    const clip = data.clips[clipNumber];
    addresses.set(clipNumber, clip.mp3
      ? URL.createObjectURL(new Blob([bytes(clip.mp3)], { type: "audio/mpeg" }))
      : linkTo(clip));
  }
  return addresses.get(clipNumber);
}

/** Relative address of a clip's file; "#" and "?" in its name are part of the name. */
function linkTo(clip) { return clip.href.split("/").map(encodeURIComponent).join("/"); }

function bytes(base64) { return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)); }

/** Plays from a time on; with an end, only that moment (a second, where it has no length). */
function playFrom(start, end) {
  if (!player.audio) return;
  player.end = end === undefined ? null : Math.max(end, start + 0.4);
  player.audio.currentTime = start;
  player.audio.play().catch(() => {});
}

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function showDetail() {
  const detail = byId("detail"), item = state.current;
  if (player.audio) player.audio.pause();
  player.audio = null;
  if (!item) { detail.replaceChildren(element("p", "Nothing matches the filters.")); return; }
  const parts = [element("h3", item.name)];
  const facts = [`score ${number(item.score)}`];
  if (item.step !== null) facts.push(`step ${item.step}`);
  if (item.tokens !== null) facts.push(`${item.tokens} tokens`);
  if (item.truncated) facts.push("cut off");
  if (item.reason) facts.push(`${item.status}: ${item.reason}`);
  facts.push(...Object.values(item.groups));
  parts.push(element("p", facts.join(" · ")));
  parts.push(element("h4", "Question"), element("p", item.question, "text"));
  if (item.clip !== null) parts.push(...clipParts(item));
  parts.push(element("h4", "Answer"), answerText(item));
  if (item.reference) parts.push(element("h4", "Reference"), element("p", item.reference.trim(), "text"));
  const terms = Object.entries(item.terms);
  if (terms.length) {
    const table = element("table"), body = element("tbody");
    for (const [name, value] of terms) {
      const row = element("tr"), head = element("th", name);
      head.scope = "row";
      row.append(head, element("td", value === null ? "–" : value.toFixed(3)));
      body.append(row);
    }
    table.append(body);
    parts.push(element("h4", "Terms"), table);
  }
  detail.replaceChildren(...parts);
}

/** The answer with every cited time as a button that plays it. */
function answerText(item) {
  const paragraph = element("p", undefined, "text");
  const characters = Array.from(item.text);  // offsets count code points
  let done = 0;
  for (const [start, end, valid, from, to, inThought] of item.cited) {
    if (from < done) continue;
    paragraph.append(characters.slice(done, from).join(""));
    const button = element("button", characters.slice(from, to).join(""),
      `cite${inThought ? " thought" : ""}${valid ? "" : " invalid"}`);
    button.type = "button";
    button.dataset.start = start;
    button.disabled = item.clip === null || !valid;
    button.setAttribute("aria-label", `play ${start} to ${end} seconds`);
    button.addEventListener("click", () => playFrom(start, end));
    paragraph.append(button);
    done = to;
  }
  paragraph.append(characters.slice(done).join(""));
  return paragraph;
}

function clipParts(item) {
  const clip = data.clips[item.clip];
  const audio = element("audio");
  audio.controls = true;
  audio.preload = "metadata";
  audio.src = address(item.clip);
  audio.setAttribute("aria-label", `clip ${clip.name}, ${clip.duration_s} seconds`);
  const { svg, playhead } = timeline(item, clip);
  audio.addEventListener("timeupdate", () => {
    playhead(audio.currentTime);
    if (player.end !== null && audio.currentTime >= player.end) { audio.pause(); player.end = null; }
  });
  player.audio = audio;
  player.end = null;
  const key = element("ul", undefined, "key");
  for (const [name, text] of [["label", "labelled"], ["answer", "cited in the answer"],
    ["thought", "cited in the thought"]]) {
    const entry = element("li", ` ${text}`), patch = element("i");
    patch.style.background = `var(--${name})`;
    entry.prepend(patch);
    key.append(entry);
  }
  const parts = [svg, key, audio];
  if (!clip.mp3) {
    const link = element("a", `${clip.name} (not embedded)`);
    link.href = linkTo(clip);
    parts.push(link);
  }
  return parts;
}

const SVG = "http://www.w3.org/2000/svg";

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Waveform, labelled and cited spans on one time axis; a click plays from there. */
function timeline(item, clip) {
  const width = Math.max(280, Math.min(760, byId("detail").clientWidth - 32));
  const x = (seconds) => width * Math.min(Math.max(seconds, 0), clip.duration_s) / clip.duration_s;
  const rows = [["label", item.labels.map(([s, e, label, asked]) => [s, e, label, asked])]];
  for (const [name, inThought] of [["answer", false], ["thought", true]]) {
    const spans = item.cited.filter((c) => c[5] === inThought && c[2]);
    if (spans.length) rows.push([name, spans.map(([s, e]) => [s, e, "", true])]);
  }
  const height = 84 + 22 * rows.length + 20;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, class: "timeline", role: "img" });
  svg.setAttribute("aria-label", describe(item));
  const peaks = bytes(clip.peaks);
  let path = "";
  peaks.forEach((peak, i) => {
    const at = ((i + 0.5) * width / peaks.length).toFixed(1), half = Math.max(0.5, 38 * peak / 255);
    path += `M${at} ${(42 - half).toFixed(1)}V${(42 + half).toFixed(1)}`;
  });
  svg.append(shape("path", { d: path, stroke: "var(--wave)", "stroke-width": width / peaks.length }));
  rows.forEach(([name, spans], row) => {
    const top = 88 + 22 * row;
    let free = 0; // where the last name ends: a name that would cover it is left to the tooltip
    for (const [start, end, label, asked] of spans) {
      const bar = shape("rect", {
        x: x(start), y: top, width: Math.max(2, x(end) - x(start)), height: 8, rx: 2,
        fill: `var(--${name})`, opacity: asked ? 1 : 0.45,
      });
      bar.append(shape("title", {}, `${label} ${start} to ${end} s`.trim()));
      svg.append(bar);
      const text = label.slice(0, 18), wide = 7 * text.length;
      const left = Math.min(x(start), width - wide);
      if (text && row === 0 && left >= free) {
        svg.append(shape("text", { x: left, y: top + 19 }, text));
        free = left + wide + 4;
      }
    }
  });
  const step = niceStep(clip.duration_s / 6);
  for (let t = 0; t < clip.duration_s - step / 3; t += step)
    svg.append(shape("text", { x: x(t) + 2, y: height - 4 }, `${Number(t.toFixed(2))} s`));
  const line = shape("line", { x1: 0, x2: 0, y1: 0, y2: height - 16, stroke: "var(--playhead)",
    "stroke-width": 1.5 });
  svg.append(line);
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    playFrom(clip.duration_s * (event.clientX - box.left) / box.width);
  });
  const playhead = (seconds) => { line.setAttribute("x1", x(seconds)); line.setAttribute("x2", x(seconds)); };
  return { svg, playhead };
}

function describe(item) {
  const spans = (list) => list.map(([s, e, label]) => `${label || ""} ${s} to ${e} s`.trim()).join(", ");
  const cited = item.cited.filter((c) => c[2] && !c[5]).map(([s, e]) => [s, e, ""]);
  return `waveform; labelled: ${spans(item.labels) || "nothing"}; cited in the answer: ${spans(cited) || "nothing"}`;
}

function niceStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
}

// --- start --------------------------------------------------------------------------------------

addEventListener("load", draw);
const names = Object.keys(data.collections);
if (names.length) {
  options(byId("collection"), names.map((name) => [name, `${name} (${data.collections[name].length})`]), "");
  byId("collection").addEventListener("change", () => { offer(); });
  for (const id of filters) byId(id).addEventListener("input", refresh);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("more").addEventListener("click", () => { state.visible += PAGE; list(); });
  offer();
  refresh();
}
