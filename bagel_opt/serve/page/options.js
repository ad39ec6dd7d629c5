// BAGEL's options, as the server tells them: shown, and sent where they differ from their defaults. Empty is the default.
let options = [];

const element = (kind, properties) => Object.assign(document.createElement(kind), properties);

function control({ type, name: id, value, unset, choices, min, max, step }) {
  const about = { id, autocomplete: "off", placeholder: unset };
  if (type === "choice") {
    const select = element("select", { id });
    if (unset) select.append(new Option(unset, ""));
    select.append(...choices.map((choice) => new Option(choice, choice)));
    return select;
  }
  if (type === "flag") return element("input", { id, type: "checkbox" });
  if (type === "text") return element("input", { ...about, type: "text", maxLength: max });
  if (type === "number") return element("input", { ...about, type: "number", min, max, step });
  const two = element("div", { className: "two" });
  two.append(...value.map((_, index) => element("input", { type: "number", id: index ? `${id}-high` : id, min, max, step, autocomplete: "off" })));
  two.lastChild.setAttribute("aria-label", `${id}, upper end`);
  return two;
}

/** The fields of an option. */
const fields = ({ name, type }) => (type === "interval" ? [name, `${name}-high`] : [name]).map((id) => document.getElementById(id));

/** Fills a container with the options at their defaults. */
export function renderOptions(container, told) {
  options = told;
  container.replaceChildren(...options.map((option) => {
    const box = element("div", { className: option.type === "text" ? "option wide" : "option" });
    box.dataset.modes = option.modes.join(" ");
    const help = element("p", { id: `${option.name}-help`, textContent: option.help });
    box.append(element("label", { htmlFor: option.name, textContent: option.name }), control(option), help);
    for (const field of box.querySelectorAll("input, select")) field.setAttribute("aria-describedby", help.id);
    return box;
  }));
  writeOptions({});
}

/** The options of a mode that differ from their defaults. */
export function readOptions(mode) {
  const found = {};
  for (const option of options) {
    if (!option.modes.includes(mode)) continue;
    const given = fields(option).map((field) => {
      if (option.type === "flag") return field.checked;
      return field.value === "" ? null : ["number", "interval"].includes(option.type) ? Number(field.value) : field.value;
    });
    const value = option.type === "interval" ? given : given[0];
    if (!given.includes(null) && JSON.stringify(value) !== JSON.stringify(option.default)) found[option.name] = value;
  }
  return found;
}

export function writeOptions(found) {
  for (const option of options) {
    const wanted = found[option.name] ?? option.value;
    fields(option).forEach((field, index) => {
      if (option.type === "flag") field.checked = wanted;
      else field.value = (option.type === "interval" ? wanted[index] : wanted) ?? "";
    });
  }
}
