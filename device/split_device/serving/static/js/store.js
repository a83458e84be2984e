/** Conversations that this browser keeps, in IndexedDB, unless the reader wants nothing kept. */

const NAME = "lambda-split";
const TABLE = "conversations";

/** In localStorage: settings as JSON, and "no" if nothing is to be kept. */
const SETTINGS = "lambda-split-settings";
const KEEP = "lambda-split-keep";
const THEME = "lambda-split-theme";

let opened = null;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

/** Runs a request against the table, in a transaction of its own. */
async function transact(mode, ask) {
  const transaction = (await database()).transaction(TABLE, mode);
  return new Promise((resolve, reject) => {
    const request = ask(transaction.objectStore(TABLE));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

export const keeps = () => localStorage.getItem(KEEP) !== "no";

/** Whether conversations and settings are kept from now on. If not, what was kept is deleted. */
export async function setKeeps(keep) {
  if (keep) return localStorage.removeItem(KEEP);
  localStorage.setItem(KEEP, "no");
  localStorage.removeItem(SETTINGS);
  return clear();
}

export const loadAll = () => transact("readonly", (table) => table.getAll());
export const remove = (id) => transact("readwrite", (table) => table.delete(id));
export const clear = () => transact("readwrite", (table) => table.clear());

/** Keeps a conversation, if that is wanted. */
export async function save(conversation) {
  if (keeps() && conversation.nodes.length) await transact("readwrite", (table) => table.put(conversation));
}

export function loadSettings() {
  try {
    return JSON.parse(localStorage.getItem(SETTINGS)) ?? {};
  } catch {
    return {};
  }
}

export function saveSettings(settings) {
  if (keeps()) localStorage.setItem(SETTINGS, JSON.stringify(settings));
}

export const loadTheme = () => localStorage.getItem(THEME) ?? "system";

export function saveTheme(theme) {
  if (theme === "system") localStorage.removeItem(THEME);
  else localStorage.setItem(THEME, theme);
}
