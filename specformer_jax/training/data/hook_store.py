"""The target's hooks of every document on disk, read once and trained from for many epochs (`fit --offline DIR`)."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specformer_jax import files
from specformer_jax.errors import UserError
from specformer_jax.training.data.documents import Document

BATCH_TOKENS = 8192


class HookStore:
    """bfloat16 hooks, G * D * 2 bytes a token, memory-mapped: store[number] has those of a document, u16[n, G, D]."""

    def __init__(
        self,
        folder: str | os.PathLike,
        documents: Sequence[Document],
        hook_layers: Sequence[int],
        width: int,
        source: str,
    ):
        """
        Args:
          folder: where the store is kept; made if it is not there.
          documents: the documents whose hooks it holds, in order; a store of other documents is refused.
          hook_layers: which G hidden states HS[i] are stored.
          width: D, the width of the target.
          source: what `source_of` says about the target; a store of another target is refused.

        Raises:
          UserError: the folder cannot be used, the disk is too small, or the folder holds other documents' hooks or
            another target's.
        """
        self._folder, self._documents = Path(folder), documents
        lengths = [len(document.tokens) for document in documents]
        self._offsets = np.concatenate([[0], np.cumsum(lengths)])
        digest = hashlib.sha256()
        for document in documents:
            digest.update(document.tokens.tobytes())
        # Documents of like length are read together, so that little of a batch is padding.
        self._order = np.argsort(lengths, kind="stable")
        self._meta = {
            "documents": digest.hexdigest(),
            "hook_layers": list(hook_layers),
            "width": width,
            "source": source,
            "order": "length",
        }
        shape = (int(self._offsets[-1]), len(hook_layers), width)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._path("json").exists():
                stored = json.loads(self._path("json").read_text())
                if stored["meta"] != self._meta:
                    raise UserError(
                        f"{folder} holds the hooks of other data, other layers or another target: choose another folder"
                    )
                self._done = stored["done"]
            else:
                self._done = 0
                _reserve(self._path("bin"), 2 * math.prod(shape))
            self._hooks = np.memmap(self._path("bin"), np.uint16, "r+", shape=shape)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"hooks cannot be stored in {folder}: {error}") from error

    def __getitem__(self, document: int) -> np.ndarray:
        return self._hooks[self._offsets[document] : self._offsets[document + 1]]

    def fill(self, read: Callable[[np.ndarray], np.ndarray], report: Callable[[str], None] = print) -> None:
        """Reads what is missing, some documents at a time; a killed run goes on where it stopped.

        Args:
          read: reads tokens i32[R, T] with the target, and returns their hooks u16[R, T, G, D].
          report: gets a line after each batch of documents.

        Raises:
          UserError: the disk is full.
        """
        total = len(self._documents)
        while self._done < total:
            # Padded to one of a few lengths, so that few programs are compiled.
            end, longest = self._done, 0
            while end < total:
                wide = max(longest, -(-len(self._documents[self._order[end]].tokens) // 128) * 128)
                if end > self._done and wide * (end + 1 - self._done) > BATCH_TOKENS:
                    break
                longest, end = wide, end + 1
            rows = max(1, BATCH_TOKENS // longest)
            tokens = np.zeros((rows, longest), np.int32)
            batch = self._order[self._done : end]
            for row, i in enumerate(batch):
                tokens[row, : len(self._documents[i].tokens)] = self._documents[i].tokens
            hooks = read(tokens)
            try:
                for row, i in enumerate(batch):
                    self[i][:] = hooks[row, : len(self._documents[i].tokens)]
                self._hooks.flush()
                files.write_whole(self._path("json"), json.dumps({"meta": self._meta, "done": end}))
            except OSError as error:
                raise UserError(f"hooks cannot be stored in {self._folder}: {error}") from error
            self._done = end
            report(f"stored the hooks of {end} of {total} documents")

    def _path(self, ending: str) -> Path:
        return self._folder / f"hooks.{ending}"


def source_of(target_params: Any, dtype: str) -> str:
    """Names what hooks also depend on: the compute dtype, and the target by a digest of one row of each array."""
    rows = jax.jit(lambda params: jax.tree.map(lambda x: x[(0,) * (x.ndim - 1)].astype(jnp.float32), params))
    digest = hashlib.sha256()
    for row in jax.tree.leaves(rows(target_params)):
        digest.update(np.asarray(row).tobytes())
    return f"{dtype} {digest.hexdigest()}"


def _reserve(path: Path, size: int) -> None:
    """A file of so many bytes, all on the disk: writing to a memory-mapped hole of a full one kills the process."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
