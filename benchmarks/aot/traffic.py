"""How many bytes a compiled TPU program moves to and from HBM, read off its text.

`cost_analysis()["bytes accessed"]` adds up what every operation reads and writes, on-chip memory included: a weight
that is prefetched into VMEM counts three times, and an activation that never leaves the chip counts too. Here a buffer
counts only where it lies in HBM: a layout with `S(n)` is on-chip.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

_BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "s16": 2, "u16": 2, "pred": 1, "s8": 1, "u8": 1}
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "iota"}


def buffers(shape: str) -> list[tuple[int, bool]]:
    """(bytes, whether in HBM) of each array of a shape as HLO text writes it.

    >>> buffers("(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[2]{0})")
    [(2048, False), (8, True)]
    """
    found = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", shape)
    return [(size_of(dtype, sizes), not re.search(r"S\(\d", layout)) for dtype, sizes, layout in found]


def size_of(dtype: str, sizes: str) -> int:
    """Bytes of an array, its sizes joined by commas.

    >>> size_of("bf16", "4,8")
    64
    """
    return _BYTES.get(dtype, 4) * math.prod(int(n) for n in sizes.split(",") if n)


def hbm_traffic(text: str) -> Counter[str]:
    """Bytes moved by each kind of operation of the entry computation (decode steps have no loops around them).

    Kernels count each buffer once, as for full rows: a paged cache is an operand several times, each another page of
    it. Gathers and scatters count what they pick or replace.
    """
    moved: Counter[str] = Counter()
    for name, operation, text_line, operands, results in _operations(text):
        if operation in ("copy-start", "slice-start"):  # (operand, result, ..): one read, and a write if it goes to HBM
            on_chip = [size for size, in_hbm in results if not in_hbm]
            moved["prefetch"] += max(on_chip) if on_chip else 2 * results[-1][0]
            continue
        read, written = ([size for size, in_hbm in side if in_hbm] for side in (operands, results))
        source = re.search(r'op_name="([^"]*)"', text_line)
        if re.search(r"gather|scatter", f"{name} {source[1] if source else ''}", re.IGNORECASE):
            picked = min([size for size, _ in (*operands, *results) if size > 4096], default=0)
            moved["gather and scatter"] += 2 * picked
        else:
            kind = re.sub(r"[.\d]+$", "", name) if operation == "custom-call" else operation
            moved[kind] += sum(read) + sum(written)
    return moved


def kernel_bytes(text: str) -> int:
    """Bytes of every kernel's operands and results, prefetched ones included: they came from HBM all the same."""
    return sum(
        size
        for *_, line, operands, results in _operations(text)
        if "tpu_custom_call" in line
        for size, _ in (*operands, *results)
    )


def _operations(text: str) -> Iterator[tuple[str, str, str, list[tuple[int, bool]], list[tuple[int, bool]]]]:
    """Name, kind, line, operands and results of what the entry computation does."""
    shapes: dict[str, str] = {}
    buffer_of: dict[str, str] = {}  # whose memory a bitcast shows
    for text_line in text[text.index("\nENTRY") :].splitlines():
        match = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", text_line)
        if not match:
            continue
        name, shape, operation, rest = match.groups()
        shapes[name] = shape
        arguments = [buffer_of.get(o, o) for o in re.findall(r"%([\w.\-]+)", rest.split("), ")[0])]
        if operation == "bitcast":
            buffer_of[name] = arguments[0]
        if operation in _FREE or operation.endswith("-done"):
            continue
        operands = [b for o in dict.fromkeys(arguments) for b in buffers(shapes.get(o, ""))]
        yield name, operation, text_line, operands, buffers(shape)
