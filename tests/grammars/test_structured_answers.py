"""The built-in model's answers to schemas: each fits its own, and has the same tokens with any drafts and company."""

import dataclasses
import json

import jsonschema
import pytest

from specformer_jax.config import SamplingParams
from specformer_jax.engine import Engine, EngineConfig
from specformer_jax.engine.request import Request
from specformer_jax.grammars import grammar
from specformer_jax.loading.language_model import load

ANIMAL = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog", "bird"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
LINKED = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer", "minimum": 0, "maximum": 9},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}


def closed(**properties):
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS = [
    ANIMAL,
    LINKED,
    closed(city={"type": "string", "pattern": "^[A-Z][a-z]{2,10}$"}, large={"type": "boolean"}),
    closed(**{"Grüße": {"const": "こんにちは"}, "🙂": {"enum": ["ä", "日本", 'a"b\\']}}),
    closed(owner=ANIMAL, pets={"type": "array", "items": ANIMAL, "minItems": 1, "maxItems": 2}),
    {"type": "array", "items": {"type": "number", "minimum": -1, "maximum": 1}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "null"}, closed(x={"type": "integer"})]},
    closed(**{f"field{i}": {"enum": [f"value {i}", f"other {i}"]} for i in range(24)}),
    closed(day={"type": "string", "format": "date"}, at={"type": "string", "format": "time"}),
]


@pytest.fixture(scope="module")
def engine():
    with Engine(load(), EngineConfig(rows=16, max_context=768, chunk=64)) as engine:
        yield engine


def asked(engine, schema, params, speculative="auto"):
    words = f"Answer in JSON. Make something up that fits this schema: {json.dumps(schema)[:300]}"
    prompt = engine.lm.tokenizer.chat([{"role": "user", "content": words}])
    return Request(tuple(prompt), params, speculative, grammar=grammar.of_json_schema(schema))


def answer(handle):
    """(tokens, text, finish reason, usage)."""
    deltas = list(handle)
    ids = [token.id for delta in deltas for token in delta.tokens]
    return ids, "".join(delta.text for delta in deltas), deltas[-1].finish_reason, deltas[-1].usage


@pytest.mark.slow
def test_answers_fit_their_schema_with_any_drafts_and_in_any_company(engine):
    sampled = SamplingParams(temperature=1.0, seed=3, max_new_tokens=200)
    cases = [(schema, params) for schema in SCHEMAS for params in (SamplingParams(max_new_tokens=200), sampled)]
    alone = []
    for schema, params in cases:
        found = {budget: answer(engine.submit(asked(engine, schema, params, budget))) for budget in ("off", 1, "auto")}
        assert found["off"][:3] == found[1][:3] == found["auto"][:3]
        ids, text, reason, _ = found["auto"]
        if reason == "stop":
            jsonschema.validate(json.loads(text), schema)
        alone.append((ids, found))
    assert sum(found["auto"][2] == "stop" for _, found in alone) >= len(cases) / 2  # a greedy list may never end
    for begin in range(0, len(cases), 16):
        some = list(zip(cases, alone, strict=True))[begin : begin + 16]
        handles = [engine.submit(asked(engine, schema, params)) for (schema, params), _ in some]
        assert [answer(handle)[0] for handle in handles] == [ids for _, (ids, _) in some]
    kappas = [found["auto"][3].kappa for _, found in alone]
    assert sum(kappas) / len(kappas) > 1.5


@pytest.mark.slow
def test_a_choice_takes_a_pass_or_two(engine):
    """What is forced is drafted: a long word of two that differ in their first letter is read at once."""
    words = ["antidisestablishmentarianism is long", "supercalifragilisticexpialidocious is too"]
    prompt = engine.lm.tokenizer.chat([{"role": "user", "content": "Say a long word."}])
    request = Request(tuple(prompt), SamplingParams(max_new_tokens=60), grammar=grammar.of_choice(words))
    _, text, reason, usage = answer(engine.submit(request))
    assert text in words and reason == "stop"
    plain = answer(engine.submit(dataclasses.replace(request, speculative="off")))
    assert plain[1] == text and usage.steps <= plain[3].steps / 2
