"""The target's hooks of every document on disk, read once and trained from for many epochs (`fit --offline DIR`)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from specformer_jax.config import UserError
from specformer_jax.data import Document

BATCH_TOKENS = 8192


class HookStore:
    """bfloat16 hooks, G * D * 2 bytes a token, memory-mapped: store[document] is u16[n, G, D]."""

    def __init__(self, folder: str | os.PathLike, documents: Sequence[Document], hooks: int, width: int):
        """
        Args:
          folder: of the store; made if it is not there.
          documents: what it holds, in order; a store of other documents is refused.
          hooks: G.
          width: D.

        Raises:
          UserError: the folder cannot be used, or holds other documents' hooks.
        """
        self._folder, self._documents = Path(folder), documents
        lengths = [len(document.tokens) for document in documents]
        self._offsets = np.concatenate([[0], np.cumsum(lengths)])
        digest = hashlib.sha256()
        for document in documents:
            digest.update(document.tokens.tobytes())
        # Documents of like length are read together, so that little of a batch is padding.
        self._order = np.argsort(lengths, kind="stable")
        self._meta = {"documents": digest.hexdigest(), "hooks": hooks, "width": width, "order": "length"}
        shape = (int(self._offsets[-1]), hooks, width)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._path("json").exists():
                stored = json.loads(self._path("json").read_text())
                if stored["meta"] != self._meta:
                    raise UserError(f"{folder} holds the hooks of other data or another head: choose another folder")
                self._done = stored["done"]
                self._hooks = np.memmap(self._path("bin"), np.uint16, "r+", shape=shape)
            else:
                self._done = 0
                self._hooks = np.memmap(self._path("bin"), np.uint16, "w+", shape=shape)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"hooks cannot be stored in {folder}: {error}") from error

    def __getitem__(self, document: int) -> np.ndarray:
        return self._hooks[self._offsets[document] : self._offsets[document + 1]]

    def fill(self, read: Callable[[np.ndarray], np.ndarray], report: Callable[[str], None] = print) -> None:
        """Reads what is missing, some documents at a time; a killed run goes on where it stopped.

        Args:
          read: tokens i32[R, T] -> hooks u16[R, T, G, D].
          report: gets a line now and then.

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
                half = self._path("json.part")
                half.write_text(json.dumps({"meta": self._meta, "done": end}))
                half.replace(self._path("json"))
            except OSError as error:
                raise UserError(f"hooks cannot be stored in {self._folder}: {error}") from error
            self._done = end
            report(f"stored the hooks of {end} of {total} documents")

    def _path(self, ending: str) -> Path:
        return self._folder / f"hooks.{ending}"
