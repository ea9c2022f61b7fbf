"""Metrics of a server in the format of Prometheus. Needs prometheus-client.

Labels have a bounded number of values and no content of requests: routes, statuses, error codes.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from logratio.serving.request_record import RequestRecord
from logratio.serving.reranker import Reranker
from logratio.serving.scheduler import Scheduler

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class ServerMetrics:
    """The metrics of one application, in a separate registry.

    Args:
        scheduler: Its queue and the work that it has done are read when metrics are asked for.
        reranker: The bundle whose digest and kind are shown.
    """

    def __init__(self, scheduler: Scheduler, reranker: Reranker) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_SchedulerMetrics(scheduler))
        self._requests = Counter(
            "logratio_requests",
            "Requests, by route and status; status 0: the client left first.",
            ["route", "status"],
            registry=self._registry,
        )
        self._rejections = Counter(
            "logratio_rejections",
            "Requests answered with an error, by the code of the error.",
            ["cause"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "logratio_request_seconds",
            "Time from a request's arrival to the end of its answer, by route.",
            ["route"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._phases = Histogram(
            "logratio_phase_seconds",
            "Time that a scored request spent waiting (queue), being tokenized (encode), and in "
            "runs of the graph (compute).",
            ["phase"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._tokens = Counter(
            "logratio_tokens",
            "Tokens of scored requests: of prompts and of candidates.",
            ["kind"],
            registry=self._registry,
        )
        self._dropped = Gauge(
            "logratio_log_lines_dropped",
            "Log lines that were dropped, because standard error was not read fast enough.",
            registry=self._registry,
        )
        self._dropped.set(0)
        self._show_bundle(reranker)

    def _show_bundle(self, reranker: Reranker) -> None:
        manifest = reranker.manifest
        info = Info("logratio_bundle", "The bundle that is served.", registry=self._registry)
        info.info(
            {
                "digest": reranker.digest or "",
                "kind": manifest.graph.kind,
                "name": manifest.name,
                "provider": reranker.provider,
                "version": manifest.versions["logratio"],
            }
        )

    def finished(self, record: RequestRecord, seconds: float) -> None:
        """Count a request that took `seconds`."""
        self._requests.labels(record.route, str(record.status)).inc()
        self._seconds.labels(record.route).observe(seconds)
        if record.cause is not None:
            self._rejections.labels(record.cause).inc()
        for phase, value in record.seconds.items():
            self._phases.labels(phase).observe(value)
        if record.prompt_tokens:
            self._tokens.labels("prompt").inc(record.prompt_tokens)
            self._tokens.labels("candidate").inc(record.candidate_tokens)

    def text(self, dropped_lines: int = 0) -> bytes:
        """Return all metrics in Prometheus' text format."""
        self._dropped.set(dropped_lines)
        return generate_latest(self._registry)


class _SchedulerMetrics(Collector):
    """Reads the scheduler's counts when metrics are asked for, so that counting costs nothing."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Metric]:
        """Yield the current values."""
        done = self._scheduler.done
        yield GaugeMetricFamily(
            "logratio_in_flight",
            "Requests that are accepted and not answered.",
            self._scheduler.in_flight,
        )
        yield GaugeMetricFamily(
            "logratio_queue_length",
            "Accepted requests that wait for their first run of the graph.",
            self._scheduler.waiting,
        )
        yield CounterMetricFamily("logratio_runs", "Runs of the graph.", done.runs)
        yield CounterMetricFamily(
            "logratio_run_tokens", "Tokens computed in runs, with padding.", done.tokens
        )
        yield CounterMetricFamily("logratio_run_seconds", "Time in runs.", done.seconds)
