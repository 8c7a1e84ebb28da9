"""The whole decode step of Qwen3-8B with the head, compiled for chips that are not there, and what that tells."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.aot.traffic import hbm_traffic, kernel_bytes, size_of
from pallas_kernels import lowering_for
from specformer_jax.config import DraftConfig, RopeScaling, SamplingParams, Shape, TargetConfig
from specformer_jax.decoding import decode, sampling
from specformer_jax.decoding import state as state_lib
from specformer_jax.decoding.model import Model
from specformer_jax.drafters.specformer import SpecFormer
from specformer_jax.loading import head_checkpoint
from specformer_jax.loading.weights import boxed_params
from specformer_jax.nn.mesh import make_mesh, param_shardings
from specformer_jax.nn.target import Target

QWEN3_8B = TargetConfig(
    "qwen3", 151936, 4096, 36, 32, 8, 128, 12288, 40960, rope_theta=1e6, qk_norm=True, eos_ids=(151645,)
)
QWEN3_4B = dataclasses.replace(QWEN3_8B, width=2560, ffn=9728, tied_embeddings=True)
LLAMA_3_1_8B = TargetConfig(
    "llama", 128256, 4096, 32, 32, 8, 128, 14336, 131072, rope_theta=5e5, rms_epsilon=1e-5,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), eos_ids=(128009,),
)  # fmt: skip
TARGETS = {"qwen3-8b": QWEN3_8B, "qwen3-4b": QWEN3_4B, "llama-3.1-8b": LLAMA_3_1_8B}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")


@dataclasses.dataclass(frozen=True)
class CompiledReport:
    """What the compiled step says of itself, per chip.

    Attributes:
      flops, bytes_accessed: the compiler's cost analysis, the kernels by their own estimates (full rows).
      traffic: bytes to and from HBM by kind of operation (`aot/traffic.py`).
      ideal_bytes: weights once, LM head once more for the drafts, KV cache once.
      cycles: the compiler's estimates of its own operations; custom calls (our kernels) have none.
      hbm: bytes of arguments, results and temporaries, aliased ones once.
      temporaries: of them.
      aliased, donated: bytes of results that reuse an argument's memory; of what must be updated in place: the KV
        cache, or the training state.
      kernel_bytes: operands and results of our kernels.
      collectives: name -> (count, bytes of their results).
      kernels: name -> count.
      gathered_weights: results of all-gathers that are as large as a weight matrix.
      logits: float arrays [.., V] with more than one vector that the program holds.
    """

    flops: float
    bytes_accessed: float
    traffic: dict[str, int]
    ideal_bytes: int
    cycles: int
    hbm: int
    temporaries: int
    aliased: int
    donated: int
    kernel_bytes: int
    collectives: dict[str, tuple[int, int]]
    kernels: dict[str, int]
    gathered_weights: list[str]
    logits: list[str]


def compile_step(
    devices,
    *,
    platform: str,
    rows: int,
    k: int,
    positions: int,
    config: TargetConfig = QWEN3_8B,
    budget: int | None = None,
    truncation: bool = False,
    options=None,
):
    """Compiles one decode step, tensor-parallel over `devices`; k = 0 is plain decoding without a head.

    It reads `budget` tokens, None those of all rows and all their k drafts.

    With `truncation` it is the engine's, whose requests may ask for top-k, top-p and min-p; without, that of a job
    which asks for none of them. The weights take the layouts that the compiler likes best: they are placed once, at
    load. `options` are the compiler's.

    Returns:
      The compiled step and its report.
    """
    draft_config = DraftConfig(max_draft_length=max(k, 1)).bind(config)
    target = Target(config, draft_config.hook_layers if k else ())
    model = Model(target, SpecFormer(config, draft_config) if k else None, truncation=truncation)
    mesh = make_mesh(model=len(devices), devices=devices)

    def abstract(boxed):
        places = param_shardings(boxed, mesh)
        sizes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), nn.unbox(boxed))
        return sizes, jax.tree.map(lambda s: Format(Layout.AUTO, s), places)

    with lowering_for(platform):
        params, formats = {}, {}
        params["target"], formats["target"] = abstract(boxed_params(config))
        if model.drafter is not None:
            params["draft"], formats["draft"] = abstract(head_checkpoint.boxed_params(config, draft_config))
        shape = Shape(rows=rows, window=k + 1, chunk=128, positions=positions)
        greedy = sampling.stack([SamplingParams()] * rows)
        init = lambda: state_lib.init_state(model, shape, greedy)
        state = jax.eval_shape(init)

        def place(x):  # the cache over its key/value heads, all else whole
            return NamedSharding(mesh, PartitionSpec(None, "model") if x.ndim == 4 else PartitionSpec())

        places = jax.tree.map(place, state)
        step = jax.jit(
            lambda params, state: decode.step(model, params, state, size=rows * (k + 1) if budget is None else budget),
            in_shardings=(formats, places),
            out_shardings=places,
            donate_argnums=(1,),
        )
        with jax.set_mesh(mesh):
            compiled = step.trace(params, state).lower(lowering_platforms=(platform,)).compile(compiler_options=options)

    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(params)) * 2 // len(devices)
    head = config.vocab_size * config.width * 2 // len(devices)
    cache = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state.cache)) // len(devices)
    # The embedding is read row by row; an untied LM head is read by the target and once more by the drafts.
    ideal = weights + cache - head * (not config.tied_embeddings) + head * (k > 0)
    return compiled, report_on(compiled, platform, ideal, cache, config)


def report_on(compiled, platform: str, ideal: int, donated: int, config: TargetConfig) -> CompiledReport:
    """Reads what a compiled program says of itself off its text and analyses."""
    text, memory, cost = compiled.as_text(), compiled.memory_analysis(), compiled.cost_analysis() or {}
    collectives: dict[str, list[int]] = {}
    gathered = []
    smallest_weight = config.width * config.kv_heads * config.head_size
    seen = set()
    for result, name, rest in re.findall(rf"= (\(?[^=]*?\)?) ({'|'.join(COLLECTIVES)})(?:-start)?\((.*)", text):
        # One that is spread over several fusions stands in each of them; those of a shard_map share channel 1.
        channel = re.search(r"channel_id=(\d+)", rest)
        if channel and channel[1] != "1" and channel[1] in seen:
            continue
        seen.add(channel and channel[1])
        sizes = [(d, s, size_of(d, s)) for d, s in re.findall(r"(\w+)\[([\d,]*)\]", result)]
        largest = max((n for *_, n in sizes), default=0)
        count = collectives.setdefault(name, [0, 0])
        count[0], count[1] = count[0] + 1, count[1] + largest
        if name == "all-gather" and largest >= 2 * smallest_weight:
            gathered += [f"{d}[{s}]" for d, s, n in sizes if n == largest][:1]
    kernels = Counter(
        re.findall(r"%(mixed_mask_attention\w*|sample_\w+?|grouped_\w+?)(?:\.\d+)? = .*custom-call", text)
    )
    vocab = {config.vocab_size, *(config.vocab_size // n for n in (2, 4, 8))}
    floats = {(d, s) for d, s in re.findall(r"\b(f32|bf16)\[([\d,]+)\]", text)}
    logits = [f"{d}[{s}]" for d, s in floats if int(s.split(",")[-1]) in vocab and size_of(d, s) > 16 * max(vocab)]
    return CompiledReport(
        flops=cost.get("flops", 0.0),
        bytes_accessed=cost.get("bytes accessed", 0.0),
        traffic=dict(hbm_traffic(text)) if platform == "tpu" else {},
        ideal_bytes=ideal,
        cycles=sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))),
        hbm=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        donated=donated,
        kernel_bytes=kernel_bytes(text) if platform == "tpu" else 0,
        collectives={name: (count, size) for name, (count, size) in collectives.items()},
        kernels=dict(kernels),
        gathered_weights=gathered,
        logits=logits,
    )
