// The log: an element for each turn, kept while the turn is there, so that a selection and what is open stay.

import { within } from "../chat/draft_marks.js";
import { copyButton } from "./clipboard.js";
import { colour } from "./colours.js";
import { blocks, element } from "./markdown.js";

const ENDS = {
  stop: "Finished.",
  empty: "The model said nothing more.",
  length: "Cut off: it has as many tokens as the settings allow.",
  full: "Cut off: the context is full.",
  stopped: "Stopped.",
};

export class Log {
  // `act` has what the buttons do: edit(turn), regenerate(), goOn().
  constructor(root, act) {
    Object.assign(this, { root, act, views: new Map() });
    this.cut = element("p", [], { className: "cut" });
    this.hint = element("p", ["Ask the model something."], { className: "hint" });
  }

  // Shows a chat; `limit` is the context's tokens, `busy` whether an answer is on its way, `edited` a turn or null.
  draw(chat, limit, busy, edited) {
    const views = new Map(chat.turns.map((turn) => [turn, this.views.get(turn) ?? new TurnView(turn, this.act)]));
    this.views = views;
    const nodes = chat.turns.length ? [] : [this.hint];
    const editedAt = edited ? chat.turns.indexOf(edited) : Infinity;
    chat.turns.forEach((turn, i) => {
      if (i === chat.from && i > 0) nodes.push(this.cut);
      const view = views.get(turn);
      const isLast = i === chat.turns.length - 1;
      view.root.classList.toggle("dropped", i < chat.from);
      view.root.classList.toggle("edited", i >= editedAt);
      view.showEnd({ isLast, busy });
      nodes.push(view.root);
    });
    this.cut.textContent = `The context holds ${limit} tokens: the model no longer reads what stands above.`;
    this.root.setAttribute("aria-busy", busy);
    arrange(this.root, nodes);
  }

  // Shows what a turn has gained.
  grow(turn) {
    this.views.get(turn)?.showText();
  }
}

// Puts the nodes into the root, in order, and moves none that is there already.
function arrange(root, nodes) {
  let next = root.firstChild;
  for (const node of nodes) {
    if (node === next) next = next.nextSibling;
    else root.insertBefore(node, next);
  }
  while (next) {
    const gone = next;
    next = next.nextSibling;
    gone.remove();
  }
}

class TurnView {
  constructor(turn, act) {
    const said = turn.role === "user";
    Object.assign(this, { turn, act, shown: [] });
    this.text = element("div", [], { className: "text" });
    this.thought = element("div", [], { className: "thought" });
    this.thoughts = element("details", [element("summary", ["Thoughts"]), this.thought], { hidden: true });
    this.end = element("p", [], { className: "end" });
    this.took = element("p", [], { className: "took" });
    const button = (words, run) => {
      const made = element("button", [words], { type: "button" });
      made.addEventListener("click", run);
      return made;
    };
    this.goOn = button("Continue", () => act.goOn());
    this.again = button("Regenerate", () => act.regenerate());
    this.edit = button("Edit", () => act.edit(turn));
    const copy = copyButton(() => turn.text, said ? "Copy message" : "Copy answer");
    this.buttons = element("div", said ? [this.edit, copy] : [this.goOn, this.again, copy], { className: "buttons" });
    const parts = said ? [this.text, this.buttons] : [this.thoughts, this.text, this.end, this.took, this.buttons];
    this.root = element("article", parts, { className: `turn ${turn.role}`, ariaLabel: said ? "You" : "Answer" });
    this.showText();
  }

  showText() {
    const { turn } = this;
    if (turn.role === "user") {
      this.text.textContent = turn.text;
      return;
    }
    this.thoughts.hidden = !turn.thought;
    this.thought.textContent = turn.thought;
    let at = 0;
    const wanted = blocks(turn.text).map(({ raw, make }) => {
      const marks = within(turn.marks, at, (at += raw.length));
      return { key: raw + JSON.stringify(marks), raw, marks, make };
    });
    // What has not changed stays; an answer grows at its end.
    let same = 0;
    while (same < this.shown.length && this.shown[same].key === wanted[same]?.key) same++;
    for (const { node } of this.shown.splice(same)) node?.remove();
    for (const { key, raw, marks, make } of wanted.slice(same)) {
      const node = make();
      if (node) {
        colour(node, raw, marks);
        this.text.append(node);
      }
      this.shown.push({ key, node });
    }
  }

  showEnd({ isLast, busy }) {
    const { turn } = this;
    const running = isLast && busy;
    this.edit.disabled = busy;
    if (turn.role === "user") return;
    this.root.classList.toggle("running", running);
    this.end.hidden = this.took.hidden = this.buttons.hidden = running;
    this.end.textContent = turn.end === "broken" ? `Broken off: ${turn.error}` : ENDS[turn.end] ?? turn.end;
    this.end.classList.toggle("error", turn.end === "broken");
    this.took.textContent = turn.usage ? took(turn.usage) : "";
    this.again.hidden = !isLast;
    this.goOn.hidden = !isLast || !turn.text || ["stop", "empty"].includes(turn.end);
  }
}

function took({ tokens, steps, drafted, accepted }) {
  const passes = Math.max(steps, 1);
  const shares = accepted.map((count) => Math.round((100 * count) / passes) + " %").join(", ");
  const kappa = ((passes + accepted.reduce((sum, count) => sum + count, 0)) / passes).toFixed(2);
  const drafts = drafted ? `; drafts accepted by position: ${shares}` : "";
  return `${tokens} tokens in ${steps} passes, kappa ${kappa}${drafts}`;
}
