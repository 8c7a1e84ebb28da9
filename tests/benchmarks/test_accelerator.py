"""The program for the day there is an accelerator: its bookkeeping by hand, and all of it as a dry run."""

import doctest
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import quant_shape_to_byte_shape, quantize

from benchmarks.accelerator import __main__ as accelerator
from benchmarks.accelerator import bare, bench, report, weights
from benchmarks.accelerator.bench import LOST, Unit, run_part
from benchmarks.accelerator.findings import Findings
from benchmarks.accelerator.parts.projection import MeasuredSteps
from specformer_jax.errors import UserError
from specformer_jax.loading import fetch

ROOT = Path(__file__).parents[2]
HERE = {"device": "a chip", "jax": "0", "python": "3", "dry": False}
# What an image with JAX need not have, and a plot that is left out where matplotlib is not.
MISSING = ("gguf", "jaxtyping", "optax", "orbax", "tensorflow_datasets", "grain", "beartype", "matplotlib", "fastapi")
IN_A_BARE_IMAGE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {missing} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
from benchmarks.accelerator.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def findings(tmp_path):
    made = Findings(tmp_path / "out")
    made.begin(HERE)
    return made


def unit(name, seconds=1.0, found=None):
    def measure():
        if isinstance(found, Exception):
            raise found
        return {"n": found}

    return Unit(name, seconds, measure)


def test_what_stands_in_for_gguf_reads_what_gguf_writes():
    rows = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    for kind in bare.TensorType:
        theirs = gguf.GGMLQuantizationType(kind)
        assert theirs.name == kind.name
        if kind.name.startswith("Q"):
            data = quantize(rows, theirs)
            assert np.array_equal(gguf.dequantize(data, theirs), bare.dequantize(data, kind))
            assert quant_shape_to_byte_shape(rows.shape, theirs) == bare.byte_shape(rows.shape, kind) == data.shape
    assert {kind.name: kind.value for kind in gguf.GGUFValueType} == {kind.name: kind.value for kind in bare.ValueType}


def test_units_run_while_there_is_time_and_what_fails_is_a_line(findings):
    later = time.monotonic() + 50
    full = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore")
    run_part(findings, "steps", iter([unit("a", found=1), unit("b", found=full), unit("long", 60)]), later)
    assert findings.of("steps")["a"]["n"] == 1
    [failed] = findings.failures()
    assert failed.startswith("steps, b: out of memory: RESOURCE_EXHAUSTED") and "more" not in failed

    # The first two took no time at all, so the guess for the third is far too high: it runs.
    assert "long" in findings.of("steps") and not findings.left_out()
    run_part(findings, "forms", iter([unit("large", 60)]), later)
    [line] = findings.left_out()
    assert line.startswith("forms, large: it takes about 60 s, of which ")
    # Another run of the same goes on: what has figures stays, what failed or was left out is tried again.
    again = Findings(findings.folder)
    again.begin(HERE)
    run_part(again, "steps", iter([unit("a", found=2), unit("b", found=3)]), later)
    run_part(again, "forms", iter([unit("large", 60, found=4)]), later + 100)
    assert again.of("steps")["a"]["n"] == 1 and again.of("steps")["b"]["n"] == 3
    assert again.of("forms")["large"]["n"] == 4 and not again.left_out() and not again.failures()


def test_a_part_that_cannot_begin_is_a_line_too(findings):
    def none():
        raise UserError("the weights are not here")
        yield

    run_part(findings, "lossless", none(), time.monotonic() + 9)
    assert findings.failures() == ["lossless, beginning: the weights are not here"]


def test_a_report_of_something_else_is_refused(findings):
    with pytest.raises(UserError, match=r"report.json is of another device \(a chip, here another\): name another fol"):
        Findings(findings.folder).begin(HERE | {"device": "another"})
    findings.file.write_text('{"a": 1}')
    with pytest.raises(UserError, match="is no report of this command"):
        Findings(findings.folder)


def test_a_unit_that_ends_the_process_is_left_alone(findings, monkeypatch, capsys):
    codes = iter([-signal.SIGSEGV, LOST, 0])

    def child(command):
        assert command[3:6] == ["--out", str(findings.folder), "--minutes"] and command[-1] == "--here"
        code = next(codes)
        if code < 0:
            Findings(findings.folder).start("forms", "attention, float32")
        return code

    monkeypatch.setattr(accelerator, "wait_for", child)
    assert accelerator.main(["--out", str(findings.folder)]) == 0
    after = Findings(findings.folder)
    assert after.failures() == ["forms, attention, float32: it ended the process with code -11"]
    run_part(after, "forms", iter([unit("attention, float32")]), time.monotonic() + 9)
    assert after.failures(), "it was tried again"
    assert "ended the process with code -11: the rest goes on" in capsys.readouterr().err


def test_without_an_accelerator_it_says_so(tmp_path, capsys):
    assert accelerator.main(["--here", "--out", str(tmp_path)]) == 2
    assert "there is no GPU or TPU here" in capsys.readouterr().err


def test_weights_travel_in_parts(tmp_path, monkeypatch, capsys):
    content = np.random.default_rng(0).bytes(3_500_000)
    source, there = tmp_path / "source.gguf", tmp_path / "cache" / "model.gguf"
    source.write_bytes(content)
    parts = tmp_path / "parts"
    monkeypatch.setattr(fetch, "builtin_gguf", lambda: source)
    assert accelerator.main(["pack", "--weights", str(parts), "--part-mb", "1"]) == 0
    assert sorted(path.name for path in parts.iterdir()) == [f"part-{i}-of-4" for i in (1, 2, 3, 4)]
    assert all(path.stat().st_size <= 10**6 for path in parts.iterdir())
    assert accelerator.main(["pack", "--weights", str(parts), "--part-mb", "56"]) == 2
    assert "must be within 1 and 55 MB" in capsys.readouterr().err

    monkeypatch.setattr(fetch, "builtin_path", lambda: there)
    lost = (parts / "part-3-of-4").rename(tmp_path / "lost")
    with pytest.raises(UserError, match="lacks part-3-of-4: copy them there, too"):
        weights.unpack(parts)
    lost.rename(parts / "part-3-of-4")

    def damaged():
        raise UserError("damaged")

    monkeypatch.setattr(fetch, "builtin_gguf", damaged)
    with pytest.raises(UserError, match="are not those of these weights"):
        weights.unpack(parts)
    assert not there.exists()
    monkeypatch.setattr(fetch, "builtin_gguf", lambda: there)
    weights.unpack(parts)
    assert there.read_bytes() == content
    with pytest.raises(UserError, match="holds no part-1-of-N"):
        there.unlink()
        weights.unpack(tmp_path / "cache")


def test_measured_steps_stand_for_those_between_them():
    step = lambda tokens, plain, context, us: dict(tokens_a_row=tokens, plain=plain, context=context, microseconds=us)
    steps = [step(1, True, 100, 10.0), step(1, True, 200, 20.0), step(1, False, 100, 99.0)]
    steps += [step(tokens, False, context, tokens * 10.0 + context) for tokens in (2, 5) for context in (100, 200)]
    cost = MeasuredSteps(steps)
    assert cost.contexts() == [100, 200]
    us = lambda *arguments: pytest.approx(cost.seconds(*arguments) * 1e6)
    assert us(8, 8, 8 * 100, False) == 10 and us(8, 8, 8 * 150, False) == 15 and us(8, 8, 8 * 300, False) == 30
    assert us(16, 8, 8 * 100, True) == 120 and us(28, 8, 8 * 200, True) == 235
    assert us(9, 8, 8 * 100, True) == 120, "one token more than the rows costs what two a row cost"


def test_a_report_without_a_roofline(findings):
    line = dict(tokens_a_row=1, plain=True, context=512, microseconds=1000.0, gbytes_per_second=2.0, tflops=3.0)
    drafts = line | dict(tokens_a_row=5, plain=False, microseconds=1500.0, over_roofline=1.2)
    figures = {"steps": [line, drafts], "contexts_left_out": {"2048": "it takes 9 of 8 GiB"}, "failed_steps": []}
    findings.add("steps", "qwen3-8b, batch 64", figures)
    findings.leave_out("answers", "batch 256", "no time")
    report.write(findings)
    text = (findings.folder / "report.md").read_text()
    assert "| qwen3-8b, batch 64 | 512 | 5 | 1.500 | 1.50x | 2.0 | 3.0 | 1.2 |" in text
    assert "| qwen3-8b, batch 64 | 2048 | it takes 9 of 8 GiB |" in text and "- answers, batch 256: no time" in text


@pytest.mark.parametrize("module", [bench, report])
def test_the_examples_of_the_accelerators_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


def bare_run(*arguments, wait=True):
    """The command where the packages above are not installed."""
    program = IN_A_BARE_IMAGE.replace("{missing}", repr(MISSING))
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    if not wait:
        return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_all_parts_on_a_cpu_in_a_bare_image(tmp_path, builtin_path):
    run = bare_run("--dry", "--here", "--out", tmp_path)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    found = json.loads((tmp_path / "report.json").read_text())
    assert list(found["parts"]) == list(accelerator.PARTS) and not found["left_out"] and found["running"] is None
    forms = [form for unit in found["parts"]["forms"].values() for form in unit["forms"].values()]
    assert len(forms) == 11 and all(form["within"] for form in forms)
    assert all(unit["tokens that differ"] == 0 for unit in found["parts"]["lossless"].values())
    assert {e["contestant"] for e in found["parts"]["answers"]["batch 1"]["contestants"]} == {"plain", "k = 3", "auto"}
    assert json.loads((tmp_path / "tiles.json").read_text()) is not None
    assert "## Projection, no measurement" in run.stdout
    assert not (tmp_path / "report.svg").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    run = bare_run("--dry", "--here", "--only", "ceilings", "--out", tmp_path, wait=False)
    for line in run.stderr:
        if "ceilings, copy" in line:
            break
    run.kill()
    run.communicate()
    first = json.loads((tmp_path / "report.json").read_text())
    assert "copy" in first["parts"]["ceilings"] and "rho" not in first["parts"]["ceilings"]
    again = bare_run("--dry", "--here", "--only", "ceilings", "--out", tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    second = json.loads((tmp_path / "report.json").read_text())["parts"]["ceilings"]
    assert second["copy"] == first["parts"]["ceilings"]["copy"] and "rho" in second
