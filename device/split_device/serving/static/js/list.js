/** The conversations that are kept: a list, search, export and import. */

import { $, button, download, fail, make } from "./dom.js";
import * as store from "./store.js";
import { checked, title } from "./thread.js";

const FORMAT = "lambda-split conversations";
const VERSION = 1;

const NO_STORE = "This browser keeps nothing here: conversations end with this page.";

/**
 * Shows the list. `open` is called with a conversation that the reader chooses; `closed` when what is open was
 * deleted.
 */
export class List {
  constructor(open, closed) {
    this._open = open;
    this._closed = closed;
    this._all = new Map();
    this.current = null;
    $("search").addEventListener("input", () => this._draw());
    $("keep").addEventListener("change", () => this._setKeeps($("keep").checked));
    $("delete-all").addEventListener("click", () => this._deleteAll());
    $("export").addEventListener("click", () => this._export());
    $("import").addEventListener("click", () => $("import-file").click());
    $("import-file").addEventListener("change", () => this._import());
  }

  async load() {
    $("keep").checked = store.keeps();
    try {
      for (const conversation of await store.loadAll()) this._all.set(conversation.id, conversation);
    } catch {
      fail(NO_STORE);
    }
    this._draw();
  }

  /** Keeps a conversation, or what has become of it. */
  async save(conversation) {
    conversation.updated = new Date().toISOString();
    this._all.set(conversation.id, conversation);
    this._draw();
    await store.save(conversation).catch((error) => {
      const full = error?.name === "QuotaExceededError";
      fail(full ? "This browser has no room for more conversations: delete some of them." : NO_STORE);
    });
  }

  _draw() {
    const wanted = $("search").value.trim().toLowerCase();
    const found = [...this._all.values()]
      .filter(({ nodes }) => nodes.some(({ text }) => text.toLowerCase().includes(wanted)))
      .sort((one, other) => other.updated.localeCompare(one.updated));
    const drawn = JSON.stringify(found.map((one) => [one.id, title(one), one === this.current]));
    // Not in vain: it would take the focus away from what is in the list.
    if (drawn !== this._drawn) $("conversations").replaceChildren(...found.map((one) => this._item(one)));
    this._drawn = drawn;
    $("none").hidden = found.length > 0;
    $("none").textContent = wanted ? "None of them has this text." : "None yet.";
    for (const id of ["export", "delete-all"]) $(id).disabled = this._all.size === 0;
  }

  _item(conversation) {
    const name = title(conversation);
    const open = button(name, () => this._open(conversation));
    open.dir = "auto";
    open.title = new Date(conversation.updated).toLocaleString();
    if (conversation === this.current) open.setAttribute("aria-current", "true");
    const item = make("li");
    item.append(open, button("×", () => this._delete(conversation), `Delete “${name}”`));
    return item;
  }

  /** Marks the conversation that is open. */
  mark(conversation) {
    this.current = conversation;
    this._draw();
  }

  async _delete(conversation) {
    if (!confirm(`Delete “${title(conversation)}”?`)) return;
    this._forget(conversation);
    await store.remove(conversation.id).catch(() => {});
  }

  _forget(conversation) {
    this._all.delete(conversation.id);
    if (conversation === this.current) this._closed();
    this._draw();
  }

  async _deleteAll() {
    if (!confirm("Delete all conversations that this browser keeps?")) return;
    for (const conversation of [...this._all.values()]) this._forget(conversation);
    await store.clear().catch(() => {});
  }

  async _setKeeps(keep) {
    if (!keep && !confirm("Keep nothing from now on, and delete what this browser has kept?")) {
      $("keep").checked = true;
      return;
    }
    await store.setKeeps(keep).catch(() => {});
    for (const conversation of [...this._all.values()]) {
      if (keep) await this.save(conversation);
      else if (conversation !== this.current) this._forget(conversation);
    }
  }

  _export() {
    const conversations = [...this._all.values()];
    const file = new Blob([JSON.stringify({ format: FORMAT, version: VERSION, conversations })], { type: "application/json" });
    const url = URL.createObjectURL(file);
    download(`lambda-split-${new Date().toISOString().slice(0, 10)}.json`, url);
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  }

  async _import() {
    const [file] = $("import-file").files;
    $("import-file").value = "";
    if (!file) return;
    try {
      const { format, version, conversations } = JSON.parse(await file.text());
      if (format !== FORMAT || version !== VERSION) throw new TypeError("another format");
      for (const conversation of conversations.map(checked)) await this._take(conversation);
      fail("");
    } catch {
      fail(`${file.name} is not a file that this page has exported.`);
    }
  }

  /** Adds a conversation of a file, unless the one that is here already was changed later. */
  async _take(conversation) {
    const known = this._all.get(conversation.id);
    if (known && known.updated >= conversation.updated) return;
    this._all.set(conversation.id, conversation);
    if (known === this.current && known) this._open(conversation);
    await store.save(conversation);
    this._draw();
  }
}
