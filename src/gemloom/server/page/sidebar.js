/** The list of conversations. What to do on a click is the caller's. */
import { el, iconButton } from "./dom.js";

/**
 * Shows the conversations, the current one marked.
 * @param {HTMLElement} list
 * @param {import("./store.js").Conversation[]} conversations
 * @param {{current: string, running: (id: string) => boolean}} state
 * @param {{open: Function, rename: Function, download: Function, remove: Function}} actions
 */
export function showList(list, conversations, state, actions) {
  list.replaceChildren(...conversations.map((one) => row(one, state, actions)));
}

function row(conversation, { current, running }, actions) {
  const { id, title } = conversation;
  const marks = { "aria-current": id === current ? "true" : null };
  const open = el(
    "button",
    { type: "button", class: "open", title, ...marks, onclick: () => actions.open(id) },
    [
      el("span", { class: "name", dir: "auto" }, title),
      running(id)
        ? el("span", { class: "dot" }, [el("span", { class: "unseen" }, "answering")])
        : "",
    ],
  );
  const item = el("li", { "data-id": id }, [
    open,
    iconButton(
      `Rename ${title}`,
      "edit",
      () => rename(item, conversation, actions.rename),
      "rename",
    ),
    iconButton(`Export ${title} as JSON`, "export", () => actions.download(conversation), "export"),
    iconButton(`Delete ${title}`, "trash", () => actions.remove(conversation), "delete"),
  ]);
  return item;
}

function rename(item, conversation, save) {
  const field = el("input", {
    "aria-label": "Name of the conversation",
    maxlength: "120",
    dir: "auto",
  });
  const before = [...item.childNodes];
  field.value = conversation.title;
  let open = true;
  const end = (title) => {
    if (!open) return; // taking the field away takes the focus from it, which ends it again
    open = false;
    item.replaceChildren(...before);
    item.querySelector(".rename").focus();
    if (title && title !== conversation.title) save(conversation, title);
  };
  field.addEventListener("blur", () => end(field.value.trim()));
  field.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
    event.preventDefault(); // the button that gets the focus would take the key for a click
    end(event.key === "Enter" ? field.value.trim() : "");
  });
  item.replaceChildren(field);
  field.focus();
  field.select();
}
