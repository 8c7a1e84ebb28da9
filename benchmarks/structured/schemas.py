"""The schemas that the benchmark asks for."""

from __future__ import annotations

from typing import Any


def closed(**properties: Any) -> dict[str, Any]:
    """An object with these properties and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def schemas() -> list[dict[str, Any]]:
    """Forty: flat and nested, choices, patterns, recursion, letters of many scripts, small and large."""
    text, number = {"type": "string", "maxLength": 24}, {"type": "integer", "minimum": 0, "maximum": 999}
    person = closed(name=text, age=number)
    node = closed(value=number, next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})
    tree = closed(name=text, children={"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2})
    found: list[dict[str, Any]] = [
        {"$defs": {"node": node}, "$ref": "#/$defs/node"},
        {"$defs": {"tree": tree}, "$ref": "#/$defs/tree"},
        {"anyOf": [{"type": "null"}, person]},
        closed(**{"Grüße": {"const": "こんにちは"}, "🙂": {"enum": ["ä", "日本", 'a"b\\']}}),
    ]
    for i in range(6):
        choice = {"enum": [f"{word}{i}" for word in ("red", "green", "blue")]}
        pattern = {"type": "string", "pattern": f"^[A-Z]{{{i + 1}}}-[0-9]{{2,4}}$"}
        found += [
            closed(**{f"field{j}": text for j in range(i + 1)}),
            closed(kind=choice, code=pattern, count=number),
            {"type": "array", "items": person, "minItems": 1, "maxItems": i + 1},
            closed(owner=person, pets={"type": "array", "items": closed(kind=choice, name=text), "maxItems": 2}),
            closed(day={"type": "string", "format": "date"}, share={"type": "number", "minimum": 0, "maximum": i + 1}),
            closed(**{f"option{j}": {"enum": [f"first choice {j}", f"second choice {j}"]} for j in range(4 * i + 1)}),
        ]
    return found
