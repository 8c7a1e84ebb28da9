"""Every kernel form, compiled ahead of time for a chip that is not there: a script of its own process.

    python tests/kernels/aot/aot_cases.py tpu v5e:2x4 v6e:2x2
    python tests/kernels/aot/aot_cases.py cuda H100 A100

The first device gets each form in every dtype and head size, the others in the ones that serve most models; an H100 the
Mosaic GPU bodies as well. Prints a line for each form: the device, the form and the kernels found in the compiled
program.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.aot.gpu_targets import REFUSE_SPILLS, gpu_devices
from pallas_kernels import (
    Places,
    grouped_rms_norm_downsample,
    lowering_for,
    mixed_mask_attention,
    ragged_attention,
    sample_hidden,
    sample_logits,
)

BF16, F32, I32, U32 = jnp.bfloat16, jnp.float32, jnp.int32, jnp.uint32


def device(platform: str, name: str):
    """A device of a chip that need not be there."""
    if platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
    return gpu_devices(name)[0]


def compile_for(platform: str, target, function, *args):
    """Lowers and compiles, and returns the program's text.

    What is donated must be updated in place, and on CUDA no register of XLA's and Triton's kernels may spill.
    """
    here = SingleDeviceSharding(target)
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), args)
    options = REFUSE_SPILLS if platform == "cuda" else None
    with lowering_for(platform):
        jitted = function if hasattr(function, "trace") else jax.jit(function)
        lowered = jitted.trace(*args).lower(lowering_platforms=(platform,))
        compiled = lowered.compile(compiler_options=options)
    donated = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(lowered.args_info) if a.donated)
    memory = compiled.memory_analysis()
    if donated and (memory.alias_size_in_bytes < donated or memory.temp_size_in_bytes >= donated):
        raise SystemExit(f"what is donated is copied: {donated} bytes, {memory}")
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        # jaxlib 0.10.2 cannot read back some TPU7x programs (async updates of two operands) that libtpu compiled.
        return lowered.as_text()


@contextlib.contextmanager
def refusing_mosaic_gpu_spills() -> Iterator[None]:
    """Raises RuntimeError if a Mosaic GPU kernel that is compiled in this context spills registers, or none is.

    Those kernels reach ptxas without XLA's options. What it says goes to the process's standard output, where it is
    caught.
    """
    with tempfile.TemporaryFile() as log:
        stdout, before = os.dup(1), os.environ.get("MOSAIC_GPU_DUMP_PTXAS")
        os.dup2(log.fileno(), 1)
        os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
        try:
            yield
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
            if before is None:
                del os.environ["MOSAIC_GPU_DUMP_PTXAS"]
        log.seek(0)
        said = log.read().decode()
    if re.search(r"[1-9]\d* bytes spill", said) or "0 bytes spill" not in said:
        raise RuntimeError(f"a Mosaic GPU kernel spills registers, or none was compiled: {said[-2000:] or 'no log'}")


def _gradient(function, count):
    """The values and the gradients of the first `count` operands."""

    def scalar(*args):
        return function(*args).astype(F32).sum()

    return jax.value_and_grad(scalar, argnums=tuple(range(count)))


def _paged(thorough: bool, platform: str):
    """What `cases` yields, of attention over pages: of Qwen3-8B and SmolLM2-135M, windows of 5 and chunks of 128."""
    of = jax.ShapeDtypeStruct
    rows, positions = 16, 2048
    p = dict(tpu=128, cuda=64)[platform]
    sizes = [(BF16, p), (BF16, 16), (BF16, 512), (F32, p)] if thorough else [(BF16, p)]
    for (name, N, K, H), (dtype, p) in itertools.product([("qwen3-8b", 32, 8, 128), ("smollm2", 9, 3, 64)], sizes):
        table, name = of((rows, positions // p), I32), f"{name} {dtype.__name__} page={p}"
        pages = (of((rows * positions // p, K, p, H), dtype),) * 2
        for kind, T, tile in (
            ("windows", 5 * rows, 5),
            ("windows and a chunk", 5 * rows + 123, 8),
            ("chunk", 128, 128),
        ):
            q, kv, place = of((T, N, H), dtype), of((T, K, H), dtype), of((T,), I32)
            # A TPU program turns arrays of heads of 64 around where they enter and leave, unless their layout is named.
            in_place = 3 if platform == "cuda" or H == 128 else ()
            flat = jax.jit(functools.partial(ragged_attention, tile=tile), donate_argnums=in_place)
            operands = (q, kv, kv, pages, Places(place, place, table))
            yield f"paged {kind} {name}", flat, operands, {"mixed_mask_attention"}
        drafts, draft = of((rows, 1, 4, N, H), dtype), (of((rows, 1, 4, K, H), dtype),) * 2
        both = lambda q, c, d, s, t: mixed_mask_attention(q, c, d, start=s, table=t)
        operands = (drafts, pages, draft, of((rows,), I32), table)
        yield f"draft block and pages {name}", both, operands, {"mixed_mask_attention"}


def cases(thorough: bool, platform: str):
    """(name, function, abstract operands, kernels that must be found); all dtypes and sizes, or one of each form."""
    yield from _paged(thorough, platform)
    of = jax.ShapeDtypeStruct
    decode = lambda q, c, s: mixed_mask_attention(q, c, start=s)
    block = lambda q, d, s: mixed_mask_attention(q, None, d, start=s)
    both = lambda q, c, d, s: mixed_mask_attention(q, c, d, start=s)
    packed = lambda q, c, s, g: mixed_mask_attention(q, c, start=s, segments=g)
    packed_both = lambda q, c, d, s, g: mixed_mask_attention(q, c, d, start=s, segments=g)
    attention = "mixed_mask_attention"
    dtypes = (BF16, F32) if thorough else (BF16,)
    for dtype in dtypes:
        for H in (64, 80, 128) if thorough else (128,):
            name = f"{dtype.__name__} H={H}"
            window, rows = of((16, 5, 8, H), dtype), of((16,), I32)
            cache = (of((16, 2, 2048, H), dtype),) * 2
            yield f"decode {name}", decode, (window, cache, rows), {attention}
            drafts, draft = of((16, 1, 4, 8, H), dtype), (of((16, 1, 4, 2, H), dtype),) * 2
            yield f"draft block {name}", block, (drafts, draft, rows), {attention}
            yield f"draft block and context {name}", both, (drafts, cache, draft, rows), {attention}

            start, segments = of((2,), I32), of((2, 1024), I32)
            q, kv = of((2, 1024, 9, H), dtype), (of((2, 3, 1024, H), dtype),) * 2
            found = {attention, f"{attention}_dq", f"{attention}_dkv"}
            yield f"full sequence, backward {name}", _gradient(packed, 2), (q, kv, start, segments), found
            q, draft = of((2, 1024, 5, 9, H), dtype), (of((2, 1024, 5, 3, H), dtype),) * 2
            yield f"draft block and context, backward {name}", _gradient(packed_both, 3), (
                q, kv, draft, start, segments,
            ), {attention, f"{attention}_dkv"}  # fmt: skip
            yield f"draft block, backward {name}", _gradient(block, 2), (q, draft, start), {attention}
    prefill = (of((1, 2048, 32, 128), BF16), (of((1, 8, 4096, 128), BF16),) * 2, of((1,), I32))
    yield "prefill", decode, prefill, {attention}
    for C in (517, 2053):  # a row's longest text and a window
        window, cache = of((16, 5, 8, 128), BF16), (of((16, 2, C, 128), BF16),) * 2
        yield f"decode in {C} positions", decode, (window, cache, of((16,), I32)), {attention}

    for R, V, D in ((320, 151936, 4096), (1, 49152, 576), (640, 151936, 4096), (5, 49152, 576))[: 3 + thorough]:
        rows = dict(seed=of((R,), U32), position=of((R,), I32), temperature=of((R,), F32))
        for confidence in (False, True):
            asked = " with confidence" * confidence
            by_logits = functools.partial(sample_logits, confidence=confidence)
            by_hidden = functools.partial(sample_hidden, confidence=confidence)
            logits = lambda x, t, r, sample=by_logits: sample(x, threshold=t, **r)
            hidden = lambda h, w, r, sample=by_hidden: sample(h, w, **r)
            mapped = lambda h, w, t, r, sample=by_hidden: sample(h, w, token_ids=t, **r)
            for dtype in dtypes:
                name = f"{dtype.__name__} {R}x{V}{asked}"
                yield f"sample logits {name}", logits, (of((R, V), dtype), of((R,), F32), rows), {"sample_logits"}
                operands = (of((R, D), dtype), of((V, D), dtype), rows)
                yield f"sample hidden {name}", hidden, operands, {"sample_hidden"}
            operands = (of((R, D), BF16), of((8192, D), BF16), of((8192,), I32), rows)
            yield f"sample a pruned vocabulary {R}x{D}{asked}", mapped, operands, {"sample_hidden"}

    norm = lambda x, s, k: grouped_rms_norm_downsample(x, s, k, epsilon=1e-6)
    for dtype in dtypes:
        for R, D in ((320, 4096), (1, 576), (1024, 8192), (5, 576), (1024, 576))[: 3 + 2 * thorough]:
            operands = (of((R, 4, D), dtype), of((4, D), F32), of((4, D, D), dtype))
            yield f"downsample {dtype.__name__} {R}x{D}", norm, operands, {"grouped_rms_norm_downsample"}
            if D == 8192:
                continue  # on GPU the backward is XLA's own products, which spill at this width unless they are tuned
            masters = (*operands[:2], of((4, D, D), F32))
            yield (
                f"downsample, backward {dtype.__name__} {R}x{D}",
                _gradient(norm, 3),
                masters,
                {"grouped_rms_norm_downsample"},
            )


def mosaic_gpu_cases():
    """As `cases`, of the Mosaic GPU bodies."""
    of, rows, positions = jax.ShapeDtypeStruct, 16, 2048
    sizes = [("qwen3-8b", 32, 8, 128, 64), ("qwen3-8b", 32, 8, 128, 256), ("smollm2", 9, 3, 64, 64)]
    for (name, N, K, H, p), (kind, T, tile) in itertools.product(
        sizes, [("windows", 5 * rows, 5), ("chunk", 128, 128)]
    ):
        q, kv, place = of((T, N, H), BF16), of((T, K, H), BF16), of((T,), I32)
        pages, table = (of((rows * positions // p, K, p, H), BF16),) * 2, of((rows, positions // p), I32)
        attend = functools.partial(ragged_attention, tile=tile, implementation="mosaic_gpu")
        operands = (q, kv, kv, pages, Places(place, place, table))
        yield f"{kind} {name} page={p}", jax.jit(attend, donate_argnums=3), operands, {"mixed_mask_attention"}
    for (R, V, D), confidence in itertools.product([(320, 151936, 4096), (5, 49152, 576)], [False, True]):
        by_row = dict(seed=of((R,), U32), position=of((R,), I32), temperature=of((R,), F32))
        sample = functools.partial(sample_hidden, confidence=confidence, implementation="mosaic_gpu")
        name = f"sample hidden {R}x{V}" + " with confidence" * confidence
        operands = (of((R, D), BF16), of((V, D), BF16), by_row)
        yield name, lambda h, w, r, sample=sample: sample(h, w, **r), operands, {"sample_hidden"}
        mapped = lambda h, w, t, r, sample=sample: sample(h, w, token_ids=t, **r)
        operands = (of((R, D), BF16), of((8192, D), BF16), of((8192,), I32), by_row)
        yield f"{name}, a pruned vocabulary", mapped, operands, {"sample_hidden"}


def _check(name: str, form: str, text: str, expected: set[str], call: str) -> None:
    """Says what was found in the compiled program; ends where a kernel or the call of its compiler is not there."""
    kernels = {k for k in re.findall(r"[%\"]([a-z_]+)[.\d]* ?[=\"]", text) if k.startswith(tuple(expected))}
    kernels |= {k for k in expected if re.search(rf"\b{k}\b", text)}
    if not expected <= kernels or call not in text:
        raise SystemExit(f"{name}: {form}: expected {expected} in the compiled program, found {kernels}")
    print(f"{name}: {form}: {', '.join(sorted(kernels))}", flush=True)


def main(platform: str, names: list[str]) -> None:
    """Compiles every case for every named device."""
    call = dict(tpu="tpu_custom_call", cuda="__gpu$xla.gpu.triton")[platform]
    for i, name in enumerate(names):
        target = device(platform, name)
        for form, function, operands, expected in cases(thorough=i == 0, platform=platform):
            _check(name, form, compile_for(platform, target, function, *operands), expected, call)
        for form, function, operands, expected in mosaic_gpu_cases() if name == "H100" else ():
            with refusing_mosaic_gpu_spills():
                text = compile_for(platform, target, function, *operands)
            _check(name, f"Mosaic GPU: {form}", text, expected, "mosaic_gpu_v2")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
