/** Answers that are not prose: calls of tools, and values of a JSON Schema as a form. */

import { make } from "./dom.js";

/** Calls of tools, and how to go on after them. */
export function called(calls = []) {
  if (!calls.length) return [];
  const shown = calls.map(({ name, arguments: given }) => {
    const block = make("div", "call");
    block.append(make("p", "", `Calls ${name}`), formOf(given) ?? make("pre", "", given));
    return block;
  });
  const each = calls.length > 1 ? "results, one per line" : "result";
  return [...shown, make("p", "note", `Nothing is called from here: your next message is sent as the ${each}.`)];
}

/** A JSON object as a list of its fields; null if the text is not one. */
export function formOf(text) {
  try {
    const value = JSON.parse(text);
    return value !== null && typeof value === "object" ? field(value) : null;
  } catch {
    return null;
  }
}

function field(value) {
  if (value === null || typeof value !== "object") {
    const plain = make("span", typeof value, String(value));
    plain.dir = "auto";
    return plain;
  }
  if (Array.isArray(value)) {
    const list = make("ol");
    for (const each of value) list.append(item("li", each));
    return list;
  }
  const form = make("dl", "form");
  for (const [name, each] of Object.entries(value)) form.append(make("dt", "", name), item("dd", each));
  return form;
}

function item(kind, value) {
  const element = make(kind);
  element.append(field(value));
  return element;
}
