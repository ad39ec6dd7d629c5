// Requests to the server as streams of events.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function send(path, init) {
  const key = sessionStorage.getItem("key");
  const headers = { ...init.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...init, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new ApiError(response.status, body.error?.message ?? `The server answered with status ${response.status}.`);
}

/** The data of each server-sent event, parsed. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
      if (!data || data === "[DONE]") continue;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(500, event.error.message);
      yield event;
    }
  }
}

const json = (body, signal) => ({ method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal });

export async function model() {
  return (await (await send("/v1/models", {})).json()).data[0];
}

export async function options() {
  return (await send("/options.json", {})).json();
}

export async function examples() {
  return (await send("/examples.json", {})).json();
}

export async function examplePicture() {
  return (await send("/example.png", {})).blob();
}

export async function draw(prompt, options, signal) {
  return events(await send("/v1/images/generations", json({ prompt, ...options, stream: true, partial_images: 3 }, signal)));
}

function asForm(fields) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    if (Array.isArray(value)) value.forEach((one) => form.append(`${name}[]`, one));
    else form.append(name, value);
  }
  return form;
}

export async function edit(prompt, pictures, options, signal) {
  const form = asForm({ prompt, ...options, stream: true, partial_images: 3 });
  pictures.forEach((picture) => form.append("image[]", picture, "picture"));
  return events(await send("/v1/images/edits", { method: "POST", body: form, signal }));
}

/** A video: what the server says of it, and its file. told: called with the first of these as long as it is made. */
export async function film(prompt, input, options, signal, told) {
  const form = asForm({ prompt, ...options });
  if (input) form.append("input_reference", input, "input");
  let video = await (await send("/v1/videos", { method: "POST", body: form, signal })).json();
  const path = `/v1/videos/${video.id}`;
  try {
    while (["queued", "in_progress"].includes(video.status)) {
      told(video);
      await new Promise((resolve) => setTimeout(resolve, 300));
      video = await (await send(path, { signal })).json();
    }
    if (video.error) throw new ApiError(500, video.error.message);
    return { video, blob: await (await send(`${path}/content`, { signal })).blob() };
  } catch (error) {
    if (error.name === "AbortError") send(path, { method: "DELETE" }).catch(() => {});
    throw error;
  }
}

export async function ask(prompt, pictures, options, signal) {
  const urls = await Promise.all(pictures.map(dataUrl));
  const content = [...urls.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text: prompt }];
  return events(await send("/v1/chat/completions", json({ messages: [{ role: "user", content }], ...options, stream: true }, signal)));
}

/** Texts and pictures in turn: a part that goes on, one that is whole, or how far the picture in progress is. */
export async function* interleave(prompt, pictures, options, signal) {
  for await (const { choices: [choice], progress } of await ask(prompt, pictures, { ...options, output: "interleaved" }, signal)) {
    if (progress) yield { progress };
    if (choice?.delta.content) yield { text: choice.delta.content };
    for (const { image_url } of choice?.delta.images ?? []) yield { blob: blob(image_url.url.split(",")[1]) };
  }
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The picture cannot be read."));
    reader.readAsDataURL(blob);
  });
}

/** A file in base64 as a blob. */
export function blob(base64) {
  return new Blob([Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))], { type: "image/png" });
}
