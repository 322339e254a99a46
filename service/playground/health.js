// The header's light: whether the server is ready, asked again and again while the page is in view.

import { pause } from "./api.js";
import { find } from "./dom.js";

const EVERY = 600; // milliseconds: a server that goes away is noticed within a second
const PATIENCE = 2000; // milliseconds that an answer may take

// `learn()` is called whenever the server becomes ready. It resolves with the model's name.
export async function watchHealth(learn) {
  let ready = false;
  show("", "connecting");
  for (;;) {
    if (!document.hidden) {
      const problem = await probe();
      if (problem) show(...problem);
      else if (!ready) {
        try {
          show("up", `ready: ${await learn()}`);
        } catch (error) {
          show("down", error.message); // no key, for instance; asked for again after the next outage
        }
      }
      ready = !problem;
    }
    await pause(EVERY);
  }
}

// What is wrong with the server, as state and words, or null.
async function probe() {
  try {
    const answer = await fetch("readyz", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    return answer.ok ? null : ["waiting", (await answer.json()).error];
  } catch {
    return ["down", "The server cannot be reached."];
  }
}

function show(state, text) {
  find("health").className = `health ${state}`;
  find("health-text").textContent = text;
}
