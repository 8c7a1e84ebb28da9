"""What an answer has to look like, in the forms that clients write it, and the grammar that this is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from specformer_jax.errors import UserError

# A small model would fill a whole answer with white space where JSON allows it.
_JSON_OPTIONS = {"whitespace_pattern": r"[ \n\t]{0,20}"}
_ANY_JSON_OBJECT = {"type": "object"}


def llguidance() -> ModuleType:
    """The package that matches tokens against grammars.

    Raises:
      UserError: it is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise UserError("grammars need the extra `serve`: pip install 'specformer-jax[serve]'") from error
    return llguidance


def of_json_schema(schema: Mapping[str, Any] | str | bool | None = None) -> str:
    """The grammar of JSON that a schema describes; None allows every JSON object.

    Raises:
      UserError: the schema is no JSON, or `llguidance` is not installed.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise UserError(f"the schema is not valid JSON: {error}") from error
    return of_parts(f"start: {json_rule(_ANY_JSON_OBJECT if schema is None else schema)}")


def of_parts(rules: str) -> str:
    """The grammar of rules that are made of the parts below, one a line; `start` is the answer."""
    return llguidance().LLMatcher.grammar_from_lark(rules)


def json_rule(schema: object) -> str:
    """The JSON that a schema describes, as a part of a rule.

    Raises:
      UserError: it is no schema.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, Mapping):
        raise UserError(f"a schema must be a JSON object, not a {type(schema).__name__}")
    return "%json " + json.dumps({"x-guidance": _JSON_OPTIONS} | dict(schema))


def text_rule(text: str) -> str:
    """A fixed text, as a part of a rule."""
    return json.dumps(text)


def token_rule(token: int) -> str:
    """A token that stands for no text, as a part of a rule."""
    return f"<[{token}]>"


def of_regex(pattern: str) -> str:
    """The grammar of texts that a regular expression matches as a whole.

    Raises:
      UserError: the expression holds half of a surrogate pair, which no text does.
    """
    try:
        pattern.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"no answer can match {pattern!r}, which cannot be written as UTF-8") from error
    return llguidance().LLMatcher.grammar_from_regex(pattern)


def of_choice(choices: Sequence[str]) -> str:
    """The grammar of some texts.

    Raises:
      UserError: there is none, one is empty, or one is no text.
    """
    if not choices or not all(choices):
        raise UserError("a choice must have one text at least, and none may be empty")
    return of_regex("|".join(re.escape(choice) for choice in choices))


def of_rules(rules: str) -> str:
    """The grammar that Lark's or llama.cpp's (GBNF) rules describe.

    Raises:
      UserError: they are neither.
    """
    try:
        return llguidance().grammar_from("grammar", rules)
    except Exception as error:  # whatever its parsers say
        raise UserError(f"the grammar cannot be read: {error}") from error
