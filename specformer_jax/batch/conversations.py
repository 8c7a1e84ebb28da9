"""Dialogues as people keep them, in one form: a system prompt, the user's turns, and the answers that stand there."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any

from specformer_jax.batch.omissions import Omission
from specformer_jax.batch.row_files import PromptRow, read_rows
from specformer_jax.errors import UserError

DIALOGUE_FIELDS = ("messages", "conversations", "conversation")
ANSWER_FIELDS = ("output", "response", "completion")
SYSTEM_FIELDS = ("system", "system_prompt")
LAYOUTS = '"messages", "conversations", "turns", "prompt" or "instruction"'
ROLES = {
    "system": "system",
    "developer": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "bing", "bard"), "assistant"),
}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What one row asks.

    Attributes:
      id: the row's "id", "prompt_id" or "question_id", or else its number.
      turns: the user's messages; each is asked after the answer to the one before.
      system: the system prompt, or None.
      answers: the answer that stands in the row for each turn, or None; the model's own take their places unless they
        are what is asked for.
    """

    id: str
    turns: tuple[str, ...]
    system: str | None = None
    answers: tuple[str | None, ...] = ()

    def first(self, turns: int) -> Conversation:
        """The conversation up to so many turns."""
        return dataclasses.replace(self, turns=self.turns[:turns], answers=self.answers[:turns])


def read_conversations(
    source: str | os.PathLike, system: str | None = None
) -> tuple[list[Conversation], list[Omission]]:
    """Reads the dialogues of a source, and what of it cannot be used.

    A row has `messages` or `conversations` (of role and content, or of from and value), `turns` (the user's, as in
    Spec-Bench and MT-Bench), `prompt`, or `instruction` and maybe `input`; beside the last two an answer may stand as
    `output`, `response` or `completion`, beside all a `system` or `system_prompt`.

    Args:
      source: what `row_files.read_rows` reads.
      system: the system prompt of the dialogues that have none of their own.

    Raises:
      UserError: what `read_rows` raises, a row of no such layout (naming it), or no dialogue at all.
    """
    conversations, omissions = [], []
    for row in read_rows(source):
        conversation, left_out = read_row(row, system)
        omissions += left_out
        if conversation is not None:
            conversations.append(conversation)
    if not conversations:
        why = f": {omissions[0].where}: {omissions[0].reason}" if omissions else ""
        raise UserError(f"{os.fspath(source)} holds no prompts{why}")
    return conversations, omissions


def read_row(row: PromptRow, system: str | None = None) -> tuple[Conversation | None, list[Omission]]:
    """The dialogue of a row, None where it has none that can be asked, and what is left out of it.

    Raises:
      UserError: the row has no such layout.
    """
    omissions: list[Omission] = []
    own_system, turns, answers = None, [], []  # type: ignore[var-annotated]
    messages = _messages(row)
    for number, (role, text, fault) in enumerate(messages):
        if fault is None:
            fault = _misplaced(role, turns, answers, own_system)
        if role == "assistant" and fault in (BEFORE_QUESTION, EMPTY):  # the dialogue goes on without it
            omissions.append(Omission(row.where, "message", 1, fault))
        elif fault is not None:
            omissions.append(Omission(row.where, "message", len(messages) - number, fault))
            break
        elif role == "system":
            own_system = text
        elif role == "user":
            turns.append(text)
            answers.append(None)
        else:
            answers[-1] = text
    if not turns:
        reason = omissions[-1].reason if omissions else "no message of the user"
        return None, [Omission(row.where, "row", 1, reason)]
    return Conversation(row.id, tuple(turns), own_system or system, tuple(answers)), omissions


EMPTY = "an empty message"
BEFORE_QUESTION = "an answer before the first question"


def _misplaced(role: str, turns: Sequence[str], answers: Sequence[str | None], system: str | None) -> str | None:
    """Why a dialogue cannot go on with a message of this role; None if it can."""
    if role == "system" and (turns or system):
        return "a system prompt that does not come first"
    if role == "assistant" and not turns:
        return BEFORE_QUESTION
    if role == "assistant" and answers[-1] is not None:
        return "two answers after each other"
    return None


def _messages(row: PromptRow) -> list[tuple[str, str, str | None]]:
    """(role, text, what is wrong with it) of each message; an empty system prompt is none."""
    fields = {name: value for name, value in row.fields.items() if value is not None}
    messages = [(ROLES["system"], fields[name]) for name in SYSTEM_FIELDS if name in fields][:1]
    answer = next((fields[name] for name in ANSWER_FIELDS if name in fields), None)
    dialogue = next((name for name in DIALOGUE_FIELDS if name in fields), None)
    if dialogue is None and isinstance(fields.get("prompt"), list):
        dialogue = "prompt"
    if dialogue is not None:
        messages += _said(row.where, dialogue, fields[dialogue])
    elif isinstance(fields.get("turns"), list):
        messages += [("user", text) for text in fields["turns"]]
    elif isinstance(fields.get("prompt"), str):
        messages.append(("user", fields["prompt"]))
    elif isinstance(fields.get("instruction"), str):
        given = fields.get("input") or ""
        messages.append(("user", f"{fields['instruction']}\n\n{given}" if given else fields["instruction"]))
    else:
        raise UserError(f"{row.where}: give {LAYOUTS} with text in it")
    if answer is not None and messages[-1][0] == "user":
        messages.append(("assistant", answer))
    checked = [(ROLES.get(role, role), *_text(role, content)) for role, content in messages]
    return [entry for entry in checked if entry[::2] != ("system", EMPTY)]


def _said(where: str, name: str, messages: Any) -> Iterable[tuple[str, Any]]:
    """(role, content) of each message of a dialogue, in OpenAI's words or in ShareGPT's."""
    if not isinstance(messages, list):
        raise UserError(f'{where}: "{name}" must be a list of messages')
    for number, message in enumerate(messages, 1):
        role = message.get("role", message.get("from")) if isinstance(message, dict) else None
        if not isinstance(role, str):
            raise UserError(
                f'{where}: message {number} of "{name}" has no "role" and "content", nor "from" and "value"'
            )
        yield role.lower(), message.get("content", message.get("value"))


def _text(role: str, content: Any) -> tuple[str, str | None]:
    """A message's text, the text parts of its content one after the other, and what is wrong with it."""
    if role not in ROLES:
        return "", f"a message of the role {role!r}"
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content]
        for part in parts:
            kind = part.get("type") or "text"
            if kind not in ("text", "input_text", "output_text"):
                return "", f"a content part that is no text ({kind!r})"
        texts = [part.get("text") for part in parts]
        content = "".join(map(str, texts)) if set(map(type, texts)) <= {str} else texts
    if content is None or (isinstance(content, str) and not content.strip()):
        return "", EMPTY
    if not isinstance(content, str):
        return "", "a message that is no text"
    try:
        content.encode()
    except UnicodeEncodeError:
        return "", "the text is no Unicode"
    return content, None
