"""What the verbs that ask dialogues share: where these may stand, and how they are written down for the target."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from specformer_jax.batch import row_files
from specformer_jax.batch.conversations import Conversation
from specformer_jax.batch.omissions import Omission
from specformer_jax.errors import require

SOURCE = (
    "dialogues as messages, conversations, turns, prompt or instruction: a file of JSON lines, a JSON array or Parquet,"
    " a folder of such files, a saved dataset, or a Hub id (ID:SPLIT)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--raw` and `--system`."""
    parser.add_argument("--raw", action="store_true", help="continue the prompt as plain text, no chat template")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt of dialogues that have none of their own")


def add_turns_argument(parser: argparse.ArgumentParser) -> None:
    """`--turns`, for `chosen_turns`."""
    parser.add_argument(
        "--turns",
        choices=("first", "all"),
        default="first",
        help="which of the user's turns are asked: the first, or each after the target's own answers to those before",
    )


def check(options: argparse.Namespace) -> None:
    """Refuses flags that do not go together.

    Raises:
      UserError: a system prompt that is empty, no Unicode or beside `--raw`.
    """
    require(
        (options.system is None or bool(options.system.strip()), "--system is empty: give it some text"),
        (
            not (options.raw and options.system),
            "--raw continues plain text, which has no place for a system prompt: leave --system out",
        ),
    )
    row_files.check_unicode("--system", options.system or "")


def chosen_turns(conversations: Sequence[Conversation], turns: str) -> tuple[list[Conversation], list[Omission]]:
    """The conversations with the turns that `--turns` asks for, and what is left out of them."""
    if turns == "all":
        return list(conversations), []
    longer = [c for c in conversations if len(c.turns) > 1]
    left_out = [Omission(c.id, "turn", len(c.turns) - 1, "not the first (--turns all asks them)") for c in longer]
    return [c.first(1) for c in conversations], left_out
