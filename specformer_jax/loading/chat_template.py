"""Chat templates as transformers runs them: sandboxed jinja2 with the same settings and helpers."""

from __future__ import annotations

import functools
import json
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from specformer_jax.errors import UserError


class ChatTemplate:
    """How a model writes a dialogue down.

    Its code is a stranger's, so it runs in a sandbox, is compiled when it is first needed, and whatever it raises is a
    sentence for the user.
    """

    def __init__(self, source: Any, names: dict[str, str]):
        """
        Args:
          source: jinja2 source.
          names: what the template may read beside the messages: bos_token, eos_token and the like.
        """
        self._source = source
        self._names = names

    def render(self, messages: list[dict[str, Any]], answer_follows: bool = True) -> str:
        """The dialogue as text, up to the header of the answer to come if one follows.

        Raises:
          UserError: the template is none, or it refuses these messages.
        """
        given = {"messages": messages, "add_generation_prompt": answer_follows, "tools": None, "documents": None}
        template = self._compiled
        try:
            return template.render({**self._names, **given})
        except Exception as error:
            reason = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)
            raise UserError(f"the model's chat template refuses these messages: {reason}") from error

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        try:
            return environment.from_string(self._source)
        except Exception as error:
            raise UserError(f"the model's chat template cannot be read ({error}): use --raw") from error


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks what an assistant wrote, for training; the text is the same without it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
