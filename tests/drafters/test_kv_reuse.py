"""KV reuse: what each of its forms reads, and a block against the same attention written the naive way."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.rotary.reference import rotate
from specformer_jax import drafters
from specformer_jax.config import REUSES, DraftConfig
from specformer_jax.errors import UserError
from specformer_jax.nn import layers
from specformer_jax.nn.cache import LayerKV
from tests import tiny

T = 7
READS = {"hidden": (True, False), "kv": (False, True), "hybrid": (True, True)}  # hooks; the target's keys and values


def inputs(reuse: str):
    """A random drafter, and hooks, embeddings and the target's keys and values of two sequences."""
    model, params = tiny.make(DraftConfig(max_draft_length=3, drafter="kv", reuse=reuse))
    c, keys = tiny.CONFIG, iter(jax.random.split(jax.random.key(3), 2 + 2 * tiny.CONFIG.layers))
    hooks = jax.random.normal(next(keys), (2, T, len(model.drafter.config.hook_layers), c.width))
    embedding = jax.random.normal(next(keys), (2, T, c.width))
    draw = lambda: jax.random.normal(next(keys), (2, c.kv_heads, T, c.head_size))
    return model.drafter, params["draft"], hooks, embedding, tuple(LayerKV(draw(), draw()) for _ in range(c.layers))


@pytest.mark.parametrize("reuse", REUSES)
def test_a_form_reads_what_its_name_says_up_to_each_anchor(reuse):
    drafter, params, hooks, embedding, cached = inputs(reuse)
    run = jax.jit(lambda hooks, cached: drafter.apply({"params": params}, hooks, embedding, target_kv=cached))
    plain = run(hooks, cached)
    later = lambda x, axis: x + 0.5 * jnp.expand_dims(jnp.arange(T) >= 4, tuple(range(1, x.ndim - axis)))
    changed = {
        "hooks": run(later(hooks, 1), cached),
        "kv": run(hooks, jax.tree.map(lambda x: later(x, 2), cached)),
    }
    for reads, slots in zip(READS[reuse], changed.values(), strict=True):
        assert jnp.array_equal(slots[:, :4], plain[:, :4]), "an anchor saw what lies behind it"
        assert bool((jnp.abs(slots[:, 4:] - plain[:, 4:]).max(axis=(2, 3)) > 1e-3).all()) == reads
        assert reads or jnp.array_equal(slots, plain)


def test_a_hybrid_block_by_the_definition():
    """One anchor of one row at a time, with softmax over a list of keys; the slots of a drafter of one layer."""
    drafter, params, hooks, embedding, cached = inputs("hybrid")
    c, block = tiny.CONFIG, params["layer_0"]
    got = drafter.apply({"params": params}, hooks, embedding, target_kv=cached)

    def norm(x, name, tree=block):
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + c.rms_epsilon) * tree[name]["scale"]

    def turned(x, positions):
        return rotate(x, *layers.rotary(positions, c.head_size, c.rope_theta, None))

    def attend(q, *parts):  # [i N H], pairs of [K j H]
        k, v = (jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        q = q.reshape(len(q), c.kv_heads, -1, c.head_size)
        weights = jax.nn.softmax(jnp.einsum("ikgh,kjh->ikgj", q, k) / c.head_size**0.5)
        return jnp.einsum("ikgj,kjh->ikgh", weights, v)

    def keys_values(x, positions):
        kv = jnp.einsum("id,dkah->aikh", x, block["kv"]["kernel"])
        return [jnp.swapaxes(part, 0, 1) for part in (turned(norm(kv[0], "k_norm"), positions), kv[1])]

    fused = norm(jnp.einsum("btgd,gde->bte", hooks, params["fuse"]["kernel"]), "hidden_norm", params)
    target = cached[drafter.config.kv_layers[0]]
    for row, anchor in ((0, 0), (0, 4), (1, T - 1)):
        positions = anchor + 1 + jnp.arange(4)
        x = jnp.stack([embedding[row, anchor], *[params["mask"]] * 3])
        y = norm(x, "attention_norm")
        q = jnp.einsum("id,dkgh->ikgh", y, block["query"]["kernel"]).reshape(4, c.heads, c.head_size)
        q, own_block = turned(norm(q, "q_norm"), positions), keys_values(y, positions)
        made = keys_values(fused[row, : anchor + 1], jnp.arange(anchor + 1))
        own, reused = attend(q, made, own_block), attend(q, [x[row, :, : anchor + 1] for x in target], own_block)
        share = jax.nn.sigmoid(jnp.einsum("id,dkgo->ikgo", y, block["gate"]["kernel"]))
        heads = (share * own + (1 - share) * reused).reshape(4, c.heads, c.head_size)
        x = x + jnp.einsum("inh,nhd->id", heads, block["out"]["kernel"])
        gate, up = jnp.einsum("id,daf->aif", norm(x, "ffn_norm"), block["ffn"]["gate_up"])
        x = x + (jax.nn.silu(gate) * up) @ block["ffn"]["down"]
        assert jnp.allclose(got[row, anchor], norm(x, "final_norm", params)[1:], atol=1e-4)


def test_the_hidden_form_is_dflash():
    drafter, params, hooks, embedding, cached = inputs("hidden")
    config = dataclasses.replace(drafter.config, drafter="dflash")
    dflash = drafters.make(tiny.CONFIG, config, "float32")
    expected = dflash.apply({"params": params}, hooks, embedding)
    assert jnp.array_equal(drafter.apply({"params": params}, hooks, embedding, target_kv=cached), expected)


def test_the_layers_that_are_read_are_one_for_each_block():
    bound = lambda **fields: DraftConfig(drafter="kv", **fields).bind(dataclasses.replace(tiny.CONFIG, layers=30))
    assert bound(draft_blocks=4).kv_layers == (7, 14, 22, 29) and bound().kv_layers == (29,)
    assert bound(reuse="kv").hook_layers == (30,) and bound().hook_layers == (1, 8, 15, 23, 30)
    assert bound(kv_layers=(3, 0), draft_blocks=2).kv_layers == (3, 0)
    for layers_read in ((0, 1), (30,)):
        with pytest.raises(UserError, match="must be 1, one a draft block, within 0 and 29"):
            bound(kv_layers=layers_read)
