"""The settings of `logratio serve`: flags, environment variables and YAML keys have these names."""

import ipaddress
import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from logratio.config_file import YamlSettings
from logratio.errors import ConfigError, MissingInputError, SettingTypeError
from logratio.serving.limits import Limits
from logratio.serving.reranker import TOKEN_BUDGET
from logratio.serving.session import LOAD_SECONDS
from logratio.validation import Converted, Range, changes, check_fields, split_list

LogFormat = Literal["text", "json", "off"]
_LIMITS = Limits()
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._/-]*")


def _as_bundles(given: Any) -> tuple[str, ...]:
    """Return the bundles as ``FOLDER`` or ``NAME=FOLDER``."""
    if isinstance(given, str | Path):
        return (str(given),)
    if isinstance(given, Mapping):
        return tuple(f"{name}={folder}" for name, folder in given.items())
    if isinstance(given, list | tuple) and all(isinstance(one, str | Path) for one in given):
        return tuple(map(str, given))
    raise SettingTypeError(f"must be one folder or a list of folders, not {given!r:.60}")


Folders = Annotated[
    str | Path | Sequence[str | Path] | Mapping[str, str | Path], Converted(_as_bundles)
]


@dataclass(frozen=True)
class ServeConfig(YamlSettings):
    """Settings of one server.

    Attributes:
        bundle: Folder written by `logratio export`, or several; `NAME=FOLDER` names one. Without a
            name, each of several has that of its folder, and one alone `Manifest.name`.
        host: Address to listen on; any other than this machine's own needs keys or `no_auth`.
        port: Port to listen on; 0 for any free port.
        provider: ONNX Runtime execution provider; None: the CPU.
        allow_fallback: As in `Reranker.load`.
        threads: As in `Reranker.load`.
        expect: As in `Reranker.load`; for several bundles, their digests separated by commas.
        allowed_signers: As in `Reranker.load`.
        load_seconds: As in `Reranker.load`.
        cache: As in `Reranker.load`; needed for bundles that take the reference's log-probs as an
            input, since requests contain none.
        base: For bundles exported with `--base`: the bundle of their base, which they share.
        max_request_tokens: Tokens that the models compute for one request; see `Limits`.
        request_seconds: Time in seconds from the arrival of a request to its answer.
        run_tokens: Tokens that one run of the graph computes for a request; see `Limits`.
        max_concurrent_requests: Requests that are waiting or being computed; see `Limits.queue`.
        queue_seconds: Longest expected wait of an accepted request in seconds; see `Limits`.
        max_connections: Open connections; see `Limits.connections`.
        header_seconds: Time in seconds for the headers of a request to arrive; see `Limits`.
        body_seconds: Time in seconds for its body to arrive; see `Limits`.
        idle_seconds: Time in seconds that a connection stays open between two requests.
        response_cache_mb: Memory in MiB for scores of earlier requests; 0: none are kept.
        workers: Processes that accept requests. They share the CPUs, unless `threads` is given;
            with CUDA, each has the GPU of its number.
        strict: Refuse requests with unknown fields, instead of naming the fields in `warnings`.
        api_key_file: File with one API key per line; clients must send one of them.
        no_auth: Serve other machines without keys.
        tls_cert: PEM file with the server's certificate and those of its issuers.
        tls_key: PEM file with the certificate's private key, not encrypted.
        cors_origin: Origins whose web pages may send requests; None: no origin.
        no_page: Serve no pages at `/` and `/docs`.
        log_format: One line per request as text or JSON on standard error, or none.
        otel: Send a span per request to the collector that the variables OTEL_… name.
        drain_seconds: Time in seconds after SIGTERM in which the server still accepts requests,
            and already answers `/readyz` with 503.
        shutdown_seconds: Time in seconds to finish the requests in flight after that.
    """

    bundle: Folders
    host: str = "127.0.0.1"
    port: Annotated[int, Range(0, 65_535)] = 8000
    provider: str | None = None
    allow_fallback: bool = False
    threads: Annotated[int, Range(1)] | None = None
    expect: str | None = None
    allowed_signers: Annotated[Path, Converted(Path)] | None = None
    load_seconds: Annotated[float, Range(0.1)] = LOAD_SECONDS
    cache: Annotated[Path, Converted(Path)] | None = None
    base: Annotated[Path, Converted(Path)] | None = None
    max_request_tokens: Annotated[int, Range(1)] = _LIMITS.request_tokens
    request_seconds: Annotated[float, Range(0.1)] = _LIMITS.seconds
    run_tokens: Annotated[int, Range(1, TOKEN_BUDGET)] = _LIMITS.run_tokens
    max_concurrent_requests: Annotated[int, Range(1)] = _LIMITS.queue
    queue_seconds: Annotated[float, Range(0)] = _LIMITS.queue_seconds
    max_connections: Annotated[int, Range(1)] = _LIMITS.connections
    header_seconds: Annotated[float, Range(0.1)] = _LIMITS.header_seconds
    body_seconds: Annotated[float, Range(0.1)] = _LIMITS.body_seconds
    idle_seconds: Annotated[float, Range(0.1)] = _LIMITS.idle_seconds
    response_cache_mb: Annotated[float, Range(0)] = 0.0
    workers: Annotated[int, Range(1)] = 1
    strict: bool = False
    api_key_file: Annotated[Path, Converted(Path)] | None = None
    no_auth: bool = False
    tls_cert: Annotated[Path, Converted(Path)] | None = None
    tls_key: Annotated[Path, Converted(Path)] | None = None
    cors_origin: tuple[str, ...] | None = None
    no_page: bool = False
    log_format: LogFormat = "text"
    otel: bool = False
    drain_seconds: Annotated[float, Range(0)] = 0.0
    shutdown_seconds: Annotated[int, Range(1)] = _LIMITS.shutdown_seconds

    __repr__ = changes

    def __post_init__(self) -> None:
        check_fields(self)
        self.folders()
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key belong together: give both")
        if self.max_concurrent_requests > self.max_connections:
            raise ConfigError(
                f"--max-concurrent-requests is {self.max_concurrent_requests}, but with "
                f"--max-connections {self.max_connections} there are never so many, because a "
                "connection has one request at a time: lower the first or raise the second"
            )
        for origin in self.cors_origin or ():
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ConfigError(
                    f"--cors-origin {origin!r} is not an origin, such as https://example.org: "
                    "a scheme and a host, without a path; the wildcard * is not accepted"
                )

    def folders(self) -> dict[str, Path]:
        """Return the folders of the bundles, by name.

        Each of several bundles has the name of its folder, unless it is given one. The name of a
        bundle alone is empty then: requests and answers have `Manifest.name`.

        Raises:
            ConfigError: There is no bundle, a name has other characters, or two have the same.
        """
        given: Any = self.bundle
        pairs = [_named(text) for text in given]
        if not pairs:
            raise ConfigError("--bundle has no folder")
        if len(pairs) == 1 and pairs[0][0] is None:
            return {"": pairs[0][1]}
        found: dict[str, Path] = {}
        for given_name, folder in pairs:
            name = folder.absolute().name if given_name is None else given_name
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"--bundle: {name!r} is not a name: use letters, digits and . _ - /, as in "
                    "--bundle name=folder"
                )
            if name in found:
                raise ConfigError(
                    f"--bundle: two bundles have the name {name!r}: name them, as in "
                    "--bundle first=folder second=folder"
                )
            found[name] = folder
        return found

    def expected(self) -> dict[str, str | None]:
        """Return the expected digest of each bundle, by name.

        Raises:
            ConfigError: There are not as many digests as bundles.
        """
        names = self.folders()
        if self.expect is None:
            return dict.fromkeys(names)
        digests = split_list(self.expect)
        if len(digests) != len(names):
            raise ConfigError(
                f"--expect has {len(digests)} digests for {len(names)} bundles: give the digest of "
                "each, in the order of --bundle, separated by commas"
            )
        return dict(zip(names, digests, strict=True))

    def limits(self, others: Limits | None = None) -> Limits:
        """Return the limits of these settings, and of `others` for the rest."""
        return replace(
            others or _LIMITS,
            request_tokens=self.max_request_tokens,
            seconds=self.request_seconds,
            run_tokens=self.run_tokens,
            queue=self.max_concurrent_requests,
            queue_seconds=self.queue_seconds,
            connections=self.max_connections,
            header_seconds=self.header_seconds,
            body_seconds=self.body_seconds,
            idle_seconds=self.idle_seconds,
            shutdown_seconds=self.shutdown_seconds,
        )

    def check_access(self, has_keys: bool) -> None:
        """Refuse to serve other machines without keys, unless `no_auth` allows it.

        Args:
            has_keys: Whether clients must send an API key.

        Raises:
            ConfigError: The address can be reached from other machines and there are no keys, or
                there are keys and `no_auth` is set.
        """
        if has_keys and self.no_auth:
            raise ConfigError("--no-auth contradicts the API keys: remove one of the two")
        if not (has_keys or self.no_auth or is_loopback(self.host)):
            raise ConfigError(
                f"{self.host} can be reached from other machines, and there are no API keys: give "
                "--api-key-file or the environment variable LOGRATIO_API_KEYS, or --no-auth if "
                "something else checks who sends requests, such as a proxy"
            )

    def check_certificate(self) -> None:
        """Read the certificate and its key.

        Raises:
            MissingInputError: One of the files does not exist.
            ConfigError: They cannot be read, or do not belong together.
        """
        if self.tls_cert is None or self.tls_key is None:
            return
        for path in (self.tls_cert, self.tls_key):
            if not path.is_file():
                raise MissingInputError(f"{path}: no such file (--tls-cert, --tls-key)")
        try:
            # The empty password keeps OpenSSL from asking for one on the terminal.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.tls_cert, self.tls_key, password="")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise ConfigError(
                "--tls-cert and --tls-key must be a PEM certificate and its private key without a "
                f"password ({getattr(error, 'reason', None) or type(error).__name__})"
            ) from None


def _named(text: str) -> tuple[str | None, Path]:
    """Return the name, if any, and the folder of ``NAME=FOLDER`` or ``FOLDER``."""
    name, equals, folder = text.partition("=")
    # A folder's name may contain "=", too.
    return (name, Path(folder)) if equals and not Path(text).is_dir() else (None, Path(text))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
