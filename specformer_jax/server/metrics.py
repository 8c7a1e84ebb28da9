"""/metrics: the engine's counts and the requests' latencies in Prometheus' text format, named as vLLM names its own."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from specformer_jax.engine import Engine
from specformer_jax.engine.request import FINISH_REASONS, Delta

PREFIX = "specformer:"
_FIRST_TOKEN = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 300)
_EACH_TOKEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_WHOLE = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

_GAUGES = {
    "num_requests_running": ("Requests being read or decoded.", lambda s: s.running),
    "num_requests_waiting": ("Requests in the queue.", lambda s: s.queued),
    "num_rows": ("Requests that can decode together.", lambda s: s.rows),
    "row_usage_perc": ("Share of the rows in use; 1 is all.", lambda s: min(s.running / s.rows, 1.0)),
    "kv_cache_usage_perc": (
        "Share of the cache's pages that requests hold; 1 is all.",
        lambda s: 1 - s.free_pages / s.pages,
    ),
    "spec_decode_budget": ("Tokens that a step reads, as the planner chose last.", lambda s: s.chosen_budget),
    "spec_decode_draft_length": ("Drafts a row that fit in them, on average.", lambda s: s.drafts_per_row),
    "forecast_tokens_per_second": (
        "Speed that the planner expected of the latest steps.",
        lambda s: s.forecast_tokens_per_second,
    ),
    "measured_tokens_per_second": ("Speed of the latest steps.", lambda s: s.measured_tokens_per_second),
}
# What three gauges were called before, for dashboards made then; the version after 0.1.0 leaves them out.
_OLD_GAUGES = {
    "num_slots": "num_rows",
    "slot_usage_perc": "row_usage_perc",
    "happened_tokens_per_second": "measured_tokens_per_second",
}
_COUNTERS = {
    "prompt_tokens": ("Prompt tokens of the requests admitted.", lambda s: s.prompt_tokens),
    "generation_tokens": ("Tokens generated.", lambda s: s.completion_tokens),
    "prefix_cache_queries": ("Prompt tokens looked up in the cache.", lambda s: s.prompt_tokens),
    "prefix_cache_hits": ("Prompt tokens found in the cache.", lambda s: s.cached_tokens),
    "num_preemptions": (
        "Times that a request left its row for lack of cache, to be read again.",
        lambda s: s.preempted,
    ),
    "decode_steps": ("Target passes, counted for each row.", lambda s: s.steps),
    "spec_decode_num_drafts": ("Target passes that verified drafts, counted for each row.", lambda s: s.drafts),
    "spec_decode_num_draft_tokens": ("Draft tokens verified.", lambda s: s.draft_tokens),
    "spec_decode_num_accepted_tokens": ("Draft tokens accepted.", lambda s: s.accepted_tokens),
}


class ServerMetrics(Collector):
    """What /metrics shows: the engine's stats when it is read, and what each finished request took."""

    def __init__(self, engine: Engine, model: str):
        self._engine, self._model = engine, model
        self._registry = CollectorRegistry()
        self._registry.register(self)

        def histogram(name: str, text: str, buckets: tuple) -> Histogram:
            family = Histogram(PREFIX + name, text, ["model_name"], buckets=buckets, registry=self._registry)
            return family.labels(model)

        self._first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN)
        self._each_token = histogram(
            "time_per_output_token_seconds", "Mean time of a request's later tokens.", _EACH_TOKEN
        )
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the last token.", _WHOLE)
        self._queued = histogram("request_queue_time_seconds", "From arrival until it was in a row.", _FIRST_TOKEN)
        self._reading = histogram("request_prefill_time_seconds", "From then to the first token.", _FIRST_TOKEN)
        self._answering = histogram("request_decode_time_seconds", "From the first token to the last.", _WHOLE)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS)
        self._answer = histogram("request_generation_tokens", "Tokens of a request's answer.", _TOKENS)
        finished = Counter(
            PREFIX + "request_success",
            "Requests that ended, by reason.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        # vLLM's word for a client that went away is abort.
        names = {reason: "abort" if reason == "cancelled" else reason for reason in FINISH_REASONS}
        self._finished = {reason: finished.labels(model, name) for reason, name in names.items()}

    def finished(self, delta: Delta) -> None:
        """Counts a request by its last delta; from any thread."""
        assert delta.finish_reason is not None
        usage = delta.usage
        self._finished[delta.finish_reason].inc()
        if usage.completion_tokens:
            self._first_token.observe(usage.time_to_first_token)
            self._whole.observe(usage.seconds)
            self._queued.observe(usage.queue_time)
            self._reading.observe(usage.time_to_first_token - usage.queue_time)
            self._answering.observe(usage.seconds - usage.time_to_first_token)
            self._prompt.observe(usage.prompt_tokens)
            self._answer.observe(usage.completion_tokens)
        if usage.completion_tokens > 1:
            later = usage.seconds - usage.time_to_first_token
            self._each_token.observe(later / (usage.completion_tokens - 1))

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The engine's part; `prometheus_client` calls it."""
        stats = self._engine.stats()
        old = {name: (f"Now {PREFIX}{new}.", _GAUGES[new][1]) for name, new in _OLD_GAUGES.items()}
        for name, (text, value) in (_GAUGES | old).items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
            gauge.add_metric([self._model], value(stats))
            yield gauge
        for name, (text, value) in _COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
            counter.add_metric([self._model], value(stats))
            yield counter
        positions = CounterMetricFamily(
            PREFIX + "spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens accepted, by position from 0.",
            labels=["model_name", "position"],
        )
        for position, accepted in enumerate(stats.accepted_per_position):
            positions.add_metric([self._model, str(position)], accepted)
        yield positions
