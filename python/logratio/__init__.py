"""Preference optimisation: train on preferences, cache the reference, serve the implicit reward.

The central quantity is the log-ratio ``log π(y|x) - log π_ref(y|x)``: how much more likely a
completion ``y`` of a prompt ``x`` is under the trained policy than under the reference.
`logratio.training` optimises it, `logratio.cache` stores the reference log-probs on disk, and
`logratio.export` and `logratio.serving` use ``beta`` times it as the reward for ranking.

Importing this package is cheap: each name imports its module on first use.
"""

TYPE_CHECKING = False  # type checkers treat it as True; avoids importing `typing`

__version__: str

__all__ = [
    "Callback",
    "ConfigError",
    "DPOTrainer",
    "EvaluateConfig",
    "ExportConfig",
    "FormatSettings",
    "LogratioError",
    "LoraSettings",
    "PrecomputeConfig",
    "ReferenceCache",
    "Reranker",
    "RunInterruptedError",
    "SFTConfig",
    "StaleCacheError",
    "Store",
    "SweepConfig",
    "TokenizationRules",
    "TrainConfig",
    "build_store",
    "evaluate",
    "export_bundle",
    "load_model",
    "merge_adapter",
    "precompute",
    "sweep",
    "train",
]

if TYPE_CHECKING:
    from logratio.cache import ReferenceCache
    from logratio.data import FormatSettings, Store, TokenizationRules, build_store
    from logratio.errors import ConfigError, LogratioError
    from logratio.export import ExportConfig, export_bundle
    from logratio.serving import Reranker
    from logratio.training import (
        Callback,
        DPOTrainer,
        EvaluateConfig,
        LoraSettings,
        PrecomputeConfig,
        RunInterruptedError,
        SFTConfig,
        StaleCacheError,
        SweepConfig,
        TrainConfig,
        evaluate,
        load_model,
        merge_adapter,
        precompute,
        sweep,
        train,
    )
else:
    _ROOMS = {
        "cache": ("ReferenceCache",),
        "data": (
            "FormatSettings",
            "Store",
            "TokenizationRules",
            "build_store",
        ),
        "errors": (
            "ConfigError",
            "LogratioError",
        ),
        "export": (
            "ExportConfig",
            "export_bundle",
        ),
        "serving": ("Reranker",),
        "training": (
            "Callback",
            "DPOTrainer",
            "EvaluateConfig",
            "LoraSettings",
            "PrecomputeConfig",
            "RunInterruptedError",
            "SFTConfig",
            "StaleCacheError",
            "SweepConfig",
            "TrainConfig",
            "evaluate",
            "load_model",
            "merge_adapter",
            "precompute",
            "sweep",
            "train",
        ),
    }
    _HOME = {name: room for room, names in _ROOMS.items() for name in names}

    def _installed_version() -> str:
        """Return the version of `logratio` or `logratio-serve`, whichever is installed."""
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("logratio")
        except PackageNotFoundError:
            return version("logratio-serve")

    def __getattr__(name: str) -> object:
        """Load a public name from its module, or the version from the installed package."""
        from importlib import import_module

        if name == "__version__":
            return _installed_version()
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"logratio.{_HOME[name]}"), name)

    def __dir__() -> list[str]:
        return sorted([*globals(), *__all__, "__version__"])
