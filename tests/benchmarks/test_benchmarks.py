"""The benchmark's arithmetic on runs written by hand, and one real run of it on a tiny model."""

import dataclasses
import doctest
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import ablations, curve, decode, drafters, lossless, numbers
from benchmarks.harness import console, contestants, plots, prompts, report
from benchmarks.harness.contestants import Contestant, Run
from specformer_jax.batch import generation
from specformer_jax.cli import command_line
from specformer_jax.config import LOOKUPS, DraftConfig, SamplingParams
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import LanguageModel
from specformer_jax.planning import chips
from specformer_jax.training import metrics
from specformer_jax.training.config import TrainConfig, load_config
from tests import tiny
from tests.engine import tiny_lm

MACHINE = {"device": "a machine", "cores": 2, "jax": "0", "gemm_gflops": 100.0, "copy_gbytes": 10.0, "rho": 8.0}


class Words:
    """A tokenizer as far as the benchmark needs one."""

    def decode(self, ids, after=()):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def lm():
    model, params = tiny.make(DraftConfig(max_draft_length=4))
    return LanguageModel("tiny", model, params, Words(), None)


def made_report(entries):
    described = {"target": "t", "draft": "d", "dtype": "float32", "temperature": 0.0, "max_new_tokens": 9}
    return described | {"machine": MACHINE, "entries": entries}


def test_the_figures_of_an_entry():
    # Two rows: three passes commit 3 + 2 tokens beside the prefill's; twice the plain rate in a pass 1.5 times as long.
    plain = [Run([[1, 2, 3, 4], [1, 2, 3]], seconds=6.0, decode_seconds=3.0, passes=3, row_passes=5)] * 3
    fast = [
        Run([[1, 2, 3, 4], [1, 9, 3]], seconds=3.0, decode_seconds=3.0, passes=2, row_passes=4, accepted=(1, 0)),
        Run([[1, 2, 3, 4], [1, 2, 3]], seconds=2.0, decode_seconds=3.0, passes=2, row_passes=3, accepted=(2, 1)),
        Run([[1, 2, 3, 4], [1, 2, 3]], seconds=4.0, decode_seconds=4.0, passes=2, row_passes=3, accepted=(2, 1)),
    ]
    found = report.entry(Contestant("k = 2", 2, lambda prompts: fast[0]), 2, fast, plain, {"hf": plain})
    assert found["speedup"] == 2.0 and found["speedup_over"] == {"hf": 2.0}
    assert found["all_rounds_over"] == {"plain": 2.0, "hf": 2.0}
    assert found["kappa"] == 1.5 and found["theta"] == 0.75
    assert found["acceptance"] == [0.5, 0.2]
    assert found["break_even_kappa"] == 1.5 and found["step_ms"] == 1500.0
    assert (found["answers"], found["answers_that_part_from_plain"]) == (6, 1)
    assert (found["tokens"], found["tokens_from_the_parting_on"]) == (21, 2)


def test_lossless_starts_anew_unless_told_to_resume(tmp_path):
    file, size = tmp_path / "found.json", {"prompts": 2, "tokens each": 4, "head": "untrained"}
    lossless.ResultFile(str(file), size, resume=False).add("a part", "found")
    assert not lossless.ResultFile(str(file), size, resume=True).missing("a part")
    assert lossless.ResultFile(str(file), size, resume=False).missing("a part")
    assert lossless.ResultFile(str(file), size | {"head": "runs/a/head"}, resume=True).missing("a part")


@pytest.mark.slow
def test_lossless_compares_every_draft_length_batch_and_an_engine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lossless, "against_transformers", lambda prompts, answers: "not asked")
    monkeypatch.setattr(lossless, "DRAFT_LENGTHS", (0, 2))
    prompts = [[5, 1, 2], [4], [6, 5, 6, 5, 7]]
    report = lossless.ResultFile(str(tmp_path / "found.json"), {"prompts": 3}, resume=False)
    job = lossless.Job(tiny_lm.make(), "float32", prompts, 8)
    lossless.free_shapes(report, job, [2, 1])
    lossless.strict(report, job)
    parts = {name: part for name, part in report.found.items() if isinstance(part, dict)}
    titles = [f"float32 {how}, {at}" for how in ("greedy", "sampled") for at in ("batch 2", "batch 1", "engine")]
    assert list(parts) == [t.replace("engine", "engine, 16 at a time") for t in titles] + ["float32 strict"]
    assert all(part["tokens that differ"] == part["answers that differ"] == 0 for part in parts.values())
    assert parts["float32 greedy, batch 1"]["answers compared"] == 6
    assert parts["float32 greedy, engine, 16 at a time"]["answers compared"] == 3
    assert "float32 sampled, k = 2, batch 1: kappa" in capsys.readouterr().err
    wrong = lossless.compared([[[1, 2, 3]]], [[1, 9, 3]])
    assert wrong["tokens that differ"] == 2 and wrong["answers that differ"] == 1


def test_a_tiny_model_runs_through_the_benchmark(lm, tmp_path, capsys):
    """Interleaved: kappa, acceptance and sameness are those of the answers; text and plots."""
    encoded = [[5, 1, 2], [4], [6, 5, 6, 5, 7], [8, 9], [1, 1, 1]]
    lengths = decode.draft_lengths(lm, "0,2,8,auto")
    assert lengths == [0, 2, None]
    assert "k = 8 is left out: the draft head has 4 slots" in capsys.readouterr().err
    entries = decode.measure(
        lm, encoded, SamplingParams(max_new_tokens=12), [2], lengths, rounds=2, strict=False, baselines={}
    )
    assert [(e["batch_size"], e["contestant"]) for e in entries] == [(2, name) for name in ("plain", "k = 2", "auto")]
    for e in entries:
        assert e["answers"] == 2 * e["batch_size"] and len(e["seconds"]) == 2
        assert e["answers_that_part_from_plain"] == 0, "float32 answers are the same at every draft length"
        assert len(e["acceptance"]) == e["draft_length"]
        # Every pass commits the accepted drafts and one token of its own.
        assert e["kappa"] == pytest.approx(1 + sum(e["acceptance"]), abs=2e-3)
    assert entries[0]["kappa"] == entries[0]["speedup"] == entries[0]["break_even_kappa"] == 1.0
    found = made_report(entries)
    text = report.markdown(json.loads(json.dumps(found)))
    assert f"| k = 2 | **{entries[1]['speedup']:.2f}x** / {entries[1]['kappa']:.2f} / " in text
    assert "k <= 4.0 at batch 2" in text
    pytest.importorskip("matplotlib")
    written = plots.plot(found, tmp_path / "plots") + plots.plot(found, tmp_path / "all.png")
    assert len(written) == 4 and all(file.stat().st_size > 1000 for file in written)


@pytest.mark.slow
def test_strict_takes_one_shape_for_every_draft_length(lm, monkeypatch):
    windows, run_batch = [], generation.run_batch
    monkeypatch.setattr(
        generation, "run_batch", lambda *given: windows.append((given[0].model, given[3].window)) or run_batch(*given)
    )
    sampling_params = SamplingParams(max_new_tokens=4)
    taking_part = decode.ours(lm, [0, 3], sampling_params, [[[5, 1]]], strict=True)
    runs = [contestant.run([[5, 1]]) for contestant in taking_part]
    assert windows == [(lm.sampling_with(sampling_params).model, 4)] * 2
    assert [len(run.accepted) for run in runs] == [0, 3]
    assert runs[0].answers == runs[1].answers


def test_drafters_stand_side_by_side(lm):
    """The SpecFormer head and the lookup on the same prompts; parameters counted by hand."""
    base = lm.without_drafter()
    model, _ = tiny.make(DraftConfig(max_draft_length=4, drafter="ngram"))
    looking_up = dataclasses.replace(lm, model=model, params=base.params)
    head = {"specformer": lm, "ngram": looking_up}
    rows = drafters.compare(
        base, head, [[5, 1, 2], [6, 5, 6, 5, 7]], SamplingParams(max_new_tokens=12), k=4, batch_size=1, rounds=2
    )
    assert [row["contestant"] for row in rows] == ["specformer", "ngram"]
    assert all(row["answers_that_part_from_plain"] == 0 for row in rows)
    width = tiny.CONFIG.width
    assert rows[0]["position_dependent"] == 4 * width * (width + 1) and rows[1]["parameters"] == 0
    assert rows[0]["parameters"] == sum(x.size for x in jax.tree.leaves(lm.params["draft"]))
    described = {"target": "t", "dtype": "float32", "draft_length": 4, "batch_size": 1, "temperature": 0.0}
    text = drafters.markdown(described | {"steps": 7, "drafters": rows})
    difference = rows[0]["kappa"] - rows[1]["kappa"]
    assert f"SpecFormer's kappa: {difference:+.2f} against ngram." in text and "| ngram | 0 | 0 |" in text


def test_draft_time_is_what_a_pass_takes_longer():
    run = Run([[1, 2, 3]], seconds=9.0, decode_seconds=3.0, passes=2, row_passes=2)
    window = dataclasses.replace(run, decode_seconds=4.0, passes=4)
    assert drafters.draft_time([run], [window]) == 0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_commands_from_answers_to_tables(tiny_target, tmp_path, monkeypatch, capsys):
    """benchmarks.drafters trains, exports and compares; benchmarks.decode takes any of the exported heads."""
    monkeypatch.setattr(command_line, "keep_compiled_programs", lambda: None)
    answers, prompts = tmp_path / "answers.jsonl", tmp_path / "prompts.jsonl"
    random = np.random.default_rng(0)
    rows = [{"prompt_ids": [1, 5, 2], "response_ids": random.integers(3, 60, 20).tolist()} for _ in range(20)]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts.write_text("".join(json.dumps({"prompt": f"w{i} w{i + 1} w{i}"}) + "\n" for i in range(5, 9)))
    small = ["batch_rows=2", "anchors=24", "sequence_length=32", "draft.draft_vocab_size=48", "draft.sequential_ffn=16"]
    changes = [word for change in [f"target={tiny_target}", *small] for word in ("--set", change)]
    common = ["--target", str(tiny_target), "--dtype", "float32", "--prompts", str(prompts), "--max-new-tokens", "12"]
    table = tmp_path / "drafters.json"
    options = ["--data", str(answers), "--runs", str(tmp_path / "runs"), "--steps", "3", "--rounds", "2", *changes]
    assert drafters.main([*common, *options, "--json", str(table)]) == 0, capsys.readouterr().err
    found = json.loads(table.read_text())
    assert [row["contestant"] for row in found["drafters"]] == [*drafters.CONTESTANTS, *LOOKUPS]
    assert all(row["answers_that_part_from_plain"] == 0 for row in found["drafters"])
    runs = [tmp_path / "runs" / name for name in drafters.CONTESTANTS]
    assert [metrics.read(run / "metrics.jsonl")[-1]["step"] for run in runs] == [3] * 7

    head = str(tmp_path / "runs" / "eagle" / "head")
    assert decode.main([*common, "--draft", head, "--batch-sizes", "2", "--rounds", "2", "--draft-lengths", "4"]) == 0
    assert "| k = 4 | **" in capsys.readouterr().out
    assert drafters.main([*common, "--heads", head, head]) == 2
    assert "two heads are eagle drafters" in capsys.readouterr().err


def ablate(target, folder, *arguments) -> int:
    """The ablations on a tiny target."""
    random = np.random.default_rng(0)
    answers, texts = folder / "answers.jsonl", folder / "texts.jsonl"
    data = [{"prompt_ids": [1, 5, 2], "response_ids": random.integers(3, 60, 20).tolist()} for _ in range(16)]
    answers.write_text("".join(json.dumps({"id": str(i)} | row) + "\n" for i, row in enumerate(data)))
    words = [" ".join(f"w{i}" for i in random.integers(3, 60, size)) for size in (9, 70, 80, 90)]
    texts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in words))
    small = ["batch_rows=2", "anchors=24", "sequence_length=32", "dtype=float32", f"target={target}"]
    small += ["draft.draft_vocab_size=48", "draft.sequential_ffn=16"]
    files = ["--data", answers, "--texts", texts, "--work", folder / "work", "--json", folder / "ablations.json"]
    budget = ["--steps", 2, "--answers", 10, "--held-out", 4, *(word for change in small for word in ("--set", change))]
    return ablations.main([str(argument) for argument in [*files, *budget, *arguments]])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_ablations_train_each_row_once_on_the_same_answers(tiny_target, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "keep_compiled_programs", lambda: None)
    assert ablate(tiny_target, tmp_path, "--seeds", "0", "--rows", "paper, others' texts") == 0, capsys.readouterr().err
    assert ablate(tiny_target, tmp_path, "--seeds", "0", "--rows", "paper", "paper, others' texts") == 0
    assert ablate(tiny_target, tmp_path, "--seeds", "0", "3", "--rows", "paper") == 0
    out, err = capsys.readouterr()
    trained = [line for line in err.splitlines() if line.startswith("python train.py fit")]
    assert ["texts.jsonl" in line for line in trained] == [True, False, False], "what is there is not trained again"
    assert ["seed=3 " in line for line in trained] == [False, False, True]
    found = json.loads((tmp_path / "ablations.json").read_text())
    named = [(row["name"], row["seed"]) for row in found["rows"]]
    assert named == [("paper", 0), ("paper", 3), ("paper, others' texts", 0)], "in the order of the table"
    paper, again, others = found["rows"]
    assert trained[1].startswith(found["command"] + " " + paper["options"])
    assert paper["trained_tokens"] == others["trained_tokens"] > 0 and paper["answers"] == 4
    # Every answer has 20 tokens, the first of which is the prefill's.
    assert paper["tokens"] == 4 * 19 and paper["kappa"] == pytest.approx(paper["tokens"] / paper["steps"], abs=1e-4)
    mean = (paper["kappa"] + again["kappa"]) / 2
    line = f"| paper | {mean:.3f} | {paper['kappa']:.3f} | {again['kappa']:.3f} | "
    assert line in out and f"| {others['kappa']:.3f} |  | " in out
    card = numbers.render("<!-- report: ablations.json -->\n<!-- end -->", tmp_path)
    assert line in card and not numbers.unsourced(card)

    rows = [json.loads(line) for line in (tmp_path / "work" / "answers.jsonl").read_text().splitlines()]
    swapped = [json.loads(line) for line in (tmp_path / "work" / "texts.jsonl").read_text().splitlines()]
    assert [row["prompt_ids"] for row in swapped] == [row["prompt_ids"] for row in rows]
    assert all(len(a["response_ids"]) == len(b["response_ids"]) == 20 for a, b in zip(rows, swapped, strict=True))
    assert len({row["id"] for row in rows}) == 10

    assert ablate(tiny_target, tmp_path, "--steps", "3") == 2
    assert "have another steps, command: name another file" in capsys.readouterr().err
    assert ablate(tiny_target, tmp_path, "--rows", "sharper") == 2
    assert "--rows ['sharper'] is none of paper, paper, causal" in capsys.readouterr().err
    assert ablate(tiny_target, tmp_path, "--answers", "13") == 2
    assert "--data has 12 other answers to train on, not 13" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_every_row_of_the_ablations_trains(tiny_target, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "keep_compiled_programs", lambda: None)
    assert ablate(tiny_target, tmp_path, "--seeds", "0") == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "ablations.json").read_text())
    assert [row["name"] for row in found["rows"]] == list(ablations.rows(tmp_path))
    assert len({row["trained_tokens"] for row in found["rows"]}) == 1


def test_the_ablations_lead_from_the_paper_to_the_shipped_configuration():
    table = ablations.rows(Path("work"))
    config = Path(ablations.__file__).parent.parent / "configs" / "smollm2_135m.py"
    first, last = (load_config(config, table[name][1::2]) for name in ("paper", "+ sequential FFN"))
    assert last == load_config(config) and not table["+ sequential FFN"]
    # No sequence is longer than the window, so it is in every row and takes part in none.
    draft = DraftConfig(max_draft_length=4, draft_vocab_size=last.draft.draft_vocab_size, window=last.sequence_length)
    paper = TrainConfig(draft=draft, sequence_length=last.sequence_length)
    assert first.draft == paper.draft
    for field in ("optimizer", "soft", "slot_decay", "init", "weight_decay", "clip"):
        assert getattr(first, field) == getattr(paper, field)


def test_a_curve_goes_on_behind_the_runs_before(tmp_path, monkeypatch):
    out = tmp_path / "curve.json"
    for run, extra in (("a", []), ("b", ["--append"])):
        (tmp_path / run).mkdir()
        steps = [{"step": i, "tokens": 5, "kappa": 1.5, "slot_accuracy": [0.5]} for i in range(1, 13)]
        (tmp_path / run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        monkeypatch.setattr("sys.argv", ["curve", "--run", str(tmp_path / run), "--json", str(out), *extra])
        curve.main()
    points = json.loads(out.read_text())["points"]
    assert [point["run"] for point in points] == ["a"] * 6 + ["b"] * 6
    assert [point["tokens"] for point in points] == list(range(10, 130, 10))


@pytest.mark.parametrize("module", [ablations, chips, console, contestants, curve, report])
def test_the_examples_in_the_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


def test_mistakes_are_one_sentence(lm, capsys):
    assert decode.main(["--batch-sizes", "0"]) == 2
    assert "error: --batch-sizes '0' must be numbers from 1 on" in capsys.readouterr().err
    with pytest.raises(UserError, match="none of hf, hf-lookup"):
        decode.load_baselines(dataclasses.make_dataclass("Options", ["baselines"])("vllm"))


def test_prompts_that_the_context_does_not_hold_are_refused_before_anything_runs(lm, tmp_path, monkeypatch):
    file = tmp_path / "p.jsonl"
    file.write_text('{"id": "long", "prompt": "a"}\n')
    monkeypatch.setattr(generation, "encode_prompt", lambda *_, **__: [1] * lm.config.context)
    with pytest.raises(UserError, match="long: the prompt has"):
        prompts.encode(lm, str(file))
