import { Graph, milliseconds } from "./graph.js";
import { Player } from "./player.js";

const HEADER_BYTES = 8; // chunk and video frame, uint32 each
const TRY_LATER = 1013;
const RECENT = 50; // chunks that the median is taken over
const LATE_MS = 400;
const MODES = {
  recache: "recache: read again under it",
  flush: "flush: mostly forgotten",
  keep: "keep: left as it is",
};

const $ = (id) => document.getElementById(id);
const graph = new Graph($("graph"), $("legend"));
const player = new Player($("video"), { onShown, onStarved, onBroken: () => say("a video frame could not be decoded", true) });

let socket = null;
let hello = null;
let student = null; // facts of the one that is shown
let chosen = null; // the name of the one that was asked for
let phase = "connecting";
let hasBegun = false; // whether the server has a stream for us
let latencies = [];
let numFramesMade = 0;
let starvedAt = null;

/** Open a connection; a stream begins as soon as the server has said hello. */
function connect() {
  socket?.close();
  const mine = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/stream`);
  mine.binaryType = "arraybuffer";
  socket = mine;
  hasBegun = false;
  player.clear();
  player.isPaused = false;
  setPhase("connecting");
  let reason = "the server does not answer";
  mine.onmessage = ({ data }) => {
    if (mine !== socket) return;
    if (data instanceof ArrayBuffer) return player.addFrame(data.slice(HEADER_BYTES));
    const message = JSON.parse(data);
    if (message.type === "hello") reason = "the connection was lost";
    if (message.type === "ended") reason = message.message;
    else receive[message.type](message);
  };
  mine.onclose = ({ code }) => {
    if (mine !== socket) return;
    hasBegun = false;
    player.isPaused = false;
    setPhase(code === TRY_LATER ? "refused" : "ended", reason);
  };
}

function send(type, fields = {}) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ type, ...fields }));
}

const receive = {
  hello(message) {
    const isFirst = hello === null;
    hello = message;
    graph.open(hello);
    showLimits(isFirst);
    showStudents();
    begin();
  },
  began({ student: name, prompt, seed, next_chunk }) {
    hasBegun = true;
    showStudent(name);
    player.clear();
    graph.clear();
    latencies = [];
    numFramesMade = 0;
    if (next_chunk > 0) send("ack", { chunk: next_chunk - 1 }); // they will not be shown any more
    $("seed").value = seed;
    const who = hello.students.length > 1 ? `${name}: ` : "";
    say(`${who}${prompt ? `“${prompt}”` : "no prompt"}, seed ${seed}`);
    setPhase("waiting");
  },
  prompt({ text }) {
    say(`“${text}” comes after the chunks that are on their way`);
  },
  state({ paused }) {
    player.isPaused = paused;
    setPhase(paused ? "paused" : "waiting");
  },
  chunk(info) {
    player.beginChunk(info);
    graph.add(info);
    showFigures(info);
  },
  error({ about, message }) {
    say(message, true);
    if (hasBegun) showStudent(student.name); // one that refuses the prompt is not shown
    if (about === "prompt" && !hasBegun) setPhase("ready", "Write a prompt to begin.");
  },
};

function begin() {
  const prompt = $("prompt").value || (hello.examples[0] ?? "");
  if (!prompt) return setPhase("ready", "Write a prompt to begin.");
  const seed = seedOf($("seed"));
  if (seed === null) return;
  if (chosen !== hello.students[0].name) send("student", { name: chosen });
  send("start", { prompt, seed });
}

function onShown(info, isLast, isFirst) {
  starvedAt = null;
  if (phase !== "live" && !player.isPaused && hasBegun) setPhase("live");
  if (isFirst) {
    if ($("shown").textContent !== info.prompt && info.index > 0) say(`“${info.prompt}” since chunk ${info.index}`);
    $("shown").textContent = info.prompt;
    $("clock").textContent = `chunk ${info.index}`;
  }
  if (isLast) send("ack", { chunk: info.chunk });
}

function onStarved() {
  starvedAt = performance.now();
  setTimeout(() => {
    if (starvedAt !== null && performance.now() - starvedAt >= LATE_MS && phase === "live") setPhase("waiting");
  }, LATE_MS);
}

function setPhase(name, text = "") {
  phase = name;
  const words = { waiting: "waiting for the model", ready: "ready" };
  $("state").dataset.phase = name;
  $("state").textContent = words[name] ?? name;
  const isOver = name === "ended" || name === "refused";
  const isHidden = name === "live" || name === "waiting";
  $("veil").hidden = isHidden;
  $("veil").classList.toggle("light", name === "paused");
  $("veil-text").textContent = text ? text[0].toUpperCase() + text.slice(1) : name;
  $("again").hidden = !isOver;
  $("again").textContent = name === "refused" ? "Try again" : "Start again";
  $("pause").textContent = player.isPaused ? "Resume" : "Pause";
  $("pause").disabled = !hasBegun;
  for (const id of ["reset", "new-seed", "apply", "prompt", "mode"]) $(id).disabled = hello === null;
}

function say(text, isBad = false) {
  $("notice").textContent = text;
  $("notice").classList.toggle("bad", isBad);
}

/** The switch, which one student alone does not need; the choice holds for a new connection too. */
function showStudents() {
  const names = hello.students.map(({ name }) => name);
  $("students").hidden = names.length < 2;
  const offered = [...document.getElementsByName("student")].map(({ value }) => value);
  if (offered.join("\n") !== names.join("\n")) $("segments").replaceChildren(...names.map(segment)); // else the focus stays
  showStudent(names.includes(chosen) ? chosen : names[0]);
}

function segment(name) {
  const label = document.createElement("label");
  const radio = document.createElement("input");
  const text = document.createElement("span");
  Object.assign(radio, { type: "radio", name: "student", value: name });
  radio.onchange = () => choose(name);
  text.textContent = name;
  label.append(radio, text);
  return label;
}

/** What belongs to one student: its name and its sizes. */
function showStudent(name) {
  chosen = name;
  student = hello.students.find((one) => one.name === name);
  for (const radio of document.getElementsByName("student")) radio.checked = radio.value === name;
  player.open(student, hello.fps);
  $("model").textContent = student.about;
  const isSmall = student.width < 256;
  $("screen").classList.toggle("small", isSmall);
  const zoom = isSmall ? Math.floor(576 / student.width) : 1; // whole, so that all pixels are squares of one size
  $("screen").style.setProperty("--widest", `${zoom * student.width}px`);
  $("context").textContent = student.visible_frames;
  $("context-note").textContent = `sink ${student.sink_frames} + window ${student.window_frames}, in latent frames`;
}

function showLimits(isFirst) {
  $("queue").textContent = hello.max_queue_chunks;
  $("idle").textContent = hello.idle_s;
  $("seed").max = hello.max_seed;
  $("prompt").maxLength = hello.max_text;
  if (!isFirst) return;
  $("seed").value = hello.seed;
  $("prompt").placeholder = hello.examples[0] ?? "";
  $("mode").replaceChildren(...hello.modes.map((mode) => new Option(MODES[mode] ?? mode, mode)));
  $("mode").value = hello.mode;
  $("examples").replaceChildren(...hello.examples.map((example) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = example;
    button.onclick = () => {
      $("prompt").value = example;
      apply();
    };
    return button;
  }));
}

function showFigures(info) {
  latencies = [...latencies, info.latency_ms].slice(-RECENT);
  numFramesMade += info.num_frames;
  const sorted = [...latencies].sort((a, b) => a - b);
  const median = sorted[sorted.length >> 1];
  const budget = (1000 * info.num_frames) / hello.fps;
  figure("fps", info.fps === null ? "–" : info.fps.toFixed(1), "", `plays at ${hello.fps}`);
  const [value, unit] = milliseconds(median).split(" ");
  figure("latency", value, unit, `median; worst ${milliseconds(sorted.at(-1))}`);
  figure("speed", (budget / median).toFixed(1), "×", "of the playing speed");
  figure("chunks", info.index + 1, "", `${(numFramesMade / hello.fps).toFixed(1)} s of video`);
  const [memory, size] = bytes(info.device_bytes ?? info.memory_bytes).split(" ");
  const [cache, cacheUnit] = bytes(student.cache_bytes).split(" ");
  figure("memory", memory, size, `keys and values ${cache} ${cacheUnit}, constant`);
}

function figure(id, value, unit, note) {
  const small = document.createElement("i");
  small.textContent = unit;
  $(id).replaceChildren(String(value), ...(unit ? [small] : []));
  $(`${id}-note`).textContent = note;
}

function bytes(number) {
  const unit = number >= 2 ** 30 ? ["GiB", 30] : ["MiB", 20];
  const value = number / 2 ** unit[1];
  return `${value >= 100 ? Math.round(value) : value.toFixed(value >= 10 ? 1 : 2)} ${unit[0]}`;
}

/** The seed in a field; null, with a word to the viewer, if it is none. */
function seedOf(field) {
  const seed = Number(field.value);
  if (field.value !== "" && Number.isSafeInteger(seed) && seed >= 0) return seed;
  say(`the seed is “${field.value}”; write a whole number from 0 on`, true);
  return null;
}

function apply() {
  const text = $("prompt").value || $("prompt").placeholder;
  if (!text) return say("the prompt is empty; write one", true);
  $("prompt").value = text;
  if (phase === "ended" || phase === "refused") connect();
  else if (!hasBegun) begin();
  else send("prompt", { text, mode: $("mode").value });
}

/** Go on with another student; the server's `began` says when. */
function choose(name) {
  chosen = name;
  if (phase === "ended" || phase === "refused") return connect();
  send("student", { name });
  if (player.isPaused) send("resume");
}

function togglePause() {
  if (!hasBegun) return;
  const wanted = !player.isPaused;
  player.isPaused = wanted; // at once; the server's answer says the same
  send(wanted ? "pause" : "resume");
}

function reset() {
  const seed = seedOf($("seed"));
  if (seed === null) return;
  if (!hasBegun) return phase === "ready" ? begin() : connect();
  send("seed", { seed });
  send("reset");
  if (player.isPaused) send("resume");
}

$("prompt-form").onsubmit = (event) => {
  event.preventDefault();
  apply();
};
$("pause").onclick = togglePause;
$("reset").onclick = reset;
$("new-seed").onclick = () => {
  $("seed").value = Math.floor(Math.random() * 1e6);
  reset();
};
$("again").onclick = connect;
document.addEventListener("keydown", (event) => {
  if (event.code !== "Space" || event.repeat || event.target.closest("input, select, button, summary")) return;
  event.preventDefault();
  togglePause();
});
connect();
