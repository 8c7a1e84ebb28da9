"""kappa counted along the target's answers equals kappa of real decoding, and distillation resumes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from specformer_jax import drafters
from specformer_jax.batch.conversations import Conversation
from specformer_jax.batch.generation import Answer
from specformer_jax.config import DraftConfig, SamplingParams
from specformer_jax.decoding.model import Model
from specformer_jax.drafters.ngram import WithLookup
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import LanguageModel, load
from specformer_jax.loading.text_stream import TextStream
from specformer_jax.nn.target import Target, lm_head
from specformer_jax.training import evaluate
from specformer_jax.training.config import DistillConfig
from specformer_jax.training.data.documents import META, Document
from specformer_jax.training.data.sources import read_documents
from specformer_jax.training.distillation import distill

from . import tiny


class _Tokenizer:
    fingerprint = "tiny"
    eos_ids = tiny.TARGET.eos_ids

    def stream(self, after=(), shown=frozenset()):
        return TextStream(self.decode)

    def decode(self, ids, after=()):
        return " ".join(map(str, ids))

    def chat(self, messages):
        return [3 + ord(letter) % 90 for message in messages for letter in message["content"]]


def made(draft: DraftConfig) -> LanguageModel:
    head = drafters.make(tiny.TARGET, draft, "float32")
    model = Model(Target(tiny.TARGET, draft.hook_layers, "float32"), head)
    if draft.drafter == "ngram":
        return LanguageModel("tiny", model, {"target": tiny.target_params()}, _Tokenizer(), "ngram")
    width = tiny.TARGET.width
    hooks = jnp.zeros((1, 2, len(draft.hook_layers), width))
    params = nn.unbox(jax.jit(head.init)(jax.random.key(0), hooks, jnp.zeros((1, 2, width))))["params"]
    # The first slot of the identity head repeats the target's own forecast, which is right now and then.
    noise = lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape)
    target_params = tiny.target_params()
    ids = jnp.arange(64) + 2
    tree = {
        "target": target_params,
        "draft": jax.tree.map(noise, params),
        "draft_vocab": {"token_ids": ids, "lm_head": lm_head(target_params)[ids]},
    }
    return LanguageModel("tiny", model, tree, _Tokenizer(), None)


@pytest.fixture(scope="module")
def lm():
    return made(tiny.config().draft)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_offline_and_decoded_counts_agree(lm, temperature):
    agree(lm, temperature)


@pytest.mark.parametrize(("drafter", "temperature"), [("medusa", 0.8), ("eagle", 0.8), ("kv", 0.8), ("ngram", 0.0)])
def test_offline_and_decoded_counts_agree_whoever_drafts(drafter, temperature):
    """The chain of a window over the drafter's memory is that of the whole sequence at once."""
    agree(made(DraftConfig(max_draft_length=3, drafter=drafter, draft_vocab_size=64).bind(tiny.TARGET)), temperature)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_offline_and_decoded_counts_agree_with_lookup(lm, temperature):
    agree(replace(lm, model=replace(lm.model, drafter=WithLookup.around(lm.model.drafter))), temperature)


def agree(lm: LanguageModel, temperature: float) -> None:
    prompts = [document.tokens[: 4 + i].tolist() for i, document in enumerate(tiny.documents(6))]
    sampling_params = SamplingParams(temperature=temperature, max_new_tokens=24, seed=5)
    decoded, answers = evaluate.decode(lm, prompts, sampling_params, 3, batch_size=4)
    documents = [
        Document.of(str(i), prompt, answer, temperature)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    (shorter, offline), forecasts = evaluate.offline(lm, documents, [1, 3], [5] * 6)
    assert [len(right) for right in forecasts.right] == [len(answer) - 1 for answer in answers]
    assert offline.report() == decoded.report()
    assert shorter.steps >= offline.steps and shorter.tokens == offline.tokens
    assert decoded.kappa > 1.0  # some draft was right, or the test would say nothing


def test_walk_stops_at_the_end():
    tokens, steps, accepted = evaluate.walk(np.ones((4, 2), bool), 2)
    assert (tokens, steps, accepted.tolist()) == (4, 2, [1, 1])


def test_distill_resumes_and_never_redoes_a_shard(lm, tmp_path):
    prompts = [Conversation(str(i), ("abc" * (i + 1),)) for i in range(5)]
    config = DistillConfig((0.0, 0.8), max_new_tokens=8, max_prompt_tokens=14, batch_size=2, shard_size=4)
    first, left_out = distill.distill(lm, prompts, config, tmp_path / "a", progress=False)
    whole = {file.name: file.read_text() for file in sorted((tmp_path / "a").glob("shard*"))}
    digests = {f"{name}.sha256" for name in whole if name.endswith(".jsonl")}
    assert first > 0 and whole.keys() == {"shard-00000.jsonl", "shard-00001.jsonl"} | digests
    assert [(omission.where, omission.part) for omission in left_out] == [("4", "row")]
    assert distill.distill(lm, prompts, config, tmp_path / "a", progress=False) == (0, left_out)

    # As a killed run leaves it: two rows, the later one first, and half a line.
    lines = whole["shard-00000.jsonl"].splitlines(keepends=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "shard-00000.part").write_text(lines[1] + lines[0] + lines[2][:20])
    for host in range(2):
        distill.distill(lm, prompts, config, tmp_path / "b", process_index=host, process_count=2, progress=False)
    assert {file.name: file.read_text() for file in (tmp_path / "b").glob("shard*")} == whole  # and no .part file
    assert len(read_documents(tmp_path / "a", tiny.TARGET.vocab_size)) == 4  # one prompt was too long


def asked(*texts):
    """Prompts whose ids are their row numbers, as those of a file without ids."""
    return [Conversation(str(i), (text,)) for i, text in enumerate(texts, 1)]


def contents(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_distill_goes_on_with_a_longer_prompt_file(lm, tmp_path):
    """The shard that used to be the last and short one gets the answers that it lacks; those of longer prompts too."""
    quiet = dict(progress=False)
    config = DistillConfig((0.0, 0.8), max_new_tokens=8, max_prompt_tokens=3, batch_size=2, shard_size=4)
    prompts = asked("a", "bb", "ccccc", "dd", "e", "f")
    assert distill.distill(lm, prompts[:3], config, tmp_path / "a", **quiet)[0] > 0
    begun = json.loads((tmp_path / "a" / "shard-00000.jsonl").read_text().splitlines()[1])
    config = replace(config, max_prompt_tokens=14, batch_size=3)
    assert distill.distill(lm, prompts, config, tmp_path / "a", **quiet)[0] > 0
    distill.distill(lm, prompts, config, tmp_path / "b", **quiet)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert begun == json.loads((tmp_path / "a" / "shard-00000.jsonl").read_text().splitlines()[1])


def test_distill_answers_a_dialogue_several_times(lm, tmp_path):
    """A folder with one answer each gets the others; they differ, and are what one run writes."""
    config = DistillConfig((0.0, 0.9), max_new_tokens=8, batch_size=2, shard_size=4)
    prompts = asked("a", "bb", "ccccc", "dd", "e", "f")
    distill.distill(lm, prompts, config, tmp_path / "a", progress=False)
    config = replace(config, samples=3)
    distill.distill(lm, prompts, config, tmp_path / "a", progress=False)
    distill.distill(lm, prompts, config, tmp_path / "b", progress=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    found = read_documents(tmp_path / "a", tiny.TARGET.vocab_size)
    assert {d.id for d in found} == {c.id for c in distill.with_samples(prompts, config)}
    of_dialogue: dict[str, list[Document]] = {}
    for document in found:
        of_dialogue.setdefault(document.id.partition("/")[0], []).append(document)
    assert set(of_dialogue) == {c.id for c in prompts}
    for several in of_dialogue.values():
        answers = {tuple(d.tokens.tolist()) for d in several}
        assert len(answers) == len(several) == 3 and sum(d.temperature == 0 for d in several) <= 1
    with pytest.raises(UserError, match="3 samples of greedy answers would be alike"):
        DistillConfig(samples=3)


@pytest.mark.parametrize(
    "kept, damaged",
    [("shard-00000.jsonl", "is not what was written there"), ("shard-00000.part", "holds a line that is no answer")],
)
def test_distill_keeps_answers_to_other_prompts_apart(lm, tmp_path, kept, damaged):
    config = DistillConfig(max_new_tokens=4, batch_size=2)
    distill.distill(lm, asked("a", "b"), config, tmp_path, progress=False)
    (tmp_path / "shard-00000.jsonl").rename(tmp_path / kept)
    before = contents(tmp_path)
    for prompts, name in ((asked("a", "c"), "2"), (asked("a"), "2")):
        with pytest.raises(UserError, match=f"answers a prompt '{name}' .* choose another folder"):
            distill.distill(lm, prompts, config, tmp_path)
    assert contents(tmp_path) == before
    (tmp_path / kept).write_text("torn\n")
    with pytest.raises(UserError, match=f"{kept} {damaged}"):
        distill.distill(lm, asked("a", "b"), config, tmp_path)


def test_distill_keeps_answers_made_in_another_way_apart(lm, tmp_path):
    config = DistillConfig(max_new_tokens=4, batch_size=2)
    prompts = asked("a", "b")
    distill.distill(lm, prompts, config, tmp_path, progress=False)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="made with target tiny, not other: choose another folder"):
        distill.distill(replace(lm, name="other"), prompts, config, tmp_path)
    for field, value in dict(max_new_tokens=5, seed=1, shard_size=7, temperatures=(0.0, 0.8)).items():
        with pytest.raises(UserError, match=f"made with {field} .*, not .*: choose another folder"):
            distill.distill(lm, prompts, replace(config, **{field: value}), tmp_path)
    assert contents(tmp_path) == before
    # What changes no answer may change; a folder of an earlier version says less, and that is compared.
    assert distill.distill(lm, prompts, replace(config, batch_size=1), tmp_path) == (0, [])
    (tmp_path / META).write_text('{"target": "tiny", "tokenizer": "tiny", "temperatures": [0.0]}\n')
    assert distill.distill(lm, prompts, replace(config, seed=1), tmp_path) == (0, [])
    with pytest.raises(UserError, match="made with target tiny, not other, and temperatures"):
        distill.distill(replace(lm, name="other"), prompts, replace(config, temperatures=(1.0,)), tmp_path)
    (tmp_path / META).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        distill.distill(lm, prompts, config, tmp_path)


def test_distill_stores_no_answer_that_failed(lm, tmp_path, monkeypatch):
    fail = lambda engine, request, key, ended: ended.put((key, Answer.failed("out of memory")))
    monkeypatch.setattr(distill.answer_file, "ask", fail)
    config = DistillConfig(max_new_tokens=8, max_prompt_tokens=14, batch_size=2)
    with pytest.raises(UserError, match="a was not answered: out of memory; the answers so far are kept"):
        distill.distill(lm, [Conversation("a", ("b",))], config, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [META]


@pytest.mark.slow
def test_two_processes_share_the_shards(tiny_target, tmp_path):
    """Each makes its own, and the one that is done first waits for the other."""
    root = Path(__file__).parents[2]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers"
    prompts.write_text("".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) + "\n" for i in range(4, 9)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = [f"target={tiny_target}", "distill.shard_size=3", "distill.batch_size=2", "distill.max_new_tokens=8"]
    command = [sys.executable, "train.py", "distill", "--config", "configs/tiny.py", "--draft", "none"]
    command += ["--prompts", str(prompts), "--out", str(out)]
    command += [argument for setting in settings for argument in ("--set", setting)]
    processes = [
        subprocess.Popen(
            [*command, "--distributed", f"127.0.0.1:{port},2,{i}"],
            cwd=root,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for i, process in enumerate(processes):
        shown, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert f"distill: {3 - i} of {3 - i} answers" in errors and "wrote" in shown
    assert len(read_documents(out, 96)) == 5


def test_the_command_reports_each_file_and_all_of_them(tiny_target, tiny_head, tmp_path, capsys):
    for name, words in (("a", range(4, 6)), ("b", range(6, 9))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) + "\n" for i in words))
    report = tmp_path / "report.json"
    files = ["--prompts", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    model = ["--target", str(tiny_target), "--draft", str(tiny_head), "--dtype", "float32"]
    assert train.main(["evaluate", *model, *files, "--max-new-tokens", "8", "--decode", "--json", str(report)]) == 0
    assert "all files" in capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["draft"] == str(tiny_head)
    for name, prompts in (("a.jsonl", 2), ("b.jsonl", 3), ("all", 5)):
        for counts in found["files"][name].values():
            assert [(count["draft_length"], count["answers"]) for count in counts] == [(k, prompts) for k in (1, 2, 3)]
    assert found["by_confidence"].keys() == {"a.jsonl", "b.jsonl", "all"}
    assert len(found["by_confidence"]["all"]["calibration_error"]) == 3
    # kappa counted along the answers is that of decoding them.
    assert found["files"]["all"]["offline"] == found["files"]["all"]["decoded"]


def test_the_command_writes_into_a_head_how_often_its_drafts_were_right(tiny_target, tiny_head, tmp_path):
    head, prompts = tmp_path / "head", tmp_path / "a.jsonl"
    shutil.copytree(tiny_head, head)
    prompts.write_text(json.dumps({"prompt": "w4 w5"}) + "\n")
    arguments = ["--target", str(tiny_target), "--dtype", "float32", "--max-new-tokens", "8", "--prompts", str(prompts)]
    assert load(str(tiny_target), draft=str(head)).acceptance is None
    report = ["--json", str(tmp_path / "report.json")]
    assert train.main(["evaluate", "--draft", str(head), *arguments, *report, "--record"]) == 0
    counted = json.loads((tmp_path / "report.json").read_text())["files"]["a.jsonl"]["offline"][-1]["acceptance"]
    assert load(str(tiny_target), draft=str(head)).acceptance == counted
    assert len(counted) == 3
