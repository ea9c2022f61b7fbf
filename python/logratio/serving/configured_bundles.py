"""Load the bundles that the settings of a server name."""

from pathlib import Path

from logratio.bundle import CACHED_REFERENCE, Manifest, digest_of, manifest_bytes, read_manifest
from logratio.errors import ConfigError
from logratio.serving.config import ServeConfig
from logratio.serving.reranker import Reranker
from logratio.serving.shared_base import SharedBase


class ConfiguredBundles:
    """The bundles of a server's settings, with their base in memory once.

    Args:
        config: The settings.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._base: SharedBase | None = None

    def load_all(self) -> dict[str, Reranker]:
        """Load every bundle, by name.

        Raises:
            ConfigError: None of them takes the log-probs of the cache, or is an adapter of the
                base.
            BundleError, ProviderError, MissingExtraError: As `Reranker.load`.
        """
        config = self._config
        loaded = {name: self.load(name) for name in config.folders()}
        if config.cache is not None and all(one.cached is None for one in loaded.values()):
            raise ConfigError("--cache is for bundles exported with `--reference cached`")
        if config.base is not None and self._base is None:
            raise ConfigError("--base is for bundles exported with `--base`")
        return loaded

    def load(self, name: str) -> Reranker:
        """Load the bundle of a name, with every check.

        Raises:
            ConfigError: It needs a cache or a base.
            BundleError, ProviderError, MissingExtraError: As `Reranker.load`.
        """
        config, folder = self._config, self._config.folders()[name]
        manifest = read_manifest(folder)
        takes_cache = len(config.folders()) == 1 or manifest.graph.kind == CACHED_REFERENCE
        reranker = Reranker.load(
            folder,
            providers=self._providers,
            allow_fallback=config.allow_fallback,
            threads=config.threads,
            expect=config.expected()[name],
            allowed_signers=config.allowed_signers,
            load_seconds=config.load_seconds,
            cache=config.cache if takes_cache else None,
            base=self._base_of(manifest),
        )
        if config.cache is None and reranker.manifest.graph.kind == CACHED_REFERENCE:
            raise ConfigError(
                f"{folder} needs the reference's log-probs of each candidate: give --cache"
            )
        return reranker

    @property
    def _providers(self) -> list[str] | None:
        return [self._config.provider] if self._config.provider else None

    def _base_of(self, manifest: Manifest) -> SharedBase | None:
        """Return the base of a bundle, which is loaded again only if its folder has changed."""
        folder = self._config.base
        if manifest.base is None or folder is None:
            return None
        if self._base is None or self._base.digest != _digest(folder):
            self._base = SharedBase.load(
                folder,
                providers=self._providers,
                allow_fallback=self._config.allow_fallback,
                threads=self._config.threads,
                load_seconds=self._config.load_seconds,
            )
        return self._base


def _digest(folder: Path) -> str:
    return digest_of(manifest_bytes(folder))
