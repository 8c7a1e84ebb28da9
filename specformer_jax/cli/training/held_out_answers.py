"""Answers to judge a head by: those that `distill` made, or the target's own to dialogues, kept in the run's folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import jax

from specformer_jax import files
from specformer_jax.batch.conversations import read_conversations
from specformer_jax.cli import command_line
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import load
from specformer_jax.loading.tokenizer import Tokenizer
from specformer_jax.nn.mesh import make_mesh
from specformer_jax.training.config import BoundConfig
from specformer_jax.training.data.documents import Document
from specformer_jax.training.data.sources import are_answers, check_tokenizer, read_documents
from specformer_jax.training.distillation import distill
from specformer_jax.training.run.owner import owned

FOLDER, ASKED = "held_out", "asked.json"  # of a run, and what stands there once all is answered


def read(config: BoundConfig, source: str, run: Path, tokenizer: Tokenizer, vocab_size: int) -> Sequence[Document]:
    """The answers to a source; the target gives them, greedily, to the first turn of each dialogue, if it has not yet.

    Args:
      config: the run's.
      source: answers as `fit` trains on them, or dialogues.
      run: the run's folder.
      tokenizer: the target's.
      vocab_size: the target's.

    Raises:
      UserError: what cannot be read or answered; dialogues where several hosts train.
    """
    if not are_answers(source):
        _answer(config, source, run, tokenizer)
        source = str(run / FOLDER)
    check_tokenizer(source, tokenizer.fingerprint)
    return read_documents(source, vocab_size)


def _answer(config: BoundConfig, source: str, run: Path, tokenizer: Tokenizer) -> None:
    if jax.process_count() > 1:
        raise UserError(
            f"--eval-prompts {source}: on several hosts let distill answer first, and name the folder of answers"
        )
    found, _ = read_conversations(source)
    conversations = [c.first(1) for c in found]
    greedy = dataclasses.replace(config.distill, temperatures=(0.0,), samples=1)
    asked = repr((conversations, config.target, config.dtype, tokenizer.fingerprint, greedy)).encode()
    digest, done = hashlib.sha256(asked).hexdigest(), run / FOLDER / ASKED
    if done.exists() and files.read_sealed(done).get("digest") == digest:
        return
    with owned(run):
        mesh = make_mesh(*greedy.mesh, devices=jax.local_devices())
        lm = load(config.target, dtype=config.dtype, mesh=mesh)
        distill.distill(lm, conversations, greedy, run / FOLDER, mesh=mesh, programs=command_line.programs_folder())
        try:
            files.write_whole(done, json.dumps(files.seal({"digest": digest})) + "\n")
        except OSError as error:
            raise UserError(f"held-out answers cannot be kept in {run / FOLDER}: {error}") from error
