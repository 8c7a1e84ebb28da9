"""Whether the decode step compiles for GPUs and fits, from the real compiler and without a GPU (extra gpu-aot).

    JAX_PLATFORMS=cpu python -m benchmarks.gpu_aot

Qwen3-8B in bfloat16 with the head, k = 4, on one H100 and tensor-parallel on eight, register spilling refused. It
proves that the program is valid and fits; nothing is tuned or timed without a device. What a step takes at least is the
time to read weights and cache once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

from benchmarks.aot.gpu_targets import GPUS, REFUSE_SPILLS, gpu_devices
from benchmarks.aot.step import QWEN3_8B, compile_step
from specformer_jax.planning.chips import CHIPS

KERNELS = ("mixed_mask_attention", "sample_hidden", "grouped_rms_norm_downsample")


def main() -> None:
    """Compiles the step for every GPU and device count and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", default=["H100"], choices=list(GPUS))
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--positions", type=int, default=2048, help="positions a row")
    parser.add_argument("--layers", type=int, default=QWEN3_8B.layers, help="fewer compile sooner")
    parser.add_argument("--json", type=Path, help="also write the reports there")
    args = parser.parse_args()
    records = []
    config = dataclasses.replace(QWEN3_8B, layers=args.layers)
    for gpu in args.gpus:
        chip = CHIPS[gpu]
        for count in args.devices:
            compiled, report = compile_step(
                gpu_devices(gpu, count), platform="cuda", rows=args.rows, k=args.k,
                positions=args.positions, config=config, options=REFUSE_SPILLS,
            )  # fmt: skip
            found = Counter(re.findall("|".join(KERNELS), compiled.as_text()))
            missing = [name for name in KERNELS if not found[name]]
            if missing:
                raise SystemExit(f"{gpu} x {count}: {missing} are not in the compiled program")
            in_place = "in place" if report.aliased >= report.donated else "COPIED"
            print(
                f"{gpu} x {count}: {args.rows} rows, k = {args.k}, {args.positions} positions: "
                f"{report.hbm / 2**30:.1f} of {chip.memory} GiB a device, "
                f"{report.temporaries / 2**30:.2f} of it temporary, "
                f"cache {in_place}, weights gathered: {report.gathered_weights or 'none'}, "
                f"{report.ideal_bytes / chip.bandwidth * 1e3:.1f} ms at least",
                flush=True,
            )
            sizes = dict(
                gpu=gpu, devices=count, rows=args.rows, k=args.k, positions=args.positions, layers=args.layers,
                hbm=report.hbm,
                temporaries=report.temporaries, aliased=report.aliased, cache=report.donated,
                collectives=report.collectives, gathered_weights=report.gathered_weights, logits=report.logits,
            )  # fmt: skip
            records.append(sizes | {"kernels": dict(found)})
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
