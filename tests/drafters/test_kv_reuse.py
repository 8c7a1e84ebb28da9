"""KV reuse: what each of its forms reads, and a block against the same attention written the naive way."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specformer_jax import drafters
from specformer_jax.config import REUSES, DraftConfig
from specformer_jax.drafters.ngram import WithLookup
from specformer_jax.errors import UserError
from specformer_jax.loading import head_checkpoint
from specformer_jax.nn.cache import LayerKV
from tests.tiny import CONFIG

T = 7
READS = {"hidden": (True, False), "kv": (False, True), "hybrid": (True, True)}  # hooks; the target's keys and values


def inputs(reuse: str):
    """A random drafter, and hooks, embeddings and the target's keys and values of two sequences."""
    config = DraftConfig(max_draft_length=3, drafter="kv", reuse=reuse).bind(CONFIG)
    random = np.random.default_rng(3)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)
    shapes = nn.unbox(head_checkpoint.boxed_params(CONFIG, config))
    params = jax.tree.map(lambda x: 0.3 * draw(*x.shape), shapes)
    cached = [LayerKV(*draw(2, 2, CONFIG.kv_heads, T, CONFIG.head_size)) for _ in range(CONFIG.layers)]
    hooks, embedding = draw(2, T, len(config.hook_layers), CONFIG.width), draw(2, T, CONFIG.width)
    return drafters.make(CONFIG, config, "float32"), params, hooks, embedding, tuple(cached)


@functools.partial(jax.jit, static_argnames="drafter")
def slots_of(drafter, params, hooks, embedding, cached):
    return drafter.apply({"params": params}, hooks, embedding, target_kv=cached)


@pytest.mark.parametrize("reuse", REUSES)
def test_a_form_reads_what_its_name_says_up_to_each_anchor(reuse):
    drafter, params, hooks, embedding, cached = inputs(reuse)
    plain = slots_of(drafter, params, hooks, embedding, cached)
    late = np.float32(0.5) * (np.arange(T) >= 4)
    later = jax.tree.map(lambda x: x + late[:, None], cached)
    changed = (
        slots_of(drafter, params, hooks + late[:, None, None], embedding, cached),
        slots_of(drafter, params, hooks, embedding, later),
    )
    for reads, slots in zip(READS[reuse], changed, strict=True):
        difference = np.abs(slots - plain).max(axis=(2, 3))
        assert not difference[:, :4].any(), "an anchor saw what lies behind it"
        assert (difference[:, 4:] > 1e-3).all() if reads else not difference.any()


def test_a_hybrid_block_by_the_definition():
    """One anchor of one row at a time, with softmax over a list of keys; the slots of a drafter of one layer."""
    drafter, params, hooks, embedding, cached = inputs("hybrid")
    block, target = params["layer_0"], cached[drafter.config.kv_layers[0]]
    N, H = CONFIG.heads, CONFIG.head_size

    def norm(x, name, tree=block):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + CONFIG.rms_epsilon) * tree[name]["scale"]

    def turned(x, positions):  # [i heads H]
        angles = positions[:, None, None] * CONFIG.rope_theta ** (-np.arange(0, H, 2) / H)
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)

    def keys_values(x, positions):  # each [K i H]
        k, v = np.einsum("id,dkah->aikh", x, block["kv"]["kernel"])
        return np.swapaxes(turned(norm(k, "k_norm"), positions), 0, 1), np.swapaxes(v, 0, 1)

    def attend(q, *parts):  # [i N H], pairs of [K j H]
        k, v = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        scores = np.exp(np.einsum("ikgh,kjh->ikgj", q.reshape(4, len(k), -1, H), k) / H**0.5)
        return np.einsum("ikgj,kjh->ikgh", scores / scores.sum(-1, keepdims=True), v)

    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    fused = norm(np.einsum("btgd,gde->bte", hooks, params["fuse"]["kernel"]), "hidden_norm", params)
    got = slots_of(drafter, params, hooks, embedding, cached)
    for row, anchor in ((0, 0), (0, 4), (1, T - 1)):
        positions = anchor + 1 + np.arange(4)
        x = np.stack([embedding[row, anchor], *[params["mask"]] * 3])
        y = norm(x, "attention_norm")
        q = turned(norm(np.einsum("id,dkgh->ikgh", y, block["query"]["kernel"]).reshape(4, N, H), "q_norm"), positions)
        made = keys_values(fused[row, : anchor + 1], np.arange(anchor + 1))
        beside = keys_values(y, positions)
        own, reused = attend(q, made, beside), attend(q, [x[row, :, : anchor + 1] for x in target], beside)
        share = sigmoid(np.einsum("id,dkgo->ikgo", y, block["gate"]["kernel"]))
        heads = (share * own + (1 - share) * reused).reshape(4, N, H)
        x = x + np.einsum("inh,nhd->id", heads, block["out"]["kernel"])
        gate, up = np.einsum("id,daf->aif", norm(x, "ffn_norm"), block["ffn"]["gate_up"])
        x = x + (gate * sigmoid(gate) * up) @ block["ffn"]["down"]
        np.testing.assert_allclose(got[row, anchor], norm(x, "final_norm", params)[1:], atol=1e-4)


def test_the_hidden_form_is_dflash():
    drafter, params, hooks, embedding, cached = inputs("hidden")
    dflash = drafters.make(CONFIG, dataclasses.replace(drafter.config, drafter="dflash"), "float32")
    expected = slots_of(dflash, params, hooks, embedding, cached)
    assert jnp.array_equal(slots_of(drafter, params, hooks, embedding, cached), expected)


def test_with_lookup_beside_it_it_reads_the_same():
    drafter, *_, cached = inputs("kv")
    (seen,) = WithLookup.around(drafter).view((), cached)
    assert seen is cached[-1]


def test_the_layers_that_are_read_are_one_for_each_block():
    bound = lambda **fields: DraftConfig(drafter="kv", **fields).bind(dataclasses.replace(CONFIG, layers=30))
    assert bound(draft_blocks=4).kv_layers == (7, 14, 22, 29) and bound().kv_layers == (29,)
    assert bound(reuse="kv").hook_layers == (30,) and bound().hook_layers == (1, 8, 15, 23, 30)
    assert bound(kv_layers=(3, 0), draft_blocks=2).kv_layers == (3, 0)
    for layers in ((0, 1), (30,)):
        with pytest.raises(UserError, match="must be 1, one a draft block, within 0 and 29"):
            bound(kv_layers=layers)
