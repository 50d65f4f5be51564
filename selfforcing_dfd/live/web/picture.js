/** A picture that the stream begins with: chosen, dropped onto the page, or pasted. */
export class StartPicture {
  #field; #thumb; #remove; #note; #say; #send;
  #limit = 16 * 2 ** 20;
  file = null; // what is sent again on a new connection

  /** send(file) resolves to an error in words, or to "". onRemoved() where the viewer takes it away. */
  constructor({ field, thumb, remove, note, drop }, { say, send, onRemoved }) {
    this.#field = field;
    this.#thumb = thumb;
    this.#remove = remove;
    this.#note = note;
    this.#say = say;
    this.#send = send;
    field.onchange = () => this.use(field.files[0]);
    remove.onclick = () => {
      this.forget();
      onRemoved();
    };
    drop.addEventListener("dragover", (event) => event.preventDefault());
    drop.addEventListener("drop", (event) => {
      event.preventDefault();
      this.use(event.dataTransfer.files[0]);
    });
    document.addEventListener("paste", (event) => event.clipboardData.files[0] && this.use(event.clipboardData.files[0]));
  }

  open({ max_picture_bytes: limit }) {
    this.#limit = limit;
  }

  /** Send a file, and keep it if the server takes it. */
  async use(file) {
    this.#field.value = ""; // so that the same file may be chosen again
    if (!file) return;
    if (file.size > this.#limit) {
      return this.#say(`the file has ${(file.size / 2 ** 20).toFixed(1)} MiB; at most ${this.#limit / 2 ** 20} are taken`, true);
    }
    const before = this.file;
    this.file = file; // the server's word may come before the answer
    const error = await this.#send(file);
    if (error) this.#say(error, true);
    this.file = error ? before : file;
    if (error) return;
    if (this.#thumb.src) URL.revokeObjectURL(this.#thumb.src);
    this.#thumb.src = URL.createObjectURL(file);
  }

  /** What the server says: whether a stream has a picture, and what its student makes of it. */
  show(hasPicture, student) {
    this.#thumb.hidden = this.#remove.hidden = !(hasPicture && this.file);
    this.#remove.disabled = student.needs_picture;
    const goesOn = "This student was not trained to begin with a picture: it goes on after it.";
    const needs = "This student begins with a picture.";
    this.#note.textContent = student.needs_picture ? needs : hasPicture ? goesOn : "";
  }

  forget() {
    this.file = null;
  }
}
