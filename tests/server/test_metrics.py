"""What /metrics and /health show, and the dashboard that charts it."""

import json
import re
import time
from pathlib import Path

import pytest

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "w5 w6"}]
DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "dashboard.json"


def test_health_and_metrics(served):
    assert served.request("GET", "/health")[0] == 200
    body = {"model": served.engine.lm.name, "messages": MESSAGES, "max_tokens": 6, "seed": 1, "speculative": 3}
    before = metrics(served)
    usage = json.loads(served.request("POST", CHAT, body)[2])["usage"]
    deadline = time.monotonic() + 30
    grown = {"specformer:generation_tokens_total": 0.0}
    # The engine counts a call right after it has handed out the tokens.
    while grown["specformer:generation_tokens_total"] < usage["completion_tokens"] and time.monotonic() < deadline:
        grown = {name: value - before.get(name, 0) for name, value in metrics(served).items()}
    assert grown["specformer:generation_tokens_total"] == usage["completion_tokens"]
    assert grown["specformer:prompt_tokens_total"] == usage["prompt_tokens"]
    assert grown["specformer:e2e_request_latency_seconds_count"] == 1
    assert grown["specformer:time_to_first_token_seconds_count"] == 1
    assert grown["specformer:time_per_output_token_seconds_count"] == 1
    assert grown["specformer:request_prompt_tokens_sum"] == usage["prompt_tokens"]
    assert grown["specformer:request_generation_tokens_sum"] == usage["completion_tokens"]
    parts = [grown[f"specformer:request_{part}_time_seconds_sum"] for part in ("queue", "prefill", "decode")]
    assert min(parts) >= 0 and sum(parts) == pytest.approx(grown["specformer:e2e_request_latency_seconds_sum"])
    assert sum(value for name, value in grown.items() if name.startswith("specformer:request_success_total")) == 1
    assert grown["specformer:spec_decode_num_drafts_total"] > 0
    per_position = [v for n, v in grown.items() if n.startswith("specformer:spec_decode_num_accepted_tokens_per_pos")]
    assert sum(per_position) == grown["specformer:spec_decode_num_accepted_tokens_total"]
    served.app.state.service.draining = True
    assert served.request("GET", "/health")[0] == 503
    served.app.state.service.draining = False


def test_the_cache_in_use_and_preemptions_have_the_names_that_vllm_gives_them(served):
    values = metrics(served)
    assert 0 <= values["specformer:kv_cache_usage_perc"] <= 1
    assert values["specformer:num_preemptions_total"] == served.engine.stats().preempted
    assert "specformer:spec_decode_draft_length" in values


def test_former_names_of_metrics_say_the_same(served):
    values = metrics(served)
    assert values["specformer:num_rows"] == values["specformer:num_slots"] == served.engine.config.rows
    assert values["specformer:row_usage_perc"] == values["specformer:slot_usage_perc"]
    assert values["specformer:measured_tokens_per_second"] == values["specformer:happened_tokens_per_second"]


def metrics(served):
    """Name, with all labels but the model's, to value."""
    status, headers, body = served.request("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    values = {}
    for line in body.decode().splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = name.replace(f'model_name="{served.engine.lm.name}"', "").replace("{}", "").replace("{,", "{")
            values[name] = float(value)
    return values


def test_the_dashboard_charts_what_is_there(served):
    """Each of its expressions names metrics that are exported, with balanced brackets."""
    exported = {re.split(r"[{ ]", name)[0] for name in metrics(served)}
    # Nothing has a label before it happens.
    exported |= {"specformer:request_success_total"}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    named = [set(re.findall(r"specformer:\w+", expression)) for expression in expressions]
    assert len(panels) == 12 and all(named) and set().union(*named) <= exported
    assert all(expression.count("(") == expression.count(")") for expression in expressions)
