// Classify an image with undefended CLIP and with the defense, and print both results.
// Usage: node classify.mjs IMAGE LABEL LABEL...

import { readFile } from "node:fs/promises";

const URL = process.env.CLASSIFY_URL ?? "http://127.0.0.1:8000";
const ATTEMPTS = 5;

// Send POST /v1/classify and return the answer. Retries while the server is busy.
async function classify(image, labels, defense = {}) {
  const form = new FormData();
  form.append("image", new Blob([image]));
  form.append("labels", JSON.stringify(labels));
  form.append("defense", JSON.stringify(defense));
  const key = process.env.TAPT_KEY;
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  for (let attempt = 1; ; attempt += 1) {
    const answer = await fetch(`${URL}/v1/classify`, { method: "POST", headers, body: form });
    const body = await answer.json();
    if (answer.ok) return body;
    const wait = Number(answer.headers.get("Retry-After"));
    if (!wait || attempt === ATTEMPTS) throw new Error(body.error);
    await new Promise((resolve) => setTimeout(resolve, 1000 * wait));
  }
}

const [path, ...labels] = process.argv.slice(2);
const image = await readFile(path);
try {
  for (const [name, defense] of [["undefended", { method: "plain" }], ["defended", {}]]) {
    const [best] = (await classify(image, labels, defense)).labels;
    console.log(`${name.padEnd(10)}  ${best.label}  ${best.score.toFixed(3)}`);
  }
} catch (error) {
  console.error(error.message);
  process.exitCode = 1;
}
