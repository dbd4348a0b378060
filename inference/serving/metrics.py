"""What a server counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counts of one server; `text` is the page `/metrics`.

    Args:
        waiting: how many sequences are in the queue.
    """

    def __init__(self, waiting: Callable[[], int]):
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "gengram_requests", "Requests, by path and status.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram("gengram_request_seconds", "Seconds until the answer.", ["path"], registry=registry)
        self.bases = Counter("gengram_bases", "Bases that were read or made, by path.", ["path"], registry=registry)
        self.batches = Histogram("gengram_batch_sequences", "Sequences of a batch.", buckets=_SIZES, registry=registry)
        Gauge("gengram_waiting", "Sequences in the queue.", registry=registry).set_function(waiting)

    def text(self) -> bytes:
        """All counts in Prometheus' text format."""
        return generate_latest(self._registry)
