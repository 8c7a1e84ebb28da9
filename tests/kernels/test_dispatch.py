"""Which implementation runs, and that the reason is said."""

import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import lowering_for, mixed_mask_attention, tuning, why


def test_a_cpu_runs_the_reference():
    choice = why(no_native="this operation has no native body")
    assert (choice.implementation, choice.platform, choice.interpret) == ("xla", "cpu", False)
    assert "reference is faster" in choice.reason


def test_a_named_kernel_is_interpreted_on_a_cpu():
    choice = why("pallas")
    assert (choice.implementation, choice.interpret) == ("pallas", True)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowering_for_another_platform(platform):
    with lowering_for(platform):
        choice = why()
        assert (choice.implementation, choice.platform, choice.interpret) == ("pallas", platform, False)
        assert why("xla").implementation == "xla"
        fallback = why(unsupported="because")
        assert (fallback.implementation, fallback.reason) == ("xla", "because")
    assert why().platform == "cpu"


def test_a_named_kernel_that_cannot_run_says_why():
    with pytest.raises(NotImplementedError, match="the reason"):
        why("pallas", unsupported="the reason")
    q = jnp.zeros((1, 1, 2, 8), jnp.bfloat16)
    context = (jnp.zeros((1, 2, 8, 8)),) * 2
    with pytest.raises(NotImplementedError, match="different dtypes"):
        mixed_mask_attention(q, context, start=jnp.zeros(1, jnp.int32), implementation="pallas")


def _on_a_gpu(monkeypatch, capability):
    gpu = types.SimpleNamespace(compute_capability=capability, client=types.SimpleNamespace(platform_version="cuda 12"))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])


@pytest.mark.parametrize(("capability", "implementation"), [("7.5", "xla"), ("8.0", "pallas"), ("12.0", "pallas")])
def test_a_gpu_that_triton_does_not_know_runs_the_reference(monkeypatch, capability, implementation):
    _on_a_gpu(monkeypatch, capability)
    choice = why()
    assert (choice.implementation, choice.platform) == (implementation, "cuda")
    assert ("needs compute capability 8.0, this GPU has 7.5" in choice.reason) == (implementation == "xla")
    with lowering_for("cuda"):  # for another machine's
        assert why().implementation == "pallas"


@pytest.mark.parametrize("capability", ["7.5", "8.0", "9.0", "10.0"])
def test_mosaic_gpu_is_for_hopper_and_runs_where_it_is_named(monkeypatch, capability):
    _on_a_gpu(monkeypatch, capability)
    if capability == "9.0":
        choice = why("mosaic_gpu", no_mosaic_gpu=None)
        assert (choice.implementation, choice.platform, choice.body) == ("mosaic_gpu", "cuda", "mosaic_gpu")
        assert (why().implementation, why().body) == ("pallas", "cuda")
        assert "Mosaic GPU's, for Hopper, has not been measured on a device and runs where it is named" in why().reason
    else:
        with pytest.raises(NotImplementedError, match=f"for compute capability 9.0, this GPU has {capability}"):
            why("mosaic_gpu", no_mosaic_gpu=None)
    with pytest.raises(NotImplementedError, match="this operation has no Mosaic GPU body"):
        why("mosaic_gpu")


def test_mosaic_gpu_is_not_interpreted_unasked():
    with pytest.raises(NotImplementedError, match="the program is lowered for cpu"):
        why("mosaic_gpu", no_mosaic_gpu=None)
    with lowering_for("cuda", interpret=True):
        assert why("mosaic_gpu", no_mosaic_gpu=None).interpret


def test_unknown_names():
    with pytest.raises(ValueError, match="implementation"):
        why("cuda")
    with pytest.raises(ValueError, match="platform"), lowering_for("rocm"):
        pass


def test_the_platform_and_the_blocks_are_part_of_the_jit_cache_key():
    seen = []

    @jax.jit
    def f(x):
        seen.append((why().platform, tuning.pick(tuning.AttentionBlocks, "tpu", jnp.float32, 8)))
        return x

    f(1.0)
    with lowering_for("tpu"):
        f(1.0)
        with tuning.using(tuning.AttentionBlocks(8, 8)):
            f(1.0)
    f(1.0)
    assert [platform for platform, _ in seen] == ["cpu", "tpu", "tpu"]
    assert seen[2][1] == tuning.AttentionBlocks(8, 8)
