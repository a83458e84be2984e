/** What is served, which layers run where, and what has left the device. */

import { call } from "./api.js";
import { $, bytes, count, make } from "./dom.js";
import { offer } from "./settings.js";

/** What the server serves: the answer of its `/split`. Names are null until it is known. */
export let served = { model: null, image_model: null, context: null };

/** What had left the device when the last answer began. */
let before = null;

/** Shows how the model is split and what has left the device. */
export async function look() {
  const split = await (await call("split")).json();
  if (split.model !== served.model || split.image_model !== served.image_model) showModel(split);
  served = split;
  for (const cell of document.querySelectorAll("[data-all]")) {
    cell.textContent = quantity(cell.dataset.all, split.traffic[cell.dataset.all]);
  }
  for (const cell of before ? document.querySelectorAll("[data-last]") : []) {
    const name = cell.dataset.last;
    cell.textContent = quantity(name, split.traffic[name] - before[name]);
  }
}

/** From here on what leaves the device is counted as the last answer's. */
export async function begin() {
  before = null;
  await look();
  before = served.traffic;
}

/** How many tokens of the context are used, if the server says how many there are. */
export function showContext(used) {
  const known = used && served.context;
  $("context").textContent = known ? `context: ${count(used)} of ${count(served.context)} tokens` : "";
}

const quantity = (name, value) => (name.startsWith("bytes") ? bytes(value) : count(value));

function showModel(split) {
  const { model, image_model: imageModel } = split;
  const names = [model, imageModel].filter(Boolean).join(", ");
  $("model").textContent = names;
  $("model").title = names;
  document.title = `${names} · lambda-split`;
  $("prompt").placeholder = !imageModel ? "Message" : model ? "Message, or /image …" : "What to show";
  offer(split);
  const kind = model ? "layers" : "blocks";
  $("parts").replaceChildren();
  $("layers").replaceChildren();
  for (const { name, where, first, last } of split.parts) {
    const range = last === first ? `no ${kind}` : `${kind} ${first}–${last - 1}`;
    const place = where === "device" ? "this device" : "a worker";
    $("parts").append(make("dt", name, name), make("dd", "", range), make("dd", "where", place));
    for (let layer = first; layer < last; layer += 1) $("layers").append(make("i", name));
  }
}
