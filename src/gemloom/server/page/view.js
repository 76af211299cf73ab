/** One message as an element. What to do on a click is the caller's. */
import { summary } from "./answer.js";
import { copyButton, el, iconButton } from "./dom.js";
import { update as showMarkdown, visible } from "./markdown.js";

/**
 * @typedef {object} Actions
 * @property {(message: object, text: string) => void} edit
 * @property {(message: object) => void} regenerate
 */

export class MessageView {
  /**
   * @param {import("./answer.js").Message} message
   * @param {Actions} actions
   */
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.thought = el("div", { class: "body" });
    this.label = el("summary");
    this.thinking = el("details", { class: "thinking", hidden: true }, [this.label, this.thought]);
    this.body = el("div", { class: "body" });
    this.calls = el("div", { class: "calls" });
    this.waiting = el("p", { class: "waiting", hidden: true }, "Waiting for the first token");
    this.error = el("div", { class: "error", hidden: true });
    this.summary = el("span", { class: "summary" });
    this.foot = el("div", { class: "foot" }, [this.buttons()]);
    const user = message.role === "user";
    const name = user ? "You" : "Assistant";
    const parts = [this.thinking, this.body, this.calls, this.waiting, this.error];
    this.element = el("article", { class: `message ${message.role}`, "aria-label": name }, [
      el("h2", { class: "who" }, name),
      ...(user ? [this.body] : parts),
      this.foot,
    ]);
    if (!user) this.foot.prepend(this.summary);
    this.thinking.addEventListener("toggle", () => this.showThought());
  }

  buttons() {
    const { message, actions } = this;
    const buttons = [copyButton("Copy message", () => message.content)];
    buttons.push(iconButton("Edit message", "edit", () => this.edit(), "edit"));
    const again = () => actions.regenerate(message);
    if (message.role === "assistant")
      buttons.push(iconButton("Regenerate", "redo", again, "regenerate"));
    return el("span", { class: "actions" }, buttons);
  }

  /**
   * Brings the element up to the message.
   * @param {{running?: boolean, thinking?: boolean, seconds?: number}} state of the run behind it
   */
  update({ running = false, thinking = false, seconds = this.message.thought ?? 0 } = {}) {
    const { content, calls = [], reasoning, role } = this.message;
    if (role === "user") this.body.textContent = visible(content);
    else showMarkdown(this.body, content);
    this.waiting.hidden = !running || Boolean(content || reasoning || calls.length);
    this.thinking.hidden = !reasoning;
    this.label.textContent = `${thinking ? "Thinking" : "Thought"} for ${Math.round(seconds)} s`;
    this.showThought();
    this.showCalls(calls);
    this.showError();
    this.summary.textContent = summary(this.message);
    this.foot.hidden = running;
  }

  showThought() {
    if (this.thinking.open) showMarkdown(this.thought, this.message.reasoning);
  }

  showCalls(calls) {
    this.calls.replaceChildren(...calls.map(callBlock));
  }

  showError() {
    const { error } = this.message;
    this.error.hidden = !error;
    if (!error) return;
    const retry = el(
      "button",
      { type: "button", onclick: () => this.actions.regenerate(this.message) },
      "Retry",
    );
    this.error.replaceChildren(el("span", {}, visible(error)), retry);
  }

  /** Puts a field in place of the text, until it is saved or cancelled. */
  edit() {
    const user = this.message.role === "user";
    const field = el("textarea", { "aria-label": "Edit message", rows: "2", dir: "auto" });
    field.value = this.message.content;
    const form = el("form", { class: "editor" }, [
      field,
      el("div", { class: "buttons" }, [
        el("button", { type: "button", onclick: () => this.endEdit(form) }, "Cancel"),
        el("button", { type: "submit", class: "primary" }, user ? "Save and resend" : "Save"),
      ]),
    ]);
    form.addEventListener("keydown", (event) => this.editKey(event, form));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.endEdit(form);
      this.actions.edit(this.message, field.value);
    });
    this.body.replaceWith(form);
    this.foot.hidden = true;
    field.focus();
  }

  editKey(event, form) {
    const enter =
      event.key === "Enter" && !event.isComposing && event.target.tagName === "TEXTAREA";
    const submits =
      event.ctrlKey || event.metaKey || (this.message.role === "user" && !event.shiftKey);
    if (event.key === "Escape") this.endEdit(form);
    else if (enter && submits) form.requestSubmit();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  endEdit(form) {
    form.replaceWith(this.body);
    this.foot.hidden = false;
    this.foot.querySelector(".edit").focus();
  }
}

function callBlock({ name, arguments: given }) {
  return el("figure", { class: "call" }, [
    el("figcaption", {}, ["Tool call: ", el("code", {}, visible(name))]),
    el(
      "pre",
      { tabindex: "0", role: "group", "aria-label": `Arguments for ${name}` },
      visible(readable(given)),
    ),
  ]);
}

/** JSON with indents; as it came, while it is still arriving. */
function readable(given) {
  try {
    return JSON.stringify(JSON.parse(given), null, 2);
  } catch {
    return given;
  }
}
