"""The data of a run as they are going to be trained on: what there is, what is left out, its packing, its cost."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specformer_jax import files
from specformer_jax.batch import omissions
from specformer_jax.batch.omissions import Omission
from specformer_jax.errors import UserError
from specformer_jax.training.data.batches import Batches
from specformer_jax.training.data.documents import LEFT_OUT, Document
from specformer_jax.training.report import step_cost
from specformer_jax.training.train_step import Trainer

NAME = "data_report.json"

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What a run is going to train on, and what that takes.

    Attributes:
      documents: how many there are.
      answers: the answers in them.
      tokens: the tokens of all documents.
      answer_tokens: those of them that are answers.
      forecasting: the positions of an epoch that forecast.
      rows: the packed rows of an epoch, those included that fill up its last batch.
      fill: the share of their places that tokens take.
      steps_per_epoch: the steps that an epoch takes.
      steps: the steps of the whole run.
      in_draft_vocabulary: the share of answer tokens that a pruned draft vocabulary has; None without pruning.
      step_flops: floating-point operations of a step.
      flops_per_second: those that one product reaches on all devices of the mesh.
      bytes: about what training holds on all devices, by what it is for.
      left_out: what of the data is not used.
    """

    documents: int
    answers: int
    tokens: int
    answer_tokens: int
    forecasting: int
    rows: int
    fill: float
    steps_per_epoch: int
    steps: int
    in_draft_vocabulary: float | None
    step_flops: int
    flops_per_second: float
    bytes: dict[str, int]
    left_out: Sequence[Omission]

    @property
    def seconds(self) -> float:
        """The least time that all steps take."""
        return self.steps * self.step_flops / self.flops_per_second

    def lines(self) -> list[str]:
        """The report for people."""
        total = sum(self.bytes.values())
        parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in self.bytes.items() if size)
        vocabulary = []
        if self.in_draft_vocabulary is not None:
            vocabulary = [f"the draft vocabulary has {self.in_draft_vocabulary:.1%} of the answer tokens"]
        return [
            f"{self.documents:,} documents, {self.answers:,} answers, {self.tokens:,} tokens, {self.answer_tokens:,} of"
            f" them in answers, {self.forecasting:,} positions that forecast",
            *omissions.summary(self.left_out),
            f"packed into {self.rows:,} rows, {self.fill:.1%} full: {self.steps_per_epoch:,} steps an epoch,"
            f" {self.steps / self.steps_per_epoch:.1f} epochs in {self.steps:,} steps",
            *vocabulary,
            f"memory: about {_gigabytes(total)} ({parts})",
            f"time: at least {_duration(self.seconds)} without compilation, {self.step_flops / 1e9:,.1f} GFLOP a step"
            f" at the {self.flops_per_second / 1e9:,.0f} GFLOP/s of a product",
        ]

    def write(self, run: Path) -> None:
        """Keeps the report in the run's folder, and beside it a list of what was left out.

        Raises:
          UserError: the folder cannot be written.
        """
        kept: dict[str, Any] = dataclasses.asdict(self) | {"seconds": self.seconds}
        kept["left_out"] = omissions.counts(self.left_out)
        try:
            run.mkdir(parents=True, exist_ok=True)
            files.write_whole(run / NAME, json.dumps(files.seal(kept), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"the report on the data cannot be written to {run}: {error}") from error
        omissions.write(run / f"{LEFT_OUT}.jsonl", self.left_out)


def read(run: Path) -> dict[str, Any] | None:
    """What `write` kept; None where there is none, or, with a warning, where it is damaged."""
    try:
        return files.read_sealed(run / NAME) if (run / NAME).exists() else None
    except UserError as error:
        log.warning("the report on the data is not used: %s", error)
        return None


def describe(
    trainer: Trainer,
    documents: Sequence[Document],
    packed: Batches,
    token_ids: np.ndarray | None,
    devices: int = 1,
    *,
    stored_hooks: bool = False,
) -> DataReport:
    """Looks at the data of a run.

    Args:
      trainer: what is trained, and on which target.
      documents: what is trained on.
      packed: the same in packed rows.
      token_ids: the token ids of a pruned draft vocabulary, or None.
      devices: how many devices the step runs on.
      stored_hooks: whether the target's hooks are read from a disk.
    """
    config, contents = trainer.config, packed.contents
    rows, tokens = packed.epoch()
    return DataReport(
        documents=len(documents),
        answers=contents.answers,
        tokens=contents.tokens,
        answer_tokens=contents.answer_tokens,
        forecasting=sum(anchors for _, anchors in contents.sizes),
        rows=rows,
        fill=tokens / (rows * config.sequence_length),
        steps_per_epoch=rows // config.batch_rows,
        steps=config.steps,
        in_draft_vocabulary=None if token_ids is None else _covered(documents, token_ids),
        step_flops=step_cost.step_flops(trainer, stored_hooks),
        flops_per_second=devices * step_cost.product_rate(config.dtype),
        bytes=step_cost.step_bytes(trainer, stored_hooks),
        left_out=contents.omissions,
    )


def _covered(documents: Sequence[Document], token_ids: np.ndarray) -> float:
    inside = total = 0
    for document in documents:
        for begin, end in document.answers:
            inside += int(np.isin(document.tokens[begin:end], token_ids).sum())
            total += end - begin
    return inside / total


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
