/** The server: requests, streams of events, and errors in words for the reader. */

/** Where the API key lies while the tab is open. */
const KEY = "lambda-split-key";

export const lock = { key: () => sessionStorage.getItem(KEY), open: (key) => sessionStorage.setItem(KEY, key) };

/** The server refused the key, or there is none. */
export class Locked extends Error {}

/** An error whose message is for the reader. */
class Failure extends Error {}

/** Fetches a path with the key. Throws an error whose message is for the reader, or an AbortError. */
export async function call(path, options = {}) {
  const key = lock.key();
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw aborted(error) ? error : new Failure("The server does not answer. Does lambda-split serve still run?");
  });
  if (response.ok) return response;
  if (response.status === 401) throw new Locked(key ? "The server refused this key." : "");
  const { error } = await response.json().catch(() => ({}));
  throw new Failure(inWords(error ?? { message: `status ${response.status}` }, response));
}

export const aborted = (error) => error.name === "AbortError";

/**
 * The events of an answer that is streamed. `notice` is called with what the server says meanwhile in comments,
 * for example that it waits for a worker.
 */
export async function* events(response, notice) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw aborted(error) ? error : new Failure("The connection to the server broke.");
    });
    if (done) throw new Failure("The server broke the answer off.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith(":")) notice(line.slice(1).trim());
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Failure(inWords(event.error, response));
      yield event;
    }
  }
}

/** What is said of the server's errors, by their code. */
const WORDS = {
  context_length_exceeded:
    "The conversation is too long for the model. Shorten the message or the system prompt, or begin a new chat.",
  NoWorker: "No worker answers. Start one with lambda-split worker, and try again.",
  WorkerGone: "The worker is gone. Start another one with lambda-split worker, and try again.",
  SessionLost: "The worker is gone. Start another one with lambda-split worker, and try again.",
  WorkerSlow: "The worker took too long. Try again, or start another one with lambda-split worker.",
  StepFailed: "The worker failed at this. Try again; its log says why.",
  WorkerFailed: "The worker failed at this. Try again; its log says why.",
  HistoryLost: "The worker is gone, and the conversation must be sent to another one. Try again.",
  BrokerUnreachable: "The broker does not answer. Start it with lambda-split broker, and try again.",
  Busy: "The server or its workers have no room at the moment. Try again in a while.",
};

/** The request's id is by what the device's log names it. */
function inWords({ code, message }, response) {
  const id = response.headers.get("X-Request-Id");
  const details = id ? `${message}; request ${id}` : message;
  return Object.hasOwn(WORDS, code) ? `${WORDS[code]} (${details})` : `The server could not do this: ${details}`;
}
