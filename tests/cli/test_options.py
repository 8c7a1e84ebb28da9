"""Any option of `train.py` and `serve.py` with any value: done, or one sentence, soon, and nothing is left behind.

Values are drawn for each option by a seed of its own; the default run takes a few, SPECFORMER_VALUES=25 all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import time
from pathlib import Path

import pytest

import serve
import train
from specformer_jax.config import DraftConfig
from specformer_jax.errors import UserError
from specformer_jax.training.config import DistillConfig, TrainConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",  # a socket, say, which goes with its process
)  # fmt: skip
ROOT = Path(__file__).parents[2]
MORE = int(os.environ.get("SPECFORMER_VALUES", "0"))  # values of an option in the slow run
more_values = pytest.mark.skipif(not MORE, reason="SPECFORMER_VALUES says how many; all 25 take long")
LONGEST = 20  # seconds of this process, whoever else computes beside it
VALUES = ("", " ", "0", "-1", "1", "2", "3.5", "1e999", "nan", "-inf", "none", "true", "1,1,1", "1,2", "x" * 3000)
VALUES += ("2147483648", "-9223372036854775809", "0.999999", "auto", "/dev/null/x", "²", "=", "--", "a=b", "\udcff")
# Would begin to serve or to train for long where they are right: the other options of these verbs are wrong on purpose.
NEVER_RIGHT = {"target": "/nowhere/model", "config": "/nowhere/config.py"}
BASE = {
    ("train", "distill"): {"config": "CONFIG", "prompts": "PROMPTS", "out": "OUT", "set": "target=/nowhere/model"},
    ("train", "fit"): {"config": "CONFIG", "data": "DATA", "run": "OUT", "set": "target=/nowhere/model"},
    ("train", "evaluate"): {"prompts": "PROMPTS", "target": "/nowhere/model"},
    ("train", "export"): {"run": "RUN", "out": "OUT"},
    ("train", "card"): {"run": "RUN", "head": "HEAD"},
    ("train", "all"): {"config": "CONFIG", "prompts": "PROMPTS", "out": "OUT", "set": "steps=0"},
    ("serve", "generate"): {"prompts": "PROMPTS", "target": "/nowhere/model"},
    ("serve", "http"): {"target": "/nowhere/model", "port": "0"},
    ("serve", "batch"): {"input": "PROMPTS", "output": "OUT", "target": "/nowhere/model"},
}


def options_of(program: str, verb: str) -> list[argparse.Action]:
    """The options of a verb, as its own parser knows them."""
    found: list[argparse.Action] = []

    def take(parser, *_):
        (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        found.extend(action for action in verbs.choices[verb]._actions if action.dest != "help")
        raise UserError("seen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", take)
        with contextlib.suppress(UserError):
            {"train": train, "serve": serve}[program].main([verb])
    assert found, f"{program}.py {verb} has no options"
    return found


def cases() -> list[tuple[str, str, str]]:
    return [(*of, action.option_strings[0]) for of in BASE for action in options_of(*of) if action.option_strings]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Files that the options name, and an empty folder to work in."""
    kept, work = tmp_path / "kept", tmp_path / "work"
    kept.mkdir()
    work.mkdir()
    (kept / "p.jsonl").write_text('{"prompt": "w5"}\n{"prompt": "w6"}\n')
    (kept / "d.jsonl").write_text('{"prompt_ids": [3, 4], "response_ids": [5, 6, 7]}\n')
    monkeypatch.chdir(work)
    monkeypatch.setenv("SPECFORMER_CACHE", str(tmp_path / "cache"))
    return {
        "CONFIG": str(ROOT / "configs" / "tiny.py"), "PROMPTS": str(kept / "p.jsonl"), "DATA": str(kept / "d.jsonl"),
        "OUT": str(work / "out"), "RUN": str(kept / "no-run"), "HEAD": str(kept / "no-head"),
    }  # fmt: skip


def run(program: str, arguments: list[str], capfd) -> tuple[int, str]:
    """The exit code of a command and its last words, which have to be one sentence where it is not 0."""
    begun = time.process_time()
    try:
        code = {"train": train, "serve": serve}[program].main(arguments)
    except SystemExit as error:  # argparse's own
        code = int(error.code or 0)
    took, err = time.process_time() - begun, capfd.readouterr().err
    said = [line for line in err.splitlines() if "error: " in line]
    assert code in (0, 2), (arguments, err)
    assert "Traceback" not in err and (code == 0 or len(said) == 1), (arguments, err)
    assert took < LONGEST, (arguments, took)
    return code, err


def check_option(program: str, verb: str, flag: str, rng: random.Random, places, capfd, count: int) -> None:
    (action,) = (a for a in options_of(program, verb) if flag in a.option_strings)
    for value in rng.sample(VALUES, count):
        named = {name: places.get(text, text) for name, text in BASE[program, verb].items()}
        name = flag.removeprefix("--")
        given = [] if action.nargs == 0 else [value]
        if name == "distributed" and value.count(",") == 2:
            continue  # would wait for other processes
        if name in named and name in NEVER_RIGHT and value in ("", "auto"):
            continue  # the default
        named.pop(name, None)
        arguments = [verb, *(word for other, text in named.items() for word in (f"--{other}", text)), flag, *given]
        if given and value.startswith("-"):
            arguments[-2:] = [f"{flag}={value}"]
        run(program, arguments, capfd)
        there = sorted(str(path.relative_to(places["OUT"].rsplit("/", 1)[0])) for path in Path.cwd().rglob("*"))
        assert not there, (arguments, there)


@pytest.mark.parametrize(("program", "verb"), BASE)
def test_some_values_of_each_option(program, verb, places, capfd):
    for number, (_, _, flag) in enumerate(case for case in cases() if case[:2] == (program, verb)):
        check_option(program, verb, flag, random.Random(number), places, capfd, count=2)


@pytest.mark.slow
@more_values
@pytest.mark.parametrize(("program", "verb", "flag"), cases())
def test_more_values_of_each_option(program, verb, flag, places, capfd):
    check_option(program, verb, flag, random.Random(flag), places, capfd, count=min(MORE, len(VALUES)))


FIELDS = [
    f"{section}{field.name}"
    for section, kind in (("", TrainConfig), ("draft.", DraftConfig), ("distill.", DistillConfig))
    for field in dataclasses.fields(kind)
]


def check_field(field: str, values, target: Path, places, capfd) -> None:
    base = ["fit", "--config", places["CONFIG"], "--data", places["DATA"], "--run", places["OUT"], "--dry-run"]
    small = ["sequence_length=64", "anchors=48", "draft.draft_vocab_size=8", "draft.ffn=16", f"target={target}"]
    settings = [setting for setting in small if not setting.startswith(f"{field}=")]
    for value in values:
        words = [word for setting in (*settings, f"{field}={value}") for word in ("--set", setting)]
        run("train", [*base, *words], capfd)
        assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("part", range(4))
def test_some_values_of_each_field(part, tiny_target, places, capfd):
    for number, field in enumerate(FIELDS):
        if number % 4 == part:
            check_field(field, [random.Random(number).choice(VALUES)], tiny_target, places, capfd)


@pytest.mark.slow
@more_values
@pytest.mark.parametrize("field", FIELDS)
def test_more_values_of_each_field(field, tiny_target, places, capfd):
    check_field(field, random.Random(field).sample(VALUES, min(MORE, len(VALUES))), tiny_target, places, capfd)
