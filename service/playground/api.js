// Calls to the API. A busy server is retried after its Retry-After. The user is asked for a key if
// the server requires one; it is kept in this module only.

import { find } from "./dom.js";

const PATIENCE = 6; // times that a busy server is asked again

let key = "";
let asking = null;

export class Refusal extends Error {}

// Resolves with the Response of a successful request. `tell(text)` is called while it waits; a
// `quiet` call neither waits nor asks for a key.
export async function ask(path, { tell = () => {}, signal, quiet = false, ...options } = {}) {
  for (let attempt = 0; ; attempt += 1) {
    const used = key;
    const answer = await send(path, { ...options, signal });
    if (answer.ok) return answer;
    const reason = await words(answer);
    if (quiet) throw new Refusal(reason);
    if (answer.status === 401) {
      if (used === key && !(await askForKey(used && reason))) throw new Refusal(reason);
      continue;
    }
    const wait = Number(answer.headers.get("Retry-After"));
    if (!wait || attempt >= PATIENCE) throw new Refusal(reason);
    await countDown(wait, reason, tell, signal);
  }
}

async function send(path, options) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  try {
    return await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached. Is it still running?");
  }
}

async function words(answer) {
  try {
    return (await answer.json()).error ?? `The server answered ${answer.status}.`;
  } catch {
    return `The server answered ${answer.status}.`;
  }
}

async function countDown(seconds, reason, tell, signal) {
  for (let left = seconds; left > 0; left -= 1) {
    tell(`${reason} Trying again in ${left} s.`);
    await pause(1000, signal);
  }
  tell("Trying again.");
}

export function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

// One dialog for all refused requests. Resolves with whether a key was entered. `reason` tells what
// was wrong with the last one.
function askForKey(reason) {
  asking ??= new Promise((resolve) => {
    const dialog = find("key-dialog");
    if (reason) find("key-note").textContent = `${reason} Do you have another?`;
    const done = (given) => {
      key = given;
      find("key").value = "";
      dialog.close();
      resolve(given !== "");
    };
    find("key-form").onsubmit = (event) => {
      event.preventDefault();
      done(find("key").value.trim());
    };
    find("key-cancel").onclick = () => done("");
    dialog.oncancel = () => done("");
    dialog.showModal();
  }).finally(() => {
    asking = null;
  });
  return asking;
}

// The lines of a streamed answer as objects, as they arrive.
export async function* lines(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    rest += value ?? "";
    const whole = rest.split("\n");
    rest = whole.pop();
    for (const line of whole) yield JSON.parse(line);
    if (done) return;
  }
}
