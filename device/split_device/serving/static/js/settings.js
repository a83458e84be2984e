/** The settings of requests: fields of the page. A field that is empty leaves its setting to the server. */

import { $, fail } from "./dom.js";
import { loadSettings, saveSettings } from "./store.js";

const fields = () => document.querySelectorAll("#settings input, #settings textarea");

const number = (id) => ($(id).value.trim() === "" ? undefined : Number($(id).value));
const text = (id) => $(id).value.trim() || undefined;

/** The texts at which an answer ends: one in each line, in which \n stands for a line break. */
function stops() {
  const found = $("stop-texts").value.split("\n").filter(Boolean);
  return found.length ? found.map((line) => line.replaceAll("\\n", "\n")) : undefined;
}

/** The value of a field of JSON; undefined if it is empty. Throws a SyntaxError if it is not JSON. */
const json = (id) => (text(id) === undefined ? undefined : JSON.parse(text(id)));

/** Whether answers have to look as a JSON Schema says. */
export const asksForSchema = () => text("schema") !== undefined;

/** The body of a request for an answer, as JSON. */
export function chatBody(model, messages, more) {
  const system = text("system");
  return withSeed(text("seed"), {
    model,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    temperature: number("temperature"),
    top_p: number("top-p"),
    max_tokens: number("max-tokens"),
    stop: stops(),
    tools: json("tools"),
    response_format: asksForSchema()
      ? { type: "json_schema", json_schema: { name: "answer", schema: json("schema") } }
      : undefined,
    stream: true,
    stream_options: { include_usage: true },
    ...more,
  });
}

/** What a picture is asked for with, except its prompt. */
export function pictureSettings() {
  return { size: text("picture-size"), steps: text("picture-steps"), seed: text("picture-seed") };
}

/** The body of a request for a picture, as JSON. */
export function pictureBody(model, prompt, { size, steps, seed }) {
  return withSeed(seed, { model, prompt, size, steps: steps && Number(steps), stream: true });
}

/** An object as JSON, with a seed that is digits: as a number JavaScript would round it above 2⁵³. */
function withSeed(seed, body) {
  const json = JSON.stringify(body);
  return seed === undefined ? json : `${json.slice(0, -1)},"seed":${BigInt(seed)}}`;
}

/** Whether all fields can be sent; shows the first that cannot. */
export function valid() {
  for (const field of fields()) {
    if (field.closest("[hidden]") || (field.checkValidity() && fits(field))) continue;
    $("settings").open = true;
    fail(`${field.labels[0].textContent.trim()}: ${field.title}.`);
    field.focus();
    return false;
  }
  return true;
}

/** Whether the text of a field is what its title says. */
function fits(field) {
  if (field.id === "stop-texts") return (stops()?.length ?? 0) <= 4;
  if (!["tools", "schema"].includes(field.id)) return true;
  try {
    const value = json(field.id);
    return value === undefined || Array.isArray(value) === (field.id === "tools");
  } catch {
    return false;
  }
}

export function restore() {
  const kept = loadSettings();
  for (const field of fields()) if (typeof kept[field.id] === "string") field.value = kept[field.id];
}

export function follow() {
  $("settings").addEventListener("change", () => {
    saveSettings(Object.fromEntries([...fields()].map((field) => [field.id, field.value])));
  });
}

/** Which settings there are follows from what is served, and what they are by default from the server. */
export function offer({ model, image_model: imageModel, defaults }) {
  $("text-settings").hidden = !model;
  $("picture-settings").hidden = !imageModel;
  for (const [id, name] of [["temperature", "temperature"], ["top-p", "top_p"]]) {
    $(id).placeholder = defaults?.[name] ?? "the server's";
  }
}
