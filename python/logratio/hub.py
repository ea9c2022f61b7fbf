"""Models on the Hugging Face hub: from an id to a folder in the cache of huggingface_hub."""

from functools import cache
from pathlib import Path

from logratio.errors import ConfigError, LogratioError, fetching_advice, hub_id

TOKENIZER = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
"""Files of a tokenizer and of a model's config. Files in subfolders are never downloaded."""
MODEL = (*TOKENIZER, "*.safetensors")
"""The above, and the weights."""
OTHER_COPIES = ("*/*", "consolidated*.safetensors")
"""Further copies of the weights, in formats that transformers does not read."""


class HubError(LogratioError, OSError):
    """A model is neither a local folder nor available from the hub.

    Attributes:
        reason: The message without the advice.
    """

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(reason + advice)
        self.reason = reason


def local_folder(given: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the folder of a model: `given` itself, or the snapshot of an id of the hub.

    A snapshot is downloaded to the cache of huggingface_hub (`HF_HOME`, `HF_HUB_CACHE`), with the
    login of `hf auth login`. Without a network, or with `HF_HUB_OFFLINE=1`, the snapshot in the
    cache is used. An existing folder always takes precedence over an id.

    Args:
        given: A folder, or an id "organisation/name", also as "organisation/name@revision".
        revision: Branch, tag or commit of an id. None: the one after "@", else "main".
        weights: Download the weights too, and not only the tokenizer and the config.

    Returns:
        The folder. A path that does not exist and cannot be an id is returned unchanged.

    Raises:
        HubError: `given` looks like an id, and no snapshot can be found.
        ConfigError: `revision` is given for a folder, or twice.

    Example:
        >>> local_folder("sft-model").name
        'sft-model'
    """
    name, _, own = str(given).partition("@")
    found = None if Path(given).exists() else hub_id(name)
    if found is None:
        if revision is not None:
            raise ConfigError(
                f"revision {revision}: {given} is not an id of the Hugging Face hub; a folder has "
                "no revisions"
            )
        return Path(given)
    if own and revision is not None:
        raise ConfigError(f"{given} names a revision, and revision {revision} is given too")
    if "/" not in found:  # may also be a folder's name with a typing error: stays on this machine
        return _cached(found, own or revision) or Path(given)
    return _snapshot(found, own or revision, MODEL if weights else TOKENIZER)


def origin(folder: str | Path) -> str:
    """Return the name of a model that a later run can use from any working directory.

    Returns:
        "organisation/name@commit" for a snapshot in the cache of huggingface_hub; the absolute
        path of any other folder.
    """
    found = hub_origin(folder)
    return "@".join(found) if found else str(Path(folder).resolve())


def hub_origin(folder: str | Path) -> tuple[str, str] | None:
    """Return the id and the commit of a snapshot in the cache; None for any other folder."""
    path = Path(folder).absolute()
    repository, kind = path.parent.parent.name, path.parent.name
    if kind != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/"), path.name


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None


@cache
def _snapshot(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """Download a snapshot, or find it in the cache; once per process, so that it stays the same."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=[*patterns], ignore_patterns=[*OTHER_COPIES]
        )
    except (OSError, ValueError) as error:
        is_missing = isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled)
        advice = fetching_advice(name, "model") if is_missing else ""
        raise HubError(_failure(name, revision, error), advice) from error
    return Path(folder)


def _failure(name: str, revision: str | None, error: Exception) -> str:
    """Describe why a model cannot be fetched, and what to do."""
    from huggingface_hub import errors

    at = f"{name} at {revision}" if revision else name
    if isinstance(error, errors.GatedRepoError):
        return f"{at}: accept the model's terms on its page on the hub, then run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name}: the model has no revision {revision}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{at}: no such folder, and the Hugging Face hub has no such model, or only with "
            "another login (`hf auth login`)"
        )
    reason = "it is not in the cache, and the Hugging Face hub cannot be reached"
    if not isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        reason = f"it cannot be downloaded: {str(error).strip().partition(chr(10))[0]}"
    return f"{at}: no such model folder, and {reason}"
