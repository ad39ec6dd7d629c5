// BAGEL's options in their official names: what the page shows of them and sends. Empty fields are left to the server.
const draws = ["draw", "edit"];

export const OPTIONS = [
  { name: "num_timesteps", modes: draws, min: 2, max: 200, step: 1, value: 50, help: "Points of the flow schedule: more take longer and refine the picture." },
  { name: "timestep_shift", modes: draws, min: 0.001, max: 1000, step: "any", value: 3, help: "Above 1, more steps go to high noise, where the layout is made." },
  { name: "cfg_text_scale", modes: draws, min: 0, max: 1000, step: "any", value: 4, help: "How strongly the picture follows the text. Up to 1 is off." },
  { name: "cfg_img_scale", modes: ["edit"], min: 0, max: 1000, step: "any", value: 1.5, help: "How strongly it keeps to the input pictures. Up to 1 is off." },
  { name: "cfg_interval", modes: draws, min: 0, max: 1, step: "any", value: [0.4, 1], help: "The flow times with guidance; 1 is noise, 0 the picture." },
  { name: "cfg_renorm_type", modes: draws, choices: ["global", "channel", "text_channel"], value: "global", help: "Over what the guided velocity is scaled back. Blurry edits may gain from text_channel." },
  { name: "cfg_renorm_min", modes: draws, min: 0, max: 1, step: "any", value: 0, help: "The least factor of that; 1 switches it off." },
  { name: "negative_prompt", modes: draws, text: true, value: "", help: "What the picture should not follow." },
  { name: "step_cache", modes: draws, choices: ["none", "taylorseer", "teacache"], value: "none", help: "taylorseer predicts most steps instead of computing them; teacache skips those that would change little." },
  { name: "max_think_tokens", modes: ["draw", "edit", "ask"], min: 1, max: 100000, step: 1, value: "", help: "The longest thought or answer, in tokens." },
  { name: "do_sample", modes: ["draw", "edit", "ask"], choices: ["false", "true"], value: "false", help: "Sample the text instead of taking the likeliest token." },
  { name: "text_temperature", modes: ["draw", "edit", "ask"], min: 0.001, max: 1000, step: "any", value: 0.3, help: "Temperature of sampling." },
];

function field(option, id, value) {
  if (option.choices) {
    const select = Object.assign(document.createElement("select"), { id });
    select.append(...option.choices.map((choice) => new Option(choice, choice)));
    select.value = value;
    return select;
  }
  const limits = option.text ? { type: "text" } : { type: "number", min: option.min, max: option.max, step: option.step };
  return Object.assign(document.createElement("input"), { id, value, autocomplete: "off", ...limits });
}

/** Fills a container with all options at their defaults. */
export function renderOptions(container) {
  container.replaceChildren(...OPTIONS.map((option) => {
    const box = Object.assign(document.createElement("div"), { className: option.text ? "option wide" : "option" });
    box.dataset.modes = option.modes.join(" ");
    const label = Object.assign(document.createElement("label"), { htmlFor: option.name, textContent: option.name });
    const help = Object.assign(document.createElement("p"), { id: `${option.name}-help`, textContent: option.help });
    let control = field(option, option.name, option.value);
    if (Array.isArray(option.value)) {
      control = Object.assign(document.createElement("div"), { className: "two" });
      control.append(field(option, option.name, option.value[0]), field(option, `${option.name}-high`, option.value[1]));
      control.lastChild.setAttribute("aria-label", `${option.name}, upper end`);
    }
    for (const input of control.matches("div") ? control.children : [control]) input.setAttribute("aria-describedby", help.id);
    box.append(label, control, help);
    return box;
  }));
}

/** The options of a mode that differ from their defaults. */
export function readOptions(mode) {
  const found = {};
  for (const { name, modes, value, choices, text } of OPTIONS) {
    const given = document.getElementById(name).value;
    if (!modes.includes(mode)) continue;
    if (Array.isArray(value)) {
      const pair = [Number(given), Number(document.getElementById(`${name}-high`).value)];
      if (pair.join() !== value.join()) found[name] = pair;
    } else if (given !== "" && given !== String(value)) {
      found[name] = text || (choices && name !== "do_sample") ? given : JSON.parse(given);
    }
  }
  return found;
}

export function writeOptions(found) {
  for (const { name, value } of OPTIONS) {
    const wanted = found[name] ?? value;
    document.getElementById(name).value = Array.isArray(wanted) ? wanted[0] : wanted;
    if (Array.isArray(wanted)) document.getElementById(`${name}-high`).value = wanted[1];
  }
}
