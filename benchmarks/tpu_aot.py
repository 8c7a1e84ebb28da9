"""What a decode step costs on TPUs, from the real compiler and without a TPU (extra tpu-aot).

    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python -m benchmarks.tpu_aot
    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python -m benchmarks.tpu_aot --topologies v5e:2x4 --rows 64 --k 0 4

Qwen3-8B in bfloat16 with the head, tensor-parallel over eight chips, one line a program; then the head's training
step. Estimates, not measurements. A draft budget should keep k <= rho / rows (paper eq. 1).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from jax.experimental import topologies

from benchmarks.aot.step import TARGETS, CompiledReport, compile_step
from benchmarks.aot.training import compile_training
from specformer_jax.planning.chips import CHIPS, Chip

# Without it libtpu 0.0.52 cannot say what it compiled where a SparseCore scatters.
READABLE = {"xla_tpu_enable_offloading_scatter_to_sparsecore": False}


def estimated_seconds(report: CompiledReport, chip: Chip) -> float:
    """The compiler's cycles, and for our kernels, which have none, their bytes at HBM speed; collectives left out."""
    return report.cycles / chip.clock + report.kernel_bytes / chip.bandwidth


def line(name: str, rows: int, k: int, report: CompiledReport) -> str:
    """One program as a row of a Markdown table."""
    chip = CHIPS[name.split(":")[0]]
    collectives = ", ".join(f"{n} {c} x ({b / 1e6:.1f} MB)" for n, (c, b) in sorted(report.collectives.items()))
    traffic = sum(report.traffic.values())
    cells = [
        name,
        str(rows),
        str(k),
        f"{chip.rho / rows:.1f}",
        f"{report.flops / 1e9:.0f}",
        f"{report.bytes_accessed / 1e9:.2f}",
        f"{report.ideal_bytes / 1e9:.2f}",
        f"{traffic / 1e9:.2f}",
        f"{traffic / report.ideal_bytes:.2f}",
        f"{traffic / chip.bandwidth * 1e3:.2f}",
        f"{chip.least_seconds(report.flops, report.ideal_bytes) * 1e3:.2f}",
        f"{report.cycles / 1e6:.2f}",
        f"{estimated_seconds(report, chip) * 1e3:.2f}",
        f"{report.hbm / 2**30:.2f} of {chip.memory} ({chip.memory - report.hbm / 2**30:.2f} free)",
        f"{report.temporaries / 1e6:.1f}",
        "yes" if report.aliased >= report.donated else "NO",
        collectives or "none",
        ", ".join(report.gathered_weights) or "none",
    ]
    return "| " + " | ".join(cells) + " |"


COLUMNS = (
    "chips", "rows", "k", "rho / rows", "GFLOP", "GB accessed", "GB ideal", "GB of HBM traffic", "ratio to ideal",
    "ms at HBM speed", "ms at least", "Mcycles without kernels", "ms estimated", "HBM GiB", "temporaries MB",
    "cache in place", "collectives", "weights gathered",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def training_line(name: str, shape: tuple[int, int, int], report: CompiledReport) -> str:
    """The training step in one line."""
    hbm = CHIPS[name.split(":")[0]].memory
    collectives = ", ".join(f"{n} {c} x ({b / 1e6:.0f} MB)" for n, (c, b) in sorted(report.collectives.items()))
    return (
        f"{name}, data x fsdp x model {shape}: {report.flops / 1e9:.0f} GFLOP (loops once), "
        f"{report.cycles / 1e6:.1f} Mcycles without kernels, HBM {report.hbm / 2**30:.2f} of {hbm} GiB "
        f"({hbm - report.hbm / 2**30:.2f} free), state {'in place' if report.aliased >= report.donated else 'COPIED'}, "
        f"{collectives}; {', '.join(f'{n} {kernel}' for kernel, n in sorted(report.kernels.items()))}"
    )


def main() -> None:
    """Compiles every combination and prints a table; with --json also a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", nargs="*", default=["v5e:2x4", "v6e:2x4"], help="of the decode step")
    parser.add_argument("--target", default="qwen3-8b", choices=list(TARGETS))
    parser.add_argument("--rows", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--k", nargs="+", type=int, default=[0, 4])
    parser.add_argument("--positions", type=int, default=2048, help="positions a row")
    parser.add_argument("--truncation", action="store_true", help="with top-k, top-p and min-p, as a server's step")
    parser.add_argument("--layers", type=int, help="fewer compile sooner")
    parser.add_argument("--training", nargs="*", default=["v5e:4x4"], help="topologies of the head's training step")
    parser.add_argument("--mesh", default="1,4,4", help="data, fsdp and model of the training step")
    parser.add_argument("--json", type=Path, help="also write the reports there")
    args = parser.parse_args()
    config = TARGETS[args.target]
    config = dataclasses.replace(config, layers=args.layers or config.layers)
    records = []
    print(HEADER, flush=True)
    for name in args.topologies:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        for rows in args.rows:
            for k in args.k:
                shape = dict(rows=rows, k=k, positions=args.positions, truncation=args.truncation)
                _, report = compile_step(devices, platform="tpu", config=config, options=READABLE, **shape)
                print(line(name, rows, k, report), flush=True)
                moved = sorted(report.traffic.items(), key=lambda item: -item[1])[:6]
                print("  by " + ", ".join(f"{kind} {size / 1e6:.0f} MB" for kind, size in moved), flush=True)
                records.append(dict(topology=name, rows=rows, k=k, layers=config.layers, **dataclasses.asdict(report)))
    for name in args.training:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        shape = tuple(int(n) for n in args.mesh.split(","))
        _, report = compile_training(devices, shape, config)
        print(training_line(name, shape, report), flush=True)
        records.append(dict(topology=name, mesh=shape, layers=config.layers, **dataclasses.asdict(report)))
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
