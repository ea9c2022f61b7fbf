"""The settings of `logratio serve`: flags, environment variables and YAML keys have these names."""

import ipaddress
import ssl
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from logratio.config_file import YamlSettings
from logratio.errors import ConfigError, MissingInputError
from logratio.serving.limits import Limits
from logratio.serving.session import LOAD_SECONDS
from logratio.validation import Converted, Range, changes, check_fields

LogFormat = Literal["text", "json", "off"]
_LIMITS = Limits()


@dataclass(frozen=True)
class ServeConfig(YamlSettings):
    """Settings of one server.

    Attributes:
        bundle: Folder written by `logratio export`.
        host: Address to listen on; any other than this machine's own needs keys or `no_auth`.
        port: Port to listen on; 0 for any free port.
        provider: ONNX Runtime execution provider; None: the CPU.
        allow_fallback: As in `Reranker.load`.
        threads: As in `Reranker.load`.
        expect: As in `Reranker.load`.
        allowed_signers: As in `Reranker.load`.
        load_seconds: As in `Reranker.load`.
        cache: As in `Reranker.load`; needed for a bundle that takes the reference's log-probs as an
            input, since requests contain none.
        max_request_tokens: Tokens that the models compute for one request; see `Limits`.
        request_seconds: Time in seconds from the arrival of a request to its answer.
        strict: Refuse requests with unknown fields, instead of naming the fields in `warnings`.
        api_key_file: File with one API key per line; clients must send one of them.
        no_auth: Serve other machines without keys.
        tls_cert: PEM file with the server's certificate and those of its issuers.
        tls_key: PEM file with the certificate's private key, not encrypted.
        cors_origin: Origins whose web pages may send requests; None: no origin.
        log_format: One line per request as text or JSON on standard error, or none.
        otel: Send a span per request to the collector that the variables OTEL_… name.
        drain_seconds: Time in seconds after SIGTERM in which the server still accepts requests,
            and already answers `/readyz` with 503.
        shutdown_seconds: Time in seconds to finish the requests in flight after that.
    """

    bundle: Annotated[str | Path, Converted(Path)]
    host: str = "127.0.0.1"
    port: Annotated[int, Range(0, 65_535)] = 8000
    provider: str | None = None
    allow_fallback: bool = False
    threads: Annotated[int, Range(1)] | None = None
    expect: str | None = None
    allowed_signers: Annotated[Path, Converted(Path)] | None = None
    load_seconds: Annotated[float, Range(0.1)] = LOAD_SECONDS
    cache: Annotated[Path, Converted(Path)] | None = None
    max_request_tokens: Annotated[int, Range(1)] = _LIMITS.request_tokens
    request_seconds: Annotated[float, Range(0.1)] = _LIMITS.seconds
    strict: bool = False
    api_key_file: Annotated[Path, Converted(Path)] | None = None
    no_auth: bool = False
    tls_cert: Annotated[Path, Converted(Path)] | None = None
    tls_key: Annotated[Path, Converted(Path)] | None = None
    cors_origin: tuple[str, ...] | None = None
    log_format: LogFormat = "text"
    otel: bool = False
    drain_seconds: Annotated[float, Range(0)] = 0.0
    shutdown_seconds: Annotated[int, Range(1)] = _LIMITS.shutdown_seconds

    __repr__ = changes

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key belong together: give both")
        for origin in self.cors_origin or ():
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ConfigError(
                    f"--cors-origin {origin!r} is not an origin, such as https://example.org: "
                    "a scheme and a host, without a path; the wildcard * is not accepted"
                )

    def limits(self, others: Limits | None = None) -> Limits:
        """Return the limits of these settings, and of `others` for the rest."""
        return replace(
            others or _LIMITS,
            request_tokens=self.max_request_tokens,
            seconds=self.request_seconds,
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


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
