"""Every way of storing a model gives the same parameters, and every broken one gives one clear sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from specformer_jax.config import RopeScaling
from specformer_jax.errors import UserError
from specformer_jax.loading import gguf_reader, weights
from specformer_jax.loading.target_config import read_config
from tests.loading.broken import edit_config
from tests.loading.gguf_files import write_gguf

GOLDEN = Path(__file__).parents[1] / "golden"
Q = gguf.GGMLQuantizationType


def _load(path: Path, dtype: str = "float32"):
    return weights.load_params(path, read_config(path), dtype)


def _assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


# Formats


@pytest.mark.parametrize("name", sorted(file.parent.name for file in GOLDEN.glob("*/golden.npz")))
def test_one_file_many_shards_and_gguf_give_the_same_parameters(name, tmp_path):
    folder = GOLDEN / name
    wanted = _load(folder)

    stored = load_file(folder / "model.safetensors")
    shards = tmp_path / "shards"
    shards.mkdir()
    shutil.copy(folder / "config.json", shards)
    of = {tensor: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, tensor in enumerate(stored)}
    for file in set(of.values()):
        save_file({tensor: value for tensor, value in stored.items() if of[tensor] == file}, shards / file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": of}))
    _assert_same(_load(shards), wanted)

    if name != "llama31":  # its factors do not reproduce Llama-3.1's own settings: a test of its own below
        file = write_gguf(folder, tmp_path / "model.gguf")
        assert read_config(file) == read_config(folder)
        _assert_same(_load(file), wanted)


@pytest.mark.parametrize(
    ("pre", "ends"), [("qwen2", (2, 3, 5)), ("llama-bpe", (2, 3, 6, 7)), ("smollm", (2, 3)), (None, (2, 3))]
)
def test_a_gguf_ends_answers_where_the_models_own_settings_do(pre, ends, tmp_path, model):
    """llama.cpp's converter names two of the tokens that generation_config.json lists."""
    file = write_gguf(model, tmp_path / "model.gguf")
    opened = gguf_reader.GGUFFile(file)
    words = ["a", "b", "<|im_end|>", "<|eot_id|>", "c", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>"]
    opened._metadata |= {"tokenizer.ggml.tokens": words} | ({"tokenizer.ggml.pre": pre} if pre else {})
    assert opened.config().eos_ids == ends


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1])
def test_quantised_gguf(kind, tmp_path, model):
    """A quantised GGUF gives what its dequantised matrices give from safetensors."""
    file = write_gguf(model, tmp_path / "model.gguf", kind)
    stored = {name: value.astype(np.float32) for name, value in load_file(model / "model.safetensors").items()}
    for name, value in stored.items():
        if value.ndim == 2:
            stored[name] = gguf.dequantize(gguf.quantize(value, kind), kind)
    save_file(stored, model / "model.safetensors")
    _assert_same(_load(file), _load(model))


@pytest.mark.parametrize("kind", [Q.Q4_K, Q.Q5_K, Q.Q6_K])
def test_k_quants(kind, tmp_path, model):
    """The package quantises none of these, so the blocks are random bytes, except for their float16 scales."""
    rng = np.random.default_rng(0)
    stored = load_file(model / "model.safetensors")
    edit_config(model, intermediate_size=256)
    block = rng.integers(0, 256, (32, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    block[:, :4] = np.array([0.01, 0.02], np.float16).view(np.uint8)  # where Q4_K and Q5_K have theirs
    block[:, -2:] = np.array([0.01], np.float16).view(np.uint8)  # where Q6_K has it
    for layer in range(2):
        for part in ("gate", "up"):
            stored[f"model.layers.{layer}.mlp.{part}_proj.weight"] = np.ones((256, 32), np.float32)
        stored[f"model.layers.{layer}.mlp.down_proj.weight"] = gguf.dequantize(block, kind)
    save_file(stored, model / "model.safetensors")
    file = write_gguf(
        model, tmp_path / "model.gguf", blocks={f"blk.{layer}.ffn_down.weight": (block, kind) for layer in range(2)}
    )
    got = _load(file)
    assert np.isfinite(got["layer_0"]["ffn"]["down"]).all() and np.ptp(got["layer_0"]["ffn"]["down"]) > 0
    _assert_same(got, _load(model))


@pytest.mark.parametrize("stored_as", ["float16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_stored_and_asked_dtypes(stored_as, dtype, model):
    wanted = jax.tree.map(lambda x: np.asarray(x).astype(stored_as).astype(np.float32), _load(model))
    stored = {name: value.astype(stored_as) for name, value in load_file(model / "model.safetensors").items()}
    save_file(stored, model / "model.safetensors")
    got = _load(model, dtype)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(got))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float32(a), b.astype(a.dtype)), got, wanted)


def test_host_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    """What is not placed yet is at most one tensor as stored and the same one as asked for."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4096, "num_hidden_layers": 6}
    shutil.copy(GOLDEN / "llama" / "config.json", tmp_path)
    edit_config(tmp_path, **sizes, head_dim=64)
    grow = {32: 256, 64: 1024, 96: 4096}
    stored = {}
    for name, value in load_file(GOLDEN / "llama" / "model.safetensors").items():
        for layer in range(6):
            big = np.zeros([grow[size] for size in value.shape], np.float32)
            stored[name.replace("layers.0.", f"layers.{layer}.")] = big
    save_file(stored, tmp_path / "model.safetensors")
    total = sum(value.nbytes for value in stored.values())
    largest = max(value.nbytes for value in stored.values())
    del stored, big

    # Placed: out of the host's hands. (The CPU backend would keep our own memory, and the count would see it.)
    monkeypatch.setattr(weights, "_put", lambda host, sharding: jax.ShapeDtypeStruct(host.shape, host.dtype))
    config = read_config(tmp_path)
    weights.load_params(tmp_path, config, "float32")  # traces the model, once for the process
    tracemalloc.start()
    params = weights.load_params(tmp_path, config, "float32")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"model {total / 1e6:.1f} MB, largest tensor {largest / 1e6:.1f} MB, host peak {peak / 1e6:.1f} MB")
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)) == total
    assert peak < 2.2 * largest < total / 3


def test_sharded_parameters_are_born_sharded(tiny_target, tiny_head):
    """On a mesh of four devices each holds its quarter of a matrix, and the values are those of one device."""
    code = f"""
        import jax, numpy as np
        from pathlib import Path
        from specformer_jax.errors import UserError
        from specformer_jax.loading import weights
        from specformer_jax.loading.target_config import read_config
        from specformer_jax.loading.language_model import load
        from specformer_jax.nn.mesh import make_mesh, param_shardings

        path = Path({str(GOLDEN / "qwen2")!r})
        config = read_config(path)
        boxed = weights.boxed_params(config)
        shardings = param_shardings(boxed, make_mesh(fsdp=2, model=2))
        params = weights.load_params(path, config, "float32", shardings)
        jax.tree.map(np.testing.assert_array_equal, params, weights.load_params(path, config, "float32"))
        for leaf in (params["embedding"], params["lm_head"], params["layer_1"]["ffn"]["gate_up"]):
            assert [4 * shard.data.size for shard in leaf.addressable_shards] == [leaf.size] * 4
        for mesh, sentence in (
            (dict(model=4), "kv_heads 2 of layer_0/attention/qkv/bias does not divide over the 4 devices"),
            (dict(fsdp=8), "needs 8 devices, not 4"),
        ):
            try:
                param_shardings(boxed, make_mesh(**mesh))
            except UserError as error:
                assert sentence in str(error), error
            else:
                raise AssertionError(mesh)
        mesh = make_mesh(model=4)
        try:
            with jax.set_mesh(mesh):
                load({str(tiny_target)!r}, draft={str(tiny_head)!r}, mesh=mesh)
        except UserError as error:
            assert "does not divide over the 4 devices" in str(error), error
        else:
            raise AssertionError(mesh)
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=False, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# Configurations


def test_llama31_scaling_from_gguf(tmp_path, model):
    """`rope_freqs.weight` holds the divisors of the frequencies, as llama.cpp's converter computes them."""
    edit_config(model, rope_parameters={"rope_theta": 500000.0, "rope_type": "default"})
    base = 500000.0 ** (np.arange(0, 8, 2) / 8)
    divisors = []
    for wavelength in 2 * np.pi * base:
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        if wavelength < 8192 / 4.0:
            divisors.append(1.0)
        elif wavelength > 8192 / 1.0:
            divisors.append(32.0)
        else:
            divisors.append(1 / ((1 - smooth) / 32.0 + smooth))
    divisors = np.array(divisors, np.float32)
    file = write_gguf(model, tmp_path / "model.gguf", extra={"rope_freqs.weight": divisors})
    assert read_config(file).rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    _assert_same(_load(file), _load(model))

    file = write_gguf(model, tmp_path / "other.gguf", extra={"rope_freqs.weight": divisors[::-1].copy()})
    with pytest.raises(UserError, match="in another way than Llama-3.1"):
        read_config(file)


# Broken checkpoints: one sentence that names the file or the tensor


def _fails(path: Path, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        _load(path)
    assert "\n" not in str(caught.value)


def _edit_tensors(folder: Path, edit) -> None:
    stored = load_file(folder / "model.safetensors")
    edit(stored)
    save_file(stored, folder / "model.safetensors")


def test_missing_files(model):
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}})
    )
    _fails(model, "model-00001-of-00002.safetensors is missing")
    (model / "model.safetensors.index.json").write_text("{")
    _fails(model, "index.json is not valid JSON")
    (model / "model.safetensors.index.json").unlink()
    (model / "model.safetensors").unlink()
    _fails(model, "model.safetensors is missing")
    (model / "config.json").unlink()
    _fails(model, "has no config.json")


@pytest.mark.parametrize("keep", [0, 5, 1000, -2])
def test_truncated_safetensors(keep, model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    _fails(model, "model.safetensors is truncated")


@pytest.mark.parametrize("keep", [0, 3, 100, 2000, -2])
def test_truncated_gguf(keep, model, tmp_path):
    file = write_gguf(model, tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[:keep])
    _fails(file, "model.gguf is no GGUF file or is truncated")


def test_tensors_that_do_not_fit(model):
    name = "model.layers.1.mlp.up_proj.weight"
    _edit_tensors(model, lambda stored: stored.update({name: stored[name][:-1]}))
    _fails(model, r"up_proj.weight has shape \(63, 32\), but the configuration asks for \(64, 32\)")
    _edit_tensors(model, lambda stored: stored.pop(name))
    _fails(model, "has no tensor model.layers.1.mlp.up_proj.weight")
    _edit_tensors(model, lambda stored: stored.update({name: np.zeros((64, 32), np.float32)}))
    _load(model)
    _edit_tensors(model, lambda stored: stored.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32)}))
    _fails(model, "holds model.layers.0.self_attn.q_proj.bias, which")


def test_gguf_of_another_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    _fails(tmp_path / "model.gguf", "holds a 'mamba' model: this project runs llama, qwen2, qwen3")


def test_odd_safetensors(model):
    """An index without its map, a tensor in eight bits, a directory in a file's place."""
    index = model / "model.safetensors.index.json"
    for content in ("{}", "[]", '{"weight_map": 3}', '{"weight_map": {"lm_head.weight": 1}}', "[" * 100_000):
        index.write_text(content)
        _fails(model, "index.json (has no weight_map|holds no JSON object|is not valid JSON)")
    index.unlink()
    for kind in (ml_dtypes.float8_e4m3fn, np.int8):
        stored = load_file(GOLDEN / "llama" / "model.safetensors")
        stored["lm_head.weight"] = stored["lm_head.weight"].astype(np.float32).astype(kind)
        save_file(stored, model / "model.safetensors")
        _fails(model, "stores lm_head.weight as (F8_E4M3|I8): .*unquantised")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()
    _fails(model, "model.safetensors is")


def _split(file: Path, count: int) -> list[Path]:
    """The file in parts as llama.cpp's `gguf-split` writes them: the metadata in the first, some tensors in each."""
    whole = gguf.GGUFReader(file)
    parts = []
    for i in range(count):
        part = file.with_name(f"{file.stem}-{i + 1:05}-of-{count:05}.gguf")
        writer = gguf.GGUFWriter(part, "llama")
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(whole.tensors))
        for name, field in whole.fields.items() if i == 0 else ():
            if not name.startswith(("GGUF.", "general.architecture")):
                writer.add_key_value(name, field.contents(), field.types[0])
        for tensor in whole.tensors[i::count]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts.append(part)
    return parts


def test_gguf_in_parts(model, tmp_path):
    parts = _split(write_gguf(model, tmp_path / "whole.gguf"), 3)
    for part in parts:  # any of them names the model
        assert read_config(part) == read_config(model)
        _assert_same(_load(part), _load(model))
    alone = parts[0].rename(tmp_path / "alone.gguf")
    _fails(alone, "alone.gguf is one of 3 parts, but its name does not say which")
    alone.rename(parts[0])
    parts[1].unlink()
    gguf_reader.open_gguf.cache_clear()
    _fails(parts[0], "whole-00002-of-00003.gguf is missing: the model is in 3 parts")


@pytest.mark.parametrize("part", range(2))
def test_damaged_gguf(part, model, tmp_path):
    """A byte anywhere before the tensors: the file is refused with a sentence, or reads as another one."""
    whole = write_gguf(model, tmp_path / "model.gguf").read_bytes()
    begin = whole.index(b"blk.0") + 3000
    rng = np.random.default_rng(part)
    for i in range(60):
        damaged = bytearray(whole)
        damaged[rng.integers(begin)] ^= 1 << rng.integers(8)
        file = tmp_path / f"{i}.gguf"
        file.write_bytes(damaged)
        try:
            config = read_config(file)
            if config.layers < 100 and config.vocab_size * config.ffn * config.width * config.head_size < 10**9:
                weights.load_params(file, config, "float32")
        except UserError as error:
            assert "\n" not in str(error)
        file.unlink()
