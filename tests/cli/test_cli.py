"""`serve.py generate` as a user calls it: what it prints, writes and refuses. A tiny model, one process a call."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import serve
from specformer_jax import files
from specformer_jax.batch import generation
from specformer_jax.cli import command_line, http
from specformer_jax.config import SamplingParams, Shape
from specformer_jax.decoding import decode
from specformer_jax.errors import UserError
from specformer_jax.loading.language_model import load
from specformer_jax.loading.target_config import read_config
from specformer_jax.loading.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def target(tiny_target):
    return tiny_target


@pytest.fixture(scope="module")
def head(tiny_head):
    return tiny_head


def _generate(target, *arguments):
    return serve.main(["generate", "--target", str(target), "--dtype", "float32", "--draft", "none", *arguments])


def _rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_prompt_streams_and_sums_up(target, capsys):
    assert _generate(target, "--prompt", "w5 w6", "--max-new-tokens", "12") == 0
    out, err = capsys.readouterr()
    assert out.strip() and "to compile" in err and "kappa" in err and "drafts a pass: 0" in err


def test_quiet_prints_the_answer_alone(target, capsys):
    assert _generate(target, "--prompt", "w5 w6", "--max-new-tokens", "12", "--quiet") == 0
    out, err = capsys.readouterr()
    assert out.strip() and not err


@pytest.mark.slow
def test_answers_follow_a_grammar(tmp_path, capsys, monkeypatch):
    """On the terminal and in a file, with drafts and without; a file made with one is not continued with another."""
    monkeypatch.setenv("SPECFORMER_CACHE", str(tmp_path / "cache"))
    target = Path(__file__).parents[1] / "golden" / "sp"
    rules, schema, prompts = (tmp_path / name for name in ("rules.lark", "schema.json", "p.jsonl"))
    rules.write_text('start: "yes" | "no"')
    schema.write_text('{"enum": ["yes", "no"]}')
    prompts.write_text('{"id": "a", "prompt": "model"}\n{"id": "b", "turns": ["of", " and"]}\n')
    sizes = ["--raw", "--quiet", "--batch-size", "2", "--max-new-tokens", "12"]
    for flags in (["--choice", "yes", "--choice", "no"], ["--json-schema", str(schema)], ["--grammar", str(rules)]):
        assert _generate(target, "--prompt", "model", *flags, *sizes) == 0
        assert capsys.readouterr().out.strip().strip('"') in ("yes", "no")
    out = tmp_path / "o.jsonl"
    asked = ["--prompts", str(prompts), "--output", str(out), "--draft", "ngram", *sizes]
    assert _generate(target, *asked, "--regex", "yes|no") == 0
    assert len(_rows(out)) == 3 and all(row["text"].strip() in ("yes", "no") for row in _rows(out))
    assert _generate(target, *asked, "--resume") == 2 and "grammar" in capsys.readouterr().err


def test_a_verification_that_is_not_exact_says_so(target, tmp_path, capsys):
    """In the rows and on the terminal; a file made with it is not continued exactly; what cannot have it refuses."""
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_text('{"id": "a", "prompt": "w5 w6 w5 w6"}\n')
    asked = ["--prompts", str(prompts), "--output", str(out), "--draft", "ngram", "--draft-length", "2"]
    asked += ["--temperature", "1", "--max-new-tokens", "8"]
    block = ["--verification", "block-distribution"]
    assert _generate(target, *asked, *block) == 0
    assert "verified by block-distribution: lossless in distribution" in capsys.readouterr().err
    assert [row["verification"] for row in _rows(out)] == ["block-distribution"]
    assert _generate(target, *asked, "--resume") == 2 and "verification block-distribution" in capsys.readouterr().err
    out.unlink()
    assert _generate(target, *asked) == 0 and "verified by" not in capsys.readouterr().err
    assert "verification" not in _rows(out)[0]
    out.unlink()
    assert _generate(target, *asked, "--verification", "fly-lossy", "--fly-window", "1") == 0
    assert "verified by fly-lossy: LOSSY" in capsys.readouterr().err and _rows(out)[0]["verification"] == "fly-lossy"
    assert _generate(target, "--prompt", "w5", "--fly-entropy", "1") == 2
    assert "--fly-window and --fly-entropy need --verification fly-lossy" in capsys.readouterr().err
    ask = ["--prompt", "w5", *block]
    for flags in (["--strict", "64"], ["--choice", "w1"], ["--draft", "none"], ["--mesh", "1,1,1"]):
        assert _generate(target, *ask, "--draft", "ngram", *flags) == 2
        assert "has no verification but the exact one: leave block-distribution out" in capsys.readouterr().err


def test_a_raw_answer_continues_its_prompt(tmp_path, capsys):
    """With the space of its first word, on the terminal as in a file; a later turn follows the answer as it stands."""
    target = Path(__file__).parents[1] / "golden" / "sp"
    flags = ["--raw", "--max-new-tokens", "8", "--quiet"]
    assert _generate(target, "--prompt", "batch model of", *flags) == 0
    shown = capsys.readouterr().out.removesuffix("\n")
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_text('{"id": "a", "turns": ["batch model of", " and then"]}\n')
    assert _generate(target, "--prompts", str(prompts), "--output", str(out), *flags) == 0
    first, second = _rows(out)
    assert shown == first["text"] and shown.startswith(" ")
    tokenizer = load_tokenizer(target, read_config(target))
    assert second["prompt_tokens"] == len(tokenizer.encode("batch model of" + shown + " and then"))


def test_answers_do_not_depend_on_drafts_or_batch(target, head, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(
            json.dumps({"prompt": " ".join(f"w{3 + i * j % 20}" for j in range(1, 4 + 3 * i))}) + "\n" for i in range(5)
        )
    )
    flags = ["--prompts", str(prompts), "--max-new-tokens", "20", "--temperature", "0.8", "--seed", "3", "--quiet"]
    outputs = [tmp_path / f"{i}.jsonl" for i in range(4)]
    assert _generate(target, *flags, "--output", str(outputs[0]), "--batch-size", "1") == 0
    assert _generate(target, *flags, "--output", str(outputs[1]), "--batch-size", "8", "--draft", str(head)) == 0
    assert _generate(target, *flags, "--output", str(outputs[2]), "--draft", str(head), "--draft-length", "1") == 0
    assert _generate(target, *flags, "--output", str(outputs[3]), "--draft", "ngram") == 0
    plain, *drafted = [_rows(file) for file in outputs]
    for rows in drafted:
        assert [row["token_ids"] for row in rows] == [row["token_ids"] for row in plain]
    wanted = {
        "id",
        "prompt",
        "text",
        "token_ids",
        "finish_reason",
        "prompt_tokens",
        "completion_tokens",
        "steps",
        "kappa",
    }
    assert wanted | {"accepted_per_position", files.SEAL} == set(plain[0])
    assert len({len(row["accepted_per_position"]) for row in drafted[0]}) == 1
    assert {len(row["accepted_per_position"]) for row in drafted[1]} == {1}
    for row in plain:
        assert row["completion_tokens"] == len(row["token_ids"]) == row["steps"] + 1
        assert row["kappa"] == 1.0


def test_turns_follow_each_other(target, tmp_path):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_text('{"id": "a", "turns": ["w5", "w6"]}\n{"id": "b", "turns": ["w7"]}\n')
    assert _generate(target, "--prompts", str(prompts), "--max-new-tokens", "4", "--output", str(out), "--quiet") == 0
    rows = {(row["id"], row.get("turn")): row for row in _rows(out)}
    assert set(rows) == {("a", 0), ("b", None), ("a", 1)}
    # The second prompt holds the first one, its answer and the new message.
    assert rows["a", 1]["prompt_tokens"] == 3 + len(rows["a", 0]["text"].split()) + 2 + 3


def test_resume_answers_only_what_is_missing(target, tmp_path):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_text("".join(f'{{"prompt": "w{i}"}}\n' for i in range(4, 8)))
    flags = ["--prompts", str(prompts), "--max-new-tokens", "4", "--output", str(out), "--quiet", "--batch-size", "2"]
    assert _generate(target, *flags) == 0
    whole = out.read_text()
    out.write_text(whole[: len(whole) * 3 // 5])
    assert _generate(target, *flags) == 2, "an existing file is not overwritten"
    assert _generate(target, *flags, "--resume") == 0
    assert out.read_text() == whole


def test_a_prompt_longer_than_the_context_fails_alone(target, tmp_path):
    context = read_config(target).context
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_text(json.dumps({"prompt": "w5 " * context}) + '\n{"prompt": "w6"}\n')
    assert _generate(target, "--prompts", str(prompts), "--max-new-tokens", "4", "--output", str(out), "--quiet") == 0
    by_id = {row["id"]: row for row in _rows(out)}
    assert by_id["1"]["finish_reason"] == "error" and f"the context holds {context}" in by_id["1"]["error"]
    assert by_id["2"]["finish_reason"] in ("stop", "length")


MISTAKES = {
    "draft length": (["--prompt", "w5", "--draft-length", "9"], "draft length 9 is out of range"),
    "mesh text": (["--prompt", "w5", "--mesh", "1,8"], "must be three numbers of devices"),
    "mesh too large": (["--prompt", "w5", "--mesh", "1,1,4096"], "needs 4096 devices"),
    "draft length text": (["--prompt", "w5", "--draft-length", "many"], "must be auto or a number"),
    "draft length digit": (["--prompt", "w5", "--draft-length", "²"], "must be auto or a number"),
    "temperature": (["--prompt", "w5", "--temperature", "-1"], "temperature -1.0 must be"),
    "batch size": (["--prompt", "w5", "--batch-size", "0"], "batch-size 0 must be"),
    "empty prompt": (["--prompt", ""], "a prompt is empty"),
    "no Unicode": (["--prompt", "w5 \udcff"], "--prompt: the text is no Unicode"),
    "no file": (["--prompts", "none.jsonl"], "cannot be read"),
    "no head": (["--prompt", "w5", "--draft", "nowhere"], "nowhere is no draft head"),
    "resume nothing": (["--prompt", "w5", "--resume"], "name it with --output"),
    "strict": (["--prompt", "w5", "--strict", "7"], "--strict takes 64 to"),
    "no schema": (["--prompt", "w5", "--json-schema", "none.json"], "none.json cannot be read"),
    "no choice": (["--prompt", "w5", "--choice", ""], "none may be empty"),
    "strict grammar": (["--prompt", "w5", "--regex", "w5", "--strict", "64"], "leave out one of both"),
    "unwritable": (["--prompt", "w5", "--output", "/dev/null/x.jsonl"], "cannot be written"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_exit_with_2_and_one_sentence(target, name, capsys):
    arguments, message = MISTAKES[name]
    assert _generate(target, *arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and "Traceback" not in err and err.count("\n") == 1


def test_a_mistake_leaves_no_empty_output_behind(tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert _generate(tmp_path / "nowhere", "--prompt", "w5", "--output", str(out)) == 2
    assert "nowhere" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_head_for_another_target_is_refused(target, head, tmp_path, capsys):
    other = tmp_path / "head"
    shutil.copytree(head, other)
    config = files.read_sealed(other / "config.json")
    config["target"]["width"] = 999
    (other / "config.json").write_text(json.dumps(config))
    assert _generate(target, "--prompt", "w5", "--draft", str(other)) == 2
    assert "width 999" in capsys.readouterr().err
    config = files.read_sealed(head / "config.json")
    (other / "config.json").write_text(json.dumps(config | {"tokenizer": "0123456789abcdef"}))
    assert _generate(target, "--prompt", "w5", "--draft", str(other)) == 2
    assert "trained with another tokenizer" in capsys.readouterr().err


def test_unknown_targets_are_refused(tmp_path, capsys):
    assert _generate(tmp_path / "nothing", "--prompt", "a") == 2
    assert capsys.readouterr().err.startswith("error: ")
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}')
    assert _generate(tmp_path, "--prompt", "a") == 2
    assert "llama, qwen2, qwen3" in capsys.readouterr().err


def test_the_python_interface(target, head):
    lm = load(str(target), draft=str(head), dtype="float32")
    prompts = ["w5 w6", "w7"]
    sampling_params = SamplingParams(max_new_tokens=8, temperature=0.5, seed=1)
    plain = generation.generate(lm, prompts, sampling_params=sampling_params, draft_length=0)
    assert [a.token_ids for a in generation.generate(lm, prompts, sampling_params=sampling_params)] == [
        a.token_ids for a in plain
    ]
    assert generation.generate(lm, [prompts[1]], sampling_params=sampling_params)[0].text == plain[1].text


def test_the_strict_mode_fixes_every_shape(target, head):
    """bfloat16: bitwise the same answers at every k, alone and in company, for short and long prompts."""
    lm = load(str(target), draft=str(head), dtype="bfloat16")
    prompts = [[5, 6], [7] * 20, [8, 9, 10]]
    sampling_params = SamplingParams(max_new_tokens=16)
    shape = Shape(rows=3, window=4, chunk=64, positions=100)

    def run(indices, k):
        chosen = [prompts[i] for i in indices]
        found = dict(generation.generate_ids(lm, chosen, sampling_params, draft_length=k, shape=shape))
        return {i: found[j].token_ids for j, i in enumerate(indices)}

    together = run([0, 1, 2], 3)
    for i in range(3):
        assert run([i], 0)[i] == run([i], 2)[i] == together[i]


def test_jobs_of_one_bucket_share_their_programs(target, head):
    """Other prompt lengths, batch fill, temperatures and seeds compile nothing; nor do other top-k, top-p and min-p."""
    lm = load(str(target), draft=str(head), dtype="float32")
    for few, other in (({}, {}), ({"top_k": 3}, {"top_p": 0.9, "min_p": 0.1})):
        list(generation.generate_ids(lm, [[5] * 40, [6]], SamplingParams(max_new_tokens=16, **few)))
        before = decode.jit_start._cache_size(), decode.jit_run._cache_size()
        sampling_params = SamplingParams(max_new_tokens=12, temperature=0.9, seed=5, **other)
        list(generation.generate_ids(lm, [[7] * 9, [8] * 48], sampling_params))
        assert (decode.jit_start._cache_size(), decode.jit_run._cache_size()) == before


@pytest.mark.parametrize(
    ("lengths", "chunk"), [([45], 48), ([40, 45, 87], 48), ([40, 45, 700], 192), ([40, 45, 4000], 256), ([300], 256)]
)
def test_a_job_reads_its_prompts_in_chunks_of_the_middle_one(lengths, chunk):
    """Unless the longest would take many of them."""
    shape = generation.job_shape(lengths, 16, batch_size=4, window=1, context=8192)
    assert shape.chunk == chunk and shape.positions >= max(lengths) + 16


def test_lookup_stands_beside_a_head_unless_it_is_left_out(target, head):
    looking, alone = (load(str(target), draft=str(head), lookup=on, dtype="float32") for on in (True, False))
    assert looking.model != alone.model == looking.without_lookup().model
    assert alone.without_lookup() is alone
    assert _generate(target, "--draft", str(head), "--no-lookup", "--prompt", "w5", "--quiet") == 0


def test_auto_takes_no_head_of_another_target(target):
    lm = load(str(target), dtype="float32")
    assert lm.model.drafter is None and lm.draft_name is None
    assert lm.model.max_draft_length == 0
    assert jnp.dtype(lm.params["target"]["embedding"].dtype) == jnp.float32
    assert dataclasses.asdict(lm.config)["architecture"] == "llama"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--api-key", "one", "--api-key", " "], "an --api-key is empty"),
        (["--host", ".local"], "cannot listen on .local"),
        (["--port", "70000"], "cannot listen on 127.0.0.1 port 70000"),
        (["--grace", "-1"], "grace -1.0 must be"),
    ],
)
def test_a_server_refuses_before_it_loads_the_model(capsys, arguments, message):
    assert serve.main(["http", "--target", "nowhere", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("lines", [1, 10**6])
def test_a_reader_that_has_read_enough_ends_the_command_quietly(lines):
    printing = f"run_command(lambda: print('y\\n' * {lines}))"
    command = f"import sys; from specformer_jax.cli.command_line import run_command; sys.exit({printing})"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    arguments = [sys.executable, "-c", command]
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.close()
        assert running.stderr.read() == b"" and running.wait() == 141


def test_a_pipe_that_is_not_the_output_is_no_quiet_end():
    def command():
        raise BrokenPipeError("a worker has gone")

    with pytest.raises(BrokenPipeError, match="a worker has gone"):
        command_line.run_command(command)


def test_a_batch_checks_its_files_before_the_model(target, tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    command = ["batch", "--input", str(source), "--output", str(output), "--target", str(tmp_path / "no-model")]
    for text, sentence in (
        (None, "cannot be read"),
        ('{"custom_id": "a"}\n', "line 1: give a row"),
        ('{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}\n', "no-model"),
    ):
        if text is not None:
            source.write_text(text)
        assert serve.main(command) == 2
        assert sentence in capsys.readouterr().err
    output.write_text("an answer")
    assert serve.main([*command[:-1], str(target)]) == 2 and "is there already" in capsys.readouterr().err


def test_two_servers_started_on_one_port():
    """Both may bind it before either listens; the later one must end with a sentence."""
    first = http._bind("127.0.0.1", 0)
    second = http._bind("127.0.0.1", first.getsockname()[1])
    http._listen(first)
    with pytest.raises(UserError, match="cannot listen on 127.0.0.1 port"):
        http._listen(second)
    first.close()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--target", "x" * 3000], r"x{40}\.\.\. is longer than the name of a file may be"),
        (["--regex=--"], "argument --regex: expected one argument"),
        (["--regex", "\udcff"], r"no answer can match '\\udcff', which cannot be written as UTF-8"),
        (["--prompts", ""], "error: "),
    ],
)
def test_odd_values_are_one_sentence(arguments, said, capsys):
    words = ["generate", *arguments] if arguments[0] == "--prompts" else ["generate", "--prompt", "a", *arguments]
    try:
        code = serve.main(words)
    except SystemExit as ended:  # argparse's own
        code = ended.code
    assert code == 2 and re.search(said, capsys.readouterr().err)
