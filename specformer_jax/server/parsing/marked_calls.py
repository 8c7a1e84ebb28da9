"""Calls between markers of their own: as Hermes and Qwen, Mistral and Gemma write them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from specformer_jax.server.parsing.json_calls import arguments, json_call, more_calls
from specformer_jax.server.parsing.reader import CallArguments, CallBegin, Said, Source, Steps, rest, skip_space, until

_MISTRAL_NAME = re.compile(r"([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")
_LONGEST_NAME = 256
_GEMMA_CALL = re.compile(r"\s*call:([\w.-]+)\s*(?=\{)")


def hermes_answer(source: Source, names: Collection[str]) -> Steps[None]:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, one or more, behind or between text."""
    while (yield from until(source, "<tool_call>")):
        space = yield from skip_space(source)
        if not (yield from json_call(source)):
            yield Said("<tool_call>" + space)  # what stands there is no call: it is shown as it is
            continue
        yield from _skip_marker(source, "</tool_call>")


def mistral_answer(source: Source, names: Collection[str]) -> Steps[None]:
    """[TOOL_CALLS][{...}, ...], or [TOOL_CALLS]name{...} as later models have it."""
    while (yield from until(source, "[TOOL_CALLS]")):
        before = "[TOOL_CALLS]" + (yield from skip_space(source))
        if source.text[:1] in ("[", "{"):
            before += source.take(1) if source.text.startswith("[") else ""
            before += yield from skip_space(source)
            if not (yield from json_call(source)):
                yield Said(before)
                continue
            yield from more_calls(source)
            yield from _skip_marker(source, "]")
            continue
        while not (named := _MISTRAL_NAME.match(source.text)):
            if source.ended or len(source.text) > _LONGEST_NAME:
                break
            yield None
        if named is None:
            yield Said(before)
            continue
        source.take(named.end())
        yield CallBegin(named[1])
        yield from arguments(source)
        yield from skip_space(source)


def gemma_answer(source: Source, names: Collection[str]) -> Steps[None]:
    """<|tool_call>call:name{key:value}<tool_call|>, its texts between <|"|>."""
    yield from _gemma(source, "<|tool_call>", "<tool_call|>", '<|"|>')


def function_gemma_answer(source: Source, names: Collection[str]) -> Steps[None]:
    """<start_function_call>call:name{key:value}<end_function_call>, its texts between <escape>."""
    yield from _gemma(source, "<start_function_call>", "<end_function_call>", "<escape>")


def _gemma(source: Source, begin: str, end: str, quote: str) -> Steps[None]:
    while (yield from until(source, begin)):
        while end not in source.text and not source.ended:
            yield None
        body, marker, _ = source.text.partition(end)
        call = _GEMMA_CALL.match(body)
        value = None if call is None else GemmaValue(body[call.end() :], quote).read()
        if call is None or not isinstance(value, dict):
            yield Said(begin)
            continue
        source.take(len(body) + len(marker))
        yield CallBegin(call[1])
        yield CallArguments(json.dumps(value, ensure_ascii=False))
        yield from skip_space(source)


class GemmaValue:
    """Gemma's way to write a value: as JSON, but with names bare and texts between marks of their own."""

    def __init__(self, text: str, quote: str):
        self._text, self._quote, self._at = text, quote, 0

    def read(self) -> Any:
        """The next value; where the text ends early, as much of it as there is."""
        if self._takes(self._quote):
            return self._up_to(self._quote)
        if self._takes("{"):
            found: dict[str, Any] = {}
            while not self._takes("}") and self._at < len(self._text):
                key = self._up_to(self._quote) if self._takes(self._quote) else self._bare(":")
                self._takes(":")
                found[key.strip()] = self.read()
                self._takes(",")
            return found
        if self._takes("["):
            values = []
            while not self._takes("]") and self._at < len(self._text):
                values.append(self.read())
                self._takes(",")
            return values
        word = self._bare(",}]")
        try:
            return json.loads(word)
        except ValueError:
            return word

    def _takes(self, mark: str) -> bool:
        begin = self._at + len(self._text[self._at :]) - len(self._text[self._at :].lstrip())
        if found := self._text.startswith(mark, begin):
            self._at = begin + len(mark)
        return found

    def _up_to(self, mark: str) -> str:
        end = self._text.find(mark, self._at)
        end = len(self._text) if end < 0 else end
        text, self._at = self._text[self._at : end], end + len(mark)
        return text

    def _bare(self, marks: str) -> str:
        begin = self._at
        while self._at < len(self._text) and self._text[self._at] not in marks:
            self._at += 1
        word = self._text[begin : self._at].strip()
        if self._at == begin and self._text[self._at : self._at + 1] in tuple("}]"):
            self._at += 1  # one too many, which must not stop the reading
        return word


def _skip_marker(source: Source, marker: str) -> Steps[None]:
    """Takes a marker off and the whitespace around it, where it stands there."""
    yield from skip_space(source)
    while not source.ended and marker.startswith(source.text[: len(marker)]) and marker not in source.text:
        yield None
    if source.text.startswith(marker):
        source.take(len(marker))
    yield from skip_space(source)


def plain_answer(source: Source, names: Collection[str]) -> Steps[None]:
    """An answer without calls."""
    yield from rest(source)
