"""The mistakes a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend; the command line prints its one sentence and exits with code 2."""
