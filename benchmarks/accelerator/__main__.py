"""What this project is on the GPU or TPU at hand, in minutes: right, tuned, how fast, and what that promises.

    python -m benchmarks.accelerator [--minutes 8] [--only PART] [--out DIR] [--weights DIR]
    python -m benchmarks.accelerator --dry                 on a CPU, kernels simulated, everything tiny
    python -m benchmarks.accelerator pack --weights DIR    cuts the built-in weights into parts that can be carried
    python -m benchmarks.accelerator golden                on a CPU: its tokens, which stand beside a device's

Seven parts, each of use without the next: the device and its ceilings; every kernel against its reference; the same
tokens with drafts and without; the best tile sizes; what a step costs; whole answers; a projection for a larger target.
DIR/report.json has every figure as soon as it is found, so a run that was killed goes on where it was. What does not
fit into the minutes, or into memory, is named. Beside it there are a table, a plot (with matplotlib) and `tiles.json`,
which `pallas_kernels` reads in the place of its own or where SPECFORMER_TILES names it.

It needs no installation: PYTHONPATH=. in a checkout, with jax, flax, numpy, safetensors, tokenizers and jinja2.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks.accelerator import report, weights
from benchmarks.accelerator.bench import LOST, Bench, run_part
from benchmarks.accelerator.findings import Findings
from benchmarks.accelerator.parts import answers, ceilings, forms, lossless, projection, steps, tiles
from benchmarks.accelerator.sizes import DEVICE, DRY
from benchmarks.harness.console import say
from specformer_jax.cli import command_line
from specformer_jax.errors import require

# By part: who measures it, and up to which share of the minutes it may run.
PARTS = {
    "ceilings": (ceilings, 0.1),
    "forms": (forms, 0.25),
    "lossless": (lossless, 0.4),
    "tiles": (tiles, 0.55),
    "steps": (steps, 0.82),
    "answers": (answers, 0.98),
    "projection": (projection, 1.0),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", nargs="?", choices=("run", "pack", "golden"), default="run")
    parser.add_argument("--minutes", type=float, default=8.0, help="what does not fit is left out")
    parser.add_argument("--only", choices=list(PARTS), help="one part alone")
    parser.add_argument("--out", type=Path, default=Path("runs/accelerator"), metavar="DIR")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="the built-in weights in parts")
    parser.add_argument(
        "--part-mb", type=int, default=40, help=f"of `pack`: the most of a part, up to {weights.LARGEST}"
    )
    parser.add_argument("--dry", action="store_true", help="go through all parts on a CPU, with no limit of time")
    parser.add_argument("--here", action="store_true", help="in this process: a kernel that ends it ends the run")
    options = parser.parse_args(arguments)
    if options.verb != "run":
        return command_line.run_command(lambda: {"pack": pack, "golden": golden}[options.verb](options))
    given = sys.argv[1:] if arguments is None else list(arguments)
    return command_line.run_command(lambda: run(options) if options.here else supervise(options, given))


def pack(options: argparse.Namespace) -> None:
    """Writes the parts."""
    for path in weights.pack(options.weights or Path("runs/weights"), options.part_mb):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def golden(options: argparse.Namespace) -> None:
    """Writes what a CPU answers."""
    jax.config.update("jax_platforms", "cpu")
    command_line.keep_compiled_programs()
    load = functools.partial(weights.load_builtin, layers=None)
    lossless.write_golden(Bench(DEVICE, Findings(options.out), None, load))


def supervise(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Runs the parts in a process of their own, and the rest in another one if a kernel ends that."""
    end = time.monotonic() + 60 * options.minutes
    while True:
        left = str(max(end - time.monotonic(), 1) / 60)
        code = wait_for([sys.executable, "-m", "benchmarks.accelerator", *given, "--minutes", left, "--here"])
        if code in (-signal.SIGTERM, -signal.SIGINT) or (code >= 0 and code != LOST):
            return code if code >= 0 else 128 - code
        findings = Findings(options.out)
        if code != LOST and (at := findings.running) is not None:
            findings.add(*at, {"failed": f"it ended the process with code {code}", "ended_the_process": True})
            say(f"{', '.join(at)} ended the process with code {code}: the rest goes on in a new one")
        elif code != LOST:
            return 1  # outside of any unit: it would end there again


def wait_for(command: Sequence[str]) -> int:
    """The exit code of a command, which ends with this process."""
    child = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    return child.wait()


def run(options: argparse.Namespace) -> int:
    """The parts, here; 1 if a unit failed.

    Raises:
      UserError: there is no accelerator, options that do not fit, or what `Findings` and `weights.unpack` raise.
    """
    if options.dry:
        jax.config.update("jax_platforms", "cpu")
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiled sooner, and less well
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # the largest caches need more than JAX would take
    device = jax.devices()[0]
    require(
        (
            options.dry or device.platform != "cpu",
            "there is no GPU or TPU here, or this JAX does not know it: --dry goes through the parts on a CPU",
        ),
        (options.minutes > 0, f"--minutes {options.minutes} must be above 0"),
    )
    findings = Findings(options.out)
    findings.begin(
        {"device": device.device_kind, "jax": jax.__version__, "python": sys.version.split()[0], "dry": options.dry}
    )
    if options.weights is not None:
        weights.unpack(options.weights)
    # Where no network is, pip should not wait for it.
    os.environ |= {"PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "5"} | dict(os.environ)
    command_line.keep_compiled_programs()
    sizes = DRY if options.dry else DEVICE
    load = functools.cache(functools.partial(weights.load_builtin, layers=sizes.layers))
    bench = Bench(sizes, findings, "tpu" if options.dry else None, load)
    begin = time.monotonic()
    for name, (part, share) in PARTS.items():
        if options.only in (None, name):
            whole = 1.0 if options.only else share
            end = float("inf") if options.dry else begin + 60 * options.minutes * whole
            run_part(findings, name, part.units(bench), end)
            report.write(findings)
        if name == "tiles":
            tiles.take_over(findings)
    print(report.markdown(findings))
    return 1 if findings.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
