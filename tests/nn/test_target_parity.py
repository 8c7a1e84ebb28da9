"""The target's float32 logits against transformers: golden arrays always, the live library where it is installed."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Places, lowering_for
from specformer_jax.loading import weights
from specformer_jax.loading.target_config import read_config
from specformer_jax.nn import cache as cache_lib
from specformer_jax.nn.target import Target, lm_head

GOLDEN = Path(__file__).parents[1] / "golden"  # made by make_golden.py there
MODELS = sorted(file.parent.name for file in GOLDEN.glob("*/golden.npz"))
TOLERANCE = 1e-3


@functools.cache
def _load(path: Path):
    config = read_config(path)
    return config, weights.load_params(path, config, "float32")


def _logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    """f32[B, T, V] of whole sequences."""
    config, params = _load(path)
    target = Target(config, dtype="float32")

    @jax.jit
    def run(params, tokens):
        hidden = target.apply({"params": params}, tokens).hidden
        return jnp.einsum("btd,vd->btv", hidden, lm_head(params), precision="highest")

    return np.asarray(run(params, jnp.asarray(tokens)))


def _check(got: np.ndarray, wanted: np.ndarray, record_property) -> None:
    difference = float(np.abs(got - wanted).max())
    record_property("max_abs_diff", difference)
    print(f"largest logit difference {difference:.1e} of {np.abs(wanted).max():.1f}")
    assert difference < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_golden_logits(name, record_property):
    golden = np.load(GOLDEN / name / "golden.npz")
    _check(_logits(GOLDEN / name, golden["tokens"]), golden["logits"], record_property)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", ["llama31", "qwen3"])
def test_golden_logits_through_the_cache(name, native, record_property):
    """The same logits when the sequences are read in flat batches of ragged pieces, as decoding does."""
    golden = np.load(GOLDEN / name / "golden.npz")
    config, params = _load(GOLDEN / name)
    target, (rows, length), size = Target(config, dtype="float32"), golden["tokens"].shape, 24
    tables = cache_lib.pages_for(length)
    table = cache_lib.identity_table(rows, tables)[:, ::-1]
    got, random = np.zeros_like(golden["logits"]), np.random.default_rng(0)
    begin = np.zeros(rows, int)
    with lowering_for("cpu", native=native):
        cache = cache_lib.create(config, config.layers, rows * tables, "float32")
        read = jax.jit(lambda params, tokens, *rest: target.apply({"params": params}, tokens, *rest))
        while (begin < length).any():
            pieces = np.minimum(random.multinomial(size - 3, np.ones(rows) / rows), length - begin)
            row, position = np.zeros(size, np.int32), np.full(size, -1, np.int32)
            row[: pieces.sum()] = np.repeat(np.arange(rows), pieces)
            position[: pieces.sum()] = np.concatenate([b + np.arange(n) for b, n in zip(begin, pieces, strict=True)])
            places = Places(jnp.asarray(row), jnp.asarray(position), table)
            out = read(params, jnp.asarray(golden["tokens"][row, position].astype(np.int32)), cache, places)
            cache, begin = out.cache, begin + pieces
            logits = jnp.einsum("td,vd->tv", out.hidden, lm_head(params), precision="highest")
            got[row[: pieces.sum()], position[: pieces.sum()]] = np.asarray(logits)[: pieces.sum()]
    _check(got, golden["logits"], record_property)


def test_builtin_golden_logits(builtin_path, record_property):
    golden = np.load(GOLDEN / "builtin.npz")
    prompts = [golden[f"tokens_{i}"] for i in range(3)]
    longest = max(map(len, prompts))
    tokens = np.stack([np.pad(ids, (0, longest - len(ids))) for ids in prompts])  # what follows changes nothing
    for i, logits in enumerate(_logits(builtin_path, tokens)):
        logits = logits[: len(prompts[i])]
        _check(logits[:, ::64], golden[f"logits_{i}"], record_property)
        assert (logits.argmax(-1) == golden[f"argmax_{i}"]).all()


@pytest.mark.parity
@pytest.mark.parametrize("name", MODELS)
def test_live_logits(name, record_property):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 100))
    with torch.no_grad():
        wanted = model(torch.tensor(tokens)).logits.numpy()
    _check(_logits(GOLDEN / name, tokens), wanted, record_property)


@pytest.mark.parity
def test_live_builtin_logits(builtin_path, record_property):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        builtin_path.parent, gguf_file=builtin_path.name, dtype=torch.float32
    )
    tokens = np.random.default_rng(0).integers(17, model.config.vocab_size, (2, 64))
    with torch.no_grad():
        wanted = model(torch.tensor(tokens)).logits.numpy()
    _check(_logits(builtin_path, tokens), wanted, record_property)
