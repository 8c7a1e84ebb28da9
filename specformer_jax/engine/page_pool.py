"""Pages of the cache on the host: which are free, which rows hold, and what full ones hold for whoever asks again.

A full page is known by a chain of digests over the tokens before it, its own, and the one after it: the drafter's keys
at a position depend on the token that follows. A page that nobody holds keeps what it has until it is needed.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence

import numpy as np

Digest = bytes


class PagePool:
    """A range of pages of one size; those given back first are taken first."""

    def __init__(self, pages: range, page_size: int):
        """
        Args:
          pages: their numbers in the cache.
          page_size: how many positions each holds.
        """
        self.page_size = page_size
        self._free = collections.OrderedDict.fromkeys(pages)
        self._holders = dict.fromkeys(pages, 0)
        self._by_digest: dict[Digest, int] = {}
        self._digest_of: dict[int, Digest] = {}

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def chain(self, tokens: Sequence[int], begin: int = 0, before: Digest = b"") -> list[Digest]:
        """The digests of the full pages from page `begin` on whose next token is known, too.

        Args:
          tokens: a row's tokens from its first position on.
          begin: how many of its pages have been digested.
          before: the digest of the last of those.
        """
        p, found = self.page_size, []
        ids = np.asarray(tokens, np.int32)
        for page in range(begin, (len(ids) - 1) // p):
            before = hashlib.blake2b(before + ids[page * p : (page + 1) * p + 1].tobytes(), digest_size=16).digest()
            found.append(before)
        return found

    def find(self, chain: Sequence[Digest]) -> list[int]:
        """The pages that hold the beginning of a chain, as far as it is kept."""
        found = []
        for digest in chain:
            if digest not in self._by_digest:
                break
            found.append(self._by_digest[digest])
        return found

    def hold(self, pages: Sequence[int]) -> None:
        """Takes part in pages that `find` found."""
        for page in pages:
            self._holders[page] += 1
            self._free.pop(page, None)

    def take(self, count: int) -> list[int] | None:
        """So many pages for one holder, what they held forgotten; None where there are not so many."""
        if count > len(self._free):
            return None
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
            if page in self._digest_of:
                del self._by_digest[self._digest_of.pop(page)]
        return taken

    def keep(self, page: int, digest: Digest) -> None:
        """Lets a full page be found; the first of several with the same content is the one that is found."""
        if digest not in self._by_digest and page not in self._digest_of:
            self._by_digest[digest], self._digest_of[page] = page, digest

    def forget(self) -> None:
        """Lets no page be found that is full by now; their holders keep them."""
        self._by_digest.clear()
        self._digest_of.clear()

    def give_back(self, pages: Sequence[int]) -> None:
        """Ends one holder's part in pages; of a row's the last are taken first, as others lean on the first."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free[page] = None
                if page not in self._digest_of:
                    self._free.move_to_end(page, last=False)
