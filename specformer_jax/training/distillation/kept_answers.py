"""Answers that are there as text, in the target's tokens: shards to train on that no target wrote."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from specformer_jax import files
from specformer_jax.batch.conversations import Conversation
from specformer_jax.batch.generation import messages
from specformer_jax.batch.omissions import Omission
from specformer_jax.errors import UserError
from specformer_jax.loading.tokenizer import Tokenizer
from specformer_jax.training.distillation.answer_shards import check_folder, lines


def keep(
    target: str,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    shard_size: int,
    folder: str | os.PathLike,
    *,
    raw: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> tuple[int, list[Omission]]:
    """Writes the answers that stand in dialogues as shards, a row each, behind all that was said before it.

    Args:
      target: the name of the target, whose tokenizer this is.
      tokenizer: writes dialogues down as the target reads them.
      conversations: the dialogues; a turn without an answer ends its dialogue.
      shard_size: how many dialogues a shard holds.
      folder: where the shards go.
      raw: whether the turns are plain text, without the chat template.
      process_index: which of the processes that share the dialogues this is: it makes the shards s with
        s % process_count == process_index.
      process_count: how many processes share the dialogues.

    Returns:
      How many answer tokens were written, and what of this process's dialogues was left out.

    Raises:
      UserError: there is no answer, the folder cannot be written, or it holds answers made in another way.
    """
    folder, written = Path(folder), 0
    omissions: list[Omission] = []
    if not any(True for c in conversations for _ in _rows(tokenizer, c, raw, omissions)):
        raise UserError(f"there is no answer to keep: {omissions[0].reason}")
    omissions.clear()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        count = -(-len(conversations) // shard_size)
        check_folder(folder, {"target": target, "tokenizer": tokenizer.fingerprint, "answers": "keep"}, count)
        for number in range(process_index, count, process_count):
            part = conversations[number * shard_size : (number + 1) * shard_size]
            rows = [row for c in part for row in _rows(tokenizer, c, raw, omissions)]
            written += sum(len(row["response_ids"]) for row in rows)
            files.write_with_digest(folder / f"shard-{number:05d}.jsonl", lines(rows))
    except OSError as error:
        raise UserError(f"answers cannot be written to {folder}: {error}") from error
    return written, omissions


def _rows(tokenizer: Tokenizer, c: Conversation, raw: bool, omissions: list[Omission]) -> Iterator[dict[str, Any]]:
    """The rows of a dialogue's answers; what is left out is added to the omissions."""
    said: list[str] = []
    for turn, (question, answer) in enumerate(itertools.zip_longest(c.turns, c.answers)):
        reason, rest = "no answer stands there", len(c.turns) - turn
        if answer is not None:
            said += [question, answer]
            try:
                if raw:
                    prompt_ids, response_ids = tokenizer.encode_answer("".join(said[:-1]), answer)
                else:
                    prompt_ids, response_ids = tokenizer.chat_answer(messages(said, c.system))
            except UserError as error:
                reason = str(error)
            else:
                row = {"id": c.id, "temperature": 0.0, "prompt_ids": prompt_ids, "response_ids": response_ids}
                yield row | ({"turn": turn} if turn else {})
                continue
        omissions.append(Omission(c.id, "turn" if turn else "row", rest if turn else 1, reason))
        return
