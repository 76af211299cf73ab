/** Sampling settings: their ranges, and the form. A field left empty leaves it to the server. */
import { el } from "./dom.js";

/**
 * @typedef {object} Settings names are those of the API; a number that is not set is absent
 * @property {string} system
 * @property {boolean} thinking
 * @property {number} [temperature]
 * @property {number} [top_p]
 * @property {number} [top_k]
 * @property {number} [min_p]
 * @property {number} [max_completion_tokens]
 * @property {number} [seed]
 */

const FIELDS = [
  {
    name: "temperature",
    label: "Temperature",
    min: 0,
    max: 2,
    step: 0.01,
    hint: "0 takes the likeliest token",
  },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: 0.01, hint: "1 keeps all" },
  { name: "top_k", label: "Top k", min: 0, max: 1000, step: 1, hint: "0 keeps all" },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, hint: "0 keeps all" },
  {
    name: "max_completion_tokens",
    label: "Max tokens",
    min: 1,
    max: 262144,
    step: 1,
    hint: "of an answer",
  },
  {
    name: "seed",
    label: "Seed",
    min: 0,
    max: Number.MAX_SAFE_INTEGER,
    step: 1,
    hint: "repeats an answer",
  },
];

/**
 * Settings of what was stored; what is out of range is left out.
 * @param {*} stored
 * @returns {Settings}
 */
export function settingsOf(stored) {
  const settings = { system: "", thinking: false };
  if (typeof stored?.system === "string") settings.system = stored.system;
  if (typeof stored?.thinking === "boolean") settings.thinking = stored.thinking;
  for (const field of FIELDS) {
    if (fits(field, stored?.[field.name])) settings[field.name] = stored[field.name];
  }
  return settings;
}

function fits({ min, max, step }, value) {
  return (
    Number.isFinite(value) && value >= min && value <= max && (step < 1 || Number.isInteger(value))
  );
}

/**
 * Builds the form in the dialog.
 * @param {HTMLDialogElement} dialog
 * @param {(changes: object) => void} changed called with what was edited, undefined where emptied
 * @returns {(settings: Settings) => void} shows settings in the form
 */
export function settingsForm(dialog, changed) {
  const system = dialog.querySelector("#system");
  const inputs = FIELDS.map((field) => fieldInput(field, changed));
  system.addEventListener("input", () => changed({ system: system.value }));
  dialog.querySelector("#fields").append(...inputs.map(({ row }) => row));
  return (settings) => {
    system.value = settings.system;
    inputs.forEach(({ show }, i) => show(settings[FIELDS[i].name]));
  };
}

function fieldInput({ name, label, hint, ...range }, changed) {
  const id = `set-${name}`;
  const most =
    range.max === Number.MAX_SAFE_INTEGER ? "or more" : `to ${range.max.toLocaleString("en")}`;
  const described = { id, "aria-describedby": `${id}-hint`, placeholder: "default", ...range };
  const input = el("input", {
    type: "number",
    inputmode: "decimal",
    autocomplete: "off",
    ...described,
  });
  const row = el("div", { class: "field" }, [
    el("label", { for: id }, label),
    input,
    el("span", { id: `${id}-hint`, class: "hint" }, `${range.min} ${most}; ${hint}`),
  ]);
  const mark = () => input.setAttribute("aria-invalid", String(!input.validity.valid));
  input.addEventListener("input", () => {
    mark();
    if (input.validity.valid) changed({ [name]: input.value ? input.valueAsNumber : undefined });
  });
  const show = (value) => {
    input.value = value ?? "";
    mark();
  };
  return { row, show };
}
