// Validates custom resources with the compiled schemas of @kubernetes-models.
// Argument: the folder they are installed in. Input: [[module, resource], ...] as JSON.
// Output: the complaints about each resource.
//
// Those validators let unknown fields pass, as the API server drops them in silence. But a field
// that they know they read, so one that nobody has read is unknown.

import { readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

function watch(value, path, read) {
  if (value === null || typeof value !== "object") return value;
  return new Proxy(value, {
    get(target, key) {
      const below = `${path}/${String(key)}`;
      read.add(below);
      return watch(target[key], below, read);
    },
  });
}

function* fields(value, path = "") {
  if (value === null || typeof value !== "object") return;
  for (const [key, below] of Object.entries(value)) {
    yield `${path}/${key}`;
    yield* fields(below, `${path}/${key}`);
  }
}

const folder = resolve(process.argv[2], "node_modules", "@kubernetes-models");
const answers = [];
for (const [module, resource] of JSON.parse(readFileSync(0, "utf8"))) {
  const { validate } = await import(pathToFileURL(join(folder, `${module}.js`)));
  const read = new Set(["/apiVersion", "/kind"]);
  const valid = validate(watch(resource, "", read));
  const wrong = valid ? [] : validate.errors.map((e) => `${e.instancePath}: ${e.message ?? e.keyword}`);
  const unknown = [...fields(resource)].filter((path) => !read.has(path));
  answers.push([...wrong, ...unknown.map((path) => `${path}: unknown`)]);
}
console.log(JSON.stringify(answers));
