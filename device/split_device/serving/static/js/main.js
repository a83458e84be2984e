/** The chat page: what the reader does, and what follows from it. */

import { Locked, lock } from "./api.js";
import { answer, asksFor, busy, check, draw, stop } from "./answer.js";
import { $, fail, focusPrompt, say } from "./dom.js";
import { List } from "./list.js";
import * as settings from "./settings.js";
import { look, showContext } from "./split.js";
import { loadTheme, saveTheme } from "./store.js";
import { add, newConversation, pictured, select } from "./thread.js";
import { View } from "./view.js";

let conversation = newConversation();

const view = new View({ edit, again, goOn, sameAgain, show });
const list = new List(open, () => open(newConversation()));

// --- conversations -------------------------------------------------------------------------------------------

function open(other) {
  if (other === conversation) return drawer(false);
  stop();
  conversation = other;
  view.show(other);
  list.mark(other);
  showContext(other.nodes[other.leaf]?.context);
  fail("");
  say("");
  drawer(false);
  focusPrompt();
}

function hooks() {
  const asked = conversation;
  return { save: () => list.save(asked), locked: askForKey };
}

/** Shows another version of a message. */
function show(index) {
  if (busy()) return;
  select(conversation, index);
  view.show(conversation);
  list.save(conversation);
}

// --- asking --------------------------------------------------------------------------------------------------

/** Asks a question that follows the message `parent`, and shows it with its answer. */
function ask(text, parent) {
  return reply(add(conversation, parent, { role: "user", text, asks: asksFor(text) }));
}

/**
 * Answers a question, by a new message or by filling `index`, an answer that came to nothing or is to go on; a picture
 * is made with the size, steps and seed of `like`, if that is given.
 */
function reply(question, index = null, like = undefined) {
  const { text, asks } = conversation.nodes[question];
  check(asks);
  index ??= add(conversation, question, { role: "assistant", text: "", asks });
  const node = conversation.nodes[index];
  const shown = view.show(conversation);
  list.current = conversation;
  list.save(conversation);
  if (asks === "picture") return draw(pictured(text), node, shown, hooks(), like);
  return answer(conversation, question, node, shown, hooks());
}

function edit(index, text) {
  if (busy() || !settings.valid()) return;
  attempt(() => ask(text, conversation.nodes[index].parent));
}

/** Makes an answer again; one that has nothing is replaced, others stay as another version. */
function again(index) {
  if (busy() || !settings.valid()) return;
  const { parent, text, picture } = conversation.nodes[index];
  attempt(() => reply(parent, text || picture ? null : index));
}

function sameAgain(index) {
  if (busy()) return;
  const { parent, picture } = conversation.nodes[index];
  attempt(() => reply(parent, null, picture));
}

function goOn(index) {
  if (busy() || !settings.valid()) return;
  attempt(() => reply(conversation.nodes[index].parent, index));
}

function attempt(action) {
  try {
    action();
  } catch (error) {
    fail(error.message);
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || busy() || !settings.valid()) return;
  if (text === "/help") help();
  else attempt(() => ask(text, conversation.leaf));
  if ($("error").hidden) $("prompt").value = "";
});

$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "ArrowUp" && !$("prompt").value && !busy()) {
    event.preventDefault();
    view.editLast();
  }
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});

$("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  // A dialog is closed by the browser.
  if (event.key !== "Escape" || $("help").open) return;
  stop();
  drawer(false);
});
$("reset").addEventListener("click", () => open(newConversation()));

// --- around the conversation -----------------------------------------------------------------------------------

function drawer(shown) {
  const wasIn = document.body.hasAttribute("data-drawer") && $("list").contains(document.activeElement);
  document.body.toggleAttribute("data-drawer", shown);
  $("menu").setAttribute("aria-expanded", String(shown));
  if (shown) $("search").focus();
  else if (wasIn) $("menu").focus();
}

$("menu").addEventListener("click", () => drawer(true));
for (const place of [$("close-menu"), $("log")]) place.addEventListener("click", () => drawer(false));

function help() {
  $("help").showModal();
}

$("open-help").addEventListener("click", help);
$("close-help").addEventListener("click", () => $("help").close());

function paint(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").value = theme;
}

$("theme").addEventListener("change", () => {
  saveTheme($("theme").value);
  paint($("theme").value);
});

// --- the key -------------------------------------------------------------------------------------------------

function askForKey(error) {
  document.body.toggleAttribute("data-locked", true);
  $("unlock").hidden = false;
  fail(error.message);
  $("key").focus();
}

$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  lock.open($("key").value);
  $("key").value = "";
  begin();
});

/** Shows the model and the conversations, if the server lets us. */
async function begin() {
  fail("");
  try {
    await look();
  } catch (error) {
    if (error instanceof Locked) askForKey(error);
    else fail(error.message);
    return;
  }
  document.body.toggleAttribute("data-locked", false);
  $("unlock").hidden = true;
  await list.load();
  focusPrompt();
}

paint(loadTheme());
settings.restore();
settings.follow();
if (matchMedia("(max-width: 68rem)").matches) $("split").open = false;
begin();
