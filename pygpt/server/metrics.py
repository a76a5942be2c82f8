"""The server's metrics for Prometheus. The names are vLLM's, with the prefix `pygpt:`."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0, 300.0)
TOKENS = tuple(2.0**n for n in range(10))

GAUGES = {
    "num_requests_running": "Sequences in the running steps.",
    "num_requests_waiting": "Sequences that wait for a step.",
    "kv_cache_usage_perc": "Share of the bytes for keys and values that is in use or reserved, 0 to 1.",
}
COUNTERS = {
    "prefix_cache_queries": "Prompt tokens that were looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens that the prefix cache had.",
    "spec_decode_num_draft_tokens": "Tokens that speculation guessed.",
    "spec_decode_num_accepted_tokens": "Guessed tokens that were right.",
    "prompt_tokens": "Tokens of prompts.",
    "generation_tokens": "New tokens.",
    "request_success": "Finished choices, by reason.",
    "http_requests_client_disconnected": "Requests whose client left before the end.",
    "http_requests": "Answers, by status.",
}
HISTOGRAMS = {
    "time_to_first_token_seconds": "From a request's arrival to its first token.",
    "inter_token_latency_seconds": "From a token to the next one of the same choice.",
    "e2e_request_latency_seconds": "From a request's arrival to its last token.",
    "request_queue_time_seconds": "From a request's arrival to its first step.",
    "request_prefill_time_seconds": "From a request's first step to its first token.",
    "request_decode_time_seconds": "From a request's first token to its last one.",
    "iteration_tokens_total": "New tokens of a step.",
}
LABELS = {"request_success": ["model_name", "finished_reason"], "http_requests": ["status"]}  # of the rest: model_name


class Metrics:
    """Gauges, counters and histograms of some models."""

    def __init__(self, models: list[str]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry, self._all = CollectorRegistry(), dict[str, Any]()
        for name, about in (GAUGES | COUNTERS | HISTOGRAMS).items():
            kind: Any = Gauge if name in GAUGES else Counter if name in COUNTERS else Histogram
            own = {"buckets": LATENCIES if name.endswith("_seconds") else TOKENS} if name in HISTOGRAMS else {}
            self._all[name] = kind(f"pygpt:{name}", about, LABELS.get(name, ["model_name"]), registry=self._registry, **own)
        for name in COUNTERS.keys() - LABELS.keys():
            for model in models:
                self.add(name, model, 0)

    def add(self, name: str, model: str | None, value: float = 1, **labels: object) -> None:
        """Add to a counter, or add a value in seconds or tokens to a histogram. model: None for what has no model."""
        one = self._all[name].labels(**labels if model is None else {"model_name": model, **labels})
        (one.observe if name in HISTOGRAMS else one.inc)(value)

    def set(self, name: str, model: str, value: float) -> None:
        """Set a gauge, or a counter that another part of the program counts."""
        one = self._all[name].labels(model_name=model)
        if name in GAUGES:
            one.set(value)
        else:
            one.reset()
            one.inc(value)

    def text(self) -> bytes:
        """Return all metrics."""
        return generate_latest(self._registry)
