"""Calls written as JSON objects: {"name": ..., "arguments": {...}}, or `parameters` as Llama 3 has it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from specformer_jax.server.parsing.reader import CallArguments, CallBegin, Said, Source, Steps, rest, skip_space

# The usual order of the fields: the arguments can be shown as they come.
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
# What may stand before the first of some calls that are the whole answer, and the beginnings of that.
_OPENING = re.compile(r"\s*(?:<\|python_tag\|>\s*)?(?:```[a-z_]*\s*)?(?:\[\s*)?(?=\{)")
_PART_OF_OPENING = re.compile(r"\s*(?:<[|a-z_]{0,12}>?\s*)?(?:`{1,3}[a-z_]{0,12}\s*)?(?:\[\s*)?")
_BETWEEN = re.compile(r"(?:[\s,;]|<\|python_tag\|>)*")
_CLOSING = re.compile(r"\s*\]?\s*(?:```)?\s*")
_PART_OF_CLOSING = re.compile(r"\s*\]?\s*`{0,3}\s*")


class Nesting:
    """How deep a JSON text is nested, letter by letter.

    Attributes:
      depth: how many objects and lists are open.
    """

    def __init__(self, depth: int = 0):
        self.depth = depth
        self._quoted = self._escaped = False

    def feed(self, letter: str) -> None:
        """One more letter."""
        if self._escaped:
            self._escaped = False
        elif self._quoted:
            self._escaped = letter == "\\"
            self._quoted = letter != '"'
        elif letter == '"':
            self._quoted = True
        else:
            self.depth += (letter in "{[") - (letter in "}]")


def json_call(source: Source, names: Collection[str] | None = None) -> Steps[bool]:
    """Reads an object that is a call.

    Args:
      source: the text, which begins with the object.
      names: the tools that there are; None takes every name.

    Returns:
      False where it is no call; then nothing was taken off.
    """
    nesting, at = Nesting(), 0
    while True:
        if head := _HEAD.match(source.text):
            name = _text(head[1])
            if name is None or not (names is None or name in names):
                return False
            source.take(head.end())
            yield CallBegin(name)
            yield from arguments(source)
            yield from _skip(source, depth=1)
            return True
        while at < len(source.text) and (at == 0 or nesting.depth):
            nesting.feed(source.text[at])
            at += 1
        if source.ended or (at and not nesting.depth):
            break
        yield None
    call = _call(source.text[:at])
    if call is None or not (names is None or call[0] in names):
        return False
    source.take(at)
    yield CallBegin(call[0])
    yield CallArguments(call[1])
    return True


def arguments(source: Source) -> Steps[None]:
    """Reads an object, given out as the arguments of a call as it comes."""
    nesting = Nesting()
    while True:
        for at, letter in enumerate(source.text):
            nesting.feed(letter)
            if not nesting.depth:
                yield CallArguments(source.take(at + 1))
                return
        if source.text:
            yield CallArguments(source.take(len(source.text)))
        if source.ended:
            return
        yield None


def json_answer(source: Source, names: Collection[str]) -> Steps[None]:
    """An answer that is nothing but calls: objects behind each other or in a list, maybe in a code block.

    So write Llama 3, which may begin with <|python_tag|>, and models that were only told how. What names no tool is the
    answer itself.
    """
    while not (opening := _OPENING.match(source.text)):
        if source.ended or not _PART_OF_OPENING.fullmatch(source.text):
            yield from rest(source)
            return
        yield None
    before = source.take(opening.end())
    if not (yield from json_call(source, names)):
        yield Said(before)
        yield from rest(source)
        return
    yield from more_calls(source, names)
    while not source.ended and _PART_OF_CLOSING.fullmatch(source.text):
        yield None
    if closing := _CLOSING.match(source.text):
        source.take(closing.end())
    yield from rest(source)


def more_calls(source: Source, names: Collection[str] | None = None) -> Steps[None]:
    """Reads the calls behind the first, as many as there are."""
    while True:
        yield from skip_space(source)
        between = _BETWEEN.match(source.text)
        after = between.end() if between else 0
        if not source.ended and (after == len(source.text) or "<|python_tag|>".startswith(source.text[after:])):
            yield None
        elif source.text[after : after + 1] == "{":
            source.take(after)
            if not (yield from json_call(source, names)):
                return
        else:
            return


def _skip(source: Source, depth: int) -> Steps[None]:
    """Takes off what is left of an object that is nested so deep."""
    nesting = Nesting(depth)
    while True:
        while source.text:
            nesting.feed(source.take(1))
            if not nesting.depth:
                return
        if source.ended:
            return
        yield None


def _text(quoted: str) -> str | None:
    try:
        return json.loads(quoted)
    except ValueError:
        return None


def _call(text: str) -> tuple[str, str] | None:
    """Name and arguments of an object, None where it is no call."""
    try:
        found: Any = json.loads(text)
    except ValueError:
        return None
    if isinstance(found, dict) and isinstance(found.get("function"), dict):
        found = found["function"]
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    given = found.get("arguments", found.get("parameters", {}))
    return found["name"], given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
