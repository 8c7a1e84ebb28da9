"""Native bodies of a CPU: right, row-invariant, safe beside other threads and after a fork, and optional."""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PackedMatrix, cpu, lm_head_logits, lowering_for, matmul, pack, why
from pallas_kernels.product.api import matmul_rows

if reason := cpu.unavailable():
    pytest.skip(reason, allow_module_level=True)
ROOT = Path(__file__).parents[3]


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(jnp.bfloat16)


def run(code: str, **variables: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(
        [sys.executable, *code.split()] if code.startswith("-m") else [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("isa", cpu.isas())
def test_every_instruction_set_agrees_with_float64_and_is_row_invariant(isa):
    out = run("-m tests.kernels.native.check", SPECFORMER_CPU_ISA=isa, SPECFORMER_THREADS="3")
    assert int(out) > 200_000


def test_the_best_set_is_taken_and_another_can_be_named():
    assert cpu.isa() == os.environ.get("SPECFORMER_CPU_ISA", cpu.isas()[0])
    assert cpu.isas()[-1] == "plain"
    out = run("import pallas_kernels; print(pallas_kernels.why().reason)", SPECFORMER_CPU_ISA="vax")
    assert "SPECFORMER_CPU_ISA=vax is no instruction set that this CPU runs" in out and "plain" in out


def test_why_names_the_native_body_or_the_reason_against_it():
    choice = why("native")
    assert (choice.implementation, choice.platform, choice.interpret) == ("native", "cpu", False)
    assert why() == choice and cpu.isa() in choice.reason
    for reason, context in (("lowered for tpu", lowering_for("tpu")), ("ruled out", lowering_for("cpu", native=False))):
        with context, pytest.raises(NotImplementedError, match=f"implementation='native' cannot run.*{reason}"):
            why("native")
    with pytest.raises(NotImplementedError, match="no native body"):
        why("native", no_native="this operation has no native body")
    with lowering_for("cpu", native=False):
        assert why().implementation == "xla"
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        assert why().implementation == "native"


def test_packed_weights_take_the_place_of_plain_ones():
    x, weights = jnp.asarray(random(2, 3, 4, 10)), random(4, 10, 3, 7, seed=1)
    kernel = pack(weights, axes=2)
    assert kernel.shape == weights.shape and kernel.panels.shape == (2, 20, 16, 2)
    with lowering_for("cpu", native=False):
        plain = matmul(x, jnp.asarray(weights), axes=2)
    got = jax.jit(lambda x, kernel: matmul(x, kernel, axes=2))(x, kernel)
    assert got.shape == plain.shape == (2, 3, 3, 7) and got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), plain.astype(np.float32), rtol=2.0**-7, atol=1e-2)
    assert jax.tree.structure(jax.tree.map(lambda x: x, kernel)) == jax.tree.structure(kernel)


def test_packed_weights_refuse_what_they_cannot_do():
    kernel = pack(random(8, 16))
    with pytest.raises(NotImplementedError, match="multiplies bfloat16, not float32"):
        matmul(jnp.zeros((1, 8)), kernel)
    with pytest.raises(ValueError, match="does not fit"):
        matmul(jnp.zeros((1, 4), jnp.bfloat16), kernel)
    with pytest.raises(ValueError, match="does not fit"):
        matmul(jnp.zeros((1, 2, 4), jnp.bfloat16), kernel, axes=2)
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(lambda x: matmul(x, kernel).sum().astype(jnp.float32))(jnp.zeros((1, 8), jnp.bfloat16))
    with lowering_for("cpu", native=False), pytest.raises(NotImplementedError, match="ruled out"):
        matmul(jnp.zeros((1, 8), jnp.bfloat16), kernel)


def test_rows_of_a_matrix_keep_their_gradient():
    x, matrix = jnp.asarray(random(3, 8)), jnp.asarray(random(5, 8, seed=1))
    loss = lambda x, matrix: (lm_head_logits(x, matrix) ** 2).sum()
    native = jax.grad(loss, argnums=(0, 1))(x, matrix)
    with lowering_for("cpu", native=False):
        plain = jax.grad(loss, argnums=(0, 1))(x, matrix)
    for a, b in zip(native, plain, strict=True):
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=2.0**-6, atol=0.1)


def test_vmap_is_a_loop():
    x, kernel = jnp.asarray(random(4, 2, 8)), pack(random(8, 16, seed=1))
    together = matmul(x, kernel)
    assert (jax.vmap(lambda x: matmul(x, kernel))(x) == together).all()


def test_float32_is_left_to_xla():
    text = jax.jit(matmul_rows).lower(jnp.zeros((2, 8)), jnp.zeros((4, 8))).as_text()
    assert "specformer" not in text
    text = jax.jit(matmul_rows).lower(jnp.zeros((2, 8), jnp.bfloat16), jnp.zeros((4, 8), jnp.bfloat16)).as_text()
    assert "specformer_product_of_rows" in text


@jax.jit
def chains(x, kernels):
    """Two chains of products that do not depend on each other: XLA may run them at the same time."""
    a = b = x
    for kernel in kernels:
        a, b = jnp.tanh(matmul(a, kernel)), jnp.tanh(matmul(-b, kernel))
    return a - b


def test_independent_products_and_many_callers_at_once():
    kernels = [pack(random(256, 256, seed=i)) for i in range(8)]
    inputs = [jnp.asarray(random(rows, 256, seed=rows)) for rows in (1, 2, 5, 17, 64)]
    alone = [np.asarray(chains(x, kernels)) for x in inputs]

    def again(number):
        return all(
            (np.asarray(chains(inputs[i % 5], kernels)) == alone[i % 5]).all() for i in range(number, number + 20)
        )

    with ThreadPoolExecutor(16) as callers:
        assert all(callers.map(again, range(64)))


def test_loops_and_donated_buffers():
    kernel = pack(random(64, 64) / 8)
    step = jax.jit(
        lambda n, x: jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, matmul(c[1], kernel)), (0, x))
    )
    x = jnp.asarray(random(3, 64))
    expected = x
    for _ in range(5):
        expected = matmul(expected, kernel)
    donating = jax.jit(lambda n, x: step(n, x)[1], donate_argnums=1)
    assert (donating(5, x) == expected).all()


def test_a_forked_child_computes_and_no_thread_begins_at_import():
    code = """
import os, threading
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_cpu_enable_async_dispatch", False)
threads = lambda: len(os.listdir("/proc/self/task"))
jnp.zeros(1).block_until_ready()  # XLA's own threads
before = threads()
import pallas_kernels as p
assert p.why("native")
assert threads() == before
kernel = p.pack(np.ones((512, 512), jnp.bfloat16))
f = jax.jit(lambda x: p.matmul(x, kernel)).lower(jnp.ones((4, 512), jnp.bfloat16)).compile()
x = jnp.ones((4, 512), jnp.bfloat16)
assert float(f(x)[0, 0]) == 512
assert threads() == before + 2
import warnings
warnings.simplefilter("ignore")
child = os.fork()
if child == 0:
    ok = all(float(f(x)[0, 0]) == 512 for _ in range(50)) and threads() == 3
    os._exit(0 if ok else 1)
assert os.waitpid(child, 0)[1] == 0
assert float(f(x)[3, 511]) == 512
print("done")
"""
    assert run(code, SPECFORMER_THREADS="3").strip() == "done"


def test_compiled_programs_are_found_in_the_cache_again(tmp_path):
    code = f"""
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_compilation_cache_dir", {str(tmp_path)!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
import pallas_kernels as p
kernel = p.pack(np.ones((64, 64), jnp.bfloat16))
out = jax.jit(p.matmul)(jnp.ones((2, 64), jnp.bfloat16), kernel)
print(float(out[1, 1]), len(hits) > 0)
"""
    first, second = run(code).split(), run(code).split()
    assert first == ["64.0", "False"] and second == ["64.0", "True"]


@pytest.fixture
def not_built(monkeypatch):
    """As after an install without a compiler."""
    find = importlib.util.find_spec
    hide = lambda name, *rest: None if name == "pallas_kernels.cpu._native" else find(name, *rest)
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    cpu._load.cache_clear()
    yield
    cpu._load.cache_clear()


def test_without_a_library_the_reference_runs_and_says_why(not_built):
    assert why().implementation == "xla" and "not built" in why().reason
    with pytest.raises(NotImplementedError, match="not built"):
        why("native")
    assert matmul_rows(jnp.ones((1, 8), jnp.bfloat16), jnp.ones((4, 8), jnp.bfloat16)).tolist() == [[8.0] * 4]


def test_a_library_of_other_sources_is_not_run(monkeypatch):
    monkeypatch.setattr(cpu.sources, "fingerprint", lambda: "other")
    cpu._load.cache_clear()
    try:
        assert "built from other sources" in why().reason
    finally:
        cpu._load.cache_clear()


def test_an_install_without_a_compiler_says_in_one_line_what_is_slower(tmp_path):
    where = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"), "--force"]
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *where],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CC": "no-such-compiler", "CXX": "no-such-compiler"},
    )
    assert done.returncode == 0
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "twice as long" in line]
    assert len(lines) == 1 and "no-such-compiler" in lines[0]
    assert not list(tmp_path.rglob("*.so"))


def test_leaves_are_bfloat16_and_there_is_one_copy():
    kernel = pack(random(33, 50))
    leaves = jax.tree.leaves({"kernel": kernel})
    assert [(x.shape, x.dtype) for x in leaves] == [((4, 17, 16, 2), jnp.bfloat16)]
    assert isinstance(jax.tree.map(lambda x: x + 0, kernel), PackedMatrix)
