/** Plays video frames at a fixed rate, in order, each once, from a buffer that its chunks fill. */
export class Player {
  #canvas; #context; #onShown; #onStarved; #onBroken;
  #frames = [];
  #info = null; // the chunk whose frames are arriving
  #numArrived = 0;
  #isPlaying = false;
  #due = 0; // when the next frame is to be shown, as performance.now()
  #current = null; // the chunk that is on the screen and not yet over
  #last = Infinity; // no later chunk begins
  #holdsNext = false; // the next chunk that begins is the last
  fps = 16;
  isPaused = false;
  maxChunks = Infinity; // beyond them the oldest are left out

  /** onShown(info, isLast, isFirst) after each frame; onStarved() where the next chunk is late; onBroken(error). */
  constructor(canvas, { onShown, onStarved, onBroken }) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    this.#onShown = onShown;
    this.#onStarved = onStarved;
    this.#onBroken = onBroken;
    const tick = (now) => {
      this.#tick(now);
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  /** Sizes and rate of the video that follows. */
  open({ width, height }, fps) {
    this.fps = fps;
    if (this.#canvas.width === width && this.#canvas.height === height) return; // a new size would clear the picture
    this.#canvas.width = width;
    this.#canvas.height = height;
  }

  /** A chunk's figures; `info.num_frames` frames of it follow. */
  beginChunk(info) {
    this.#info = info;
    this.#numArrived = 0;
    const waiting = [...new Set(this.#frames.map((frame) => frame.info.chunk))];
    const late = waiting.slice(0, Math.max(waiting.length - this.maxChunks, 0));
    if (late.length > 0) this.#drop(({ info: { chunk } }) => late.includes(chunk) && chunk !== this.#current);
  }

  /** The next frame. Decoded at once, so that it is ready when its time comes. */
  addFrame(jpeg) {
    const info = this.#info;
    const place = this.#numArrived++;
    const frame = { info, isFirst: place === 0, isLast: place === info.num_frames - 1, picture: null, isDropped: false };
    this.#frames.push(frame);
    createImageBitmap(new Blob([jpeg], { type: "image/jpeg" })).then((picture) => {
      if (frame.isDropped) picture.close();
      else frame.picture = picture;
    }, this.#onBroken);
  }

  /** Finish the chunk on the screen, else the next one, and wait there until `goOn`. */
  hold() {
    if (this.#current === null) this.#holdsNext = true;
    else this.#last = this.#current;
  }

  /** Drop the chunks between two, without both, and play on. */
  goOn(keep = Infinity, from = Infinity) {
    this.#last = Infinity;
    this.#holdsNext = false;
    this.#drop(({ info: { chunk } }) => chunk > keep && chunk < from);
  }

  /** Drop everything that has not been shown. */
  clear() {
    this.goOn();
    this.#drop(() => true);
    this.#current = null;
    this.#isPlaying = false;
  }

  #drop(isUnwanted) {
    for (const frame of this.#frames.filter(isUnwanted)) {
      frame.isDropped = true;
      frame.picture?.close();
    }
    this.#frames = this.#frames.filter((frame) => !frame.isDropped);
  }

  #tick(now) {
    if (this.isPaused) return;
    const interval = 1000 / this.fps;
    if (!this.#isPlaying) {
      if (!this.#frames.some((frame) => frame.isLast && frame.picture)) return; // a whole chunk, or it would stop again
      this.#isPlaying = true;
      this.#due = Math.max(now, this.#due); // not sooner than one interval after the frame before
    }
    if (now - this.#due > 4 * interval) this.#due = now; // after a pause or a hidden tab: no hurry to catch up
    while (this.#due <= now) {
      const next = this.#frames[0];
      if (!next || next.info.chunk > this.#last) {
        this.#isPlaying = next !== undefined; // while one is held back, time goes on
        if (!next) this.#onStarved();
        return;
      }
      if (!next.picture) return;
      this.#show(this.#frames.shift());
      this.#due += interval;
    }
  }

  #show({ info, isFirst, isLast, picture }) {
    if (this.#holdsNext) {
      this.#holdsNext = false;
      this.#last = info.chunk;
    }
    this.#current = isLast ? null : info.chunk;
    this.#context.drawImage(picture, 0, 0);
    picture.close();
    this.#onShown(info, isLast, isFirst);
  }
}
