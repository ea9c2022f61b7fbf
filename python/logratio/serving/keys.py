"""API keys: read and hashed at the start, compared in constant time, checked before the body."""

import hashlib
import hmac
import os
import re
from collections.abc import Collection, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from logratio.errors import ConfigError, MissingInputError
from logratio.serving.connections import PROBES, App, Receive, Send, refuse
from logratio.serving.limits import RefusedError

VARIABLE = "LOGRATIO_API_KEYS"
_SHORTEST = 16
_KEY = re.compile(r"[!-~]+")
_UNAUTHORIZED = RefusedError(401, "unauthorized", "a valid API key is needed")


class Keys:
    """The SHA-256 hashes of the keys that are accepted; the keys themselves are not kept."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = tuple({hashlib.sha256(key.encode()).digest() for key in keys})

    def __len__(self) -> int:
        return len(self._hashes)

    def accepts(self, given: bytes) -> bool:
        """Return whether a key is one of these; the time depends only on its length."""
        digest = hashlib.sha256(given).digest()
        # A sum, and not any(): every hash is compared, whichever of them is equal.
        return sum(hmac.compare_digest(digest, known) for known in self._hashes) > 0


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> Keys:
    """Read the keys of a file and of the variable `LOGRATIO_API_KEYS`.

    Args:
        file: One key per line; empty lines and lines that begin with # are ignored.
        environment: Environment variables; commas or spaces separate several keys.

    Raises:
        MissingInputError: There is no such file.
        ConfigError: The file or the variable is given without a key, or a key is short or has
            characters that a header cannot hold.
    """
    keys = []
    if file is not None:
        keys += _in_file(file)
    if VARIABLE in environment:
        given = environment[VARIABLE].replace(",", " ").split()
        keys += _checked(given, VARIABLE)
    return Keys(keys)


def _in_file(file: Path) -> list[str]:
    if not file.is_file():
        raise MissingInputError(f"{file}: no such file (--api-key-file)")
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not a text file with one API key per line") from None
    return _checked([line for line in lines if line and not line.startswith("#")], str(file))


def _checked(keys: list[str], where: str) -> list[str]:
    """Return keys that are good enough; messages have their places, never the keys."""
    if not keys:
        raise ConfigError(f"{where} has no API key")
    for number, key in enumerate(keys, 1):
        if len(key) < _SHORTEST or not _KEY.fullmatch(key):
            raise ConfigError(
                f"{where}: key {number} must have at least {_SHORTEST} characters, all of them "
                "ASCII and none a space: make one with `openssl rand -hex 32`"
            )
    return keys


class Authenticated:
    """ASGI middleware that refuses requests without a valid key, before their body is read.

    Health probes and `open_paths` need no key.
    """

    def __init__(self, app: App, keys: Keys, open_paths: Collection[str] = ()) -> None:
        self._app, self._keys = app, keys
        self._open_paths = PROBES.union(open_paths)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle one HTTP request; pass other scopes to the application."""
        is_open = scope["type"] != "http" or scope["path"] in self._open_paths
        if is_open or self._keys.accepts(_given(scope)):
            await self._app(scope, receive, send)
        else:
            await refuse(send, _UNAUTHORIZED)


def _given(scope: MutableMapping[str, Any]) -> bytes:
    """Return the key of `Authorization: Bearer`, else that of `X-API-Key`, else nothing."""
    headers = dict(scope["headers"])
    kind, _, bearer = headers.get(b"authorization", b"").partition(b" ")
    key: bytes = headers.get(b"x-api-key", b"")
    return bearer.strip() if kind.lower() == b"bearer" else key
