// What the model's folder gives to try it with: prompts, and a picture to edit and to ask about.
import * as api from "./api.js";

let told = null; // {prompts, edit, question, picture: whether there is one}
let picture = null; // it, as a blob, once it was used

export async function loadExamples() {
  told = await api.examples();
}

/** Buttons for a mode and its input pictures. use(prompt, picture): what one does; picture is null where none is to be added. */
export function showExamples(container, mode, inputs, use) {
  if (!told) return;
  const draws = mode === "draw" || mode === "video"; // from a text alone
  const bare = told.picture && !inputs.length; // the example picture is still to be added
  const texts = draws ? told.prompts : [mode === "edit" ? told.edit : told.question];
  // what is said of the example picture fits no other
  const fitting = draws ? mode === "draw" || !inputs.length : !told.picture || inputs.every((input) => input === picture);
  container.hidden = !fitting;
  container.replaceChildren(...(fitting ? texts : []).map((text) => {
    const button = Object.assign(document.createElement("button"), { type: "button", className: "example" });
    if (!draws && bare) button.append(Object.assign(document.createElement("img"), { src: "/example.png", alt: "An example picture:" }));
    button.append(Object.assign(document.createElement("span"), { textContent: text }));
    button.onclick = async () => {
      if (draws || !bare) return use(text, null);
      picture ??= await api.examplePicture();
      use(text, picture);
    };
    return button;
  }));
}
