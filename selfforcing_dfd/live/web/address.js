/** Prompt, seed, student and later prompts in the page's address, behind #: no server logs them. */
const CHANGE = /^(\d{1,9})\.(\w+)\.([^]+)$/; // first chunk, mode and text of a later prompt
const LONGEST = 8000; // characters; what mails and chats pass on whole
const OURS = { isOurs: true }; // what the page wrote itself, in the history of the browser

/** What the address asks for; null for what it does not say. */
export function readAddress() {
  const said = new URLSearchParams(location.hash.slice(1));
  const seed = said.get("seed");
  return {
    prompt: said.get("prompt"),
    seed: seed ? (/^\d{1,16}$/.test(seed) ? Number(seed) : NaN) : null,
    student: said.get("student"),
    changes: said.getAll("then").map(readChange),
    watch: said.get("watch"),
  };
}

/** What is no change is left for the server to refuse, in words. */
function readChange(said) {
  const [, chunk, mode, text] = CHANGE.exec(said) ?? [];
  return chunk ? { chunk: Number(chunk), text, mode } : { said };
}

/** Whether the page wrote the address, and not the viewer. */
export function isOwnAddress() {
  return history.state?.isOurs === true;
}

/** Note what is shown; `isNew`: as a step that the back button takes back. */
export function writeAddress(shown, isNew) {
  const whole = shown.changes && hashOf(shown.first, shown, shown.changes);
  const hash = whole && whole.length <= LONGEST ? whole : hashOf(shown.prompt, shown, []);
  if (hash === location.hash && isOwnAddress()) return;
  if (isNew && location.hash && hash !== location.hash) history.pushState(OURS, "", hash);
  else history.replaceState(OURS, "", hash);
}

function hashOf(prompt, { seed, student }, changes) {
  const said = new URLSearchParams({ prompt, seed, student });
  for (const { chunk, mode, text } of changes) said.append("then", `${chunk}.${mode}.${text}`);
  return `#${said}`;
}

/** A link to watch a running stream. */
export function watchLink(stream) {
  return `${location.origin}/#${new URLSearchParams({ watch: stream })}`;
}
