"""Which row a prompt is read in, and how much of it is reused; states are names here."""

import numpy as np
import pytest
from specformer_jax.engine.prefix_cache import WORTH_A_COPY, PrefixCache

from specformer_jax.engine.compiled_steps import CompiledSteps


class Names:
    """Compiled steps without a device."""

    chunks = (16, 64)
    padded = CompiledSteps.padded

    def __init__(self):
        self.made, self.copied = 0, []

    def empty(self, rows):
        self.made += 1
        return f"row {self.made}"

    def copy(self, state):
        self.copied.append(state)
        return f"copy of {state}"


def read(prefixes, prompt):
    """A prompt read to its end and put into a row."""
    row, reused = prefixes.take(prompt)
    assert len(row.tokens) == (reused + 1 if reused else 0)
    row.tokens, row.busy = np.asarray(prompt, np.int32), False
    return row, reused


LONG = list(range(100, 300))


def test_the_last_shared_token_is_read_again():
    prefixes = PrefixCache(Names(), 2)
    first, reused = read(prefixes, LONG)
    assert reused == 0
    again, reused = read(prefixes, LONG)
    assert again is first and reused == len(LONG) - 1
    longer, reused = read(prefixes, [*LONG, 1, 2, 3])
    assert longer is first and reused == len(LONG) - 1


def test_a_shared_beginning_is_copied_and_the_original_kept():
    names = Names()
    prefixes = PrefixCache(names, 2)
    first, _ = read(prefixes, LONG)
    second, reused = read(prefixes, [*LONG[:150], 7])
    assert second is not first and reused == 149 and names.copied == ["row 1"]
    assert second.state == "copy of row 1" and first.tokens.tolist() == LONG


def test_a_copy_must_save_reading():
    names = Names()
    prefixes = PrefixCache(names, 2)
    read(prefixes, LONG)
    # 63 tokens are read as 64; 24 of them shared leaves 40, which are read as 64 too.
    assert names.padded(63) - names.padded(40) < WORTH_A_COPY
    assert read(prefixes, [*LONG[:24], *range(39)])[1] == 0 and not names.copied


def test_the_row_used_longest_ago_is_taken_and_busy_ones_never():
    prefixes = PrefixCache(Names(), 2)
    a, _ = read(prefixes, [1] * 80)
    b, _ = read(prefixes, [2] * 80)
    read(prefixes, [1] * 80)
    taken, _ = prefixes.take([3] * 80)
    assert taken is b
    assert prefixes.take([4] * 80)[0] is a
    with pytest.raises(RuntimeError, match="every row for prompts is busy"):
        prefixes.take([5] * 80)


@pytest.mark.parametrize("count, padded", [(1, 16), (16, 16), (17, 64), (64, 64), (65, 80), (127, 128), (128, 144)])
def test_padding(count, padded):
    assert Names().padded(count) == padded
