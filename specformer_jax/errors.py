"""The mistakes a user can mend, and how they are found."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend; the command line prints its one sentence and exits with code 2."""


def require(*checks: tuple[bool, str]) -> None:
    """Raises `UserError` with the sentence of the first check that does not hold.

    >>> require((1 + 1 == 2, "arithmetic is broken: repair it"))
    """
    for holds, sentence in checks:
        if not holds:
            raise UserError(sentence)
