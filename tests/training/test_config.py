"""Configuration files load, overrides are checked, the command line says what is wrong in one sentence."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import pytest

from specformer_jax.cli.training import distributed
from specformer_jax.config import DraftConfig
from specformer_jax.errors import UserError
from specformer_jax.training.config import BoundConfig, TrainConfig, load_config

from . import tiny

TRAIN = "from specformer_jax.training.config import TrainConfig\nget_config = lambda: TrainConfig"
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_loads_and_says_how_to_run_it(path):
    assert isinstance(load_config(path), TrainConfig)
    docstring = path.read_text().split('"""')[1]
    assert f"--config configs/{path.name}" in docstring and "Expected" in docstring


def test_overrides_reach_every_kind_of_field():
    config = load_config(
        CONFIGS[0],
        [
            "steps=7",
            "draft.bidirectional=false",
            "draft.draft_vocab_size=none",
            "mesh=1,2,4",
            "distill.temperatures=0,1",
        ],
    )
    assert config.steps == 7 and not config.draft.bidirectional and config.draft.draft_vocab_size is None
    assert config.mesh == (1, 2, 4) and config.distill.temperatures == (0.0, 1.0)


def test_overrides_are_checked_together():
    before = load_config(CONFIGS[0])
    longer, more = 4 * before.sequence_length, 7 * before.batch_rows
    wide = [
        f"anchors={2 * before.sequence_length}",
        f"sequence_length={longer}",
        "accumulation=7",
        f"batch_rows={more}",
    ]
    for overrides in (wide, wide[::-1]):
        config = load_config(CONFIGS[0], overrides)
        assert (config.sequence_length, config.batch_rows, config.accumulation) == (longer, more, 7)


@pytest.mark.parametrize(
    "override",
    [
        "steps",
        "nothing=1",
        "draft.nothing=1",
        "steps=many",
        "draft.bidirectional=perhaps",
        "mesh=1,8",
        "distill.mesh=0,1,1",
        "distill.batch_size=0",
        "draft=medusa",
        "distill=5",
        "steps.x=3",
        "warmup=500",
        "seed=-1",
        "learning_rate=nan",
        "learning_rate=inf",
        "learning_rate=1e300",
        "learning_rate=-0.1",
        "final_learning_rate=-inf",
        "adam_learning_rate=nan",
        "weight_decay=nan",
        "clip=-1",
        "soft=nan",
        "slot_decay=0",
        "batch_rows=0",
        "batch_rows=-4",
        "accumulation=0",
        "steps=0",
        "steps=99999999999",
        "checkpoint_every=0",
        "keep_last=0",
        "keep_best=-1",
        "sequence_length=4",
        "anchors=0",
        "distill.temperatures=nan",
        "distill.temperatures=0,-1",
        "distill.temperatures=",
        "distill.max_new_tokens=0",
        "distill.shard_size=-1",
        "distill.seed=-1",
    ],
)
def test_bad_overrides(override):
    with pytest.raises(UserError, match=override.split("=")[0]):
        load_config(CONFIGS[0], [override])


def test_a_bound_configuration_knows_its_target():
    config = TrainConfig(draft=DraftConfig(max_draft_length=3), batch_rows=4)
    bound = config.bind(tiny.TARGET)
    assert isinstance(bound, BoundConfig) and not isinstance(config, BoundConfig)
    assert bound.draft == config.draft.bind(tiny.TARGET) and bound.draft.hook_layers == tiny.TARGET.default_hooks
    assert dataclasses.asdict(bound) == dataclasses.asdict(dataclasses.replace(config, draft=bound.draft))
    with pytest.raises(UserError, match="4 rows of a micro-batch do not divide over data 3 x fsdp 1 devices"):
        dataclasses.replace(config, mesh=(3, 1, 1)).bind(tiny.TARGET)
    with pytest.raises(UserError, match="put 2 into hook_layers"):
        dataclasses.replace(config, draft=DraftConfig(hook_layers=(0, 1))).bind(tiny.TARGET)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_draft_length": 0},
        {"max_draft_length": 10**9},
        {"draft_blocks": 0},
        {"draft_blocks": 1.5},
        {"ffn": 0},
        {"ffn": -3},
        {"sequential_ffn": 0},
        {"sequential_ffn": 2**40},
        {"hook_layers": ("0", 2)},
    ],
    ids=str,
)
def test_a_head_of_no_size(changes):
    name = next(iter(changes)).replace("_layers", "")
    with pytest.raises(UserError, match=name):
        DraftConfig(**changes).bind(tiny.TARGET)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def get_config(:", "raises SyntaxError"),
        ("import nothing_of_the_kind", "raises ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
        ("def get_config():\n    return 1 / 0", "raises ZeroDivisionError: division by zero"),
        ("def get_config():\n    raise SystemExit(3)", "raises SystemExit: 3"),
        ("def get_config(size):\n    pass", "raises TypeError"),
        ("def get_config():\n    return {'steps': 3}", "returns a dict, not a TrainConfig"),
        ("def get_config():\n    pass", "returns a NoneType, not a TrainConfig"),
        ("get_config = 5", "has no get_config"),
        (f"{TRAIN}(steps=1.5)", "steps 1.5 must be a whole number from 1"),
        (f"{TRAIN}(steps='3')", "steps '3' must be a whole number"),
        (f"{TRAIN}(seed=True)", "seed True must be a whole number from 0"),
        (f"{TRAIN}(learning_rate='1e-3')", "learning_rate '1e-3' must be a number"),
        (f"{TRAIN}(target=None)", "target None must be the name of a model"),
        (f"{TRAIN}(draft=None)", "draft None must be a DraftConfig"),
        (f"{TRAIN}(remat=1)", "remat 1 must be one of True, False"),
        (f"{TRAIN}(init=3)", "init 3 must be"),
        (f"{TRAIN}(mesh=(1, 1))", "must be three numbers of devices"),
        (f"{TRAIN}(distill=3)", "distill 3 must be a DistillConfig"),
    ],
)
def test_a_configuration_that_is_none(tmp_path, content, message):
    (tmp_path / "c.py").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_config(tmp_path / "c.py")
    assert "\n" not in str(error.value)


def test_a_missing_configuration_or_one_without_get_config(tmp_path):
    with pytest.raises(UserError, match="no configuration file"):
        load_config(tmp_path / "none.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="get_config"):
        load_config(tmp_path / "empty.py")


def test_the_command_line_prints_one_sentence_and_returns_2(capsys, tmp_path):
    import train

    code = train.main(["distill", "--config", str(tmp_path / "none.py"), "--prompts", "p.jsonl", "--out", "o"])
    assert code == 2
    assert capsys.readouterr().err.startswith("error: there is no configuration file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a/p.jsonl", "b/p.jsonl"], "two prompt files are called p.jsonl"),
        (["p.jsonl", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["p.jsonl", "--limit", "0"], "--limit 0 must be at least 1"),
        (["p.jsonl", "--json", "none/report.json"], "make its folder first"),
        (["p.jsonl", "--draft", "none"], "there is no draft head to evaluate"),
        (["p.jsonl", "--record"], "--record writes what a head drafts alone into --draft DIR"),
        (["p.jsonl", "--draft", "runs/head", "--lookup", "--record"], "leave out --lookup"),
        (["p.jsonl", "--draft", "runs/head", "--draft-length", "2", "--record"], "leave out --draft-length"),
        (["p.jsonl", "--draft", "HEAD", "--draft-length", "9"], "are not within 1 and the head's"),
        (["p.jsonl", "--draft-length", "0"], "--draft-length [0] must be at least 1"),
        (["p.jsonl", "--temperature", "nan"], "temperature nan must be within 0"),
        (["p.jsonl", "--max-new-tokens", "0"], "max-new-tokens 0 must be within 1"),
    ],
)
def test_evaluate_refuses_before_it_answers(capsys, tiny_target, tiny_head, arguments, message):
    import train

    named = [str(tiny_head) if argument == "HEAD" else argument for argument in arguments]
    assert train.main(["evaluate", "--target", str(tiny_target), "--prompts", *named]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--data", "d", "--run", "r", "--stop-at", "0"], "--stop-at 0 must be at least 1"),
        (["fit", "--data", "d", "--run", "r", "--allow-change", "mesh"], "--allow-change mesh: it takes one of"),
        (["fit", "--data", "d", "--run", "r", "--set", "mesh=1,1,4096"], "needs 4096 devices"),
        (["fit", "--data", "d", "--run", "r", "--set", "draft.reuse=all"], "'all' must be one of hidden, kv, hybrid"),
        (["fit", "--data", "d", "--run", "r", "--drafter", "kv", "--offline", "h"], "stores hooks, no keys and values"),
        (["export", "--out", "o", "--run", "r", "--step", "0"], "--step 0 must be at least 1"),
        (["export", "--out", "o", "--run", "nowhere"], "nowhere is no training run"),
    ],
)
def test_train_refuses_before_anything_is_read_or_written(capsys, tmp_path, monkeypatch, arguments, message):
    import train

    config = ["--config", str(CONFIGS[0])] if arguments[0] == "fit" else []
    monkeypatch.chdir(tmp_path)
    assert train.main([*arguments, *config]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_distributed_auto_outside_a_cluster_is_one_sentence(monkeypatch):
    def initialize(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match="--distributed auto finds no cluster here"):
        distributed.join("auto", 1)
