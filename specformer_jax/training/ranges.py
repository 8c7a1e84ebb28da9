"""Checks of a configuration's values for `errors.require`: whether each holds, and the sentence with its range."""

from __future__ import annotations

from typing import Any

LARGEST = 2**31 - 1


def count(name: str, value: Any, least: int = 1, most: int = LARGEST) -> tuple[bool, str]:
    """A whole number.

    >>> count("rows", 0)
    (False, 'rows 0 must be a whole number from 1 to 2147483647')
    """
    holds = type(value) is int and least <= value <= most  # isinstance would let True pass
    return holds, f"{name} {value!r} must be a whole number from {least} to {most}"


def number(name: str, value: Any, least: float, most: float) -> tuple[bool, str]:
    """A finite number.

    >>> number("rate", float("nan"), 0, 1)
    (False, 'rate nan must be a number from 0 to 1')
    """
    holds = type(value) in (int, float) and least <= value <= most
    return holds, f"{name} {value!r} must be a number from {least} to {most}"


def one_of(name: str, value: Any, *choices: Any) -> tuple[bool, str]:
    """One of a few values.

    >>> one_of("schedule", "step", "cosine", "linear")
    (False, "schedule 'step' must be one of cosine, linear")
    """
    holds = any(type(value) is type(choice) and value == choice for choice in choices)
    return holds, f"{name} {value!r} must be one of {', '.join(map(str, choices))}"


def mesh(name: str, value: Any) -> tuple[bool, str]:
    """Numbers of devices along (data, fsdp, model)."""
    holds = isinstance(value, tuple) and len(value) == 3 and all(count(name, size)[0] for size in value)
    return holds, f"{name} {value!r} must be three numbers of devices: data, fsdp, model"
