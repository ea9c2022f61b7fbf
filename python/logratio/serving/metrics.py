"""Metrics of a server in the format of Prometheus. Needs prometheus-client.

Labels have a bounded number of values and no content of requests: routes, statuses, error codes,
names of bundles. If `FOLDER` is set, the processes of a server share their metrics in its files.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import InfoMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from logratio.serving.request_record import RequestRecord
from logratio.serving.service import ScoringService

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus-client's variable, which it reads when it is imported."""
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class ServerMetrics:
    """The metrics of one application, in a separate registry.

    Args:
        bundles: Names of the bundles.
        dropped: Returns the number of log lines that were dropped.
    """

    def __init__(self, bundles: Sequence[str], dropped: Callable[[], int] = lambda: 0) -> None:
        self._registry, self._read_dropped = CollectorRegistry(), dropped
        self._requests = self._counter(
            "logratio_requests",
            "Requests, by route and status; status 0: the client left first.",
            *("route", "status"),
        )
        self._rejections = self._counter(
            "logratio_rejections",
            "Requests answered with an error, by the code of the error.",
            "cause",
        )
        self._seconds = self._histogram(
            "logratio_request_seconds",
            "Time from a request's arrival to the end of its answer, by route.",
            "route",
        )
        self._phases = self._histogram(
            "logratio_phase_seconds",
            "Time that a scored request spent waiting (queue), being tokenized (encode), and in "
            "runs of the graph (compute).",
            "phase",
        )
        self._tokens = self._counter(
            "logratio_tokens",
            "Tokens of scored requests: of prompts and of candidates.",
            *("bundle", "kind"),
        )
        self._add_queue()
        self._add_runs()
        self._add_operation()
        for bundle in bundles:  # shown as 0 from the start
            for counter in (*self._of_runs, *self._of_cache, *self._of_reloads):
                counter.labels(bundle)

    def _add_queue(self) -> None:
        self._in_flight = self._gauge(
            "logratio_in_flight", "Requests that are accepted and not answered."
        )
        self._waiting = self._gauge(
            "logratio_queue_length", "Accepted requests that wait for their first run of the graph."
        )

    def _add_runs(self) -> None:
        self._of_runs = (
            self._counter("logratio_runs", "Runs of the graph.", "bundle"),
            self._counter(
                "logratio_run_tokens", "Tokens computed in runs, with padding.", "bundle"
            ),
            self._counter(
                "logratio_run_real_tokens", "Tokens computed in runs, without padding.", "bundle"
            ),
            self._counter("logratio_run_seconds", "Time in runs.", "bundle"),
        )
        self._of_cache = (
            self._counter(
                "logratio_response_cache_hits",
                "Candidates whose scores were in the response cache.",
                "bundle",
            ),
            self._counter(
                "logratio_response_cache_misses",
                "Candidates whose scores were computed, with a response cache.",
                "bundle",
            ),
        )

    def _add_operation(self) -> None:
        self._of_reloads = (
            self._counter("logratio_reloads", "Bundles that were replaced.", "bundle"),
            self._counter("logratio_reload_failures", "Bundles that were not replaced.", "bundle"),
        )
        self._restarts = self._counter(
            "logratio_worker_restarts", "Processes started again after one has ended."
        )
        self._dropped = self._gauge(
            "logratio_log_lines_dropped",
            "Log lines that were dropped, because standard error was not read fast enough.",
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        """A number that is summed over the processes that are alive."""
        return Gauge(name, text, registry=self._registry, multiprocess_mode="livesum")

    def _histogram(self, name: str, text: str, label: str) -> Histogram:
        return Histogram(name, text, [label], buckets=_BUCKETS, registry=self._registry)

    def finished(self, record: RequestRecord, seconds: float) -> None:
        """Count a request that took `seconds`."""
        self._requests.labels(record.route, str(record.status)).inc()
        self._seconds.labels(record.route).observe(seconds)
        if record.cause is not None:
            self._rejections.labels(record.cause).inc()
        for phase, value in record.seconds.items():
            self._phases.labels(phase).observe(value)
        if record.prompt_tokens:
            self._tokens.labels(record.bundle, "prompt").inc(record.prompt_tokens)
            self._tokens.labels(record.bundle, "candidate").inc(record.candidate_tokens)
        self._dropped.set(self._read_dropped())

    def queue_changed(self, in_flight: int, waiting: int) -> None:
        """See `scheduler.Observer`."""
        self._in_flight.set(in_flight)
        self._waiting.set(waiting)

    def run_finished(self, bundle: str, tokens: int, real_tokens: int, seconds: float) -> None:
        """See `scheduler.Observer`."""
        amounts = (1, tokens, real_tokens, seconds)
        for counter, amount in zip(self._of_runs, amounts, strict=True):
            counter.labels(bundle).inc(amount)

    def cache_used(self, bundle: str, hits: int, misses: int) -> None:
        """See `service.Counts`."""
        for counter, amount in zip(self._of_cache, (hits, misses), strict=True):
            counter.labels(bundle).inc(amount)

    def reloaded(self, bundle: str, *, failed: bool) -> None:
        """See `bundles.Reloads`."""
        self._of_reloads[failed].labels(bundle).inc()

    def restarted(self, times: int) -> None:
        """Count processes that were started again after one has ended."""
        self._restarts.inc(times)

    def text(self, services: Iterable[ScoringService]) -> bytes:
        """Return all metrics in Prometheus' text format; `services` are the bundles served now."""
        self._dropped.set(self._read_dropped())
        counted, shown = self._registry, CollectorRegistry()
        if FOLDER in os.environ:
            counted = CollectorRegistry()
            MultiProcessCollector(counted)  # type: ignore[no-untyped-call]
        shown.register(_BundleInfo(services))
        return generate_latest(counted) + generate_latest(shown)


class _BundleInfo(Collector):
    """The bundles that are served; after a replacement, the old one is no longer shown."""

    def __init__(self, services: Iterable[ScoringService]) -> None:
        self._services = services

    def collect(self) -> Iterator[Metric]:
        """Yield one sample per bundle."""
        family = InfoMetricFamily("logratio_bundle", "The bundles that are served.")
        for service in self._services:
            manifest = service.reranker.manifest
            shown = {
                "bundle": service.bundle,
                "digest": service.reranker.digest or "",
                "kind": manifest.graph.kind,
                "name": manifest.name,
                "provider": service.reranker.provider,
                "version": manifest.versions["logratio"],
            }
            family.add_metric([], shown)
        yield family
