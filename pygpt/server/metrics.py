"""The server's metrics for Prometheus. The names are vLLM's, with the prefix `pygpt:`."""

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
LABELS = {"request_success": ["finished_reason"], "http_requests": ["status"]}


class Metrics:
    """Gauges, counters and histograms of some models."""

    def __init__(self, models: list[str]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        own = ["model_name"]
        self._gauges = {name: Gauge(f"pygpt:{name}", about, own, registry=registry) for name, about in GAUGES.items()}
        self._counters, self._histograms = dict[str, Counter](), dict[str, Histogram]()
        for name, about in COUNTERS.items():
            self._counters[name] = Counter(f"pygpt:{name}", about, own + LABELS.get(name, []), registry=registry)
        for name, about in HISTOGRAMS.items():
            edges = LATENCIES if name.endswith("_seconds") else TOKENS
            self._histograms[name] = Histogram(f"pygpt:{name}", about, own, registry=registry, buckets=edges)
        self._totals: dict[tuple[str, str], int] = {}
        for model in models:
            for name in COUNTERS.keys() - LABELS.keys():
                self.count(name, model, 0)

    def count(self, name: str, model: str, amount: int = 1, **labels: object) -> None:
        """Add to a counter."""
        self._counters[name].labels(model_name=model, **labels).inc(amount)

    def count_to(self, name: str, model: str, total: int) -> None:
        """Raise a counter to a total that another part of the program counts."""
        self.count(name, model, total - self._totals.get((name, model), 0))
        self._totals[name, model] = total

    def observe(self, name: str, model: str, value: float) -> None:
        """Add a value, in seconds or tokens, to a histogram."""
        self._histograms[name].labels(model_name=model).observe(value)

    def text(self, gauges: dict[str, tuple[float, ...]]) -> bytes:
        """Return all metrics. gauges: each model's values of the gauges, in order."""
        for model, values in gauges.items():
            for gauge, value in zip(self._gauges.values(), values, strict=True):
                gauge.labels(model_name=model).set(value)
        return generate_latest(self._registry)
