// The list of the chats that are kept, and the parts at the side that fold.

import { title } from "../chat/store.js";
import { element } from "./markdown.js";

const WIDE = matchMedia("(min-width: 60rem)"); // as in style.css

// `open` and `drop` are called with a chat.
export function showChats(root, chats, current, { open, drop }) {
  const rows = chats.map((chat) => {
    const name = element("button", [title(chat)], { type: "button", className: "name" });
    if (chat.id === current.id) name.setAttribute("aria-current", "true");
    name.addEventListener("click", () => open(chat));
    const remove = element("button", ["×"], { type: "button", ariaLabel: `Delete the chat “${title(chat)}”` });
    remove.addEventListener("click", () => drop(chat));
    return element("li", [name, remove]);
  });
  root.replaceChildren(...rows);
}

// Folded where the screen is narrow, one of them open at most; all open where it is wide.
export function fold(parts) {
  const arrange = () => {
    for (const part of parts) {
      part.name = WIDE.matches ? "" : "side"; // of one name, the browser keeps one open
      part.open = WIDE.matches;
    }
  };
  WIDE.addEventListener("change", arrange);
  arrange();
}

export function foldAway(parts) {
  if (!WIDE.matches) parts.forEach((part) => (part.open = false));
}
