// One answer: what is asked, and the turn that grows while it streams in.
//
// A turn is { role: "user" or "assistant", text }. An assistant's also has `thought`; `marks`, see draft_marks.js;
// `usage`, what it took; and `end`, why it ended: "stop", "empty" (a stop before any text), "length", "full" (the
// context is), "stopped" (by whoever reads), or "broken" with the sentence that says why in `error`.

import { chunks, countTokens } from "./api.js";
import { DraftMarks } from "./draft_marks.js";

export function emptyAnswer() {
  return { role: "assistant", text: "", thought: "", marks: [], end: "stopped" };
}

// Leaves out the oldest exchanges of a chat where the context would not hold them beside the answer to come.
export async function fit(chat, most, limit, key, signal) {
  const room = Math.min(most, Math.floor(limit / 4));
  const last = chat.turns.findLastIndex((turn) => turn.role === "user");
  while (chat.from < last && (await countTokens(dialogue(chat), key, signal)) + room > limit) {
    chat.from = chat.turns.findIndex((turn, i) => i > chat.from && turn.role === "user");
  }
}

// Answers the chat's last turn: an empty one, or one that is continued. Yields its usage so far after every change.
export async function* answer(chat, asked, limit, key, signal) {
  const turn = chat.turns.at(-1);
  const { text, thought, usage: before } = turn;
  const marks = new DraftMarks(text, turn.marks);
  const body = {
    ...asked, ...dialogue(chat), stream: true, return_tokens: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  for await (const { choices: [choice], usage } of chunks(body, key, signal)) {
    for (const token of choice?.specformer?.tokens ?? []) marks.add(token);
    turn.text += choice?.delta.content ?? "";
    turn.thought += choice?.delta.reasoning_content ?? "";
    turn.marks = marks.of(turn.text.slice(text.length));
    if (usage?.steps) turn.usage = sum(before, usage);
    if (choice?.finish_reason) turn.end = usage.total_tokens >= limit ? "full" : choice.finish_reason;
    if (usage?.steps) yield usage;
  }
  if (turn.text === text && turn.thought === thought && turn.end === "stop") turn.end = "empty";
}

// What of a chat the model is to read, in the words of the API.
function dialogue(chat) {
  const turns = chat.turns.slice(chat.from).filter((turn) => turn.role === "user" || turn.text);
  const continued = turns.at(-1).role === "assistant";
  const messages = turns.map(({ role, text }) => ({ role, content: text }));
  if (continued && turns.at(-1).thought) messages.at(-1).reasoning_content = turns.at(-1).thought;
  if (chat.system.trim()) messages.unshift({ role: "system", content: chat.system });
  return { messages, ...(continued && { continue_final_message: true }) };
}

// The usage of an answer that came in two parts.
function sum(before, usage) {
  const { completion_tokens: tokens, steps, drafted_tokens: drafted, accepted_per_position: accepted } = usage;
  const part = { tokens, steps, drafted, accepted, total: usage.total_tokens };
  if (!before) return part;
  return {
    tokens: before.tokens + tokens,
    steps: before.steps + steps,
    drafted: before.drafted + drafted,
    accepted: accepted.map((count, i) => count + (before.accepted[i] ?? 0)),
    total: part.total,
  };
}
