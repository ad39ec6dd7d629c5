import * as api from "./api.js";
import { loadExamples, showExamples } from "./examples.js";
import { readOptions, renderOptions, writeOptions } from "./options.js";
import { isVideo, showAnswer, showNothing, showParts, showPicture, showVideo, thumbnail } from "./stage.js";

const $ = (id) => document.getElementById(id);
const WORDS = {
  draw: { go: "Draw", label: "What to draw", busy: "Drawing" },
  edit: { go: "Edit", label: "What to change", busy: "Editing" },
  video: { go: "Film", label: "What happens, or what to change", busy: "Filming" },
  ask: { go: "Ask", label: "Your question", busy: "Answering" },
  interleave: { go: "Start", label: "What to think about, in texts and pictures", busy: "Thinking" },
};
const past = []; // what was made: {mode, prompt, inputs, options, size, seed, think, url, blob, answer, parts, thought, seconds}
const PICTURES = "image/png,image/jpeg,image/webp";
let sizes = []; // [name, value] of those to choose from
let inputs = []; // pictures to edit or ask about, or a video to change, as blobs
let running = null; // an AbortController
let shown = null;

const mode = () => document.querySelector("input[name=mode]:checked").value;
const sizeOf = (mode) => $(mode === "edit" ? "editSize" : "size");

function setMode(name) {
  document.querySelector(`input[name=mode][value=${name}]`).checked = true;
  showMode();
}

function showMode() {
  const words = WORDS[mode()];
  $("go").textContent = words.go;
  $("promptLabel").textContent = words.label;
  $("inputs").hidden = mode() === "draw";
  for (const element of document.querySelectorAll("[data-modes]")) element.hidden = !element.dataset.modes.split(" ").includes(mode());
  const films = mode() === "video";
  Object.assign($("files"), { multiple: !films, accept: films ? `${PICTURES},video/*` : PICTURES });
  $("choose").textContent = films ? "Choose a picture to begin with, or a video to change" : "Choose pictures";
  const size = $("size").value;
  $("size").replaceChildren(...(films ? [["The model's own", "auto"], ...sizes] : sizes).map(([name, value]) => new Option(name, value)));
  if ([...$("size").options].some(({ value }) => value === size)) $("size").value = size;
  if (films) $("sizeField").hidden = inputs.length > 0; // whose size it then has
  showExamples($("examples"), mode(), inputs, useExample);
}

function useExample(prompt, picture) {
  if (picture) { inputs = [picture]; showInputs(); }
  $("error").textContent = "";
  $("prompt").value = prompt;
  $("prompt").focus();
}

// ---- pictures that go in

function showInputs() {
  for (const image of $("pictures").querySelectorAll("img, video")) URL.revokeObjectURL(image.src);
  $("pictures").replaceChildren(...inputs.map((picture, index) => {
    const item = document.createElement("li");
    const image = thumbnail(picture, URL.createObjectURL(picture), `Input ${isVideo(picture) ? "video" : "picture"} ${index + 1}`);
    const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "×" });
    remove.setAttribute("aria-label", `Remove input picture ${index + 1}`);
    remove.onclick = () => { inputs = inputs.filter((one) => one !== picture); showInputs(); $("files").focus(); };
    item.append(image, remove);
    return item;
  }));
  showMode();
}

function addInputs(files) {
  const films = !document.querySelector("input[value=video]").parentElement.hidden;
  const found = [...files].filter((file) => file.type.startsWith("image/") || (films && isVideo(file)));
  if (!found.length) return;
  const one = found.some(isVideo) || mode() === "video"; // takes the place of what was there
  inputs = one ? found.slice(-1) : [...inputs, ...found];
  if (found.some(isVideo)) setMode("video");
  else if (mode() === "draw") setMode("edit");
  showInputs();
}

// ---- what comes out

function showThought(text) {
  $("thoughtText").textContent = text.replace(/<\/?think>/g, "").trim();
  $("thought").hidden = !text;
}

function show(entry) {
  shown = entry;
  if (entry.parts) showParts(entry.parts);
  else if (entry.url) (isVideo(entry.blob) ? showVideo : showPicture)(entry.url, entry.prompt);
  else showAnswer(entry.answer);
  showThought(entry.thought);
  $("status").textContent = [entry.prompt, entry.seed !== undefined && `seed ${entry.seed}`, `${entry.seconds.toFixed(1)} s`].filter(Boolean).join(" · ");
  $("error").textContent = "";
  $("tools").hidden = false;
  for (const id of ["download", "reuse"]) $(id).hidden = !entry.url;
  if (entry.url) Object.assign($("download"), { href: entry.url, download: isVideo(entry.blob) ? "bagel.mp4" : "bagel.png" });
  for (const button of $("history").querySelectorAll("button")) button.setAttribute("aria-current", button.entry === entry);
}

function remember(entry) {
  past.push(entry);
  const item = document.createElement("li");
  const button = Object.assign(document.createElement("button"), { type: "button", entry, title: entry.prompt });
  button.append(entry.url
    ? thumbnail(entry.blob, entry.url, entry.prompt)
    : Object.assign(document.createElement("span"), { textContent: entry.answer }));
  button.onclick = () => show(entry);
  item.append(button);
  $("history").prepend(item);
  $("past").hidden = false;
  show(entry);
}

// ---- running

function busy(on) {
  $("go").disabled = on;
  for (const id of ["cancel", "progress"]) $(id).hidden = !on;
  if (on) $("progress").removeAttribute("value");
}

async function makePicture(entry, signal) {
  const options = { ...entry.options, size: entry.size, ...(entry.think && { think: true }), ...(entry.seed !== undefined && { seed: entry.seed }) };
  const stream = entry.mode === "draw" ? await api.draw(entry.prompt, options, signal) : await api.edit(entry.prompt, entry.inputs, options, signal);
  let preview = null;
  for await (const event of stream) {
    const kind = event.type.split(".")[1];
    if (kind === "progress") {
      Object.assign($("progress"), { max: event.total, value: event.index + 1 });
      $("status").textContent = `${WORDS[entry.mode].busy}: step ${event.index + 1} of ${event.total}`;
    } else if (kind === "thought") {
      showThought(entry.thought += event.delta);
    } else if (kind === "partial_image") {
      const url = URL.createObjectURL(api.blob(event.b64_json));
      showPicture(url, "Preview");
      if (preview) URL.revokeObjectURL(preview);
      preview = url;
    } else if (kind === "completed") {
      entry.blob = api.blob(event.b64_json);
      Object.assign(entry, { url: URL.createObjectURL(entry.blob), seed: event.seed, thought: event.thought ?? "" });
    }
  }
  if (!entry.url) throw new api.ApiError(0, "The server broke off.");
}

async function makeVideo(entry, signal) {
  const options = { ...entry.options, ...(entry.seed !== undefined && { seed: entry.seed }) };
  if (!entry.inputs.length) options.size = entry.size;
  const { video, blob } = await api.film(entry.prompt, entry.inputs[0], options, signal, ({ status, progress }) => {
    if (status !== "queued") Object.assign($("progress"), { max: 100, value: progress });
    $("status").textContent = status === "queued" ? "Waiting in line …" : `${WORDS[entry.mode].busy}: ${progress}%`;
  });
  Object.assign(entry, { blob, url: URL.createObjectURL(blob), seed: video.seed });
}

async function makeAnswer(entry, signal) {
  const options = { ...entry.options, ...(entry.think && { think: true }), ...(entry.seed !== undefined && { seed: entry.seed }) };
  let text = "";
  for await (const chunk of await api.ask(entry.prompt, entry.inputs, options, signal)) {
    text += chunk.choices[0]?.delta.content ?? "";
    const [, thought, answer] = text.match(/^\s*(<think>[^]*?(?:<\/think>|$))?([^]*)$/);
    Object.assign(entry, { thought: thought ?? "", answer: answer.trim() });
    showThought(entry.thought);
    showAnswer(entry.answer);
  }
}

async function makeParts(entry, signal) {
  const options = { ...entry.options, ...(entry.think && { think: true }), ...(entry.seed !== undefined && { seed: entry.seed }) };
  if (!entry.inputs.length) [options.width, options.height] = entry.size.split("x").map(Number);
  entry.parts = [];
  for await (const { progress, text, blob } of api.interleave(entry.prompt, entry.inputs, options, signal)) {
    if (progress) {
      Object.assign($("progress"), { max: progress.total, value: progress.index + 1 });
      $("status").textContent = `Round ${progress.round + 1}: step ${progress.index + 1} of ${progress.total}`;
      continue;
    }
    const last = entry.parts.at(-1);
    if (blob) {
      Object.assign(entry, { blob, url: URL.createObjectURL(blob) }); // the last picture is the one to download and to use
      entry.parts.push({ url: entry.url });
    } else if (last?.text !== undefined) last.text += text;
    else entry.parts.push({ text });
    showParts(entry.parts);
  }
  entry.answer = entry.parts.map(({ text }) => text ?? "").join(" ");
}

const MAKE = { draw: makePicture, edit: makePicture, video: makeVideo, ask: makeAnswer, interleave: makeParts };

async function run(entry) {
  running?.abort();
  const controller = running = new AbortController();
  const began = performance.now();
  for (const id of ["error", "status"]) $(id).textContent = "";
  $("tools").hidden = true;
  showThought("");
  $("status").textContent = `${WORDS[entry.mode].busy} …`;
  busy(true);
  try {
    await MAKE[entry.mode](entry, controller.signal);
    remember({ ...entry, seconds: (performance.now() - began) / 1000 });
  } catch (error) {
    if (running !== controller) return;
    if (shown) show(shown);
    else showNothing();
    $("status").textContent = error.name === "AbortError" ? "Cancelled." : "";
    if (error.status === 401) askForKey(() => run(entry));
    else if (error.name !== "AbortError") $("error").textContent = error.message;
  } finally {
    if (running === controller) { running = null; busy(false); }
  }
}

function askForKey(then) {
  $("keyForm").onsubmit = () => { sessionStorage.setItem("key", $("key").value); then(); };
  $("keyDialog").showModal();
}

// A larger seed would be rounded, here and in the answer.
$("seed").oninput = ({ target }) => target.setCustomValidity(
  Number(target.value) <= Number.MAX_SAFE_INTEGER ? "" : `at most ${Number.MAX_SAFE_INTEGER}`);

function submit() {
  if (running || !$("form").reportValidity()) return;
  if (mode() === "edit" && !inputs.length) { $("error").textContent = "Add a picture to edit."; $("files").focus(); return; }
  const films = mode() === "video";
  if (films ? inputs.length > 1 : mode() !== "draw" && inputs.some(isVideo)) {
    $("error").textContent = films ? "A video takes one picture or one video." : "This takes pictures, no videos.";
    return;
  }
  const seed = $("seed").value.trim();
  run({
    mode: mode(), prompt: $("prompt").value.trim(), inputs: mode() === "draw" ? [] : [...inputs], options: readOptions(mode()),
    size: sizeOf(mode()).value, think: !$("thinkField").hidden && $("think").checked, thought: "", ...(seed && { seed: Number(seed) }),
  });
}

function repeat(entry) {
  setMode(entry.mode);
  inputs = [...entry.inputs];
  showInputs();
  $("prompt").value = entry.prompt;
  sizeOf(entry.mode).value = entry.size;
  $("seed").value = entry.seed ?? "";
  $("seed").setCustomValidity("");
  $("think").checked = entry.think;
  writeOptions(entry.options);
  submit();
}

// ---- the page

async function showModel() {
  try {
    const { id, default_size: side, size_multiple: multiple, draws, thinks } = await api.model();
    $("model").textContent = id;
    const snapped = (share) => Math.max(multiple, Math.round(side * share / multiple) * multiple);
    const shapes = [["Square", 1, 1], ["Landscape 4:3", 1, 3 / 4], ["Portrait 3:4", 3 / 4, 1], ["Wide 16:9", 1, 9 / 16], ["Tall 9:16", 9 / 16, 1]];
    sizes = shapes.map(([name, width, height]) => {
      const size = `${snapped(width)}x${snapped(height)}`;
      return [`${name}, ${size.replace("x", "×")}`, size];
    });
    $("thinkField").hidden = !thinks;
    for (const label of document.querySelectorAll("[data-draws]")) label.hidden = !draws.includes(label.dataset.draws);
    if (document.querySelector("input[name=mode]:checked").parentElement.hidden) setMode(draws.includes("video") ? "video" : "ask");
    else showMode();
  } catch (error) {
    if (error.status === 401) askForKey(showModel);
    else $("error").textContent = error.message;
  }
}

async function showOptions() {
  try {
    renderOptions($("options"), await api.options());
    await loadExamples();
    showMode();
  } catch (error) {
    $("error").textContent = error.message;
  }
}

showMode();
showOptions().then(showModel);
$("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
$("form").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(); });
$("form").addEventListener("change", (event) => { if (event.target.name === "mode") showMode(); });
$("files").addEventListener("change", () => { addInputs($("files").files); $("files").value = ""; });
$("cancel").addEventListener("click", () => running?.abort());
$("defaults").addEventListener("click", () => writeOptions({}));
$("reuse").addEventListener("click", () => {
  inputs = [shown.blob];
  setMode(isVideo(shown.blob) ? "video" : "edit");
  showInputs();
  $("prompt").focus();
});
$("repeat").addEventListener("click", () => repeat(shown));
document.addEventListener("paste", (event) => addInputs(event.clipboardData.files));
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", over);
    if (name === "drop") addInputs(event.dataTransfer.files);
  });
}
