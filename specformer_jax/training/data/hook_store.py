"""The target's hooks of every document on disk, read once and trained from for many epochs (`fit --offline DIR`).

`hooks.bin` holds them, `hooks.digests` a digest of each document's, and `hooks.json` says whose they are and how many
documents are done.
"""

from __future__ import annotations

import contextlib
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
    """bfloat16 hooks, G * D * 2 bytes a token, memory-mapped: store[number] has those of a document, u16[n, G, D].

    Reading a document whose hooks are not what was stored raises UserError. A store that is full is only read, so it
    may lie where nobody can write.
    """

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
          UserError: the folder cannot be used, the disk is too small, or the folder holds other documents' hooks,
            another target's or files that are damaged.
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
        sizes = {"bin": 2 * math.prod(shape), "digests": 8 * len(documents)}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._path("json").exists():
                self._done = self._stored()
                for ending, size in sizes.items():
                    _check_size(self._path(ending), size)
            else:
                self._done = 0
                for ending, size in sizes.items():
                    _reserve(self._path(ending), size)
            mode: Any = "r" if self._done == len(documents) else "r+"
            self._hooks = np.memmap(self._path("bin"), np.uint16, mode, shape=shape)
            self._digests = np.memmap(self._path("digests"), np.uint64, mode, shape=(len(documents),))
        except (OSError, ValueError) as error:
            raise UserError(f"hooks cannot be stored in {folder}: {error}") from error
        self._verified = np.zeros(len(documents), bool)

    def __getitem__(self, document: int) -> np.ndarray:
        hooks = self._of(document)
        if not self._verified[document]:
            if _digest(hooks) != self._digests[document]:
                raise UserError(f"{self._path('bin')} is damaged, in document {document}: remove {self._folder}")
            self._verified[document] = True
        return hooks

    def fill(self, read: Callable[[np.ndarray], np.ndarray], report: Callable[[str], None] = print) -> None:
        """Reads what is missing, some documents at a time; a killed run goes on where it stopped.

        Args:
          read: reads tokens i32[R, T] with the target, and returns their hooks u16[R, T, G, D].
          report: gets a line after each batch of documents.

        Raises:
          UserError: the disk is full, or the target's hooks are not finite.
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
                    of_document = hooks[row, : len(self._documents[i].tokens)]
                    _check_finite(of_document, f"the document {self._documents[i].id!r}")
                    self._of(i)[:] = of_document
                    self._digests[i] = _digest(of_document)
                self._hooks.flush()
                self._digests.flush()
                files.write_whole(self._path("json"), json.dumps(files.seal({"meta": self._meta, "done": end})))
            except OSError as error:
                raise UserError(f"hooks cannot be stored in {self._folder}: {error}") from error
            self._done = end
            report(f"stored the hooks of {end} of {total} documents")

    def _of(self, document: int) -> np.ndarray:
        return self._hooks[self._offsets[document] : self._offsets[document + 1]]

    def _stored(self) -> int:
        """How many documents are done, as hooks.json says."""
        stored = files.read_sealed(self._path("json"))
        if stored.get("meta") != self._meta:
            raise UserError(
                f"{self._folder} holds the hooks of other data, other layers or another target: choose another folder"
            )
        done = stored.get("done")
        if type(done) is not int or not 0 <= done <= len(self._documents):
            raise UserError(f"{self._path('json')} says that {done!r} documents are done: remove {self._folder}")
        return done

    def _path(self, ending: str) -> Path:
        return self._folder / f"hooks.{ending}"


def source_of(target_params: Any, dtype: str) -> str:
    """Names what hooks also depend on: the compute dtype, and the target by a digest of one row of each array."""
    rows = jax.jit(lambda params: jax.tree.map(lambda x: x[(0,) * (x.ndim - 1)].astype(jnp.float32), params))
    digest = hashlib.sha256()
    for row in jax.tree.leaves(rows(target_params)):
        digest.update(np.asarray(row).tobytes())
    return f"{dtype} {digest.hexdigest()}"


def _digest(hooks: np.ndarray) -> np.uint64:
    return np.frombuffer(hashlib.sha256(np.ascontiguousarray(hooks).data).digest(), np.uint64)[0]


def all_finite(hooks: np.ndarray) -> bool:
    """Whether bits of bfloat16 numbers are those of finite ones; infinities and NaN have the largest exponent."""
    return not (hooks & 0x7F80 == 0x7F80).any()


def _check_finite(hooks: np.ndarray, where: str) -> None:
    if not all_finite(hooks):
        raise UserError(f"the target's hidden states of {where} are not finite: its weights are damaged, or overflow")


def _check_size(path: Path, size: int) -> None:
    """A memory map would make the file longer, with zeros."""
    found = path.stat().st_size if path.exists() else 0
    if found != size:
        raise UserError(f"{path} has {found} bytes and not {size}: it is damaged, remove {path.parent}")


def _reserve(path: Path, size: int) -> None:
    """A file of so many bytes, all on the disk: writing to a memory-mapped hole of a full one kills the process."""
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise
