"""Chat templates as transformers runs them: sandboxed jinja2 with the same settings and helpers."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from specformer_jax.errors import UserError

_END = "\ue000"  # of a message that is to be continued: a character that no text has, as it means nothing


class ChatTemplate:
    """How a model writes a dialogue down.

    Its code is a stranger's, so it runs in a sandbox, is compiled when it is first needed, and whatever it raises is a
    sentence for the user.

    Attributes:
      source: the jinja2 source.
    """

    def __init__(self, source: Any, names: dict[str, str]):
        """
        Args:
          source: jinja2 source.
          names: what the template may read beside the messages: bos_token, eos_token and the like.
        """
        self.source = source
        self._names = names

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        more: Mapping[str, Any] = {},
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The dialogue as text.

        Args:
          messages: what was said, and by whom.
          more: other names that the template reads, `enable_thinking` say.
          add_generation_prompt: end with the header of the answer to come.
          continue_final_message: end within the last message, where its content ends.

        Raises:
          UserError: the template is none, or it refuses these messages.
        """
        if continue_final_message:
            *before, last = messages
            messages = [*before, {**last, "content": last["content"] + _END}]
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        template = self._compiled
        try:
            text = template.render({**self._names, "tools": None, "documents": None, **more, **given})
        except Exception as error:
            reason = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)
            raise UserError(f"the model's chat template refuses these messages: {reason}") from error
        if not continue_final_message:
            return text
        if _END not in text:
            raise UserError("the model's chat template leaves the last message out, so it cannot be continued")
        return text[: text.rindex(_END)]

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        try:
            return environment.from_string(self.source)
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
