"""Where answers to train on are read from: the shards of `train.py distill`, or a TFDS dataset of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from specformer_jax.training.data.documents import Document, read_shards


def read_documents(path: str | os.PathLike, vocab_size: int | None = None) -> Sequence[Document]:
    """Reads distilled answers: a JSONL file (.gz too), a directory of such shards, or a TFDS directory.

    Args:
      path: the file or the directory.
      vocab_size: token ids must be below it; those of a TFDS directory are checked when a document is read.

    Raises:
      UserError: an unreadable or empty file, a row without an answer, ids that the target does not have.
    """
    if (Path(path) / "dataset_info.json").exists():
        # TFDS takes seconds to import, so only who reads such a dataset waits for it.
        from specformer_jax.training.data import tfds_files

        return tfds_files.open_source(path, vocab_size)
    return read_shards(path, vocab_size)
