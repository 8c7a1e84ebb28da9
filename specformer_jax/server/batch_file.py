"""OpenAI's batch files over an engine: a request a line, an answer a line, resumed after a kill.

A row is {"custom_id", "method": "POST", "url", "body"}; its answer {"id", "custom_id", "response": {"status_code",
"request_id", "body"}, "error"}, and under `specformer` which request it answers.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import uuid
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from specformer_jax.batch import prompt_files
from specformer_jax.batch.prompt_files import Answered, AnswerFile
from specformer_jax.engine.request import QueueFull, Stopped
from specformer_jax.errors import UserError
from specformer_jax.server import errors
from specformer_jax.server.apis import APIS
from specformer_jax.server.errors import ApiError
from specformer_jax.server.service import Service


def open_output(
    path: str | os.PathLike, rows: list[dict[str, Any]], made_with: dict[str, Any], *, resume: bool
) -> AnswerFile:
    """The file that the rows of `read_batch` are answered into; see `AnswerFile`."""
    asked = {(row["custom_id"],): _asked(row) for row in rows}
    return AnswerFile(path, asked, made_with, resume=resume, read=_read_answer)


def _asked(row: dict[str, Any]) -> str:
    """The address that a row asks, and 16 hex digits of what it asks there."""
    body = json.dumps(row["body"], sort_keys=True)
    return f"{row['url']} {hashlib.sha256(body.encode()).hexdigest()[:16]}"


def _read_answer(row: dict[str, Any]) -> Answered:
    """Which request an answer is to.

    Raises:
      KeyError, TypeError: it is no answer of a batch.
    """
    return Answered((row["custom_id"],), row["specformer"]["request"], row["response"]["status_code"] != 200)


def read_batch(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a batch file.

    Raises:
      UserError: an unreadable or empty file, or a row that is none, naming its line.
    """
    rows: dict[str, dict[str, Any]] = {}
    for number, row in prompt_files.read_objects(path):
        where, name = f"{path}, line {number}", row.get("custom_id")
        if not isinstance(name, str) or not isinstance(row.get("body"), dict):
            raise UserError(f'{where}: give a row its "custom_id", a text, and its "body", an object')
        prompt_files.check_unicode(where, json.dumps(row, ensure_ascii=False))
        if name in rows:
            raise UserError(f"{where}: the custom_id {name!r} stands there for the second time")
        if row.get("method") != "POST" or row.get("url") not in APIS:
            raise UserError(f'{where}: its "method" must be "POST" and its "url" one of {", ".join(APIS)}')
        rows[name] = row
    if not rows:
        raise UserError(f"the batch file {path} holds no requests")
    return list(rows.values())


def answer_batch(service: Service, rows: list[dict[str, Any]], output: AnswerFile) -> tuple[int, int]:
    """Answers what has no answer yet; what a client would get for a mistake of its own is an answer, too.

    Args:
      service: the model.
      rows: of `read_batch`.
      output: of `open_output`; gets a line an answer, in the order they finish.

    Returns:
      How many answers were written, and how many of them are errors.

    Raises:
      UserError: the output cannot be written.
      Stopped: the engine was stopped before the last answer.
    """
    left = [row for row in rows if (row["custom_id"],) not in output.done]
    try:
        return asyncio.run(_answer_all(service, left, output))
    except ExceptionGroup as group:  # what one of the tasks raised has ended the others
        raise group.exceptions[0] from None


async def _answer_all(service: Service, rows: list[dict[str, Any]], output: AnswerFile) -> tuple[int, int]:
    # Enough that the queue never runs dry, few enough that it never fills with requests for one answer.
    places = asyncio.Semaphore(min(2 * service.engine.config.rows, service.engine.config.max_queue))
    failed = 0

    async def one(row: dict[str, Any]) -> None:
        nonlocal failed
        async with places:
            status, body = await _answer(service, row)
        failed += status != 200
        name = uuid.uuid4().hex
        response = {"status_code": status, "request_id": name, "body": body}
        written = {"id": f"batch_req_{name}", "custom_id": row["custom_id"], "response": response, "error": None}
        output.write(written | {"specformer": {"request": _asked(row)}})

    async with asyncio.TaskGroup() as tasks:
        for row in rows:
            tasks.create_task(one(row))
    return len(rows), failed


async def _answer(service: Service, row: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and body of an answer, as HTTP would have them."""
    api = APIS[row["url"]]
    while True:
        try:
            if row["body"].get("stream"):
                raise ApiError(400, "a batch does not stream: leave stream out", param="stream", code="invalid_value")
            answer = await api.answer(service, api.body.model_validate(row["body"]))
            assert isinstance(answer, dict)
            return 200, answer
        except QueueFull as full:
            await asyncio.sleep(full.retry_after)
        except Stopped:
            raise
        except ValidationError as mistake:
            details = [{**detail, "loc": ("body", *detail["loc"])} for detail in mistake.errors()]
            error = errors.of(RequestValidationError(details, body=row["body"]))
            return error.status, error.body()
        except (ApiError, UserError) as mistake:
            error = errors.of(mistake)
            if error.code == "shutting_down":
                raise Stopped("the engine was stopped; --resume asks for what is missing") from mistake
            return error.status, error.body()
