"""The training loop in processes of its own: many devices, kills, signals, full disks, several hosts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from specformer_jax.loading import head_checkpoint
from specformer_jax.training import export
from specformer_jax.training.run.checkpoint import Checkpoints

from . import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning"),
]
PROGRAM = Path(tiny.__file__)


def _start(run, *options, devices=1):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, str(PROGRAM), str(run), *map(str, options)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def _finish(process) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def _wait_for_lines(run, count: int, process) -> None:
    deadline = time.monotonic() + 200
    while len(tiny.losses(run)) < count:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def test_a_run_on_many_devices_is_exported_on_one(tmp_path):
    _finish(_start(tmp_path / "run", "--mesh", "1,2,2", "--stop-at", 5, devices=4))
    assert export.export(tmp_path / "run", tmp_path / "head") == 5
    params = head_checkpoint.load_head(tmp_path / "head", tiny.TARGET)[1]
    assert all(np.isfinite(x.astype(np.float32)).all() for x in jax.tree.leaves(params))


def test_kill_and_restart_gives_the_same_losses_bit_for_bit(tmp_path):
    _finish(_start(tmp_path / "whole"))
    victim = _start(tmp_path / "killed", "--delay", 0.2)
    _wait_for_lines(tmp_path / "killed", 8, victim)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    _finish(_start(tmp_path / "killed"))
    assert tiny.losses(tmp_path / "killed") == tiny.losses(tmp_path / "whole")


def test_sigterm_saves_and_exits_with_0(tmp_path):
    run = tmp_path / "run"
    process = _start(run, "--delay", 0.3)
    _wait_for_lines(run, 3, process)
    process.send_signal(signal.SIGTERM)
    out, _ = _finish(process)
    step = int(out.split()[-1])
    checkpoints = Checkpoints(run / "checkpoints")
    assert checkpoints.steps[-1] == step < 20
    checkpoints.close()


def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoints_before(tmp_path):
    run = tmp_path / "run"
    process = _start(run, "--delay", 0.3, "--full-disk-after", 9)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "UserError" in err and "cannot be written" in err, err
    checkpoints = Checkpoints(run / "checkpoints")
    assert checkpoints.steps == [5]
    checkpoints.close()


def test_sigterm_to_one_of_two_processes_stops_both_after_the_same_step(tmp_path):
    address = _free_address()
    run = tmp_path / "run"
    options = ("--mesh", "2,1,1", "--delay", 0.3, "--steps", 60)
    both = [_start(run, *options, "--distributed", f"{address},2,{i}") for i in range(2)]
    _wait_for_lines(run, 3, both[0])
    both[1].send_signal(signal.SIGTERM)
    steps = [int(_finish(process)[0].split()[-1]) for process in both]
    checkpoints = Checkpoints(run / "checkpoints")
    assert steps == [checkpoints.steps[-1]] * 2 and steps[0] < 60
    checkpoints.close()


def test_two_processes_train_as_one_and_checkpoints_move_between_meshes(tmp_path):
    _finish(_start(tmp_path / "one"))
    expected = tiny.losses(tmp_path / "one")

    def two(run, *options, mesh="2,2,1", devices=2):
        address = _free_address()
        both = [
            _start(run, "--mesh", mesh, "--distributed", f"{address},2,{i}", *options, devices=devices)
            for i in range(2)
        ]
        for process in both:
            _finish(process)

    two(tmp_path / "two")
    np.testing.assert_allclose(tiny.losses(tmp_path / "two"), expected, rtol=1e-5)
    # `model` reaches over both: they hold the same rows.
    two(tmp_path / "over", mesh="1,1,2", devices=1)
    np.testing.assert_allclose(tiny.losses(tmp_path / "over"), expected, rtol=1e-5)
    two(tmp_path / "down", "--stop-at", 10)
    _finish(_start(tmp_path / "down"))
    np.testing.assert_allclose(tiny.losses(tmp_path / "down"), expected, rtol=1e-5)
    _finish(_start(tmp_path / "up", "--stop-at", 10))
    two(tmp_path / "up")
    np.testing.assert_allclose(tiny.losses(tmp_path / "up"), expected, rtol=1e-5)
