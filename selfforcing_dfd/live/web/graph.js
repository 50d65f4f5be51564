/** Latency of the newest chunks as stacked bars, against the time that a chunk takes to play. */
import { milliseconds } from "./figures.js";

const STAGES = ["text", "prompt", "noise", "denoise", "decode", "commit", "other"];
const MAX_BARS = 400;
const LEAST = 0.01; // of a chunk: what a legend needs to name
const BAR = 7, GAP = 2, LEFT = 52, TOP = 18, BOTTOM = 6;

export class Graph {
  #canvas; #legend; #fps = 16;
  #bars = [];
  #hovered = null; // counted from the newest

  constructor(canvas, legend) {
    this.#canvas = canvas;
    this.#legend = legend;
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    canvas.addEventListener("pointermove", (event) => this.#hover(event));
    canvas.addEventListener("pointerleave", () => this.#hover(null));
  }

  open({ fps }) {
    this.#fps = fps;
    this.clear();
  }

  clear() {
    this.#bars = [];
    this.draw();
  }

  /** One more chunk; what its stages leave unexplained is `other`. */
  add(info) {
    const known = Object.values(info.stages_ms).reduce((sum, value) => sum + value, 0);
    const stages = { ...info.stages_ms, other: Math.max(info.latency_ms - known, 0) };
    const isChange = this.#bars.length > 0 && this.#bars.at(-1).prompt !== info.prompt;
    this.#bars.push({ ...info, stages, height: Math.max(info.latency_ms, known), isChange });
    if (this.#bars.length > MAX_BARS) this.#bars.shift();
    this.draw();
  }

  /** Chunks after this one are not shown. */
  dropAfter(chunk) {
    this.#bars = this.#bars.filter((bar) => bar.chunk <= chunk);
    this.draw();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    const scale = devicePixelRatio || 1;
    this.#canvas.width = Math.round(width * scale);
    this.#canvas.height = Math.round(height * scale);
    const context = this.#canvas.getContext("2d");
    context.scale(scale, scale);
    context.font = `11px ${getComputedStyle(document.body).fontFamily}`;
    if (this.#bars.length === 0) return this.#legend.replaceChildren();
    const shown = this.#bars.slice(-Math.max(Math.floor((width - LEFT) / (BAR + GAP)), 1));
    const budget = (1000 * shown.at(-1).num_frames) / this.#fps;
    const highest = Math.max(...shown.map((bar) => bar.height));
    const hasBudget = budget < 2.5 * highest;
    const top = 1.08 * (hasBudget ? Math.max(highest, budget) : highest);
    const y = (ms) => height - BOTTOM - (ms / top) * (height - TOP - BOTTOM);
    this.#drawGrid(context, width, top, y);
    shown.forEach((bar, i) => this.#drawBar(context, bar, LEFT + i * (BAR + GAP), y, shown.length - 1 - i === this.#hovered));
    this.#drawBudget(context, width, budget, hasBudget ? y(budget) : 10, hasBudget);
    this.#describe(shown);
  }

  #drawGrid(context, width, top, y) {
    const step = niceStep(top / 3);
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (let ms = 0; ms <= top; ms += step) {
      context.fillStyle = colour("line");
      context.fillRect(LEFT, Math.round(y(ms)), width - LEFT, 1);
      context.fillStyle = colour("soft");
      if (y(ms) > TOP + 4) context.fillText(`${+ms.toFixed(1)} ms`, LEFT - 8, y(ms));
    }
  }

  #drawBar(context, bar, x, y, isHovered) {
    let sum = 0;
    for (const name of STAGES.filter((stage) => bar.stages[stage] > 0)) {
      const from = y(sum);
      sum += bar.stages[name];
      context.fillStyle = colour(`stage-${name}`);
      context.fillRect(x, y(sum), BAR, from - y(sum));
    }
    if (isHovered) {
      context.strokeStyle = colour("ink");
      context.strokeRect(x - 0.5, y(sum) - 0.5, BAR + 1, y(0) - y(sum) + 1);
    }
    if (bar.isChange) {
      context.fillStyle = colour("ink");
      context.beginPath();
      context.moveTo(x + BAR / 2, y(sum) - 2);
      context.lineTo(x - 1, y(sum) - 9);
      context.lineTo(x + BAR + 1, y(sum) - 9);
      context.fill();
    }
  }

  /** The line of real time with its label on it; where it is far above all bars, the label alone, at the top. */
  #drawBudget(context, width, budget, place, isLine) {
    const label = `real time at ${this.#fps} fps: ${Math.round(budget)} ms a chunk${isLine ? "" : " ↑"}`;
    context.strokeStyle = context.fillStyle = colour(isLine ? "bad" : "soft");
    if (isLine) {
      context.setLineDash([5, 4]);
      context.beginPath();
      context.moveTo(LEFT, place);
      context.lineTo(width, place);
      context.stroke();
      context.setLineDash([]);
    }
    context.textAlign = "right";
    context.textBaseline = "alphabetic";
    context.strokeStyle = colour("card"); // a rim, for bars and lines may be behind it
    context.lineWidth = 4;
    context.lineJoin = "round";
    const y = isLine ? place - 5 : place;
    context.strokeText(label, width, y);
    context.fillText(label, width, y);
  }

  #hover(event) {
    const shown = Math.max(Math.floor((this.#canvas.clientWidth - LEFT) / (BAR + GAP)), 1);
    const count = Math.min(this.#bars.length, shown);
    const place = event ? Math.floor((event.offsetX - LEFT) / (BAR + GAP)) : -1;
    this.#hovered = place >= 0 && place < count ? count - 1 - place : null;
    this.draw();
  }

  /** Legend with the numbers of the hovered chunk, else of the newest. */
  #describe(shown) {
    const bar = this.#hovered === null ? shown.at(-1) : shown.at(-1 - this.#hovered);
    const seen = STAGES.filter((name) => shown.some((other) => other.stages[name] >= LEAST * other.height));
    const items = seen.map((name) => {
      const item = document.createElement("span");
      const chip = document.createElement("i");
      chip.style.background = colour(`stage-${name}`);
      item.append(chip, `${name} `, bold(bar.stages[name] ? milliseconds(bar.stages[name]) : "–"));
      return item;
    });
    const total = document.createElement("span");
    total.append(`chunk ${bar.index} `, bold(milliseconds(bar.latency_ms)));
    this.#legend.replaceChildren(total, ...items);
  }
}

function bold(text) {
  const element = document.createElement("b");
  element.textContent = text;
  return element;
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** The next of 1, 2, 5, 10, ... that is not smaller. */
function niceStep(atLeast) {
  const power = 10 ** Math.floor(Math.log10(atLeast));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= atLeast);
}
