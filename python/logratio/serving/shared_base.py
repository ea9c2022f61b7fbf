"""The graph of a base model, which the bundles of several policies share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logratio.adapted_graph import Adapter
from logratio.bundle import (
    ADAPTER,
    BundleError,
    Manifest,
    digest_of,
    manifest_bytes,
    parse_manifest,
    verify_files,
)
from logratio.errors import ConfigError
from logratio.serving.session import LOAD_SECONDS, open_session


@dataclass(frozen=True)
class SharedBase:
    """A base model that is in memory once, for all policies that are adapters over it.

    Attributes:
        folder: The base's bundle.
        manifest: Its manifest.
        digest: Its digest.
        session: The ONNX Runtime session on its graph.

    Example:
        ::

            base = SharedBase.load("base")
            policies = [Reranker.load(folder, base=base) for folder in ("one", "two")]
    """

    folder: Path
    manifest: Manifest
    digest: str
    session: Any

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        providers: Sequence[str] | None = None,
        allow_fallback: bool = False,
        threads: int | None = None,
        load_seconds: float = LOAD_SECONDS,
    ) -> "SharedBase":
        """Load the bundle that `logratio export --base` wrote for the base, and check its files.

        The golden groups of each policy verify its numbers.

        Args:
            folder: The base's bundle.
            providers: As in `Reranker.load`.
            allow_fallback: As in `Reranker.load`.
            threads: As in `Reranker.load`.
            load_seconds: Time limit in seconds for opening the graph.

        Raises:
            BundleError: The folder is not a bundle, was altered, or takes no adapters.
            ProviderError: ONNX Runtime would use another provider than the requested one.
            MissingExtraError: ONNX Runtime is not installed.
        """
        folder = Path(folder)
        content = manifest_bytes(folder)
        manifest = parse_manifest(content, folder)
        if not manifest.graph.takes_adapters:
            raise BundleError(f"{folder}: its graph takes no adapters, so it is no --base")
        verify_files(folder, manifest.files)
        session = open_session(
            folder,
            manifest,
            providers=providers,
            allow_fallback=allow_fallback,
            threads=threads,
            load_seconds=load_seconds,
        )
        return cls(folder, manifest, digest_of(content), session)

    def adapter(self, folder: Path, manifest: Manifest) -> Adapter:
        """Open the adapter of a bundle.

        Args:
            folder: The bundle, whose files were verified.
            manifest: Its manifest.

        Raises:
            BundleError: It was exported for another base, or does not fit the base's graph.
        """
        if self.digest != manifest.base:
            raise BundleError(
                f"{folder}: it was exported for a base with the digest {manifest.base}, but "
                f"{self.folder} has {self.digest}"
            )
        mine, other = manifest.graph, self.manifest.graph
        facts = [
            (one.opset, one.chunk, one.vocabulary_size, one.max_positions, one.layout)
            for one in (mine, other)
        ]
        if facts[0] != facts[1]:
            raise BundleError(f"{folder}: its graph has other properties than its base")
        adapter = Adapter(folder / ADAPTER, manifest.beta, manifest.adapter_tie)
        adapter.check_fits(self.session)
        return adapter


def open_graph(
    folder: Path, manifest: Manifest, base: str | Path | SharedBase | None, opening: dict[str, Any]
) -> tuple[Any, Adapter | None]:
    """Open the graph of a bundle, or that of its base with its adapter.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        base: What `check_base` accepted.
        opening: Arguments of `SharedBase.load`.

    Returns:
        The session, and the adapter or None.

    Raises:
        BundleError, ProviderError, MissingExtraError: As `SharedBase.load` and
            `SharedBase.adapter`.
    """
    if base is None:
        return open_session(folder, manifest, **opening), None
    shared = base if isinstance(base, SharedBase) else SharedBase.load(base, **opening)
    return shared.session, shared.adapter(folder, manifest)


def check_base(folder: Path, manifest: Manifest, base: "str | Path | SharedBase | None") -> None:
    """Check that a base is given exactly if a bundle needs one.

    Raises:
        ConfigError: It is missing or superfluous.
    """
    if manifest.base is not None and base is None:
        raise ConfigError(
            f"{folder} is an adapter over a base: give --base, the folder of the bundle with the "
            f"digest {manifest.base}"
        )
    if manifest.base is None and base is not None:
        raise ConfigError(f"{folder} has a graph: remove --base, which is for adapters")
