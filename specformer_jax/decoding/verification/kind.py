"""The ways to verify drafts by name, and what each of them promises."""

from __future__ import annotations

import dataclasses

from specformer_jax.errors import UserError, require

EXACT, BLOCK, FLY = "exact", "block-distribution", "fly-lossy"
NAMES = (EXACT, BLOCK, FLY)
PROMISES = {
    EXACT: "the same tokens as without drafts",
    BLOCK: "lossless in distribution: answers are drawn from what plain decoding draws from, but are other answers than"
    " its, and depend on the drafts",
    FLY: "LOSSY: where the target is unsure drafts pass that it would not have said, so answers may be worse than its",
}


@dataclasses.dataclass(frozen=True)
class Verification:
    """How drafts are verified; static.

    Attributes:
      name: one of `NAMES`. "exact" is seed-exact; one that says "distribution" keeps the distribution of answers, not
        the answers themselves; one that says "lossy" keeps neither.
      fly_window: how many right drafts must follow a wrong one for it to pass ("fly-lossy"; the paper's 6, or all that
        follow the first of a shorter chain).
      fly_entropy: the entropy, in nats over the three likeliest tokens, that the target must have there (the paper's).
    """

    name: str = EXACT
    fly_window: int = 6
    fly_entropy: float = 0.3

    def __post_init__(self):
        require(
            (self.name in NAMES, f"unknown verification {self.name!r}: it must be one of {', '.join(NAMES)}"),
            (self.fly_window >= 1, f"fly-window {self.fly_window} must be at least 1"),
            (self.fly_entropy >= 0, f"fly-entropy {self.fly_entropy} must be 0 or more"),
        )

    @property
    def draws(self) -> bool:
        """Whether drafts are drawn from the drafter's distribution, which verification then asks for."""
        return self.name == BLOCK

    @property
    def promise(self) -> str:
        """What it promises of the answers."""
        return PROMISES[self.name]

    def require_exact(self, where: str) -> None:
        """Raises UserError where nothing but seed-exact verification is served."""
        if self.name != EXACT:
            raise UserError(f"{where} has no verification but the exact one: leave {self.name} out")
