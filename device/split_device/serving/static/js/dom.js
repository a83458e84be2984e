/** Short names for what every part of the page does with elements, texts and files. */

export const $ = (id) => document.getElementById(id);

/** An element with a class, and a text if one is given. */
export function make(tag, name = "", text = null) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== null) element.textContent = text;
  return element;
}

/** A button that does something. `label` is what it is called where its text alone would not say it. */
export function button(text, action, label = "") {
  const element = make("button", "small", text);
  element.type = "button";
  if (label) element.setAttribute("aria-label", label);
  element.addEventListener("click", action);
  return element;
}

/** A button that copies what `text()` returns, and says so. */
export function copyButton(text, label) {
  const element = button("Copy", async () => {
    element.textContent = (await copied(text())) ? "Copied" : "Not copied";
    setTimeout(() => (element.textContent = "Copy"), 2000);
  }, label);
  return element;
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copiedBySelection(text);
  }
}

/** Browsers have no clipboard for pages of plain HTTP, except those of the loopback. */
function copiedBySelection(text) {
  const field = make("textarea", "unseen");
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  return done;
}

/** Hands a file to the reader. */
export function download(name, url) {
  const link = make("a");
  link.href = url;
  link.download = name;
  link.click();
}

/** Shows an error below the conversation; an empty text takes it away. */
export function fail(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

export function say(text) {
  $("status").textContent = text;
}

export const count = (value) => value.toLocaleString("en");

/** A number of bytes in the unit that suits it. */
export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = Math.min(Math.floor(Math.log10(Math.max(value, 1)) / 3), units.length - 1);
  return `${(value / 1000 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
}

/** On a touch screen focus would open the keyboard. */
export function focusPrompt() {
  if (!("ontouchstart" in window)) $("prompt").focus();
}
