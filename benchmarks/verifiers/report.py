"""The table of `benchmarks.verifiers`."""

from __future__ import annotations

from typing import Any


def markdown(found: dict[str, Any]) -> str:
    """The table."""
    parts = [
        f"{found['target']}, {found['dtype']}, the head alone, chains of k = {found['draft_length']}, "
        f"{found['prompts']} prompts, at most {found['max_new_tokens']} new tokens each:",
        "",
        "| temperature | verification | keeps | tokens read a row and pass | kappa | accepted by position | passes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for e in found["verifiers"]:
        shares = " ".join(f"{share:.0%}" for share in e["acceptance"])
        parts.append(
            f"| {e['temperature']} | {e['verification']} | {e['keeps']} | {e['reads']} | {e['kappa']:.2f} | {shares} "
            f"| {e['passes']} |"
        )
    return "\n".join(parts) + "\n"
