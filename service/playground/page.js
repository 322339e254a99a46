// The page: what the server is, and from the form to the answer.

import { ask, Refusal } from "./api.js";
import { setUpAnswer, expectAnswer, showDefended, showPlain } from "./answer.js";
import { setUpAttack } from "./attack.js";
import { find, make } from "./dom.js";
import { labels, setUpLabels } from "./labels.js";
import { watch } from "./live.js";
import { picture, setUpPicture } from "./picture.js";

let info = null;
let running = null;

// What the form asks for, in the API's own shape.
function choices() {
  const defense = {};
  for (const name of ["method", "steps", "views"]) {
    const value = find(name).value.trim();
    if (value !== "") defense[name] = name === "method" ? value : Number(value);
  }
  const asked = { candidate_labels: labels() };
  if (Object.keys(defense).length) asked.defense = defense;
  if (find("template").value.trim()) asked.hypothesis_template = find("template").value.trim();
  return asked;
}

function say(text, wrong = false) {
  find("message").textContent = text;
  find("message").classList.toggle("wrong", wrong);
}

// What keeps the request from being sent, in words.
function objection() {
  const file = picture();
  const limit = info?.limits.max_body_bytes;
  if (!file) return "Choose a picture first.";
  if (labels().length < 2) return "Give at least two labels.";
  if (limit && 1.4 * file.size > limit) {
    return `The picture has ${(file.size / 2 ** 20).toFixed(1)} MB; the server takes about ${(limit / 1.4 / 2 ** 20).toFixed(0)} MB.`;
  }
  return null;
}

async function classify() {
  const wrong = objection();
  if (wrong) return say(wrong, true);
  running?.abort();
  const control = (running = new AbortController());
  const began = performance.now();
  const progress = setInterval(() => {
    const seconds = (performance.now() - began) / 1000;
    if (seconds > 1.5) say(`Still working: ${seconds.toFixed(0)} s.`);
  }, 500);
  const waiting = (text) => {
    clearInterval(progress);
    say(text);
  };
  busy(true);
  say("Looking ...");
  try {
    const asked = { ...choices(), image: await encode(picture()) };
    expectAnswer(asked, info);
    const send = async (path, body) => {
      const answer = await ask(path, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
        signal: control.signal,
        tell: waiting,
      });
      return answer.json();
    };
    const plain = { ...asked, defense: { method: "plain" } };
    showPlain(await send("v1/classify", plain));
    showDefended(await send(info?.policies.attack_demo ? "demo/classify" : "v1/classify", asked));
    say("");
  } catch (error) {
    if (running === control) report(error);
  } finally {
    clearInterval(progress);
    if (running === control) busy(false);
  }
}

function report(error) {
  if (error.name === "AbortError") say("Stopped.");
  else if (error instanceof Refusal) say(error.message, true);
  else {
    say("This page met something it does not understand.", true);
    throw error;
  }
}

function busy(on) {
  find("busy").classList.toggle("on", on);
  find("stop").hidden = !on;
  find("form").setAttribute("aria-busy", String(on));
  if (!on) running = null;
}

// A file as base64, without the detour over a string of characters.
export function encode(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.split(",", 2)[1]);
    reader.onerror = () => reject(new Refusal("The picture cannot be read."));
    reader.readAsDataURL(file);
  });
}

function health(state, text) {
  find("health").className = `health ${state}`;
  find("health-text").textContent = text;
}

async function learn() {
  health("", "connecting");
  try {
    await ask("readyz", { tell: (text) => health("waiting", text) });
    info = await (await ask("info")).json();
  } catch (error) {
    return health("down", error.message);
  }
  const { model, defaults, limits, methods, service } = info;
  health("up", `ready: ${model.name}`);
  for (const [name, { description }] of Object.entries(methods ?? {})) {
    find("method").append(make("option", { value: name, textContent: `${name}: ${description}` }));
  }
  find("method").options[0].textContent = `the server's default (${defaults.method})`;
  find("template").placeholder = info.bundle?.template ?? defaults.hypothesis_template;
  for (const name of ["steps", "views"]) {
    find(name).placeholder = defaults[name];
    find(name).max = limits[`max_${name}`];
  }
  find("about").textContent =
    `tapt-serve ${service.version}; model ${model.name}` +
    (model.parameters ? `, ${(model.parameters / 1e6).toFixed(1)} million parameters, ${model.image_size} pixels, on ${model.device}` : "") +
    ". A small model's answers are a demonstration, not advice.";
  expectAnswer(choices(), info);
  setUpAttack({ info, choices, picture, labels, encode, objection });
  return undefined;
}

setUpAnswer();
find("options").open = matchMedia("(min-width: 50rem)").matches;
setUpLabels(() => expectAnswer(choices(), info));
setUpPicture(() => say(""));
find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  classify();
});
find("stop").addEventListener("click", () => running?.abort());
learn();
watch();
