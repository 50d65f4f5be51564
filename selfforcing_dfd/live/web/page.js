import { isOwnAddress, readAddress, watchLink, writeAddress } from "./address.js";
import { Figures } from "./figures.js";
import { Graph } from "./graph.js";
import { Line } from "./line.js";
import { Look } from "./look.js";
import { StartPicture } from "./picture.js";
import { Player } from "./player.js";
import { Saving } from "./saving.js";

const HEADER_BYTES = 8; // chunk and video frame, uint32 each
const IDLE = 1001;
const LATE_MS = 400;
const MODES = {
  recache: "recache: read again",
  flush: "flush: mostly forgotten",
  keep: "keep: left as it is",
};

const $ = (id) => document.getElementById(id);
const graph = new Graph($("graph"), $("legend"));
const figures = new Figures($);
const look = new Look($("screen"), $("look"));
const player = new Player($("video"), { onShown, onStarved, onBroken: () => say("a video frame could not be decoded", true) });
const saving = new Saving($("record"), $("save-last"), say);
const picture = new StartPicture(
  { field: $("picture"), thumb: $("thumb"), remove: $("no-picture"), note: $("picture-note"), drop: document.body },
  { say, send: sendPicture, onRemoved: () => line.send("drop_picture") },
);
const line = new Line({
  connecting: () => setPhase("connecting"),
  message: (message) => receive[message.type]?.(message),
  frame: (data) => player.addFrame(data.slice(HEADER_BYTES)),
  lost: (reason, seconds) => leave("reconnecting", `${reason}; trying again in ${seconds} s`),
  ended: (code, reason) => {
    endedIdle = code === IDLE;
    leave(code === IDLE || watched ? "ended" : "refused", reason);
  },
});

let hello = null;
let student = null; // facts of the one that is shown
let wanted = readAddress(); // what the stream is to begin with
let watched = wanted.watch; // whose stream is watched; null for one's own
let shown = null; // prompt, seed and student of the running stream
let target = null; // what an address asks for that is being carried out
let sentTo = null; // the stream that has got the picture
let phase = "connecting";
let hasBegun = false; // whether the server has a stream for us
let endedIdle = false;
let starvedAt = null;

function connect() {
  endedIdle = false;
  line.open(watched ? `/watch?${new URLSearchParams({ stream: watched })}` : "/stream");
}

/** The connection is gone; the last picture stays on the screen. */
function leave(name, reason) {
  hasBegun = false;
  player.clear();
  player.isPaused = false;
  setPhase(name, reason);
}

const receive = {
  hello(message) {
    const isFirst = hello === null;
    hello = message;
    hasBegun = false;
    player.clear();
    player.isPaused = false;
    player.maxChunks = hello.max_queue_chunks + 2; // more wait only where others set the pace
    graph.open(hello);
    figures.open(hello);
    saving.open(hello);
    picture.open(hello);
    showLimits(isFirst);
    showStudents();
    if (watched) setPhase("waiting");
    else begin();
  },
  began({ student: name, prompt, seed, next_chunk, has_picture, unknown, first, changes, num_coming }) {
    hasBegun = true;
    showStudent(name);
    player.clear();
    graph.clear();
    figures.begin();
    if (next_chunk > 0) line.send("ack", { chunk: next_chunk - 1 }); // they will not be shown any more
    $("seed").value = seed;
    const who = hello.students.length > 1 ? `${name}: ` : "";
    const later = num_coming ? `; later prompts in the link: ${num_coming}` : "";
    say(`${who}${prompt ? `“${prompt}”` : "no prompt"}, seed ${seed}${later}`);
    warn(unknown);
    picture.show(has_picture, student);
    note({ prompt, seed, student: name, first, changes });
    setPhase(player.isPaused ? "paused" : "waiting");
  },
  prompt({ text, keep, from_chunk, unknown, changes, is_planned }) {
    // a new connection begins with what stands in the field
    if (is_planned && document.activeElement !== $("prompt")) $("prompt").value = text;
    if (!is_planned) {
      player.goOn(keep, from_chunk);
      graph.dropAfter(keep);
      figures.promptTaken(from_chunk);
    }
    say(`“${text}” comes next`);
    warn(unknown);
    note({ ...shown, prompt: text, changes });
  },
  picture({ has_picture }) {
    picture.show(has_picture, student);
    if (!hasBegun) begin();
  },
  state({ paused }) {
    player.isPaused = paused;
    setPhase(paused ? "paused" : "waiting");
  },
  viewers({ count }) {
    figures.viewers(count);
  },
  chunk(info) {
    player.beginChunk(info);
    graph.add(info);
    figures.chunk(info);
  },
  error({ about, message }) {
    player.goOn();
    figures.promptRefused();
    target = null;
    say(message, true);
    if (hasBegun) showStudent(shown.student); // one that refuses the prompt is not shown
    if (hasBegun && about === "picture") picture.show(picture.file !== null, student);
    if (hasBegun) return;
    if (about !== "picture") wanted = { ...wanted, changes: [] }; // those of the link were refused, or its prompt
    setPhase("ready", about === "picture" ? "Choose a picture to begin." : "Write a prompt to begin.");
  },
};

function begin() {
  const prompt = $("prompt").value || (hello.examples[0] ?? "");
  if (!prompt) return setPhase("ready", "Write a prompt to begin.");
  const seed = seedOf($("seed"));
  if (seed === null) return setPhase("ready", "Write a seed to begin.");
  const name = student.name;
  if (name !== hello.students[0].name) line.send("student", { name });
  if (picture.file && sentTo !== hello.stream) return sendAgain(); // the server's `picture` leads here once more
  if (student.needs_picture && !picture.file) {
    picture.show(false, student);
    return setPhase("ready", "This student begins with a picture. Choose one.");
  }
  figures.started();
  const isLink = shown === null && prompt === wanted.prompt;
  line.send("start", { prompt, seed, changes: isLink ? wanted.changes : [] });
}

async function sendAgain() {
  const error = await sendPicture(picture.file);
  if (error) begin();
  if (error) say(error, true);
}

/** An error in words, or "". */
async function sendPicture(file) {
  if (!hello) return "there is no connection; try again in a moment";
  sentTo = hello.stream;
  const query = new URLSearchParams({ stream: hello.stream });
  const answer = await fetch(`/picture?${query}`, { method: "POST", body: file }).catch(() => null);
  if (!answer) return "the picture did not arrive; the server does not answer";
  if (answer.ok) return "";
  return (await answer.json().catch(() => ({}))).message ?? `the server refuses the picture (${answer.status})`;
}

/** What is shown, for the address and for the next connection. */
function note(now) {
  const isNew = shown !== null && target === null;
  shown = now;
  const isThere = !target || ["prompt", "seed", "student"].every((name) => target[name] === now[name]);
  if (watched || !isThere) return;
  target = null;
  writeAddress(now, isNew);
}

function onShown(info, isLast, isFirst) {
  starvedAt = null;
  if (phase !== "live" && !player.isPaused && hasBegun) setPhase("live");
  figures.shown(info, isFirst);
  if (isFirst) {
    if ($("shown").textContent !== info.prompt && info.index > 0) say(`“${info.prompt}” since chunk ${info.index}`);
    $("shown").textContent = info.prompt;
    $("clock").textContent = `chunk ${info.index}`;
  }
  if (!isLast) return;
  saving.add(info);
  line.send("ack", { chunk: info.chunk });
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
  $("again").textContent = watched ? "Start a stream of your own" : name === "refused" ? "Try again" : "Start again";
  $("pause").textContent = player.isPaused ? "Resume" : "Pause";
  $("pause").disabled = !hasBegun;
  document.body.classList.toggle("watching", watched !== null);
  const isDead = hello === null || watched !== null;
  for (const id of ["reset", "new-seed", "apply", "prompt", "mode", "picture"]) $(id).disabled = isDead;
  for (const id of ["copy-link", "copy-watch"]) $(id).disabled = !hasBegun;
}

function say(text, isBad = false) {
  $("notice").textContent = text;
  $("notice").classList.toggle("bad", isBad);
}

/** Words that a student has never met. */
function warn(unknown) {
  const words = unknown.slice(0, 12).map((word) => `“${word.slice(0, 40)}”`).join(", ");
  const more = unknown.length > 12 ? ` and ${unknown.length - 12} more` : "";
  const isOne = unknown.length === 1;
  $("unknown").hidden = unknown.length === 0;
  $("unknown").textContent = unknown.length === 0 ? "" : `Not known to ${student.name}: ${words}${more}. ${isOne ? "The word was" : "These words were"} in no caption of its training.`;
}

/** The switch, which one student alone does not need; the choice holds for a new connection too. */
function showStudents() {
  const names = hello.students.map(({ name }) => name);
  $("students").hidden = names.length < 2 || watched !== null;
  const offered = [...document.getElementsByName("student")].map(({ value }) => value);
  if (offered.join("\n") !== names.join("\n")) $("segments").replaceChildren(...names.map(segment)); // else the focus stays
  const asked = shown?.student ?? wanted.student;
  showStudent(names.includes(asked) ? asked : names[0]);
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
  student = hello.students.find((one) => one.name === name);
  for (const radio of document.getElementsByName("student")) radio.checked = radio.value === name;
  player.open(student, hello.fps);
  look.open(student);
  figures.student(student);
  $("model").textContent = student.about;
}

function showLimits(isFirst) {
  $("idle").textContent = hello.idle_s;
  $("seed").max = hello.max_seed;
  $("prompt").maxLength = hello.max_text;
  if (!isFirst) return;
  $("seed").value = wanted.seed ?? hello.seed; // empty for what is none
  $("prompt").value = wanted.prompt ?? "";
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

/** The seed in a field; null, with a word to the viewer, if it is none. */
function seedOf(field) {
  const seed = Number(field.value);
  if (field.value !== "" && Number.isSafeInteger(seed) && seed >= 0) return seed;
  say(`the seed is “${field.value}”; write a whole number from 0 on`, true);
  return null;
}

const isGone = () => phase === "ended" || phase === "refused" || phase === "reconnecting";

function apply() {
  const text = $("prompt").value || $("prompt").placeholder;
  if (!text) return say("the prompt is empty; write one", true);
  $("prompt").value = text;
  if (isGone()) connect();
  else if (!hasBegun) begin();
  else {
    player.hold();
    figures.prompted();
    line.send("prompt", { text, mode: $("mode").value });
  }
}

/** Go on with another student; the server's `began` says when. */
function choose(name) {
  if (!hasBegun) {
    shown = shown && { ...shown, student: name };
    wanted = { ...wanted, student: name };
    showStudent(name);
    return isGone() ? connect() : begin();
  }
  figures.started();
  line.send("student", { name });
  if (player.isPaused) line.send("resume");
}

function togglePause() {
  if (!hasBegun || watched) return;
  const isWanted = !player.isPaused;
  player.isPaused = isWanted; // at once; the server's answer says the same
  line.send(isWanted ? "pause" : "resume");
}

function reset() {
  const seed = seedOf($("seed"));
  if (seed === null) return;
  if (!hasBegun) return phase === "ready" ? begin() : connect();
  figures.started();
  line.send("seed", { seed });
  line.send("reset");
  if (player.isPaused) line.send("resume");
}

/** The address has changed under us: Back, Forward, or a link that was pasted. */
function follow() {
  const asked = readAddress();
  if (asked.watch !== watched) return location.reload();
  if (watched) return;
  if (!isOwnAddress()) return location.reload(); // a link that was pasted: that very stream
  if (!hello) return;
  const now = shown ?? {};
  const seed = asked.seed ?? now.seed ?? hello.seed;
  const prompt = asked.changes.at(-1)?.text ?? asked.prompt ?? now.prompt ?? "";
  const isOther = asked.student !== now.student && hello.students.some(({ name }) => name === asked.student);
  $("prompt").value = prompt;
  $("seed").value = seed;
  if (!hasBegun) return isOther ? choose(asked.student) : isGone() ? connect() : begin();
  target = { prompt, seed, student: isOther ? asked.student : now.student }; // what leads there is no new step
  if (prompt !== now.prompt) apply();
  if (isOther) line.send("student", { name: asked.student });
  if (seed !== now.seed) reset();
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    say(`copied ${what}`);
  } catch {
    prompt(`Copy ${what}:`, text); // without TLS, browsers keep the clipboard from pages of other machines
  }
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
$("again").onclick = () => {
  if (watched) {
    location.hash = "";
    return location.reload();
  }
  connect();
};
$("copy-link").onclick = () => copy(location.href, picture.file ? "the link, without the picture" : "the link to this video");
$("copy-watch").onclick = () => copy(watchLink(hello.stream), "the link to watch this stream");
$("full").onclick = () => (document.fullscreenElement ? document.exitFullscreen() : $("screen").requestFullscreen());
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && phase === "ended" && endedIdle && !watched) connect();
});
addEventListener("hashchange", follow);
document.addEventListener("keydown", (event) => {
  if (event.code !== "Space" || event.repeat || event.target.closest("input, select, button, summary, a")) return;
  event.preventDefault();
  togglePause();
});
connect();
