"""Train on preferences, keep the reference's half, serve the other: one log-ratio, three uses.

The library turns on one number, ``log π(y|x) - log π_ref(y|x)``: how much likelier a trained
policy makes a completion ``y`` of a prompt ``x`` than the reference it started from.
`logratio.training` moves it, the reference cache keeps its second half on disk, and ``beta`` times
it is the reward that `logratio.scoring` exports and `logratio.serving` ranks with.

Importing this package loads nothing else; take what you need from its folders.
"""

TYPE_CHECKING = False  # type checkers read it as true, and `typing` need not be loaded

__version__: str

if not TYPE_CHECKING:

    def __getattr__(name: str) -> str:
        """Look up ``__version__``, the only lazy name, in the installed package's metadata."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import version

        return version("logratio")
