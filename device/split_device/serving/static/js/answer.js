/** Asking the server: an answer of the language model, or a picture, becomes a message of the conversation. */

import { Locked, aborted, call, events } from "./api.js";
import { $, count, fail, focusPrompt, say } from "./dom.js";
import { asksForSchema, chatBody, pictureBody, pictureSettings } from "./settings.js";
import { begin, look, served, showContext } from "./split.js";
import { context } from "./thread.js";

/** Milliseconds between two looks at what has left the device, during an answer. */
const LOOK_INTERVAL = 1000;

/** Aborts the answer under way; null while there is none. */
let answering = null;

export const busy = () => answering !== null;
export const stop = () => answering?.abort();

/**
 * Fills an answer's message by `produce`, which gets a signal to abort by, whatever becomes of it. `save` keeps the
 * conversation; `locked` asks for the key.
 */
async function turn(node, shown, produce, { save, locked }) {
  answering = new AbortController();
  show(true);
  delete node.error;
  delete node.ended;
  shown.busy = true;
  let timer = 0;
  try {
    await begin();
    timer = setInterval(() => look().then(save).catch(() => {}), LOOK_INTERVAL);
    await produce(answering.signal);
    say("Answered.");
  } catch (error) {
    node.ended = aborted(error) ? "stopped" : "broken";
    if (!aborted(error)) node.error = error.message || "The server asks for its key.";
    say(aborted(error) ? "Stopped." : "");
    if (error instanceof Locked) locked(error);
  } finally {
    clearInterval(timer);
    answering = null;
    shown.draw();
    shown.busy = false;
    shown.article.scrollIntoView({ block: "nearest" });
    show(false);
    look().catch(() => {});
    save();
  }
}

/** Whether an answer is under way decides which buttons there are. */
function show(busy) {
  document.body.toggleAttribute("data-busy", busy);
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  if (busy) fail("");
  if (busy) say("Answering …");
  focusPrompt();
}

/** An answer to `question`, or, if `node` has a text already, how it goes on. */
export function answer(conversation, question, node, shown, hooks) {
  return turn(node, shown, async (signal) => {
    const messages = context(conversation, question);
    const goesOn = node.text !== "";
    if (goesOn) messages.push({ role: "assistant", content: node.text });
    const more = goesOn ? { continue_final_message: true, add_generation_prompt: false } : {};
    const body = chatBody(served.model, messages, more);
    const response = await call("v1/chat/completions", { method: "POST", signal, body });
    const clock = { began: performance.now(), first: 0, tokens: 0, cached: 0 };
    const { notice, settled } = waiting(shown);
    node.form = asksForSchema() || undefined;
    for await (const event of events(response, notice)) {
      if (event.usage) {
        clock.tokens = event.usage.completion_tokens;
        clock.cached = event.usage.prompt_tokens_details?.cached_tokens ?? 0;
        node.context = event.usage.total_tokens;
        showContext(node.context);
      }
      const choice = event.choices[0];
      if (!choice) continue;
      settled();
      clock.first ||= performance.now();
      node.text += choice.delta.content ?? "";
      if (choice.delta.reasoning_content) node.thinking = (node.thinking ?? "") + choice.delta.reasoning_content;
      for (const delta of choice.delta.tool_calls ?? []) growCall((node.calls ??= []), delta);
      node.ended = choice.finish_reason ?? node.ended;
      shown.grow();
    }
    node.facts = facts(clock, goesOn);
    if (sameAsBefore(conversation, node)) node.facts += " · the same as before: a temperature makes it vary";
  }, hooks);
}

/** Shows what the server says while a message waits: `notice` takes it, and `settled` takes it away. */
function waiting(shown) {
  let noticed = false;
  const notice = (text) => {
    noticed = text !== "";
    shown.notice(text);
    say(text ? "Waiting …" : "Answering …");
  };
  return { notice, settled: () => noticed && notice("") };
}

/** Adds a piece of a tool call to those of an answer. */
function growCall(calls, { index, id, function: piece }) {
  const call = (calls[index] ??= { id: "", name: "", arguments: "" });
  call.id ||= id ?? "";
  call.name += piece?.name ?? "";
  call.arguments += piece?.arguments ?? "";
}

/** Whether an answer that was made again has come out as an earlier one. */
function sameAsBefore(conversation, node) {
  return conversation.nodes.some((one) => one !== node && one.parent === node.parent && one.text === node.text);
}

function facts({ began, first, tokens, cached }, goesOn) {
  const rate = tokens > 1 ? [`${((1000 * (tokens - 1)) / (performance.now() - first)).toFixed(1)} tokens/s`] : [];
  const made = `${tokens} ${goesOn ? "more " : ""}${tokens === 1 ? "token" : "tokens"}`;
  const saved = cached ? [`${count(cached)} of the prompt cached`] : [];
  return [made, ...rate, `first after ${((first - began) / 1000).toFixed(2)} s`, ...saved].join(" · ");
}

/** A picture for a prompt, with the settings of the page or those of another picture. */
export function draw(prompt, node, shown, hooks, settings = pictureSettings()) {
  return turn(node, shown, async (signal) => {
    const began = performance.now();
    const body = pictureBody(served.image_model, prompt, settings);
    const response = await call("v1/images/generations", { method: "POST", signal, body });
    const { notice, settled } = waiting(shown);
    const made = (await events(response, notice).next()).value;
    settled();
    const { b64_json: content, seed, steps, notes } = made;
    node.picture = {
      source: `data:image/png;base64,${content}`,
      size: made.size,
      steps: String(steps),
      // A seed that was given is shown as it was given; those that the server draws have 32 bits.
      seed: settings.seed ?? String(seed),
    };
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    const { picture } = node;
    node.facts = [picture.size, `${picture.steps} steps`, `${seconds} s`, `seed ${picture.seed}`, ...notes].join(" · ");
  }, hooks);
}

/** What a message asks for, "text" or "picture". Throws an error for the reader if it is not served. */
export function asksFor(text) {
  const found = /^\/image(?:\s+(.*))?$/s.exec(text);
  const asks = found || !served.model ? "picture" : "text";
  check(asks);
  if (found && !found[1]) throw new Error("Say what to show: /image a photo of a lighthouse");
  return asks;
}

/** Throws an error for the reader if no model is served for a "text" or a "picture". */
export function check(asks) {
  if (asks === "picture" && !served.image_model) {
    throw new Error("No image model is served here: start lambda-split serve with --image-model.");
  }
  if (asks === "text" && !served.model) {
    throw new Error("No language model is served here: start lambda-split serve with --model.");
  }
}
