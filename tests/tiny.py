"""A random target and head so small that drafts are right by chance, and plain decoding written the naive way."""

from __future__ import annotations

import functools
import typing
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import jaxtyped

from pallas_kernels import gumbel
from specformer_jax import drafters
from specformer_jax.config import LOOKUPS, DraftConfig, SamplingParams, Shape, TargetConfig
from specformer_jax.decoding import decode, sampling
from specformer_jax.decoding.model import Model
from specformer_jax.nn.target import Target, lm_head

CONFIG = TargetConfig(
    "llama", vocab_size=13, width=32, layers=2, heads=4, kv_heads=2, head_size=8, ffn=48, context=256, eos_ids=(3,)
)


@functools.cache
def make(draft: DraftConfig | None, seed: int = 0, dtype: str = "float32", **switches) -> tuple[Model, dict]:
    """A model with random parameters, everything scaled up so that no product is near the identity."""
    bound = None if draft is None else draft.bind(CONFIG)
    hooks = CONFIG.default_hooks if bound is None else bound.hook_layers
    target = Target(CONFIG, hooks, dtype)
    key = jax.random.key(seed)
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = {"target": _random(target.init(key, tokens), key, dtype)}
    if bound is None:
        return Model(target, None, **switches), params
    head = drafters.make(CONFIG, bound, dtype)
    if bound.drafter in LOOKUPS:
        return Model(target, head, **switches), params
    made = head.init(key, jnp.zeros((1, 2, len(hooks), CONFIG.width)), jnp.zeros((1, 2, CONFIG.width)))
    params["draft"] = _random(made, jax.random.key(seed + 1), dtype)
    if bound.draft_vocab_size is not None:
        ids = jnp.arange(bound.draft_vocab_size) * 2 % CONFIG.vocab_size
        params["draft_vocab"] = {"token_ids": ids, "lm_head": lm_head(params["target"])[ids]}
    return Model(target, head, **switches), params


def _random(made, key, dtype):
    leaves, tree = jax.tree.flatten(nn.unbox(made)["params"])
    keys = jax.random.split(key, len(leaves))
    noisy = [x + jax.random.normal(k, x.shape) * 0.3 for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, [x.astype(dtype) for x in noisy])


def answers(model, params, prompts, requests, *, k, rows=None, window=None, positions=96, max_new_tokens=40, chunk=8):
    """Token lists of `decode.generate` for prompts (None is an empty row) and their `SamplingParams`."""
    rows = rows or len(prompts)
    tokens, lengths = np.zeros((rows, 32), np.int32), np.zeros(rows, np.int32)
    requests = list(requests) + [SamplingParams()] * (rows - len(prompts))
    for row, prompt in enumerate(prompts):
        if prompt is not None:
            tokens[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
    state = decode.jit_generate(
        model,
        params,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        sampling.stack(requests),
        jnp.array([r.max_new_tokens for r in requests], jnp.int32),
        shape=Shape(rows, window or k + 1, chunk, positions),
        max_new_tokens=max_new_tokens,
        draft_length=k,
    )
    tokens, known = np.asarray(state.tokens), np.asarray(state.known)
    return [tokens[row, lengths[row] : known[row]].tolist() for row in range(len(prompts))], state


def check_shapes(record) -> None:
    """Raises unless every array of a state record, and of records within it, has the shape that its annotation says.

    One letter is one size throughout a record.
    """

    @jaxtyped(typechecker=None)
    def check():
        for name, annotation in typing.get_type_hints(type(record)).items():
            value = getattr(record, name)
            if hasattr(annotation, "dim_str"):
                assert isinstance(value, annotation), f"{name} is {value.dtype}{value.shape}, not {annotation}"
            elif hasattr(value, "_fields"):
                check_shapes(value)

    check()


@functools.cache
def _whole_sequence(model):
    def logits(params, tokens):
        hidden = model.target.apply({"params": params["target"]}, tokens).hidden
        return (hidden @ lm_head(params["target"]).T)[0]

    return jax.jit(logits)


def next_logits(model, params, ids) -> np.ndarray:
    """f64[V] after a sequence, without a cache."""
    padded = np.zeros((1, 80), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(_whole_sequence(model)(params, jnp.asarray(padded)))[len(ids) - 1].astype(np.float64)


def naive(model, params, prompt, request: SamplingParams) -> list[int]:
    """Plain decoding with no cache, no window and no batch: the whole sequence again for every token, in numpy."""
    ids, new = list(prompt), []
    while len(new) < request.max_new_tokens:
        token = choose(processed(next_logits(model, params, ids), request, prompt, new), request, len(ids))
        ids.append(token)
        new.append(token)
        if token in CONFIG.eos_ids:
            break
    return new


def processed(logits: np.ndarray, request: SamplingParams, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
    """The logits after bias, penalties and bad words, one token after the other."""
    logits = logits.copy()
    for token, amount in request.logit_bias:
        logits[token] += amount
    for token in {*prompt, *answer}:
        logits[token] *= request.repetition_penalty if logits[token] < 0 else 1 / request.repetition_penalty
    for token in answer:
        logits[token] -= request.frequency_penalty
    for token in set(answer):
        logits[token] -= request.presence_penalty
    for *begin, last in request.bad_words:
        if [*answer][len(answer) - len(begin) :] == begin:
            logits[last] = -np.inf
    return logits


def choose(logits: np.ndarray, request: SamplingParams, position: int) -> int:
    """One token by the definition of every processor, with a sort."""
    if request.temperature == 0:
        return int(np.argmax(logits))
    noise = gumbel(jnp.uint32(request.seed), jnp.int32(position), jnp.arange(len(logits)))
    scaled = np.where(keep(logits, request), logits / request.temperature, -np.inf)
    return int(np.argmax(scaled + np.asarray(noise, np.float64)))


def keep(logits: np.ndarray, request: SamplingParams) -> np.ndarray:
    """bool[V]: the tokens that temperature, top-k, top-p and min-p leave, in transformers' order."""
    scaled = logits / request.temperature
    order = np.argsort(-scaled, kind="stable")
    kept = np.ones(len(logits), bool)
    if 0 < request.top_k < len(logits):
        kept[order[request.top_k :]] = False
    probability = np.exp(scaled - scaled.max()) * kept
    probability /= probability.sum()
    if request.top_p < 1:
        before = np.cumsum(probability[order]) - probability[order]
        kept[order[before >= request.top_p]] = False
    return kept & (probability >= request.min_p * probability.max())
