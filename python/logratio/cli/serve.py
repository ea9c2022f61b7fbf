"""`logratio serve`: its flags, which environment variables and a YAML file can set, too."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from logratio.cli.config import takes_config, takes_environment
from logratio.cli.export import LOADING, Loading
from logratio.cli.options import Settings, takes_flags

Bundles = Annotated[
    list[Path],
    typer.Option(
        "--bundle",
        metavar="[NAME=]FOLDER…",
        help="Bundle folder written by `logratio export`. Several may follow; a request chooses "
        "one by the name in `model`, and gets the first one without. Default name: that of the "
        "folder.",
    ),
]
ACCESS_PANEL, OPERATION_PANEL, LIMITS_PANEL = "Access", "Operation", "Limits"
CONNECTIONS_PANEL = "Connections"


class LogFormat(StrEnum):
    """How the line of a request is written on standard error."""

    TEXT = "text"
    JSON = "json"
    OFF = "off"


@dataclass(frozen=True)
class Access(Settings):
    """Who can reach the server, and how."""

    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. The default accepts only clients on this machine.",
            rich_help_panel=ACCESS_PANEL,
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        typer.Option(
            min=0,
            max=65535,
            help="Port to listen on; 0: any free port.",
            rich_help_panel=ACCESS_PANEL,
        ),
    ] = 8000
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Accept only requests with one of the API keys in this file, one per line. "
            "The variable LOGRATIO_API_KEYS holds keys, too.",
            rich_help_panel=ACCESS_PANEL,
        ),
    ] = None
    no_auth: Annotated[
        bool,
        typer.Option(
            "--no-auth",
            help="Serve other machines without API keys.",
            rich_help_panel=ACCESS_PANEL,
        ),
    ] = False
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Serve HTTPS with this PEM certificate, followed by those of its issuers.",
            rich_help_panel=ACCESS_PANEL,
        ),
    ] = None
    tls_key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="PEM private key of --tls-cert, without a password.",
            rich_help_panel=ACCESS_PANEL,
        ),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN…",
            help="Origin whose web pages may send requests, such as https://example.org. Several "
            "may follow. Default: none.",
            rich_help_panel=ACCESS_PANEL,
        ),
    ] = None
    no_page: Annotated[
        bool,
        typer.Option(
            "--no-page",
            help="Serve no pages: neither the form at `/` nor the API's reference at `/docs`.",
            rich_help_panel=ACCESS_PANEL,
        ),
    ] = False


@dataclass(frozen=True)
class Operation(Settings):
    """Processes, logs and traces, and how the server stops."""

    workers: Annotated[
        int,
        typer.Option(
            min=1,
            help="Processes that accept requests. They share the CPUs; with CUDA, each has "
            "another GPU.",
            rich_help_panel=OPERATION_PANEL,
        ),
    ] = 1

    log_format: Annotated[
        LogFormat,
        typer.Option(
            help="Format of the line per request on standard error, which has no content of "
            "requests; off: no lines of requests.",
            rich_help_panel=OPERATION_PANEL,
        ),
    ] = LogFormat.TEXT
    otel: Annotated[
        bool,
        typer.Option(
            "--otel",
            help="Send OpenTelemetry traces to the collector that OTEL_EXPORTER_OTLP_ENDPOINT "
            "names. Default: none are made.",
            rich_help_panel=OPERATION_PANEL,
        ),
    ] = False
    drain_seconds: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds after SIGTERM in which the server still accepts requests and is no "
            "longer ready, so that load balancers can take it out.",
            rich_help_panel=OPERATION_PANEL,
        ),
    ] = 0.0
    shutdown_seconds: Annotated[
        int,
        typer.Option(
            min=1,
            help="Seconds to finish the requests in flight after that.",
            rich_help_panel=OPERATION_PANEL,
        ),
    ] = 30


@dataclass(frozen=True)
class Amounts(Settings):
    """Limits on the work of a request, and the threads for it."""

    max_request_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Maximum number of tokens computed per request.",
            rich_help_panel=LIMITS_PANEL,
        ),
    ] = 131_072
    request_seconds: Annotated[
        float,
        typer.Option(
            min=0.1, help="Timeout of a request in seconds.", rich_help_panel=LIMITS_PANEL
        ),
    ] = 30.0
    run_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            max=16_384,
            help="Maximum number of tokens that one run of the graph computes for a request. Raise "
            "it on a GPU. Lower it if small requests wait too long for large ones: another request "
            "can begin only between two runs.",
            rich_help_panel=LIMITS_PANEL,
        ),
    ] = 256
    max_concurrent_requests: Annotated[
        int,
        typer.Option(
            min=1,
            help="Requests that wait or are computed at once; one more is answered 429. "
            "--queue-seconds usually refuses requests before. Raise both for bursts.",
            rich_help_panel=LIMITS_PANEL,
        ),
    ] = 256
    queue_seconds: Annotated[
        float,
        typer.Option(
            min=0,
            help="Longest expected wait of a request; one that would wait longer is answered 503. "
            "Lower it if clients can ask another server; raise it for bursts.",
            rich_help_panel=LIMITS_PANEL,
        ),
    ] = 5.0
    response_cache_mb: Annotated[
        float,
        typer.Option(
            min=0,
            help="MiB of memory for scores of earlier requests, which are not computed again. "
            "0: none are kept.",
            rich_help_panel=LIMITS_PANEL,
        ),
    ] = 0.0
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Threads per run of the graph. Default: OMP_NUM_THREADS, or the CPUs of the "
            "process.",
            rich_help_panel=LIMITS_PANEL,
        ),
    ] = None


@dataclass(frozen=True)
class Connections(Settings):
    """Limits on connections, which protect the server from slow and silent clients."""

    max_connections: Annotated[
        int,
        typer.Option(
            min=1,
            help="Open connections. One more closes the one that is idle longest; if none is, only "
            "health probes are answered on it. Raise it for more clients, with `ulimit -n`.",
            rich_help_panel=CONNECTIONS_PANEL,
        ),
    ] = 512
    header_seconds: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Seconds for the headers of a request to arrive. Raise it for slow networks.",
            rich_help_panel=CONNECTIONS_PANEL,
        ),
    ] = 10.0
    body_seconds: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Seconds for the body of a request to arrive, and for a pause of a client that "
            "reads its answer. Raise it for slow networks.",
            rich_help_panel=CONNECTIONS_PANEL,
        ),
    ] = 30.0
    idle_seconds: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Seconds that a connection stays open between two requests. Set it above the idle "
            "timeout of the load balancer, which otherwise may send a request into a closed "
            "connection.",
            rich_help_panel=CONNECTIONS_PANEL,
        ),
    ] = 60.0


ACCESS, OPERATION, AMOUNTS = Access(), Operation(), Amounts()
CONNECTIONS = Connections()


@takes_environment
@takes_config("ServeConfig", "logratio.serving.config", example="port: 9000")
@takes_flags
def serve(
    bundle: Bundles,
    access: Access = ACCESS,
    operation: Operation = OPERATION,
    amounts: Amounts = AMOUNTS,
    connections: Connections = CONNECTIONS,
    loading: Loading = LOADING,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Refuse requests with unknown fields. Default: ignore the fields, and name them "
            "in the answer's `warnings`.",
        ),
    ] = False,
) -> None:
    """Serve rewards: `/v1/score`, and the APIs of Cohere, Jina, TEI, Infinity, vLLM and OpenRLHF.

    In `POST /v1/rerank`, `query` is the prompt and `documents` are the candidates. The paths below
    `/v2/models` are the Open Inference Protocol of KServe and Triton.
    Each flag can also be set by an environment variable, or in the file of --config. Flags override
    variables, and variables override the file.
    """
    from logratio.serving.config import ServeConfig
    from logratio.serving.server import serve as run

    run(
        ServeConfig(
            bundle,
            strict=strict,
            **loading.settings(),
            **access.settings(),
            **operation.settings(),
            **amounts.settings(),
            **connections.settings(),
        )
    )
