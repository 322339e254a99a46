// The curl command of the present request, and its picture to save.

import { find } from "./dom.js";

const COPY = "Copy the command";

export function setUpCommand() {
  find("copy").addEventListener("click", async () => {
    await navigator.clipboard.writeText(find("curl").textContent);
    find("copy").textContent = "Copied";
    setTimeout(() => (find("copy").textContent = COPY), 2000);
  });
}

// `asked` is the request's JSON without its image, `file` the picture's name, `source` its URL.
export function showCommand(asked, file, source, info) {
  find("curl").textContent = command(asked, file, info);
  find("save").hidden = !source;
  find("save").href = source;
  find("save").download = file;
}

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function command(asked, file, info) {
  const plain = /^[\w.-]+$/.test(file);
  const image = plain ? `image=@${file}` : quote(`image=@"${file.replace(/["\\]/g, "\\$&")}"`);
  const form = asked.candidate_labels.map((label) => `--form-string ${quote(`labels=${label}`)}`);
  if (asked.hypothesis_template) form.push(`--form-string ${quote(`hypothesis_template=${asked.hypothesis_template}`)}`);
  if (asked.defense) form.push(`--form-string ${quote(`defense=${JSON.stringify(asked.defense)}`)}`);
  const key = info?.policies.keys ? [`-H "Authorization: Bearer $TAPT_KEY"`] : [];
  const address = new URL("v1/classify", document.baseURI);
  return [`curl -s ${address}`, ...key, `-F ${image}`, ...form].join(" \\\n    ");
}
