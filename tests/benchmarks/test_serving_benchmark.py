"""`benchmarks.serving` runs through on the tiny model, and its figures hang together."""

import json

import pytest

from benchmarks import serving
from specformer_jax.planning.budgets import step_budgets
from tests.engine import tiny_lm


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serving, "load", lambda *_, **__: tiny_lm.make())
    monkeypatch.setattr(serving.command_line, "keep_compiled_programs", lambda: None)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join('{"prompt": "%s"}\n' % ("fbclh"[: 1 + i % 5] + "fg" * i) for i in range(8)))
    arguments = (
        f"--requests 12 --concurrency 1,2 --rounds 3 --max-new-tokens 20 --draft-lengths 0,2 --prompts {prompts}"
    )
    assert serving.main([*arguments.split(), str(prompts), "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(e["concurrency"], e["policy"]) for e in found["entries"]] == [
        (size, name) for size in (1, 2) for name in ("off", "k = 2", "auto")
    ]
    tokens = {e["tokens"] for e in found["entries"]}
    assert len(tokens) == 1, "every policy makes the same tokens"
    for e in found["entries"]:
        assert e["policy"] != "off" or (e["over_off"] == 1 and e["kappa"] == 1)
        assert e["policy"] != "k = 2" or e["kappa"] > 1
        assert len(e["tokens_per_second_by_round"]) == {1: 3, 2: 2}[e["concurrency"]]
    decoding = {budget.size for budget in step_budgets(2, tiny_lm.DRAFTS, 128) if not budget.chunk}
    assert {f"{size} tokens" for size in decoding} <= set(found["step_ms"])
    assert found["continuous_batching"]["over_full_rows"] > 0
    assert "| 2 | auto |" in capsys.readouterr().out
