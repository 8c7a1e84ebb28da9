"""The arguments of a call in Gemma's form as rules of a grammar; `marked_calls.GemmaValue` reads what follows them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from specformer_jax.errors import UserError
from specformer_jax.grammars import grammar

_NOTHING, _COMMA = '""', '","'
_PLAIN = ("number", "integer", "boolean", "null")  # written as in JSON
# What says nothing about which values fit, or is followed where its type is.
_KNOWN = frozenset(
    (
        "type",
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "properties",
        "required",
        "additionalProperties",
        "items",
        "minItems",
        "maxItems",
        "minLength",
        "maxLength",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "enum",
        "const",
        "anyOf",
        "oneOf",
        "$ref",
        "$defs",
        "definitions",
        "$schema",
        "$id",
        "$comment",
    )
)


class GemmaRules:
    """The rules of one call's arguments.

    Attributes:
      lines: the rules; the names of all begin alike, with `prefix`.
    """

    def __init__(self, prefix: str, schema: Mapping[str, Any], quote: str, letters: str):
        """
        Args:
          prefix: what the names of the rules begin with.
          schema: the JSON schema of the arguments.
          quote: the mark around texts, as a part of a rule.
          letters: what a letter within them may be, as a regular expression.
        """
        self._prefix, self._root, self._quote, self._letters = prefix, schema, quote, letters
        self._refs: dict[str, str] = {}
        self.lines: list[str] = []

    def rule(self, schema: Any) -> str:
        """The name of a new rule for values that fit the schema.

        Raises:
          UserError: it has a keyword that this form cannot follow.
        """
        name = self._add("")  # its place is taken before those of its parts
        at = len(self.lines) - 1
        self.lines[at] = f"{name}: {self._value(schema)}"
        return name

    def _add(self, body: str) -> str:
        name = f"{self._prefix}_{len(self.lines)}"
        self.lines.append(f"{name}: {body}")
        return name

    def _value(self, schema: Any) -> str:
        if schema is True or schema == {}:
            return self._any()
        if not isinstance(schema, Mapping):
            raise UserError(f"a schema must be a JSON object, not {json.dumps(schema)}")
        if unknown := sorted(schema.keys() - _KNOWN):
            raise UserError(f"{unknown[0]} of a schema cannot be followed where a call is forced in this model's form")
        if "$ref" in schema:
            return self._referred(schema["$ref"])
        if "const" in schema or "enum" in schema:
            return _one_of(self._written(value) for value in schema.get("enum", [schema.get("const")]))
        if some := schema.get("anyOf", schema.get("oneOf")):
            return _one_of(self.rule(part) for part in some)
        kind = schema.get("type", "object" if "properties" in schema else None)
        if isinstance(kind, list):
            return _one_of(self.rule({**schema, "type": each}) for each in kind)
        match kind:
            case "object":
                return self._object(schema)
            case "array":
                return self._array(schema)
            case "string":
                return self._string(schema.get("minLength", 0), schema.get("maxLength"))
            case _ if kind in _PLAIN:
                return grammar.json_rule(schema)
        return self._any()

    def _referred(self, path: str) -> str:
        if path not in self._refs:
            found: Any = self._root
            for part in path.removeprefix("#").strip("/").split("/") if path != "#" else ():
                found = found.get(part) if isinstance(found, Mapping) else None
            if found is None or not path.startswith("#"):
                raise UserError(f"the schema has no {path}")
            self._refs[path] = f"{self._prefix}_{len(self.lines)}"  # the rule may need itself
            self.rule(found)
        return self._refs[path]

    def _object(self, schema: Mapping[str, Any]) -> str:
        """Its properties, by name, as the templates write them; those that are not required may be left out."""
        properties, required = schema.get("properties", {}), schema.get("required", ())
        if not properties and not required:
            return '"{}"' if schema.get("additionalProperties") is False else self._any_object()
        # What may stand behind a property, and behind none; from the last name to the first.
        behind, first = _NOTHING, _NOTHING
        for name in sorted({*properties, *required}, reverse=True):
            pair = f"{grammar.text_rule(name + ':')} {self.rule(properties.get(name, True))}"
            here = self._add(f"{pair} {behind}")
            if name in required:
                behind, first = self._add(f"{_COMMA} {here}"), here
            else:
                behind, first = self._add(f"{_COMMA} {here} | {behind}"), self._add(f"{here} | {first}")
        return f'"{{" {first} "}}"'

    def _array(self, schema: Mapping[str, Any]) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        item = self.rule(schema.get("items", True))
        more = f'("," {item}){{{max(least - 1, 0)},{"" if most is None else max(most - 1, 0)}}}'
        inner = "" if most == 0 else f"{item} {more}" if least else f"({item} {more})?"
        return f'"[" {inner} "]"'

    def _string(self, least: int = 0, most: int | None = None) -> str:
        bounds = f"{{{max(least, 1)},{'' if most is None else most}}}"
        text = "" if most == 0 else f"/(?s:{self._letters}{bounds})/{'' if least else '?'}"
        return f"{self._quote} {text} {self._quote}"

    def _any(self) -> str:
        """Whatever may stand there."""
        return _one_of([self._string(), *(grammar.json_rule({"type": kind}) for kind in _PLAIN)])

    def _any_object(self) -> str:
        """Any names, with simple values."""
        pair = f'/[A-Za-z_][A-Za-z0-9_]*/ ":" {self._add(self._any())}'
        return f'"{{" ({pair} ("," {pair})*)? "}}"'

    def _written(self, value: Any) -> str:
        """A value as a part of a rule."""
        match value:
            case str():
                return f"{self._quote} {grammar.text_rule(value) if value else ''} {self._quote}"
            case dict():
                pairs = [f"{grammar.text_rule(k + ':')} {self._written(v)}" for k, v in sorted(value.items())]
                return f'"{{" {_listed(pairs)} "}}"'
            case list():
                return f'"[" {_listed(map(self._written, value))} "]"'
        return grammar.text_rule(json.dumps(value))


def _one_of(parts: Iterable[str]) -> str:
    """One of some parts of a rule."""
    return " | ".join(parts)


def _listed(parts: Iterable[str]) -> str:
    """Parts of a rule with commas between."""
    return f" {_COMMA} ".join(parts)
