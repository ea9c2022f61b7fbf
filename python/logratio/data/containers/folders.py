"""Folders of data files: which of them are read, and which are not and why."""

import errno
import json
from pathlib import Path

from logratio.data.containers.recognition import KIND_OF_SUFFIX, suffix
from logratio.errors import InputError

_BESIDE_DATA = {"dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json"}
_BESIDE_STEMS = {"readme", "license", "licence", "notice", "citation", "changelog"}


def data_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """List the data files below a folder, in the order of their paths.

    Returns:
        The files to read, and those that stand beside data and are left out: hidden ones, those
        whose names begin with an underscore, README, LICENSE, Markdown, `dataset_info.json` …

    Raises:
        OSError: It has no data files, or one of a kind that is not known, or holds several
            splits of a `datasets.DatasetDict`.
    """
    _check_splits(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    beside = [path for path in files if _is_beside(path.relative_to(folder))]
    files = [path for path in files if path not in set(beside)]
    unknown = [path for path in files if suffix(path.name) not in KIND_OF_SUFFIX]
    if unknown:
        names = ", ".join(path.relative_to(folder).as_posix() for path in unknown[:5])
        more = f" and {len(unknown) - 5:,} more" if len(unknown) > 5 else ""
        reason = f"Holds files of no known kind ({names}{more}); name those to read"
        raise InputError(errno.EINVAL, reason, str(folder))
    if not files:
        raise InputError(errno.ENOENT, "Holds no data file", str(folder))
    return files, beside


def _is_beside(path: Path) -> bool:
    if any(part.startswith((".", "_")) for part in path.parts):
        return True
    is_text = path.stem.lower() in _BESIDE_STEMS or path.suffix.lower() == ".md"
    return path.name in _BESIDE_DATA or is_text


def _check_splits(folder: Path) -> None:
    """Refuse to read training and test data as one, as `DatasetDict.save_to_disk` writes them."""
    listing = folder / "dataset_dict.json"
    if not listing.is_file():
        return
    try:
        splits = list(json.loads(listing.read_bytes())["splits"])
    except (ValueError, KeyError, TypeError):
        return
    if len(splits) > 1:
        names = ", ".join(map(str, splits[:8]))
        reason = f"Holds several splits ({names}): name the folder of one"
        raise InputError(errno.EINVAL, reason, str(folder))
