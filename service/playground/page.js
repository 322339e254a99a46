// The page: what the server is, and from the form to the answer.

import { ask, Refusal } from "./api.js";
import { clearAnswer, expectAnswer, setUpAnswer, showDefended, showPlain } from "./answer.js";
import { clearAttack, setUpAttack } from "./attack.js";
import { setUpCommand, showCommand } from "./curl.js";
import { find, make } from "./dom.js";
import { labels, setUpLabels } from "./labels.js";
import { watchHealth } from "./health.js";
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
  const limit = info?.limits.max_body_bytes ?? Infinity;
  if (!file) return "Choose a picture first.";
  if (labels().length < 2) return "Give at least two labels.";
  const asked = choices();
  const rest = Math.max(...[asked, undefended(asked)].map((one) => new Blob([JSON.stringify({ ...one, image: "" })]).size));
  const size = rest + 4 * Math.ceil(file.size / 3);
  return size > limit ? `The request would have ${size} bytes; the limit is ${limit}.` : null;
}

const undefended = (asked) => ({ ...asked, defense: { method: "plain" } });

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
  say("");
  expectAnswer(choices(), info);
  try {
    const asked = { ...choices(), image: await encode(picture()) };
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
    showPlain(await send("v1/classify", undefended(asked)));
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
  clearAnswer();
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

// Read what the server is, at the start and whenever it comes back. Returns the model's name.
async function learn() {
  const known = info !== null;
  info = await (await ask("info")).json();
  const { model, defaults, limits, methods, service } = info;
  find("method").replaceChildren(
    make("option", { value: "", textContent: `the server's default (${defaults.method})` }),
    ...Object.entries(methods ?? {}).map(([name, { description }]) =>
      make("option", { value: name, textContent: `${name}: ${description}` }),
    ),
  );
  const template = info.bundle?.template ?? defaults.hypothesis_template;
  find("template").placeholder = typeof template === "string" ? template : JSON.stringify(template);
  for (const name of ["steps", "views"]) {
    find(name).placeholder = defaults[name];
    find(name).max = limits[`max_${name}`];
  }
  find("about").textContent =
    `tapt-serve ${service.version}; model ${model.name}` +
    (model.parameters ? `, ${(model.parameters / 1e6).toFixed(1)} million parameters, ${model.image_size} pixels, on ${model.device}` : "") +
    ". A small model's answers are a demonstration, not advice.";
  tellCommand();
  if (!known) setUpAttack({ info: () => info, choices, picture, labels, encode, objection });
  return model.name;
}

// Whatever was asked changed: forget the answers to what was asked before.
function forget(problem = "") {
  running?.abort();
  busy(false);
  clearAnswer();
  clearAttack();
  tellCommand();
  say(problem, problem !== "");
}

function tellCommand() {
  showCommand(choices(), picture()?.name || "picture.png", find("preview").src, info);
}

// Lower a number to the server's limit, as the server would.
function limit({ target }) {
  if (target.value === "" || !target.max) return;
  target.value = Math.max(target.min, Math.min(target.max, Math.round(target.value)));
}

setUpAnswer();
setUpCommand();
setUpLabels(() => forget());
setUpPicture(
  () => forget(),
  ({ name }) => forget(`${name} is not a picture. The server reads ${info?.images.formats.join(", ") ?? "JPEG, PNG and others"}.`),
);
for (const name of ["steps", "views"]) find(name).addEventListener("change", limit);
for (const name of ["template", "method", "steps", "views"]) find(name).addEventListener("change", () => forget());
find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  classify();
});
find("stop").addEventListener("click", () => running?.abort());
watchHealth(learn);
watch();
