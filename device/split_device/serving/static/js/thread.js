/**
 * A conversation as data: a tree, because a question may be edited and an answer made again.
 *
 * `nodes` are messages in the order in which they were made; `parent` of one is the index of the message that it
 * follows, -1 for the first. What is shown is the path that ends at `leaf`.
 */

export function newConversation() {
  const now = new Date().toISOString();
  return { id: randomId(), created: now, updated: now, leaf: -1, nodes: [] };
}

/** `crypto.randomUUID` is missing on pages of plain HTTP, except those of the loopback. */
function randomId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Adds a message and makes it the last one that is shown. Returns its index. */
export function add(conversation, parent, node) {
  conversation.nodes.push({ parent, ...node });
  conversation.leaf = conversation.nodes.length - 1;
  return conversation.leaf;
}

/** The indices of the messages from the first one to this one. */
export function path(conversation, last = conversation.leaf) {
  const found = [];
  for (let index = last; index >= 0; index = conversation.nodes[index].parent) found.unshift(index);
  return found;
}

/** The messages that stand in the place of this one, itself included. */
export function siblings(conversation, index) {
  const { parent } = conversation.nodes[index];
  return conversation.nodes.flatMap((node, other) => (node.parent === parent ? [other] : []));
}

/** Shows this message, and what last followed it. */
export function select(conversation, index) {
  conversation.leaf = index;
  conversation.nodes.forEach((node, other) => {
    if (node.parent === conversation.leaf) conversation.leaf = other;
  });
}

/** What a conversation is called in lists. */
export function title(conversation) {
  return conversation.nodes[0]?.text.trim().slice(0, 80) || "Untitled";
}

/** What a picture is to show, of the message that asked for it. */
export const pictured = (text) => text.replace(/^\/image\s+/, "");

/** What the model is sent to answer a question; pictures, and questions without an answer, are left out. */
export function context(conversation, question) {
  const nodes = path(conversation, question).map((index) => conversation.nodes[index]);
  return nodes.flatMap((node, at) => {
    const answered = node.role === "assistant" || at === nodes.length - 1 || nodes[at + 1].text || nodes[at + 1].calls;
    if (node.asks === "picture" || (!node.text && !node.calls) || !answered) return [];
    if (node.calls) return [{ role: "assistant", content: node.text || null, tool_calls: node.calls.map(asCall) }];
    const { calls } = nodes[at - 1] ?? {};
    return calls ? results(calls, node.text) : [{ role: node.role, content: node.text }];
  });
}

const asCall = ({ id, name, arguments: given }) => ({ id, type: "function", function: { name, arguments: given } });

/** What follows tool calls is their result: a line for each of several, or else the whole text for each. */
function results(calls, text) {
  const lines = text.split("\n");
  const each = calls.length > 1 && lines.length === calls.length ? lines : calls.map(() => text);
  return calls.map(({ id }, index) => ({ role: "tool", tool_call_id: id, content: each[index] }));
}

const TYPES = { role: "string", text: "string", parent: "number" };

/** A conversation of a file, with nothing in it that this page would not have written. Throws if it is not one. */
export function checked(given) {
  const nodes = given.nodes.map((node, index) => {
    const valid = Object.entries(TYPES).every(([name, type]) => typeof node[name] === type);
    const placed = Number.isInteger(node.parent) && node.parent >= -1 && node.parent < index;
    if (!valid || !placed || !["user", "assistant"].includes(node.role)) throw new TypeError("not a message");
    const { parent, role, text, asks, facts, ended, error, thinking, form, calls } = node;
    return {
      ...{ parent, role, text, asks: asks === "picture" ? asks : "text" },
      ...(typeof facts === "string" && { facts }),
      ...(typeof ended === "string" && { ended }),
      ...(typeof error === "string" && { error }),
      ...(typeof thinking === "string" && { thinking }),
      ...(form === true && { form }),
      ...(calls && { calls: calls.map(checkedCall) }),
      ...(node.picture && { picture: checkedPicture(node.picture) }),
    };
  });
  if (!nodes.length || !nodes[given.leaf] || !/^[0-9a-f]{32}$/.test(given.id)) throw new TypeError("not a conversation");
  const [created, updated] = [given.created, given.updated].map((time) => new Date(time).toISOString());
  return { id: given.id, created, updated, leaf: given.leaf, nodes };
}

function checkedCall({ id, name, arguments: given }) {
  if (![id, name, given].every((value) => typeof value === "string")) throw new TypeError("not a tool call");
  return { id, name, arguments: given };
}

function checkedPicture({ source, size, seed, steps }) {
  if (!/^data:image\/png;base64,[\w+/]+=*$/.test(source) || !/^\d+x\d+$/.test(size)) throw new TypeError("not a picture");
  if (!/^-?\d+$/.test(seed) || !/^\d+$/.test(steps)) throw new TypeError("not a picture");
  return { source, size, seed: String(seed), steps: String(steps) };
}
