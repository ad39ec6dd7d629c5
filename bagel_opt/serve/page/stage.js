// Where the result is shown: one of a picture, a video, a text, or texts and pictures.

const KINDS = ["empty", "picture", "video", "answer"];
const $ = (id) => document.getElementById(id);

/** Shows what belongs to one of KINDS, and nothing else. */
function only(kind, properties) {
  for (const id of KINDS) $(id).hidden = id !== kind;
  if (kind !== "video") $("video").removeAttribute("src"); // or it would play on
  return Object.assign($(kind), properties);
}

export const showNothing = () => only("empty");

export const showPicture = (src, alt) => only("picture", { src, alt });

export const showVideo = (src, about) => only("video", { src }).setAttribute("aria-label", about);

export const showAnswer = (textContent) => only("answer", { textContent });

/** Texts and the addresses of pictures, in order. */
export function showParts(parts) {
  showAnswer("").append(...parts.map(({ text, url }, index) => url
    ? Object.assign(document.createElement("img"), { src: url, alt: `Picture ${index + 1}` })
    : Object.assign(document.createElement("p"), { textContent: text.trim() })));
}

export const isVideo = (blob) => blob.type.startsWith("video/");

/** A small picture or video to look at. */
export function thumbnail(blob, url, about) {
  if (!isVideo(blob)) return Object.assign(document.createElement("img"), { src: url, alt: about });
  const video = Object.assign(document.createElement("video"), { src: url, muted: true, preload: "metadata" });
  video.setAttribute("aria-label", about);
  return video;
}
