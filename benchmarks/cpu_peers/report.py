"""The report of the peers as text."""

from __future__ import annotations

from typing import Any


def markdown(found: dict[str, Any]) -> str:
    """Both tables, and the memory."""
    m = found["machine"]
    lines = [
        f"{found['target']}, at most {found['max_new_tokens']} tokens, greedy. {m['device']}, {m['cores']} cores.",
        "",
        "| one at a time | tokens/s | over llama.cpp | over transformers | first token, ms | kappa |",
        "|---|---|---|---|---|---|",
    ]
    for e in found["alone"]:
        over = [f"{e['over'].get(peer, 1):.2f}x" for peer in ("llama.cpp", "transformers")]
        lines.append(
            f"| {e['contestant']} | {e['tokens_per_second']:.0f} | {' | '.join(over)} | {e['first_token_ms']:.0f} |"
            f" {e['kappa']:.2f} |"
        )
    lines += ["", "| at a time | | tokens/s | over llama.cpp | first token, ms |", "|---|---|---|---|---|"]
    for e in found["served"]:
        lines.append(
            f"| {e['concurrency']} | {e['contestant']} | {e['tokens_per_second']:.0f} | {e['over_llama_cpp']:.2f}x |"
            f" {e['first_token_ms']:.0f} |"
        )
    peaks = ", ".join(f"{name} {mb} MB" for name, mb in found["peak_mb"].items())
    return "\n".join(lines) + f"\n\nAt its peak a process that loads the model and answers a prompt holds: {peaks}.\n"
