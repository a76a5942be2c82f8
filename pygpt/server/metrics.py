"""The server's metrics in Prometheus's text format. The names are vLLM's, with the prefix `pygpt:`."""

from bisect import bisect_left
from collections import Counter, defaultdict

LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0, 300.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

GAUGES = {
    "num_requests_running": "Sequences in the running steps.",
    "num_requests_waiting": "Sequences that wait for a step.",
    "kv_cache_usage_perc": "Share of the bytes for keys and values that is in use or reserved, 0 to 1.",
}
COUNTERS = {
    "prefix_cache_queries": "Prompt tokens that were looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens that the prefix cache had.",
    "prompt_tokens": "Tokens of prompts.",
    "generation_tokens": "New tokens.",
    "request_success": "Finished requests, by reason.",
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


class Metrics:
    """Counters and histograms, for the event loop's thread only."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._sums: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._buckets: dict[tuple[str, str], list[int]] = {}

    def count(self, name: str, model: str, amount: int = 1, **labels: object) -> None:
        """Add to a counter."""
        self._counts[name, _labels(model, labels)] += amount

    def observe(self, name: str, model: str, value: float) -> None:
        """Add a value, in seconds or tokens, to a histogram."""
        key, edges = (name, _labels(model, {})), _edges(name)
        self._sums[key] += value
        self._buckets.setdefault(key, [0] * (len(edges) + 1))[bisect_left(edges, value)] += 1

    def text(self, gauges: dict[str, dict[str, float]]) -> str:
        """Return all metrics. gauges: the values of each gauge by model."""
        lines = []
        for name, about in GAUGES.items():
            lines += _head(name, about, "gauge")
            lines += [f"pygpt:{name}{{{_labels(model, {})}}} {value}" for model, value in gauges[name].items()]
        models = list(gauges["num_requests_running"])
        for name, about in COUNTERS.items():
            lines += _head(f"{name}_total", about, "counter")
            found = {labels: value for (counter, labels), value in self._counts.items() if counter == name}
            if not found and name not in ("request_success", "http_requests"):
                found = {_labels(model, {}): 0 for model in models}
            lines += [f"pygpt:{name}_total{{{labels}}} {value}" for labels, value in found.items()]
        for name, about in HISTOGRAMS.items():
            lines += _head(name, about, "histogram")
            for (histogram, labels), buckets in self._buckets.items():
                if histogram == name:
                    total = 0
                    for edge, amount in zip((*_edges(name), "+Inf"), buckets, strict=True):
                        total += amount
                        lines.append(f'pygpt:{name}_bucket{{{labels},le="{edge}"}} {total}')
                    lines.append(f"pygpt:{name}_sum{{{labels}}} {self._sums[histogram, labels]}")
                    lines.append(f"pygpt:{name}_count{{{labels}}} {total}")
        return "\n".join(lines) + "\n"


def _edges(name: str) -> tuple[float, ...]:
    return LATENCIES if name.endswith("_seconds") else ROWS


def _head(name: str, about: str, kind: str) -> list[str]:
    return [f"# HELP pygpt:{name} {about}", f"# TYPE pygpt:{name} {kind}"]


def _labels(model: str, labels: dict[str, object]) -> str:
    pairs = {"model_name": model, **labels}
    return ",".join(f'{name}="{_escaped(str(value))}"' for name, value in pairs.items())


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
