/** How the video is enlarged: as sharp pixels or smoothly; remembered by the browser. */
const KEY = "live-stream-look";
const SMALL = 256; // pixels; from here on a screen shows a video about as it is
const WIDEST = 640;

export class Look {
  #screen; #choice; #whole = "100%";

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
    this.#apply();
  }

  /** Sizes of the video that follows. */
  open({ width }) {
    const isSmall = width < SMALL;
    this.#choice.hidden = !isSmall;
    const zoom = Math.floor(WIDEST / width); // whole, so that all pixels are squares of one size
    this.#whole = isSmall ? `${zoom * width}px` : "100%";
    this.#apply();
  }

  #apply() {
    const chosen = this.#choice.querySelector("input:checked");
    const isSharp = chosen?.value === "pixels" && !this.#choice.hidden;
    this.#screen.classList.toggle("pixels", isSharp);
    this.#screen.style.setProperty("--widest", isSharp ? this.#whole : "100%");
  }
}
