/** The connection to the server. It comes back by itself; what is sent while it is down is lost. */
const WAITS_S = [0.5, 1, 2, 4, 5]; // before each new try, the last one again and again
const SILENCE_S = 15; // the server says something every 5 s
const FINAL = new Set([1001, 1008, 1011, 1013, 4404]); // the server ended it and said why
const CLOSED_FOR_SILENCE = 4000;
const TRY_LATER = 1013;

export class Line {
  #path = ""; #socket = null; #numTries = 0; #timer = 0; #heardAt = 0; #said = "";
  #on;

  /** on.message(object), on.frame(ArrayBuffer), on.lost(reason, seconds), on.ended(code, reason), on.connecting(). */
  constructor(on) {
    this.#on = on;
    addEventListener("online", () => this.#timer && this.#try());
    addEventListener("offline", () => this.#socket && this.#lose("the network is down"));
    setInterval(() => {
      const isSilent = this.#socket && performance.now() - this.#heardAt > 1000 * SILENCE_S;
      if (isSilent) this.#lose("the server has gone silent");
    }, 1000);
  }

  /** Connect; an older connection is given up. */
  open(path) {
    this.#path = path;
    this.#numTries = 0;
    this.#try();
  }

  send(type, fields = {}) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify({ type, ...fields }));
  }

  #leave() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    const socket = this.#socket;
    this.#socket = null;
    socket?.close();
  }

  #try() {
    this.#leave();
    this.#on.connecting();
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const socket = new WebSocket(`${scheme}://${location.host}${this.#path}`);
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    this.#said = "";
    this.#heardAt = performance.now();
    let hasOpened = false;
    socket.onopen = () => (hasOpened = true);
    socket.onmessage = ({ data }) => {
      if (socket !== this.#socket) return;
      this.#heardAt = performance.now();
      if (data instanceof ArrayBuffer) return this.#on.frame(data);
      const message = JSON.parse(data);
      if (message.type === "ended") this.#said = message.message;
      else {
        if (message.type === "hello") this.#numTries = 0;
        this.#on.message(message);
      }
    };
    socket.onclose = ({ code }) => {
      if (socket !== this.#socket) return;
      const isGhost = code === TRY_LATER && this.#numTries > 0; // our old connection may still count as one
      if (code !== CLOSED_FOR_SILENCE && FINAL.has(code) && !isGhost) {
        this.#leave();
        return this.#on.ended(code, this.#said || "the server has ended the stream");
      }
      if (isGhost) return this.#lose(this.#said);
      this.#lose(hasOpened ? "the connection was lost" : "the server does not answer");
    };
  }

  /** Wait, and try again; but not where the server is there and refuses us. */
  async #lose(reason) {
    this.#leave();
    const wait = WAITS_S[Math.min(this.#numTries++, WAITS_S.length - 1)];
    this.#timer = setTimeout(() => this.#try(), 1000 * wait);
    this.#on.lost(reason, wait);
    const timer = this.#timer;
    const answer = await fetch("/healthz", { cache: "no-store" }).catch(() => null);
    if (timer !== this.#timer || (answer?.status !== 401 && answer?.status !== 403)) return;
    this.#leave();
    this.#on.ended(answer.status, await answer.text());
  }
}
