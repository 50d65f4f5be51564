/** The numbers beside the video. */
const RECENT = 50; // chunks that the median is taken over

export class Figures {
  #$; #fps = 16; #student = null;
  #latencies = [];
  #numFrames = 0;
  #startedAt = null;
  #asked = null; // { at, numFrames, from } of a prompt that is not yet seen

  constructor($) {
    this.#$ = $;
  }

  open({ fps }) {
    this.#fps = fps;
  }

  student(facts) {
    this.#student = facts;
    const sizes = `sink ${facts.sink_frames} + window ${facts.window_frames}, latent frames`;
    this.#figure("context", facts.visible_frames, "", sizes);
  }

  /** A stream has been asked for. */
  started() {
    this.#startedAt = performance.now();
  }

  /** It begins. */
  begin() {
    this.#latencies = [];
    this.#numFrames = 0;
    this.#asked = null;
  }

  chunk(info) {
    this.#latencies = [...this.#latencies, info.latency_ms].slice(-RECENT);
    this.#numFrames += info.num_frames;
    const sorted = [...this.#latencies].sort((a, b) => a - b);
    const median = sorted[sorted.length >> 1];
    const budget = (1000 * info.num_frames) / this.#fps;
    this.#figure("fps", info.fps === null ? "–" : info.fps.toFixed(1), "", `plays at ${this.#fps}`);
    const [value, unit] = milliseconds(median).split(" ");
    this.#figure("latency", value, unit, `median; worst ${milliseconds(sorted.at(-1))}`);
    this.#figure("speed", (budget / median).toFixed(1), "×", "of the playing speed");
    this.#figure("chunks", info.index + 1, "", `${(this.#numFrames / this.#fps).toFixed(1)} s were made`);
    const [memory, size] = bytes(info.device_bytes ?? info.memory_bytes).split(" ");
    const [cache, cacheUnit] = bytes(this.#student.cache_bytes).split(" ");
    this.#figure("memory", memory, size, `keys and values ${cache} ${cacheUnit}`);
  }

  /** A prompt is on its way. */
  prompted() {
    this.#asked = { at: performance.now(), numFrames: 0, from: Infinity };
  }

  promptTaken(from) {
    if (this.#asked) this.#asked.from = from;
  }

  promptRefused() {
    this.#asked = null;
  }

  /** A video frame is on the screen. */
  shown({ index, chunk }, isFirst) {
    const now = performance.now();
    if (isFirst && index === 0 && this.#startedAt !== null) {
      this.#figure("first", seconds(now - this.#startedAt), "s", "from the start to the screen");
      this.#startedAt = null;
    }
    if (!this.#asked) return;
    if (chunk < this.#asked.from) return this.#asked.numFrames++;
    const { at, numFrames } = this.#asked;
    this.#figure("prompted", seconds(now - at), "s", `${numFrames} frame${numFrames === 1 ? "" : "s"} came before it`);
    this.#asked = null;
  }

  viewers(count) {
    this.#figure("viewers", count, "", count === 1 ? "you alone" : "of this stream");
  }

  #figure(id, value, unit, note) {
    const small = document.createElement("i");
    small.textContent = unit;
    this.#$(id).replaceChildren(String(value), ...(unit ? [small] : []));
    this.#$(`${id}-note`).textContent = note;
  }
}

export function milliseconds(ms) {
  return `${ms >= 100 ? Math.round(ms) : ms.toFixed(1)} ms`;
}

function seconds(ms) {
  return (ms / 1000).toFixed(2);
}

function bytes(number) {
  const unit = number >= 2 ** 30 ? ["GiB", 30] : ["MiB", 20];
  const value = number / 2 ** unit[1];
  return `${value >= 100 ? Math.round(value) : value.toFixed(value >= 10 ? 1 : 2)} ${unit[0]}`;
}
