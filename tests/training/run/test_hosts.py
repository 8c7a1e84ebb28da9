"""Two processes on this machine: one that is killed or has bad data ends the other, which says so."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .. import tiny

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
SMALL = ("anchors=48", "sequence_length=64", "steps=40", "checkpoint_every=4", "draft.draft_vocab_size=8")
SMALL += ("draft.ffn=16", "mesh=2,1,1", "dtype=float32", "log_every=1", "batch_rows=2", "optimizer=adamw")
BOUND = 30  # seconds


@pytest.fixture
def start(tiny_target, tmp_path):
    """Begins one of two processes of a fit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    data = tmp_path / "data.jsonl"
    rows = [{"id": d.id, "prompt_ids": d.tokens[:5].tolist(), "response_ids": d.tokens[5:].tolist()} for d in DOCUMENTS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [word for setting in (*SMALL, f"target={tiny_target}") for word in ("--set", setting)]

    def begin(index: int, data: Path = data, port: int = 0):
        where = f"{address.rpartition(':')[0]}:{int(address.rpartition(':')[2]) + port},2,{index}"
        command = ["train.py", "fit", "--config", "configs/tiny.py", "--data", data, "--run", tmp_path / "run"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
        environment |= {"PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            [sys.executable, *map(str, command), *settings, "--distributed", where],
            env=environment | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip

    return begin


DOCUMENTS = [d._replace(tokens=d.tokens % 60 + 3) for d in tiny.documents(12)]


def wait_for_lines(run: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 900
    while not (run / "metrics.jsonl").exists() or len(tiny.losses(run)) < count:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.1)


def ended(process: subprocess.Popen) -> tuple[int, str, float]:
    begun = time.monotonic()
    out = process.communicate(timeout=900)[0]
    return process.returncode, out.splitlines()[-1], time.monotonic() - begun


@pytest.mark.parametrize("victim", [1, 0])
def test_one_killed_within_a_step_ends_the_other_and_both_go_on(start, tmp_path, victim):
    run = tmp_path / "run"
    both = [start(index) for index in range(2)]
    wait_for_lines(run, 6, both[0])
    both[victim].send_signal(signal.SIGKILL)
    code, last, seconds = ended(both[1 - victim])
    both[victim].communicate()
    assert code == 3 and seconds < BOUND, last
    assert last.startswith(f"error: process {victim} of 2 on ") and " has gone" in last
    before = tiny.losses(run)
    both = [start(index, port=1) for index in range(2)]
    assert [process.communicate(timeout=900)[0] and process.returncode for process in both] == [0, 0]
    after = tiny.losses(run)
    whole = len(before) // 4 * 4
    assert len(after) == 40 and after[:whole] == before[:whole]


@pytest.mark.parametrize("victim", [1, 0])
def test_one_killed_when_its_part_is_done_does_not_crash_the_other(start, tmp_path, victim):
    both = [start(index) for index in range(2)]
    wait_for_lines(tmp_path / "run", 40, both[0])
    if victim == 0:
        assert any(line.startswith("finished: step 40") for line in both[0].stdout)
    both[victim].send_signal(signal.SIGKILL)
    code, last, seconds = ended(both[1 - victim])
    both[victim].communicate()
    assert code in (0, 3) and seconds < BOUND, (code, last)


@pytest.mark.parametrize("victim", [1, 0])
def test_one_with_bad_data_ends_both_and_both_say_whose(start, tmp_path, victim):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "a", "prompt_ids": [1, 2], "response_ids": "none"}\n')
    both = [start(index, **({"data": bad} if index == victim else {})) for index in range(2)]
    ends = [ended(process) for process in both]
    assert [code for code, *_ in ends] == ([2, 3] if victim == 0 else [3, 2])
    assert all(f"error: process {victim} of 2 on " in last and "bad.jsonl" in last for _, last, _ in ends), ends
    assert not list((tmp_path / "run").glob("checkpoints/*")), "the other one may have made the folder"


@pytest.mark.parametrize("index", [0, 1])
def test_one_that_waits_in_vain_for_the_other_says_so(index):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]},2,{index}"
    code = "from specformer_jax.cli.training import distributed as d; d.JOINING = 3; d.join('" + where + "')"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 3, found.stderr
    assert found.stderr.splitlines()[-1].startswith(f"error: --distributed {where}: not all processes came within 3")
