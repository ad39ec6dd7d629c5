"""What the server counts, for Prometheus."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from bagel_opt.sampling.engine import Engine

STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
LATENCY = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)


class Metrics:
    """One server's figures, in a registry of their own."""

    def __init__(self):
        registry = self.registry = CollectorRegistry()
        self.info = Info("bagel", "What computes", registry=registry)
        self.waiting = Gauge("bagel_requests_waiting", "Requests in line", registry=registry)
        self.running = Gauge("bagel_requests_running", "Requests that have rows", registry=registry)
        self.rows = Gauge("bagel_rows_in_use", "Rows of the static batches that requests have", registry=registry)
        self.row_capacity = Gauge("bagel_rows", "Rows of the static batches", registry=registry)
        self.step_seconds = Histogram("bagel_step_seconds", "One round of the engine", buckets=STEP, registry=registry)
        self.tokens = Counter("bagel_tokens", "Tokens written", registry=registry)
        self.pictures = Counter("bagel_pictures", "Pictures drawn", registry=registry)
        self.videos = Counter("bagel_videos", "Videos drawn", registry=registry)
        self.latency = Histogram(
            "bagel_request_seconds",
            "From acceptance to the end, by kind of request",
            ["kind"],
            buckets=LATENCY,
            registry=registry,
        )
        self.failures = Counter("bagel_failures", "Requests that failed, by exception", ["error"], registry=registry)
        self.rejected = Counter("bagel_rejected", "Requests refused because the line was full", registry=registry)
        self.responses = Counter("bagel_responses", "HTTP responses", ["path", "status"], registry=registry)

    def measure(self, engines: Iterable[Engine]) -> None:
        engines = list(engines)
        rows = sum(engine.profile.rows * engine.profile.batches for engine in engines)
        self.waiting.set(sum(len(engine.waiting) for engine in engines))
        self.running.set(sum(len(engine.active) for engine in engines))
        self.rows.set(rows - sum(len(engine.batches.free) for engine in engines))
        self.row_capacity.set(rows)

    def ended(self, kind: str, outputs: list | Exception, seconds: float) -> None:
        if isinstance(outputs, Exception):
            self.failures.labels(type(outputs).__name__).inc()
            return
        self.latency.labels(kind).observe(seconds)
        self.videos.inc(sum(isinstance(output, list) for output in outputs))
        self.pictures.inc(sum(not isinstance(output, str | list) for output in outputs))
