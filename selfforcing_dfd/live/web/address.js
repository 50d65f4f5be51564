/** Prompt, seed and student in the page's address, behind #: the server never sees or logs them. */
const NAMES = ["prompt", "seed", "student"];

/** What the address asks for; null for what it does not say. */
export function readAddress() {
  const said = new URLSearchParams(location.hash.slice(1));
  const seed = said.get("seed");
  return {
    prompt: said.get("prompt"),
    seed: seed !== null && /^\d{1,15}$/.test(seed) ? Number(seed) : null,
    student: said.get("student"),
    watch: said.get("watch"),
  };
}

/** Note what is shown; `isNew`: as a step that the back button takes back. */
export function writeAddress(shown, isNew) {
  const hash = `#${new URLSearchParams(NAMES.map((name) => [name, String(shown[name])]))}`;
  if (hash === location.hash) return;
  if (isNew && location.hash) history.pushState(null, "", hash);
  else history.replaceState(null, "", hash);
}

/** A link to watch a running stream. */
export function watchLink(stream) {
  return `${location.origin}/#${new URLSearchParams({ watch: stream })}`;
}
