"""A target and data small enough to train within a test; also a program: `python tiny.py RUN` fits on them."""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from specformer_jax.config import DraftConfig, TargetConfig
from specformer_jax.nn.target import Target
from specformer_jax.training import metrics
from specformer_jax.training.config import BoundConfig, TrainConfig
from specformer_jax.training.data.batches import Batches
from specformer_jax.training.data.documents import Document

TARGET = TargetConfig("llama", 96, 32, 2, 4, 2, 8, 48, 256, tied_embeddings=True, eos_ids=(2,))


def target_params():
    tokens = jnp.zeros((1, 2), jnp.int32)
    return nn.unbox(jax.jit(Target(TARGET, (), "float32").init)(jax.random.key(1), tokens))["params"]


def documents(count: int = 60) -> list[Document]:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(3, TARGET.vocab_size, rng.integers(12, 30)) for _ in range(count)]
    return [Document.of(str(i), some[:5], some[5:]) for i, some in enumerate(tokens)]


def config(**changes) -> BoundConfig:
    draft = DraftConfig(max_draft_length=3, next_token_hook=True, draft_vocab_size=64)
    fields = dict(
        draft=draft,
        sequence_length=64,
        batch_rows=4,
        anchors=48,
        dtype="float32",
        steps=20,
        learning_rate=3e-3,
        soft=0.5,
        slot_decay=0.8,
        checkpoint_every=5,
        log_every=1,
    )
    return TrainConfig(**(fields | changes)).bind(TARGET)


def losses(run: str | Path) -> list[float]:
    """What the lines of a run's metrics say about its loss."""
    return [row["loss"] for row in metrics.read(Path(run) / "metrics.jsonl")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--mesh", default="1,1,1")
    parser.add_argument("--stop-at", type=int)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--distributed", default="")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds a batch takes, so that a test can hit a step")
    parser.add_argument("--full-disk-after", type=int, help="from this batch on, files may not grow past 512 bytes")
    options = parser.parse_args()
    if options.distributed:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        address, count, index = options.distributed.split(",")
        jax.distributed.initialize(address, int(count), int(index))
    from specformer_jax.training import fit

    plain = Batches.__getitem__

    def disturbed(self, i):
        time.sleep(options.delay)
        if i == options.full_disk_after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
        return plain(self, i)

    Batches.__getitem__ = disturbed
    mesh = tuple(map(int, options.mesh.split(",")))
    inputs = fit.Inputs(TARGET, target_params(), documents())
    state = fit.fit(
        config(mesh=mesh, steps=options.steps), inputs, options.run, stop_at=options.stop_at, progress=False
    )
    print(f"stopped after step {int(state.step)}", flush=True)
    if options.distributed:
        jax.distributed.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
