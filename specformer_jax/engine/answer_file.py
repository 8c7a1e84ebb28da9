"""Prompt files through the engine: JSON lines of any size, written as they are answered, resumed after a kill."""

from __future__ import annotations

import collections
import dataclasses
import os
import queue
import time
from collections.abc import Iterator, Sequence
from typing import Any

from specformer_jax.batch import generation, prompt_files
from specformer_jax.batch.conversations import Conversation
from specformer_jax.batch.generation import Answer
from specformer_jax.config import SamplingParams
from specformer_jax.engine.engine import Engine
from specformer_jax.engine.request import Delta, QueueFull, Request, Stopped
from specformer_jax.errors import UserError


def answer_prompt_file(
    engine: Engine,
    input_path: str | os.PathLike,
    output_path: str | os.PathLike,
    *,
    sampling_params: SamplingParams = SamplingParams(),
    speculative: str | int = "auto",
    raw: bool = False,
    resume: bool = False,
) -> int:
    """Answers the prompts of a file; the rows are those of `serve.py generate --output`, in the order they finish.

    Args:
      engine: answers the prompts, beside whatever else it is asked.
      input_path: a file that `prompt_files.read_prompts` reads.
      output_path: grows by a row an answer; a killed call loses no finished row.
      sampling_params: how every answer is sampled.
      speculative: how many drafts a step may have, as in `Request`.
      raw: whether prompts are continued as plain text, without the chat template.
      resume: whether to continue an output file that a stopped call left; rows with an error are asked again.

    Returns:
      How many rows this call wrote, those with finish_reason "error" included.

    Raises:
      UserError: a file that cannot be read or written, is there already without `resume`, or holds answers to other
        prompts or made in another way.
      Stopped: the engine was stopped before the last answer; every answer that had ended is written.
    """
    conversations = prompt_files.read_prompts(input_path)
    made_with = {"target": engine.lm.name, "dtype": engine.lm.model.target.dtype, "raw": raw}
    made_with |= dataclasses.asdict(sampling_params)
    output = prompt_files.AnswerFile(output_path, prompt_files.asked_turns(conversations), made_with, resume=resume)
    texts = {key: row["text"] for key, row in output.done.items()}
    waiting = collections.deque((c, 0) for c in conversations)
    ended: queue.SimpleQueue[tuple[tuple[Conversation, int], Answer]] = queue.SimpleQueue()
    asked = written = 0
    stopped: Stopped | None = None
    while waiting or asked:
        # Enough that the queue never runs dry, few enough that it never fills.
        while waiting and asked < min(2 * engine.config.rows, engine.config.max_queue):
            c, turn = waiting.popleft()
            if (c.id, turn) in texts:
                if turn + 1 < len(c.turns):
                    waiting.append((c, turn + 1))
                continue
            asked += 1
            try:
                ids = generation.encode_turn(engine.lm, c, generation.answers_before(c, turn, texts), raw)
                request = Request(tuple(ids), sampling_params, speculative, raw=raw, streams=False)
                ask(engine, request, (c, turn), ended)
            except UserError as error:  # the row's own mistake: the others go on
                ended.put(((c, turn), Answer.failed(str(error))))
            except Stopped as error:
                stopped = stopped or error
                asked -= 1
                waiting.clear()
        if not asked:
            continue
        (c, turn), answer = ended.get()
        asked -= 1
        if answer.finish_reason == "cancelled":
            stopped = stopped or Stopped("the engine was stopped")
            continue
        output.write(generation.answer_row(c, turn, answer))
        written += 1
        if answer.error is None:
            texts[c.id, turn] = answer.text
        if turn + 1 < len(c.turns):
            waiting.appendleft((c, turn + 1))
    if stopped is not None:
        raise type(stopped)(f"{stopped}; `resume` asks for what is missing") from stopped
    return written


def answer_each(
    engine: Engine, request: Request, prompts: Sequence[Sequence[int]], **_: object
) -> Iterator[tuple[int, Answer]]:
    """The index and the answer of each prompt, as they finish; `generation.generate_ids` by an engine.

    Args:
      engine: answers the prompts.
      request: what is asked for, whatever its prompt.
      prompts: the token ids of each prompt.
    """
    ended: queue.SimpleQueue[tuple[int, Answer]] = queue.SimpleQueue()
    for i, prompt in enumerate(prompts):
        try:
            ask(engine, dataclasses.replace(request, prompt_ids=tuple(prompt)), i, ended)
        except UserError as error:  # the row's own mistake: the others go on
            ended.put((i, Answer.failed(str(error), len(prompt))))
    for _i in prompts:
        yield ended.get()


def ask(engine: Engine, request: Request, key: Any, ended: queue.SimpleQueue) -> None:
    """Submits a request, waiting while others fill the queue; puts (key, `Answer`) into `ended` when it has ended.

    Raises:
      UserError, Stopped: `Engine.submit` refuses the request.
    """
    while True:
        try:
            handle = engine.submit(request)
            break
        except QueueFull as full:
            time.sleep(full.retry_after)
    handle.subscribe(_Collector(key, ended))


class _Collector:
    """Puts a request's deltas together and hands over the answer when the last has come."""

    def __init__(self, key: Any, ended: queue.SimpleQueue):
        self._key, self._ended = key, ended
        self._ids: list[int] = []
        self._text = ""

    def __call__(self, delta: Delta) -> None:
        self._ids += [token.id for token in delta.tokens]
        self._text += delta.text
        if delta.finish_reason is not None:
            u = delta.usage
            answer = Answer(
                text=self._text,
                token_ids=self._ids,
                finish_reason=delta.finish_reason,
                prompt_tokens=u.prompt_tokens,
                completion_tokens=u.completion_tokens,
                steps=u.steps,
                kappa=round(u.kappa, 4),
                accepted_per_position=list(u.accepted_per_position),
                error=delta.error,
            )
            self._ended.put((self._key, answer))
