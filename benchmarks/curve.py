"""kappa against training tokens: the metrics of a run, or of runs that went on from each other, in a few points each.

    python -m benchmarks.curve --run runs/a runs/b --json benchmarks/results/curve.json
    python -m benchmarks.curve --run runs/c --json benchmarks/results/curve.json --append

Each point is the mean over the steps since the one before it, on the batches trained on, at all their positions: it
starts a pass at every token, where decoding starts more of them at hard ones, and later epochs have seen the text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from specformer_jax.training import metrics


def points(rows: list[dict], count: int = 6) -> list[dict]:
    """The curve of the rows of a metrics.jsonl.

    >>> step = {"tokens": 5.0, "kappa": 1.5, "slot_accuracy": [0.5, 0.25]}
    >>> points([step | {"step": 1}, step | {"step": 2, "kappa": 1.7}], count=1)
    [{'step': 2, 'tokens': 10, 'kappa': 1.6, 'slot_accuracy': [0.5, 0.25]}]
    """
    tokens = np.cumsum([row["tokens"] for row in rows])
    found = []
    for part in np.array_split(np.arange(len(rows)), count):
        share = [rows[i] for i in part]
        found.append(
            {
                "step": share[-1]["step"],
                "tokens": int(tokens[part[-1]]),
                "kappa": round(float(np.mean([row["kappa"] for row in share])), 4),
                "slot_accuracy": np.mean([row["slot_accuracy"] for row in share], axis=0).round(4).tolist(),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, nargs="+", type=Path, help="of `train.py fit`, the earliest first")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--append", action="store_true", help="keep the points of the earlier runs in that file")
    options = parser.parse_args()
    if options.append and options.json is None:
        parser.error("--append needs --json FILE")
    found: list[dict] = json.loads(options.json.read_text())["points"] if options.append else []
    for run in options.run:
        before = found[-1]["tokens"] if found else 0
        for point in points(metrics.read(run / "metrics.jsonl")):
            found.append(point | {"run": run.name, "tokens": before + point["tokens"]})
            print(f"{run.name} step {point['step']:6}  {found[-1]['tokens']:10,} tokens  kappa {point['kappa']:.3f}")
    if options.json:
        options.json.write_text(json.dumps({"points": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
