/** How the video is enlarged: as sharp pixels or smoothly; remembered by the browser. */
const KEY = "live-stream-look";
const SMALL = 256; // pixels; from here on a screen shows a video about as it is
const HIGHEST = 0.78; // of the window's height, as in page.css

export class Look {
  #screen; #choice; #width = SMALL;

  constructor(screen, choice) {
    this.#screen = screen;
    this.#choice = choice;
    for (const radio of choice.querySelectorAll("input")) {
      radio.checked = radio.value === (localStorage.getItem(KEY) ?? "smooth");
      radio.onchange = () => {
        localStorage.setItem(KEY, radio.value);
        this.#apply();
      };
    }
    addEventListener("resize", () => this.#apply());
    this.#apply();
  }

  /** Sizes of the video that follows. */
  open({ width }) {
    this.#width = width;
    this.#choice.hidden = width >= SMALL;
    this.#apply();
  }

  #apply() {
    const chosen = this.#choice.querySelector("input:checked");
    const isSharp = chosen?.value === "pixels" && !this.#choice.hidden;
    this.#screen.classList.toggle("pixels", isSharp);
    const room = Math.min(this.#screen.parentElement.clientWidth - 2 * 16, HIGHEST * innerHeight);
    const zoom = Math.max(Math.floor(room / this.#width), 1); // whole, so that all pixels are squares of one size
    this.#screen.style.setProperty("--widest", isSharp ? `${zoom * this.#width}px` : "100%");
  }
}
