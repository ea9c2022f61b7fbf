"""Preference optimisation: train on preferences, cache the reference, serve the implicit reward.

The library turns on one number, the log-ratio ``log π(y|x) - log π_ref(y|x)``: how much more likely
a trained policy makes a completion ``y`` of a prompt ``x`` than the reference it started from.
`logratio.training` moves it, the reference cache keeps its second half on disk, and ``beta`` times
it is the reward that `logratio.export` exports and `logratio.serving` ranks with.

Importing this package is free: each name loads its module when it is first used.
"""

TYPE_CHECKING = False  # type checkers read it as true, and `typing` need not be loaded

__version__: str

__all__ = [
    "EvaluateConfig",
    "ExportConfig",
    "FormatSettings",
    "LogratioError",
    "LoraSettings",
    "PrecomputeConfig",
    "ReferenceCache",
    "Reranker",
    "TokenizationRules",
    "TrainConfig",
    "evaluate",
    "export_bundle",
    "precompute",
    "train",
]

if TYPE_CHECKING:
    from logratio.cache import ReferenceCache as ReferenceCache
    from logratio.data import FormatSettings as FormatSettings
    from logratio.data import TokenizationRules as TokenizationRules
    from logratio.errors import LogratioError as LogratioError
    from logratio.export import ExportConfig as ExportConfig
    from logratio.export import export_bundle as export_bundle
    from logratio.serving import Reranker as Reranker
    from logratio.training import EvaluateConfig as EvaluateConfig
    from logratio.training import LoraSettings as LoraSettings
    from logratio.training import PrecomputeConfig as PrecomputeConfig
    from logratio.training import TrainConfig as TrainConfig
    from logratio.training import evaluate as evaluate
    from logratio.training import precompute as precompute
    from logratio.training import train as train
else:
    _ROOMS = {
        "cache": ("ReferenceCache",),
        "data": ("FormatSettings", "TokenizationRules"),
        "errors": ("LogratioError",),
        "export": ("ExportConfig", "export_bundle"),
        "serving": ("Reranker",),
        "training": (
            *("EvaluateConfig", "LoraSettings", "PrecomputeConfig", "TrainConfig"),
            *("evaluate", "precompute", "train"),
        ),
    }
    _HOME = {name: room for room, names in _ROOMS.items() for name in names}

    def __getattr__(name: str) -> object:
        """Load a public name from its module, or the version from the installed package."""
        from importlib import import_module
        from importlib.metadata import version

        if name == "__version__":
            return version("logratio")
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"logratio.{_HOME[name]}"), name)

    def __dir__() -> list[str]:
        return sorted([*globals(), *__all__, "__version__"])
