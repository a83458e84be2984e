/** Messages of a conversation, as they are shown. */

import { $, button, copyButton, download, focusPrompt, make } from "./dom.js";
import { Rendering } from "./markdown.js";
import { called, formOf } from "./structured.js";
import { path, pictured, siblings } from "./thread.js";

/**
 * Shows conversations. `doing` has what the buttons do, each with the message's index: `edit` (and the new text),
 * `again`, `goOn`, `sameAgain` and `show`.
 */
export class View {
  constructor(doing) {
    this._doing = doing;
  }

  /** Shows a conversation from its first message to its last. Returns the last as it is shown. */
  show(conversation) {
    const shown = path(conversation).map((index) => new Shown(this._doing, conversation, index));
    for (const article of document.querySelectorAll("#log > article")) article.remove();
    $("log").append(...shown.map(({ article }) => article));
    $("log").scrollTop = $("log").scrollHeight;
    $("empty").hidden = shown.length > 0;
    return shown.at(-1);
  }

  /** The reader's last question becomes a field in which it can be changed. */
  editLast() {
    [...document.querySelectorAll("#log > article.user [data-does=edit]")].at(-1)?.click();
  }
}

/** One message: a text or a picture, a line of facts, and buttons. */
export class Shown {
  constructor(doing, conversation, index) {
    this._doing = doing;
    this._conversation = conversation;
    this._index = index;
    this.node = conversation.nodes[index];
    const { role } = this.node;
    this.article = make("article", role);
    this.body = make("div", "body");
    this.body.dir = "auto";
    this._facts = make("p", "facts");
    this._error = make("p", "problem");
    this._error.setAttribute("role", "alert");
    this._actions = make("div", "actions");
    const heading = make("h2", role === "user" ? "unseen" : "", role === "user" ? "You" : "Answer");
    this._thinking = make("details", "thinking");
    this._thinking.append(make("summary", "", "Thinking"), make("div"));
    this._calls = make("div", "calls");
    this.article.append(heading, this._thinking, this.body, this._calls, this._error, this._facts, this._actions);
    this._rendering = role === "assistant" ? new Rendering(this.body) : null;
    this.draw();
  }

  /** Whether the answer is under way. */
  set busy(busy) {
    this.article.setAttribute("aria-busy", String(busy));
  }

  /** Shows the text so far. */
  grow() {
    const log = $("log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    this._think();
    this._calls.replaceChildren(...called(this.node.calls));
    this._rendering.update(this.node.text, () => atEnd && (log.scrollTop = log.scrollHeight));
  }

  /** Shows what the server says while there is nothing new of the answer; an empty text takes it away. */
  notice(text) {
    this._error.textContent = text;
    this._error.hidden = !text;
  }

  /** Shows what the model thought, folded. */
  _think() {
    this._thinking.hidden = !this.node.thinking;
    this._thinking.lastChild.textContent = this.node.thinking ?? "";
  }

  draw() {
    this._think();
    const { text, picture, facts, ended, error, form, calls } = this.node;
    const fields = form && ended === "stop" ? formOf(text) : null;
    this._calls.replaceChildren(...called(calls));
    if (picture) this.body.replaceChildren(drawn(picture, pictured(this._question.text)));
    else if (this._rendering) this._rendering.finish(text);
    else this.body.textContent = text;
    if (fields) this.body.replaceChildren(fields);
    this.notice(error ?? "");
    this._facts.textContent = [facts, ENDED[ended]].filter(Boolean).join(" · ");
    this._actions.replaceChildren(...this._branches(), ...this._buttons());
  }

  get _question() {
    return this._conversation.nodes[this.node.parent];
  }

  _buttons() {
    const { role, text, picture, ended, error } = this.node;
    if (role === "user") return [copyButton(() => text, "Copy the message"), this._edit()];
    const does = (name, label) => {
      const element = button(label, () => this._doing[name](this._index));
      element.dataset.does = name;
      return element;
    };
    if (picture) return [savePicture(picture), does("sameAgain", "Same again"), does("again", "Another one")];
    const copy = text ? [copyButton(() => text, "Copy the answer")] : [];
    const goOn = text && !["stop", "tool_calls"].includes(ended) ? [does("goOn", "Go on")] : [];
    return [...copy, ...goOn, does("again", error || !(text || this.node.calls) ? "Try again" : "Regenerate")];
  }

  _edit() {
    const element = button("Edit", () => this._change(), "Edit the message");
    element.dataset.does = "edit";
    return element;
  }

  /** The message becomes a field in which it can be changed. */
  _change() {
    const field = make("textarea");
    field.value = this.node.text;
    field.dir = "auto";
    field.setAttribute("aria-label", "Edit the message");
    const done = () => {
      this.draw();
      focusPrompt();
    };
    const send = () => (field.value.trim() ? this._doing.edit(this._index, field.value.trim()) : done());
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") done();
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      send();
    });
    this.body.replaceChildren(field);
    this._actions.replaceChildren(button("Send", send, "Send the edited message"), button("Cancel", done));
    field.focus();
  }

  /** Which of several versions this is, and the way to the others. */
  _branches() {
    const all = siblings(this._conversation, this._index);
    if (all.length < 2) return [];
    const at = all.indexOf(this._index);
    const go = (text, other, label) => {
      const element = button(text, () => this._doing.show(other), label);
      element.disabled = other === undefined;
      return element;
    };
    const where = make("span", "version", `${at + 1} of ${all.length}`);
    return [go("‹", all[at - 1], "Earlier version"), where, go("›", all[at + 1], "Later version")];
  }
}

/** What is said of how an answer ended. */
const ENDED = {
  length: "cut off at “Most tokens” or the end of the context",
  stopped: "stopped",
  broken: "broken off",
};

function drawn(picture, prompt) {
  const image = new Image();
  image.alt = prompt;
  image.src = picture.source;
  // Until it is decoded it has no height to scroll by.
  const [width, height] = picture.size.split("x");
  image.width = Number(width);
  image.height = Number(height);
  return image;
}

function savePicture({ source, seed }) {
  return button("Save", () => download(`picture-${seed}.png`, source), "Save the picture");
}
