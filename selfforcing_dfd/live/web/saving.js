/** Saves what was shown as mp4: the server keeps the newest minutes and puts the file together. */
const LAST_S = 30;
const LATER_MS = 1000; // so that what became of a recording is not hidden by the news of the next stream

export class Saving {
  #record; #last; #say; #fps = 16; #keepS = 600;
  #stream = null; // its name, which the server knows its recording by
  #shown = []; // { chunk, num_frames } of the newest chunks, as far as they can be asked for
  #begun = null; // { stream, chunk, at } while a recording runs
  #timer = 0;

  constructor(record, last, say) {
    this.#record = record;
    this.#last = last;
    this.#say = say;
    record.onclick = () => (this.#begun ? this.#stop() : this.#start());
    last.onclick = () => this.#save(this.#stream, this.#chunkBefore(LAST_S), last);
    this.#draw();
  }

  /** A new connection. A recording of the one before is saved, as far as the server still has it. */
  open({ stream, fps, keep_s: keepS }) {
    this.#fps = fps;
    this.#keepS = keepS;
    this.#stream = stream;
    this.#shown = [];
    setTimeout(() => this.#begun && this.#begun.stream !== this.#stream && this.#stop(), LATER_MS);
    this.#draw();
  }

  /** A chunk has been shown. */
  add({ chunk, num_frames }) {
    this.#shown.push({ chunk, num_frames });
    if (this.#shown.length > 2000) this.#shown.shift();
    this.#draw();
  }

  #chunkBefore(seconds) {
    let left = seconds * this.#fps;
    let first = 0;
    for (const { chunk, num_frames } of [...this.#shown].reverse()) {
      if (left <= 0) break;
      first = chunk;
      left -= num_frames;
    }
    return first;
  }

  #start() {
    const newest = this.#shown.at(-1);
    this.#begun = { stream: this.#stream, chunk: newest ? newest.chunk + 1 : 0, at: Date.now() };
    this.#say(`recording; the newest ${Math.round(this.#keepS / 60)} minutes can be kept`);
    this.#timer = setInterval(() => this.#draw(), 500);
    this.#draw();
  }

  #stop() {
    const { stream, chunk } = this.#begun;
    this.#begun = null;
    clearInterval(this.#timer);
    this.#draw();
    this.#save(stream, chunk, this.#record);
  }

  async #save(stream, first, button) {
    button.disabled = true;
    const query = new URLSearchParams({ stream, first_chunk: first });
    const answer = await fetch(`/video.mp4?${query}`, { cache: "no-store" }).catch(() => null);
    if (answer?.ok) {
      const url = URL.createObjectURL(await answer.blob());
      const link = document.createElement("a");
      Object.assign(link, { href: url, download: `stream-${stamp(new Date())}.mp4` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(url), 60_000);
      this.#say(`saved as ${link.download}`);
    } else {
      const why = answer ? (await answer.json().catch(() => ({}))).message : "the server does not answer";
      this.#say(why ?? `the server refuses (${answer.status})`, true);
    }
    button.disabled = false;
    this.#draw();
  }

  #draw() {
    const seconds = this.#begun ? Math.floor((Date.now() - this.#begun.at) / 1000) : 0;
    const clock = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
    this.#record.textContent = this.#begun ? `Stop and save ${clock}` : "Record";
    this.#record.classList.toggle("on", this.#begun !== null);
    this.#record.setAttribute("aria-pressed", String(this.#begun !== null));
    this.#record.disabled = this.#stream === null;
    this.#last.textContent = `Save last ${LAST_S} s`;
    this.#last.disabled = this.#shown.length === 0;
  }
}

function stamp(date) {
  const two = (number) => String(number).padStart(2, "0");
  const day = [date.getFullYear(), two(date.getMonth() + 1), two(date.getDate())].join("");
  return `${day}-${[date.getHours(), date.getMinutes(), date.getSeconds()].map(two).join("")}`;
}
