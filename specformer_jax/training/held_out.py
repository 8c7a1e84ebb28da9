"""What a head in training is worth: kappa along answers of the target that nothing is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from specformer_jax.decoding.model import Model
from specformer_jax.decoding.pass_counts import PassCounts
from specformer_jax.decoding.program_store import ProgramStore
from specformer_jax.errors import UserError, require
from specformer_jax.loading.tokenizer import Tokenizer
from specformer_jax.nn.target import Target
from specformer_jax.planning.forecasts import Forecasts
from specformer_jax.training import evaluate, placement
from specformer_jax.training.data.documents import Document
from specformer_jax.training.report.samples import pieces
from specformer_jax.training.run.run_record import digest_of
from specformer_jax.training.train_step import Frozen, Trainer

SAMPLE = 160  # tokens of an answer that are shown


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What a run is judged by.

    Attributes:
      documents: the target's own answers to prompts that nothing is trained on.
      every: how many steps lie between two counts; there is one at each checkpoint in any case.
      tokenizer: the target's, to show drafts as text; None shows none.
    """

    documents: Sequence[Document]
    every: int | None = None
    tokenizer: Tokenizer | None = None

    def __post_init__(self):
        require(
            (self.every is None or self.every >= 1, f"--eval-every {self.every} must be at least 1"),
            (
                any(end - begin >= 2 for document in self.documents for begin, end in document.answers),
                "no held-out answer has two tokens: give other --eval-prompts",
            ),
        )

    @property
    def digest(self) -> str:
        """Names the documents: only counts along the same ones are compared."""
        return digest_of(self.documents)

    def trained_on(self, documents: Sequence[Document]) -> int:
        """How many of these prompts are in the training data, too."""
        seen = {document.tokens[: document.answers[0][0]].tobytes() for document in documents}
        return sum(document.tokens[: document.answers[0][0]].tobytes() in seen for document in self.documents)


@dataclasses.dataclass(frozen=True)
class HeldOutCounts:
    """What a head brings on held-out answers, drafted greedily.

    Attributes:
      passes: the passes that decode them with all J drafts.
      forecasts: what the head forecast at every place of them.
      sample: the beginning of an answer in pieces, and whether each was drafted, and right; None without a tokenizer.
    """

    passes: PassCounts
    forecasts: Forecasts
    sample: list[tuple[bool, str]] | None

    def line(self) -> str:
        """For people."""
        slots = " ".join(f"{share:.3f}" for share in self.passes.acceptance)
        return f"held out: kappa {self.passes.kappa:.3f}, accepted by position {slots}; {self.forecasts.line()}"

    def report(self) -> dict[str, Any]:
        """JSON of it."""
        return self.passes.report() | self.forecasts.report() | {"sample": self.sample}


class HeldOutCounter:
    """Counts along the same answers again and again, with the parameters of the moment."""

    def __init__(
        self,
        trainer: Trainer,
        mesh: Mesh,
        frozen: Frozen,
        token_ids: np.ndarray | None,
        held_out: HeldOut,
        programs: ProgramStore | None = None,
    ):
        """
        Args:
          trainer: what is trained.
          mesh: what it is trained on.
          frozen: the target, which reads the answers anew each time.
          token_ids: the token ids of a pruned draft vocabulary, or None.
          held_out: the answers; what lies beyond the sequence length of a packed row is left out.
          programs: what keeps compiled programs between starts, or None.
        """
        self._draft = _compile(trainer, mesh, token_ids)
        if programs is not None:
            self._draft = programs.keeping(
                self._draft, "held-out drafts", trainer, token_ids is not None and token_ids.tolist()
            )
        self._every = held_out.every
        self._frozen, self._tokenizer, self._slots = frozen, held_out.tokenizer, trainer.config.draft.max_draft_length
        longest = trainer.config.sequence_length
        self._documents = [d for d in held_out.documents if d.answers[0][0] + 2 <= longest]
        if not self._documents:
            raise UserError(
                f"every held-out prompt is longer than sequence_length {longest}: give other --eval-prompts"
            )
        size = min(max(len(d.tokens) for d in self._documents), longest)
        rows = mesh.size // mesh.shape["model"]
        padded = np.zeros((-(-len(self._documents) // rows) * rows, -(-size // 64) * 64), np.int32)
        for row, document in zip(padded, self._documents, strict=False):
            row[: min(len(document.tokens), size)] = document.tokens[:size]
        self._size, sharding = size, placement.batch_sharding(mesh)
        place = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
        self._batches = [place(padded[first : first + rows]) for first in range(0, len(padded), rows)]

    def due(self, done: int) -> bool:
        """Whether so many steps ask for a count, wherever checkpoints are."""
        return self._every is not None and done % self._every == 0

    def count(self, params: Any) -> HeldOutCounts:
        """What the head is worth with these parameters."""
        passes, right, confidence, sample = PassCounts(self._slots), [], [], None
        found = [jax.device_get(self._draft(params, self._frozen, batch)) for batch in self._batches]
        drafts = np.concatenate([chain.tokens for chain in found])
        sure = np.concatenate([chain.confidence for chain in found])
        for row, document in enumerate(self._documents):
            for begin, end in document.answers:
                end = min(end, self._size)
                if end - begin < 2:
                    continue
                hits, here = evaluate.right_drafts(drafts[row], document.tokens[:end], begin)
                passes.add(*evaluate.walk(hits, self._slots))
                right.append(np.cumprod(hits, axis=1).sum(axis=1))
                confidence.append(sure[row, here])
                if sample is None and self._tokenizer is not None:
                    sample = _shown(document.tokens[begin:end][:SAMPLE], right[-1], self._tokenizer)
        return HeldOutCounts(passes, Forecasts(right, confidence), sample)


def _shown(answer: np.ndarray, right: np.ndarray, tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    """An answer in pieces that passes accept as drafts, or write themselves."""
    drafted, at = np.zeros(len(answer) + 1 + right.max(), bool), 0
    while at < len(answer) - 1:
        drafted[at + 1 : at + 1 + right[at]] = True
        at += int(right[at]) + 1
    return list(pieces(answer, drafted[: len(answer)], tokenizer))


def _compile(
    trainer: Trainer, mesh: Mesh, token_ids: np.ndarray | None
) -> Callable[[Any, Frozen, Int[Array, "R T"]], Any]:
    """What drafts at every position of a batch of whole rows: the parameters are those of training, in float32."""
    config = trainer.config
    model = Model(Target(trainer.target, config.draft.hook_layers, config.dtype), trainer.drafter)

    def draft(params, frozen, tokens):
        arrays = {"target": frozen.target, "draft": jax.tree.map(lambda x: x.astype(config.dtype), params)}
        if token_ids is not None:
            arrays["draft_vocab"] = {"token_ids": jnp.asarray(token_ids, jnp.int32), "lm_head": frozen.lm_head}
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return evaluate.draft_everywhere(model, arrays, tokens, jnp.uint32(0), jnp.float32(0))

    places = placement.state_shardings(trainer, mesh).params, None, placement.batch_sharding(mesh)
    return jax.jit(draft, in_shardings=places, out_shardings=NamedSharding(mesh, P()))
