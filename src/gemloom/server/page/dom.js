/** Makes elements. Text always becomes a text node: nothing on this page parses markup. */

/**
 * Makes an element. A prop named `on...` is a function and becomes a listener; others become
 * attributes (true: empty; false, null and undefined: none).
 * @param {string} tag
 * @param {Object<string, *>} [props]
 * @param {(Node | string)[] | string} [children]
 * @returns {HTMLElement}
 */
export function el(tag, props = {}, children = []) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of [children].flat()) node.append(child);
  return node;
}

/**
 * One of the symbols drawn in index.html.
 * @param {string} name
 * @returns {SVGElement}
 */
export function icon(name) {
  const make = (tag) => document.createElementNS("http://www.w3.org/2000/svg", tag);
  const svg = make("svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = make("use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/**
 * A button that is only an icon; `label` is its name for readers and its tooltip.
 * @param {string} label
 * @param {string} name of the icon
 * @param {(event: Event) => void} onclick
 * @param {string} [kind] more classes
 */
export function iconButton(label, name, onclick, kind = "") {
  const props = {
    type: "button",
    class: `plain ${kind}`,
    "aria-label": label,
    title: label,
    onclick,
  };
  return el("button", props, [icon(name)]);
}

/**
 * A button that copies `text()` and says so for a moment.
 * @param {string} label
 * @param {() => string} text
 */
export function copyButton(label, text) {
  const done = async () => {
    const said = (await copy(text())) ? "Copied" : "Copying failed";
    button.replaceChildren(icon("copy"), said);
    button.setAttribute("aria-label", said);
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.setAttribute("aria-label", label);
    }, 1500);
  };
  const button = iconButton(label, "copy", done, "copy");
  return button;
}

/** @returns {Promise<boolean>} whether it was copied: only safe origins have a clipboard */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text);
  }
}

function copyBySelection(text) {
  const focused = document.activeElement;
  const area = el("textarea", { class: "unseen", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return copied;
}
