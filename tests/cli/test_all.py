"""`train.py all`: one command from prompts to a head with its card, killed as often as one likes."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from specformer_jax import files
from specformer_jax.batch.conversations import read_conversations
from specformer_jax.cli.training import all_verbs
from specformer_jax.loading import head_checkpoint
from specformer_jax.training import metrics

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning")
ROOT = Path(__file__).parents[2]
ASKED = os.environ.get("SPECFORMER_KILLS")  # of processes, at random moments: without it a few of one process
KILLS = int(ASKED or "2")
takes_long = pytest.mark.skipif(ASKED is None, reason="SPECFORMER_KILLS asks for it; it takes ten minutes and more")
SMALL = (
    "anchors=48",
    "sequence_length=64",
    "steps=8",
    "checkpoint_every=2",
    "draft.draft_vocab_size=8",
    "draft.ffn=16",
)
SMALL += ("distill.max_new_tokens=12", "distill.batch_size=4", "distill.shard_size=8", "dtype=float32")


def words(target: Path | str, prompts: Path, out: Path, *more: str, small: tuple[str, ...] = SMALL) -> list[str]:
    settings = [word for setting in (*small, f"target={target}") for word in ("--set", setting)]
    where = ["--config", str(ROOT / "configs" / "tiny.py"), "--prompts", str(prompts), "--out", str(out)]
    return ["all", *where, *settings, *more]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": " ".join(f"w{3 + i * j % 20}" for j in range(1, 4 + i % 5))} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def left(out: Path) -> dict:
    """What has to be the same however often the command was killed."""
    head, report = out / "head", files.read_sealed(out / "evaluation.json")
    counted = [row["held_out"] for row in metrics.read(out / "run" / "metrics.jsonl") if "held_out" in row]
    return {
        "answers": {file.name: file.read_text() for file in sorted(out.glob("*/shard-*.jsonl"))},
        "losses": [row["loss"] for row in metrics.read(out / "run" / "metrics.jsonl")],
        "held out": counted,
        "head": {file.name: file.read_bytes() for file in head.iterdir() if file.name != "README.md"},
        "evaluation": {name: value for name, value in report.items() if name not in ("draft", files.SEAL)},
        "acceptance": head_checkpoint.read_config(head)["acceptance"],
        "card": (head / "README.md").read_text().count("\n"),
        "report": (out / "run" / "report.html").exists(),
    }


def test_dialogues_are_held_out_and_kept_whole(tmp_path):
    source = tmp_path / "p.jsonl"
    rows = [{"prompt": f"question {i}"} for i in range(1, 18)]
    messages = ["be brief", "hello", "an answer", "and then?"]
    roles = ["system", "user", "assistant", "user"]
    rows.append({"messages": [{"role": r, "content": c} for r, c in zip(roles, messages, strict=True)]})
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = type("Options", (), {"prompts": source, "eval_prompts": None, "system": None})
    training, held_out = all_verbs._conversations(options)
    assert [c.id for c in held_out] == ["8", "16"] and len(training) == 16
    all_verbs._write(tmp_path / "written.jsonl", training)
    again = read_conversations(tmp_path / "written.jsonl")[0]
    assert [(c.id, c.system, c.turns) for c in again] == [(c.id, c.system, c.turns) for c in training]
    assert again[-1].answers == training[-1].answers == ("an answer", None)
    options.eval_prompts = source
    assert [len(part) for part in all_verbs._conversations(options)] == [18, 18]


def test_mistakes_are_found_before_anything_is_written(tmp_path, capsys):
    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "w5"}\n')
    out = tmp_path / "out"
    for more, sentence in (
        ([], "holds one dialogue, so none can be held out"),
        (["--set", "mesh=1,1,64"], "needs 64 devices"),
        (["--raw", "--system", "x"], "leave --system out"),
        (["--eval-prompts", "none.jsonl"], "cannot be read"),
    ):
        assert train.main(words("nowhere", one, out, *more)) == 2
        assert sentence in capsys.readouterr().err and not out.exists()


@pytest.mark.slow
def test_one_command_to_a_head_and_again(tiny_target, prompts, tmp_path, capsys):
    """A second call finds everything done, and leaves the same."""
    out = tmp_path / "out"
    command = words(tiny_target, prompts, out, "--offline")
    assert train.main(command) == 0
    first, weights = left(out), (out / "head" / "head.safetensors").stat().st_mtime_ns
    said = capsys.readouterr()
    assert "held out: kappa" in said.err and "wrote" in said.out and len(first["held out"]) == 4
    assert "| held_out.jsonl | 3 |" in (out / "head" / "README.md").read_text()
    assert train.main(command) == 0
    said = capsys.readouterr().out
    assert left(out) == first and "train.py evaluate" not in said and weights
    assert "finished: step 8 of 8" in said
    # Another head is evaluated anew.
    report = json.loads((out / "evaluation.json").read_text())
    (out / "evaluation.json").write_text(json.dumps(report | {"temperature": 1.0}))
    assert train.main(command) == 0
    assert "train.py evaluate" in capsys.readouterr().out and left(out) == first


def begin(command: list[str], index: int | None = None, address: str = "") -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    joined = [] if index is None else ["--distributed", f"{address},2,{index}"]
    return subprocess.Popen(
        [sys.executable, "train.py", *command, *joined],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=takes_long)])
def test_killed_at_random_moments_it_ends_with_the_same(tiny_target, prompts, tmp_path, monkeypatch, processes):
    """Every verb is killed somewhere, as the moments are spread over the time that the whole command takes."""
    monkeypatch.setenv("SPECFORMER_CACHE", str(tmp_path / "cache"))
    rng = random.Random(processes)
    more = ("--set", f"mesh={processes},1,1", "--offline") if processes == 1 else ("--set", f"mesh={processes},1,1")

    def together(out: Path) -> list[subprocess.Popen]:
        command = words(tiny_target, prompts, out, *more)
        if processes == 1:
            return [begin(command)]
        address = free_address()
        return [begin(command, index, address) for index in range(2)]

    def finish(started: list[subprocess.Popen]) -> None:
        for process in started:
            said = process.communicate(timeout=900)[0]
            assert process.returncode == 0, said[-3000:]

    begun = time.monotonic()
    finish(together(tmp_path / "whole"))
    longest = time.monotonic() - begun
    killed, out = 0, tmp_path / "killed"
    while killed < KILLS // processes:
        started = together(out)
        victim = rng.choice(started)
        try:
            victim.wait(timeout=rng.uniform(1, longest))
            for process in started:
                process.wait(timeout=900)
        except subprocess.TimeoutExpired:
            victim.send_signal(signal.SIGKILL)
            killed += 1
        ends = [process.communicate(timeout=900)[0] for process in started]
        codes = [process.returncode for process in started]
        for process, code, said in zip(started, codes, ends, strict=True):
            assert process is victim or code in (0, 3), f"{code}, when {victim.args} was killed:\n{said[-6000:]}"
        if codes == [0] * processes:  # all was done: begin once more
            out = tmp_path / f"killed-{killed}"
    finish(together(out))
    assert left(out) == left(tmp_path / "whole")


@pytest.mark.slow
@takes_long
def test_the_built_in_target_with_64_prompts_is_killed_twice(prompts, tmp_path):
    """A head that decodes, its card and a report; a CPU-only machine with two cores takes some minutes."""
    texts = ["Name a river.", "What is rust?", "Add 2 and 3.", "Who wrote Faust?"]
    rows = [{"prompt": f"{texts[i % 4]} ({i})"} for i in range(64)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ("distill.max_new_tokens=16", "distill.batch_size=8", "sequence_length=64", "anchors=32", "steps=3")
    small += ("checkpoint_every=1", "init=target", "batch_rows=1")
    command = lambda out: words("smollm2-135m", prompts, out, small=small)
    whole = begin(command(tmp_path / "whole"))
    assert whole.wait(timeout=900) == 0, whole.communicate()[0][-3000:]
    out = tmp_path / "out"
    for made in (out / "answers" / "shard-00000.part", out / "run" / "metrics.jsonl"):
        victim, deadline = begin(command(out)), time.monotonic() + 900
        while not made.exists():
            assert victim.poll() is None and time.monotonic() < deadline, victim.communicate()[0][-3000:]
            time.sleep(0.05)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
    last = begin(command(out))
    assert last.wait(timeout=900) == 0, last.communicate()[0][-3000:]
    assert left(out) == left(tmp_path / "whole")
    decoding = [
        "serve.py",
        "generate",
        "--draft",
        str(out / "head"),
        "--prompt",
        "Name a river.",
        "--max-new-tokens",
        "8",
    ]
    said = subprocess.run([sys.executable, *decoding], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert said.returncode == 0 and "kappa" in said.stderr, said.stderr
