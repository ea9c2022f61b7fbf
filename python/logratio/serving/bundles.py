"""The bundles of a server: which one a request means, and replacing them while requests run."""

import ctypes
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from logratio.bundle import digest_of, manifest_bytes
from logratio.errors import LogratioError
from logratio.serving.connections import App, Receive, Send, refuse
from logratio.serving.limits import RefusedError
from logratio.serving.request_record import current_record
from logratio.serving.reranker import Reranker
from logratio.serving.service import ScoringService, Shared

PREFIX = "/m/"
"""`/m/NAME` in front of a path chooses a bundle, for requests that have no field `model`."""
_log = logging.getLogger("logratio.serving")


class Bundles:
    """The bundles of a server, by name; the first one is the default.

    Args:
        rerankers: The loaded bundles; the name of one alone may be empty.
        shared: What they have in common.
    """

    def __init__(self, rerankers: Mapping[str, Reranker], shared: Shared) -> None:
        self._shared = shared
        self._services = {
            name: ScoringService(name, reranker, shared) for name, reranker in rerankers.items()
        }

    def __iter__(self) -> Iterator[ScoringService]:
        return iter([*self._services.values()])

    @property
    def title(self) -> str:
        """The names of the bundles and the execution provider, for people."""
        names = ", ".join(service.model for service in self)
        return f"{names} ({self.first.reranker.provider})"

    @property
    def first(self) -> ScoringService:
        """The bundle of requests that name none."""
        return next(iter(self))

    def warm_up(self) -> None:
        """Warm up every bundle."""
        for service in self:
            service.warm_up()

    def of(self, model: str | None) -> ScoringService:
        """Return the bundle of a request.

        A server with one bundle ignores `model`, because many clients send the name of a model of
        another server. The name in the path, if there is one, takes precedence.

        Args:
            model: The request's field.

        Raises:
            RefusedError: 404, there is no bundle of this name.
        """
        in_path = current_record().model
        if in_path is None and (model is None or len(self._services) == 1):
            return self.first
        wanted = model if in_path is None else in_path
        for service in self:
            if wanted == service.model:
                return service
        raise self.unknown()

    def named(self, name: str) -> ScoringService:
        """Return the bundle with a name of the settings."""
        return self._services[name]

    def unknown(self) -> RefusedError:
        """Return the error for a name that no bundle has."""
        names = ", ".join(service.model for service in self)
        return RefusedError(404, "model_not_found", f"no such model; this server has: {names}")

    def replace(self, name: str, reranker: Reranker) -> None:
        """Serve another bundle under a name, after a warm-up.

        Requests that have begun finish with the old one, whose memory is freed after the last.
        """
        service = ScoringService(name, reranker, self._shared)
        service.warm_up()
        self._services[name] = service


class NamedInPath:
    """ASGI middleware: `/m/NAME/get_reward` is `/get_reward` of the bundle with this name."""

    def __init__(self, app: App, bundles: Bundles) -> None:
        self._app, self._bundles = app, bundles

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle one HTTP request; pass other scopes to the application."""
        if scope["type"] == "http" and scope["path"].startswith(PREFIX):
            rest = scope["path"].removeprefix(PREFIX)
            names = [service.model for service in self._bundles]
            # The longest first: a name may begin with another one and "/".
            found = [name for name in sorted(names, key=len) if rest.startswith(f"{name}/")]
            if not found:
                await refuse(send, self._bundles.unknown())
                return
            current_record().model = found[-1]
            scope["path"] = rest.removeprefix(found[-1])
        await self._app(scope, receive, send)


class Reloads(Protocol):
    """Counts for the metrics."""

    def reloaded(self, bundle: str, *, failed: bool) -> None:
        """A bundle was replaced, or the new one was refused."""


class Reloader:
    """Reads the folders of the bundles again, in a thread, and replaces what has changed.

    A bundle that is refused is not served; the old one stays.

    Args:
        bundles: The bundles.
        folders: Their folders, by name.
        load: Loads the bundle of a name, with every check.
        counts: Counts successes and failures.
        asked: Each item asks for a reading; a signal handler may put it.
    """

    def __init__(
        self,
        bundles: Bundles,
        folders: Mapping[str, Path],
        load: Callable[[str], Reranker],
        counts: Reloads,
        asked: SimpleQueue[None],
    ) -> None:
        self._bundles, self._folders, self._load, self._counts = bundles, folders, load, counts
        self._asked = asked
        threading.Thread(target=self._run, name="logratio-reload", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._asked.get()
            while not self._asked.empty():  # one reading answers all who have asked so far
                self._asked.get()
            for name in self._folders:  # no variable here may keep a bundle in memory
                self._reload(name)
            _return_memory()

    def _reload(self, name: str) -> None:
        service = self._bundles.named(name)
        before = service.reranker
        try:
            # A cache may have grown; without one, an equal digest means an equal bundle.
            if before.cached is None and before.digest == _digest(self._folders[name]):
                _log.info("bundle %s is unchanged", service.bundle)
                return
            loaded = self._load(name)
            self._bundles.replace(name, loaded)
        except Exception as error:  # whatever it is, the old bundle stays
            reason = str(error) if isinstance(error, LogratioError | OSError) else ""
            _log.error(  # one line
                "bundle %s is not replaced, %s stays: %s",
                *(service.bundle, before.digest, " ".join(reason.split()) or type(error).__name__),
            )
            self._counts.reloaded(service.bundle, failed=True)
        else:
            _log.info("bundle %s is now %s", service.bundle, loaded.digest)
            self._counts.reloaded(service.bundle, failed=False)


def _return_memory() -> None:
    """Return freed memory to the operating system; glibc keeps that of replaced bundles.

    Over 20 replacements of a bundle of 25 MB, a process of 162 MB grew to 400 MB without this, and
    to between 170 and 231 MB with it.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _digest(folder: Path) -> str:
    return digest_of(manifest_bytes(folder))
