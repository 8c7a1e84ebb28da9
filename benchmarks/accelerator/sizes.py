"""How large everything is: on a device, and in a dry run that a CPU goes through in a minute."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from benchmarks.aot.step import QWEN3_4B, QWEN3_8B
from specformer_jax.config import DraftConfig, TargetConfig


class Heads(NamedTuple):
    """The attention of a target: N query heads, K key/value heads of size H."""

    name: str
    N: int
    K: int
    H: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
      spell: the seconds that a timing should last, so that starting it costs nothing.
      gemm: of a square product.
      copy_bytes: of a copy.
      dtypes: in which the kernels are checked.
      heads: whose attention is checked and tuned.
      rows, positions: of the caches that are attended, B and C.
      page: positions of a page; None takes the platform's own.
      windows: tokens of a row, the last one with its drafts, for which attention is tuned.
      chunk: tokens of a piece of a prompt.
      packed: positions of a packed sequence.
      vocabulary, width, pruned: V and D of sampling and of the downsampler, and V of a pruned vocabulary.
      sampled: sampled rows, R.
      candidates: tile sizes that are tried; None tries all.
      layers: of the built-in target that are run; None runs all.
      prompts, tokens: answers that are compared, and their length.
      answer_tokens, rounds: the length of timed answers, and how many batches of each size.
      drafts: k of whole answers, 0 is plain decoding.
      batches, answered: B of steps, and of timed answers, the most telling first.
      tokens_a_row: of steps: the last token of a row and its drafts.
      contexts: positions of a row when its step is timed.
      steps: of a timed call.
      targets: whose steps are timed, each with its head.
      projected: the target of the projection.
    """

    spell: float
    gemm: int
    copy_bytes: int
    dtypes: tuple[str, ...]
    heads: tuple[Heads, ...]
    rows: int
    positions: int
    page: int | None
    windows: tuple[int, ...]
    chunk: int
    packed: int
    vocabulary: int
    width: int
    pruned: int
    sampled: int
    candidates: int | None
    layers: int | None
    prompts: int
    tokens: int
    answer_tokens: int
    rounds: int
    drafts: tuple[int, ...]
    batches: tuple[int, ...]
    answered: tuple[int, ...]
    tokens_a_row: tuple[int, ...]
    contexts: tuple[int, ...]
    steps: int
    targets: dict[str, tuple[TargetConfig, DraftConfig]]
    projected: str


# The built-in target and its head, so that their steps can be timed where the weights are not.
SMOLLM2 = TargetConfig(
    "llama", 49152, 576, 30, 9, 3, 64, 1536, 8192, rope_theta=1e5, rms_epsilon=1e-5, tied_embeddings=True
)
HEAD = DraftConfig(4, next_token_hook=True, draft_vocab_size=4096, sequential_ffn=512)
PAPER = DraftConfig(4)  # as many slots as a row verifies here; all else is the paper's

DEVICE = Sizes(
    spell=0.03,
    gemm=8192,
    copy_bytes=2**31,
    dtypes=("float32", "bfloat16"),
    heads=(Heads("qwen3-8b", 32, 8, 128), Heads("smollm2-135m", 9, 3, 64)),
    rows=64,
    positions=2048,
    page=None,
    windows=(2, 3, 5, 9),
    chunk=128,
    packed=1024,
    vocabulary=151936,
    width=4096,
    pruned=8192,
    sampled=320,
    candidates=None,
    layers=None,
    prompts=16,
    tokens=96,
    answer_tokens=96,
    rounds=3,
    drafts=(0, 2, 4),
    batches=(64, 1, 128, 8, 256, 32),
    answered=(1, 64, 8, 128, 32, 256),
    tokens_a_row=(1, 2, 3, 4, 5),
    contexts=(512, 2048),
    steps=8,
    targets={"qwen3-8b": (QWEN3_8B, PAPER), "smollm2-135m": (SMOLLM2, HEAD), "qwen3-4b": (QWEN3_4B, PAPER)},
    projected="qwen3-8b",
)

_TINY = TargetConfig("qwen3", 256, 64, 1, 4, 2, 16, 96, 512, qk_norm=True)
DRY = Sizes(
    spell=0.0,
    gemm=128,
    copy_bytes=2**20,
    dtypes=("bfloat16",),
    heads=(Heads("tiny", 4, 2, 16),),
    rows=4,
    positions=64,
    page=16,
    windows=(3,),
    chunk=40,
    packed=32,
    vocabulary=512,
    width=64,
    pruned=128,
    sampled=8,
    candidates=1,
    layers=1,
    prompts=3,
    tokens=12,
    answer_tokens=8,
    rounds=1,
    drafts=(0, 3),
    batches=(2,),
    answered=(1,),
    tokens_a_row=(5,),
    contexts=(16, 40),
    steps=2,
    targets={"tiny": (_TINY, PAPER)},
    projected="tiny",
)
