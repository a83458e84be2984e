"use strict";

const $ = (id) => document.getElementById(id);

/** Where the API key lies while the tab is open. */
const KEY = "lambda-split-key";

/** Milliseconds between two looks at what has left the device, during an answer. */
const LOOK_INTERVAL = 1000;

/** What the models are called, if there are such, and the conversation so far in OpenAI's format. */
let model = null;
let imageModel = null;
let messages = [];
/** Aborts the answer under way; null while there is none. */
let answering = null;
/** What had left the device when the last answer began. */
let before = null;

// --- the server ----------------------------------------------------------------------------------------------

/** Fetches a path with the key. Throws an Error whose message is for the reader. */
async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("The server does not answer.");
  });
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  if (response.status === 401) {
    askForKey();
    throw new Error(key ? "The server refused this key." : "");
  }
  throw new Error(error?.message ?? `The server answered with status ${response.status}.`);
}

/** The events of an answer that is streamed. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error("The connection to the server broke.");
    });
    if (done) throw new Error("The server broke the answer off.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

/** Shows how the model is split and what has left the device; returns the latter. */
async function look() {
  const split = await (await call("split")).json();
  if (split.model !== model || split.image_model !== imageModel) showModel(split);
  const traffic = split.traffic;
  for (const cell of document.querySelectorAll("[data-all]")) {
    cell.textContent = quantity(cell.dataset.all, traffic[cell.dataset.all]);
  }
  for (const cell of before ? document.querySelectorAll("[data-last]") : []) {
    const name = cell.dataset.last;
    cell.textContent = quantity(name, traffic[name] - before[name]);
  }
  return traffic;
}

// --- asking --------------------------------------------------------------------------------------------------

/** A message of the reader's, and what `produce` makes of the answer to it. */
async function turn(text, produce) {
  const question = addMessage("user", "You");
  question.body.textContent = text;
  const answer = addMessage("assistant", "Answer");
  answer.article.setAttribute("aria-busy", "true");
  answering = new AbortController();
  show(true);
  let timer = 0;
  try {
    before = null;
    before = await look();
    timer = setInterval(() => look().catch(() => {}), LOOK_INTERVAL);
    await produce(answer);
    $("status").textContent = "Answered.";
  } catch (error) {
    if (error.name !== "AbortError") {
      fail(error.message);
      if (!answer.body.hasChildNodes()) takeBack(question, answer, text);
    }
    answer.facts.textContent = error.name === "AbortError" ? "stopped" : "broken off";
    $("status").textContent = error.name === "AbortError" ? "Stopped." : "";
  } finally {
    clearInterval(timer);
    answer.article.removeAttribute("aria-busy");
    answering = null;
    show(false);
    look().catch(() => {});
  }
}

async function ask(text) {
  const conversation = messages;
  let said = "";
  await turn(text, async (answer) => {
    let reason = null;
    const clock = { began: performance.now(), first: 0, tokens: 0 };
    for await (const event of events(await complete(text))) {
      if (event.usage) clock.tokens = event.usage.completion_tokens;
      const choice = event.choices[0];
      if (!choice) continue;
      clock.first ||= performance.now();
      said += choice.delta.content;
      reason = choice.finish_reason ?? reason;
      write(answer, said);
    }
    answer.facts.textContent = facts(clock, reason);
  });
  if (said) conversation.push({ role: "user", content: text }, { role: "assistant", content: said });
}

/** What an image is asked for by a message; null for a message that is to be answered by a text. */
function imagePrompt(text) {
  if (!imageModel) return null;
  return /^\/image\s+(.+)$/s.exec(text)?.[1] ?? (model ? null : text);
}

/** An image is no part of the conversation that the language model sees. */
function draw(text, prompt) {
  return turn(text, async (answer) => {
    const began = performance.now();
    const response = await call("v1/images/generations", {
      method: "POST",
      signal: answering.signal,
      body: JSON.stringify({ model: imageModel, prompt }),
    });
    const made = await response.json();
    const image = new Image();
    image.alt = prompt;
    image.src = `data:image/png;base64,${made.data[0].b64_json}`;
    await image.decode();
    answer.body.append(image);
    const seconds = `${((performance.now() - began) / 1000).toFixed(1)} s`;
    answer.facts.textContent = [made.size, seconds, `seed ${made.data[0].seed}`].join(" · ");
  });
}

function complete(text) {
  return call("v1/chat/completions", {
    method: "POST",
    signal: answering.signal,
    body: JSON.stringify({
      model,
      messages: [...messages, { role: "user", content: text }],
      temperature: Number($("temperature").value),
      max_tokens: Number($("max-tokens").value),
      stream: true,
      stream_options: { include_usage: true },
    }),
  });
}

/** A question that got no answer goes back to where it was written. */
function takeBack(question, answer, text) {
  question.article.remove();
  answer.article.remove();
  $("empty").hidden = $("log").querySelector("article") !== null;
  $("prompt").value ||= text;
}

// --- showing -------------------------------------------------------------------------------------------------

/** A message of the conversation: `body` takes a text or an image, `facts` a line about it. */
function addMessage(role, name) {
  const article = make("article", role);
  const message = { article, body: make("div", "body"), facts: make("p", "facts") };
  const heading = make("h2", role === "user" ? "unseen" : "");
  heading.textContent = name;
  article.append(heading, message.body, message.facts);
  $("empty").hidden = true;
  $("log").append(article);
  article.scrollIntoView({ block: "end" });
  return message;
}

function write(message, text) {
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  message.body.textContent = text;
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function facts(clock, reason) {
  const seconds = (performance.now() - clock.first) / 1000;
  const rate = clock.tokens > 1 ? [`${((clock.tokens - 1) / seconds).toFixed(1)} tokens/s`] : [];
  const first = `first after ${((clock.first - clock.began) / 1000).toFixed(2)} s`;
  const cut = reason === "length" ? ["cut off there"] : [];
  return [`${clock.tokens} tokens`, ...rate, first, ...cut].join(" · ");
}

function showModel(split) {
  model = split.model;
  imageModel = split.image_model;
  const names = [model, imageModel].filter(Boolean).join(", ");
  $("model").textContent = names;
  $("model").title = names;
  document.title = `${names} · lambda-split`;
  $("prompt").placeholder = !imageModel ? "Message" : model ? "Message, or /image …" : "What to show";
  const kind = model ? "layers" : "blocks";
  $("parts").replaceChildren();
  $("layers").replaceChildren();
  for (const { name, where, first, last } of split.parts) {
    const [term, range, place] = [make("dt", name), make("dd"), make("dd", "where")];
    term.textContent = name;
    range.textContent = last === first ? `no ${kind}` : `${kind} ${first}–${last - 1}`;
    place.textContent = where === "device" ? "this device" : "a worker";
    $("parts").append(term, range, place);
    for (let layer = first; layer < last; layer += 1) $("layers").append(make("i", name));
  }
}

/** Whether an answer is under way decides which button there is. */
function show(busy) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  if (busy) {
    $("error").hidden = true;
    $("status").textContent = "Answering …";
  }
  if (!("ontouchstart" in window)) $("prompt").focus();
}

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function askForKey() {
  $("ask").hidden = true;
  $("unlock").hidden = false;
  $("key").focus();
}

function quantity(name, value) {
  if (!name.startsWith("bytes")) return value.toLocaleString("en");
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = Math.min(Math.floor(Math.log10(Math.max(value, 1)) / 3), units.length - 1);
  return `${(value / 1000 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
}

function make(tag, name = "") {
  const element = document.createElement(tag);
  element.className = name;
  return element;
}

// --- what the reader does --------------------------------------------------------------------------------------

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || answering) return;
  $("prompt").value = "";
  const prompt = imagePrompt(text);
  prompt === null ? ask(text) : draw(text, prompt);
});

$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});

$("stop").addEventListener("click", () => answering?.abort());
document.addEventListener("keydown", (event) => event.key === "Escape" && answering?.abort());

$("reset").addEventListener("click", () => {
  answering?.abort();
  messages = [];
  for (const article of document.querySelectorAll("article")) article.remove();
  $("empty").hidden = false;
  fail("");
  $("status").textContent = "";
  $("prompt").focus();
});

$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value);
  $("key").value = "";
  begin();
});

/** Shows the model, if the server lets us. */
function begin() {
  $("unlock").hidden = true;
  $("ask").hidden = false;
  fail("");
  look().then(() => $("prompt").focus(), (error) => fail(error.message));
}

if (matchMedia("(max-width: 48rem)").matches) $("split").open = false;
begin();
