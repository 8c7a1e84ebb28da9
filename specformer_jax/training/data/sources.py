"""Where answers to train on are read from: the shards of `train.py distill`, a TFDS dataset of them, or a mixture."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from specformer_jax.errors import UserError, require
from specformer_jax.training.data.documents import Document, holds_answers, read_meta, read_shards

MIXTURE = "mixture.json"  # how the name of one ends


def read_documents(path: str | os.PathLike, vocab_size: int | None = None) -> Sequence[Document]:
    """Reads distilled answers: a JSONL file (.gz too), a directory of such shards, a TFDS directory, or a mixture.

    A mixture is a file `mixture.json`, or `NAME-mixture.json`, that says how much of each source is taken:
    `{"answers/": 1, "long/": 0.5}`. Sources are named as seen from it. Which documents a share takes follows from their
    ids; a larger share takes the same ones and more.

    Args:
      path: the file or the directory.
      vocab_size: token ids must be below it; those of a TFDS directory are checked when a document is read.

    Raises:
      UserError: an unreadable or empty file, a row without an answer, ids that the target does not have, or a mixture
        that says something else.
    """
    if _is_mixture(path):
        taken = [d for source, share in _mixed(path) for d in _share_of(read_documents(source, vocab_size), share)]
        require((bool(taken), f"the mixture {path} takes no document: give larger shares"))
        return taken
    if (Path(path) / "dataset_info.json").exists():
        # TFDS takes seconds to import, so only who reads such a dataset waits for it.
        from specformer_jax.training.data import tfds_files

        return tfds_files.open_source(path, vocab_size)
    return read_shards(path, vocab_size)


def are_answers(path: str | os.PathLike) -> bool:
    """Whether these are answers or a mixture of them, and no dialogues."""
    return _is_mixture(path) or holds_answers(path)


def check_tokenizer(path: str | os.PathLike, fingerprint: str) -> None:
    """Raises UserError if the data says that it was made with another tokenizer than the target's."""
    for source, _ in _mixed(path) if _is_mixture(path) else [(path, 1.0)]:
        stored = read_meta(source).get("tokenizer")
        if stored not in (None, fingerprint):
            raise UserError(f"the data in {source} was made with tokenizer {stored}, the target's is {fingerprint}")


def _is_mixture(path: str | os.PathLike) -> bool:
    return os.fspath(path).endswith(MIXTURE)


def _mixed(path: str | os.PathLike) -> list[tuple[Path, float]]:
    """The sources of a mixture, and how much of each is taken."""
    try:
        shares = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the mixture {path} cannot be read: {error}") from error
    fits = isinstance(shares, dict) and all(type(x) in (int, float) and 0 < x <= 1 for x in shares.values())
    require(
        (
            fits and bool(shares) and not any(map(_is_mixture, shares)),
            f'the mixture {path} must be an object of sources and shares within 0 and 1, as {{"answers/": 0.5}}, and no'
            " source a mixture itself",
        )
    )
    return [(Path(path).parent / source, share) for source, share in shares.items()]


def _share_of(found: Sequence[Document], share: float) -> list[Document]:
    return [d for d in found if _place(d.id) < share]


def _place(name: str) -> float:
    """Where a name stands between 0 and 1."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little") / 2**48
