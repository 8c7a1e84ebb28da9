"""`serve.py generate` where there is nothing to tell: no time that passed, no numbers to take a token from."""

from __future__ import annotations

import json
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

import serve
from specformer_jax.batch import generation
from specformer_jax.cli import generate


def test_what_takes_no_time_has_no_rate():
    """Such as a run that is resumed with nothing left, or one that the compiler's clock covers whole."""
    answer = generation.Answer("a", [1, 2], "length", 3, 2, 1, 1.0, [])
    said = generate._summary([answer] * 50, 4.0, 2.0)
    assert said.startswith("100 tokens in 2.0 s: 50.0 tokens/s, and 2.0 s to compile")
    for answers, seconds, compiling in (([], 3.0, 0.0), ([answer], 0.01, 0.0), ([answer], 2.0, 2.1)):
        said = generate._summary(answers, seconds, compiling)
        assert "too few to be timed" in said and "tokens/s" not in said


def test_hidden_states_that_are_no_numbers_are_an_error_and_no_text(tiny_target, tmp_path, capsys):
    target = shutil.copytree(tiny_target, tmp_path / "target")
    tensors = load_file(target / "model.safetensors")
    tensors["model.norm.weight"][:] = np.nan
    save_file(tensors, target / "model.safetensors")
    command = ["generate", "--target", str(target), "--dtype", "float32", "--draft", "none", "--quiet"]
    command += ["--max-new-tokens", "12"]
    assert serve.main([*command, "--prompt", "w5 w6"]) == 2
    out, err = capsys.readouterr()
    assert not out.strip() and "the target's hidden states are not finite" in err
    prompts, output = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_text('{"prompt": "w5"}\n{"prompt": "w6"}\n')
    assert serve.main([*command, "--prompts", str(prompts), "--output", str(output)]) == 2
    assert "no prompt could be answered: the target's hidden states are not finite" in capsys.readouterr().err
    for line in output.read_text().splitlines():
        row = json.loads(line)
        assert row["finish_reason"] == "error" and row["text"] == "" and "not finite" in row["error"]
