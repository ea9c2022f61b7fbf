"""Folders of data files: which of them are read, and which are not and why.

A folder may hold several splits of a data set, as clones of the Hugging Face hub do. They are never
read as one: `split` names the one to read. A split is recognised as `datasets` does it: by the name
of a shard (``data/train_prefs-00000-of-00002.parquet``), by a word in the name of a file or folder
(``train.jsonl``, ``dev/a.csv``), or by the list that ``DatasetDict.save_to_disk`` writes.
"""

import errno
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from logratio.data.containers.recognition import KIND_OF_SUFFIX, suffix
from logratio.errors import InputError

_BESIDE_DATA = {"dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json"}
_BESIDE_STEMS = {"readme", "license", "licence", "notice", "citation", "changelog"}
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words that name a split, as in `datasets`."""
_SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
_PARTS_OF_ONE = {"data", "part", "shard", "chunk"}
_NAMED = 4  # files of a split that an error names
_CONFIG = re.compile(r"^\s*-?\s*config_name:\s*[\"']?([\w.-]+)", re.MULTILINE)


def data_files(folder: Path, split: str | None = None) -> tuple[list[Path], list[Path]]:
    """List the data files below a folder, in the order of their paths.

    Args:
        folder: A folder of files, a clone of a data set, or its folder in the hub's cache.
        split: The split to read; None: the only one.

    Returns:
        The files to read, and those that stand beside data and are left out: hidden ones, those
        whose names begin with an underscore, README, LICENSE, Markdown, `dataset_info.json` …

    Raises:
        OSError: It has no data files, or one of a kind that is not known, or several splits or
            configurations and none is chosen, or no split of that name.
    """
    folder = _snapshot(folder)
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
    _check_configs(folder, files)
    return _chosen(folder, files, split), beside


def chosen_split(names: Iterable[str], split: str | None) -> str | None:
    """Choose one of several splits; None where none of them is meant.

    Args:
        names: All splits there are.
        split: The name of one, or another word for it (``dev`` for ``validation``).
    """
    names = list(names)
    if split is None:
        return names[0] if len(names) == 1 else None
    if split in names:
        return split
    meant = _WORDS.get(split, split)
    return next((name for name in names if _WORDS.get(name, name) == meant), None)


def _chosen(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """Return the files of one split.

    Files whose names tell no split are read with the only one there is, or where there is none.
    """
    saved = _saved_splits(folder)
    of = {path: _split_of(path.relative_to(folder), saved) for path in files}
    names = sorted({name for name in of.values() if name is not None})
    if split is None and len(names) < 2:
        return files
    name = chosen_split(names, split)
    if name is None:
        raise InputError(errno.EINVAL, _choice(folder, of, names, split), str(folder))
    return [path for path in files if of[path] == name]


def _choice(
    folder: Path, of: Mapping[Path, str | None], names: list[str], split: str | None
) -> str:
    if not names:
        return f"Holds no split {split!r}: the names of its files tell no split"
    listed = []
    for name in names:
        own = [path.relative_to(folder).as_posix() for path in of if of[path] == name]
        more = f" and {len(own) - _NAMED:,} more" if len(own) > _NAMED else ""
        listed.append(f"{name}: {', '.join(own[:_NAMED])}{more}")
    what = "Holds several splits" if split is None else f"Holds no split {split!r}"
    return f"{what}; choose one with --split {names[-1]}, or name its files ({'; '.join(listed)})"


def _split_of(path: Path, saved: frozenset[str]) -> str | None:
    """Tell a file's split by its path below the folder, or None."""
    if saved:
        return path.parts[0] if path.parts[0] in saved else None
    shard = _SHARD.match(path.name)
    if shard and shard["split"] not in _PARTS_OF_ONE:
        return shard["split"]
    stem = path.name.partition(".")[0]
    for part in (stem, *reversed(path.parts[:-1])):
        found = {_WORDS[word] for word in re.split(r"[-._ 0-9]+", part.lower()) if word in _WORDS}
        if len(found) == 1:
            return found.pop()
    return None


def _saved_splits(folder: Path) -> frozenset[str]:
    """Read the splits of a folder that `DatasetDict.save_to_disk` wrote."""
    try:
        splits = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
        return frozenset(map(str, splits))
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


def _snapshot(folder: Path) -> Path:
    """Return the snapshot to read of a data set's folder in the hub's cache; else the folder."""
    snapshots = folder / "snapshots"
    if not (folder.name.startswith("datasets--") and snapshots.is_dir()):
        return folder
    names = sorted(path.name for path in snapshots.iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    if main.is_file() and (name := main.read_text().strip()) in names:
        return snapshots / name
    if len(names) == 1:
        return snapshots / names[0]
    reason = f"Holds several snapshots ({', '.join(names)}): name the folder of one"
    raise InputError(errno.EINVAL, reason, str(folder))


def _check_configs(folder: Path, files: list[Path]) -> None:
    """Refuse to read several configurations as one, where the data set's card names them."""
    card = folder / "README.md"
    if not card.is_file():
        return
    front = re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
    configs = set(_CONFIG.findall(front[1])) if front else set()
    tops = sorted({path.relative_to(folder).parts[0] for path in files} & configs)
    if len(tops) > 1:
        reason = f"Holds several configurations ({', '.join(tops)}): name the folder of one"
        raise InputError(errno.EINVAL, reason, str(folder))


def _is_beside(path: Path) -> bool:
    if any(part.startswith((".", "_")) for part in path.parts):
        return True
    is_text = path.stem.lower() in _BESIDE_STEMS or path.suffix.lower() == ".md"
    return path.name in _BESIDE_DATA or is_text
