// Which parts of an answer were accepted drafts: pairs [begin, end) of places in its text, in order.

export class DraftMarks {
  // Adds to the marks of a text that is there already.
  constructor(before, marks) {
    this.before = before.length;
    this.kept = marks;
    this.tokens = "";
    this.found = [];
  }

  add(token) {
    const begin = this.tokens.length;
    this.tokens += token.text;
    if (!token.drafted || !token.text) return;
    const last = this.found.at(-1);
    if (last?.[1] === begin) last[1] = this.tokens.length;
    else this.found.push([begin, this.tokens.length]);
  }

  // Those of the whole text, of which `gained` is what the tokens made of it: they may also hold thoughts before it.
  of(gained) {
    const { tokens, before } = this;
    const shift = tokens.endsWith(gained) ? tokens.length - gained.length : tokens.indexOf(gained);
    if (shift < 0) return this.kept;
    const moved = this.found.map(([begin, end]) => [Math.max(begin - shift, 0), Math.min(end - shift, gained.length)]);
    const inside = moved.filter(([begin, end]) => end > begin);
    return [...this.kept, ...inside.map(([begin, end]) => [begin + before, end + before])];
  }
}

// The marks of a part of a text, from its own beginning.
export function within(marks, begin, end) {
  const cut = marks.map(([from, to]) => [Math.max(from, begin) - begin, Math.min(to, end) - begin]);
  return cut.filter(([from, to]) => to > from);
}
