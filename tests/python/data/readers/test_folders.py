"""Folders of data: which files are read, which split, and how nulls in tables are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import duckdb
import polars
import pyarrow
import pytest
from pyarrow import feather, parquet

from logratio.data.formats import FormatSettings
from logratio.data.inspection import inspect
from logratio.data.readers import open_inputs
from logratio.data.readers.inputs import Reading

ROW = {"prompt": "p", "chosen": "a", "rejected": "b"}


def layout(folder: Path, *names: str) -> Path:
    """Write into each file one row that contains the file's name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{**ROW, "prompt": name}]
        if path.suffix == ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def read(folder: Path, split: str | None = None) -> list[str]:
    """Return the names of the files that are read."""
    return [Path(rows.name).name for rows in open_inputs([folder], Reading(split))]


LAYOUTS: dict[str, tuple[tuple[str, ...], dict[str, list[str]]]] = {
    "names": (("train.jsonl", "test.jsonl"), {"train": ["train.jsonl"], "test": ["test.jsonl"]}),
    "words in names": (
        ("hh-train-1.jsonl", "hh-train-2.jsonl", "hh_eval.jsonl"),
        {"train": ["hh-train-1.jsonl", "hh-train-2.jsonl"], "test": ["hh_eval.jsonl"]},
    ),
    "hub": (
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        {"train": ["train-00000-of-00001.parquet"], "test": ["test-00000-of-00001.parquet"]},
    ),
    "hub, unknown names": (
        ("data/train_prefs-00000-of-00001.parquet", "data/train_sft-00000-of-00001.parquet"),
        {
            "train_prefs": ["train_prefs-00000-of-00001.parquet"],
            "train_sft": ["train_sft-00000-of-00001.parquet"],
        },
    ),
    "folders": (
        ("train/a.jsonl", "train/b.jsonl", "dev/a.jsonl"),
        {"train": ["a.jsonl", "b.jsonl"], "validation": ["a.jsonl"]},
    ),
    "inner folders": (
        ("harmless/train.jsonl", "harmless/test.jsonl", "helpful/train.jsonl"),
        {"train": ["train.jsonl", "train.jsonl"], "test": ["test.jsonl"]},
    ),
}


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (("train/a.jsonl", "validation/a.jsonl"), "train"),
        (("test.jsonl", "validation.jsonl"), "validation"),
        (("train_prefs-00000-of-00001.parquet", "train_sft-00000-of-00001.parquet"), "train_prefs"),
    ],
)
def test_the_split_for_training_is_the_example(
    names: tuple[str, ...], shown: str, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match=rf"formats\.split {shown}, or"):
        read(layout(tmp_path / "set", *names))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_split_is_chosen_or_refused_with_the_list(kind: str, tmp_path: Path) -> None:
    names, splits = LAYOUTS[kind]
    folder = layout(tmp_path / "set", *names)
    with pytest.raises(
        OSError, match=r"Holds several splits; choose one with formats\.split"
    ) as caught:
        read(folder)
    for split, files in splits.items():
        assert f"{split}: " in str(caught.value)
        assert read(folder, split) == files
    with pytest.raises(OSError, match="Holds no split 'golden'; choose one"):
        read(folder, "golden")


def test_synonyms_of_a_split_select_it(tmp_path: Path) -> None:
    folder = layout(tmp_path, "train.jsonl", "valid.jsonl")
    for word in ("validation", "valid", "dev", "val"):
        assert read(folder, word) == ["valid.jsonl"]


@pytest.mark.parametrize(
    "names",
    [
        ("a.jsonl", "b.jsonl"),
        ("train.jsonl",),
        ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"),
        ("data-00000-of-00002.parquet", "data-00001-of-00002.parquet"),
        ("train.jsonl", "more.jsonl"),
        ("latest.jsonl", "contest.jsonl", "training_of_the_test.jsonl"),
    ],
)
def test_a_single_split_or_none_is_read_completely(names: tuple[str, ...], tmp_path: Path) -> None:
    folder = layout(tmp_path / "set", *names)
    assert sorted(read(folder)) == sorted(names)


def test_asking_for_a_split_of_a_folder_without_splits(tmp_path: Path) -> None:
    folder = layout(tmp_path / "set", "a.jsonl")
    with pytest.raises(OSError, match="Holds no split 'train': the names of its files"):
        read(folder, "train")
    assert read(folder / "a.jsonl", "train") == [
        "a.jsonl"
    ]  # a file named explicitly is always read


def test_a_saved_dict_of_splits(tmp_path: Path) -> None:
    part = datasets.Dataset.from_list([ROW])
    datasets.DatasetDict(train=part, test_hard=part).save_to_disk(tmp_path / "sets")
    with pytest.raises(OSError, match=r"test_hard: test_hard/data-00000-of-00001\.arrow"):
        read(tmp_path / "sets")
    for split in ("train", "test_hard"):
        (rows,) = open_inputs([tmp_path / "sets"], Reading(split))
        assert f"/{split}/" in rows.name
    with pytest.raises(TypeError, match="'train', 'test_hard', but not 'golden'"):
        open_inputs([datasets.DatasetDict(train=part, test_hard=part)], Reading("golden"))
    (rows,) = open_inputs([datasets.DatasetDict(train=part, test=part)], Reading("train"))
    assert rows.size == 1


def test_a_data_set_in_the_hubs_cache(tmp_path: Path) -> None:
    folder = tmp_path / "datasets--org--name"
    for number in ("0a1b", "2c3d"):
        snapshot = folder / "snapshots" / number / "data"
        snapshot.mkdir(parents=True)
        for split in ("train", "test"):
            blob = layout(folder / "blobs", f"{number}-{split}") / f"{number}-{split}"
            (snapshot / f"{split}.jsonl").symlink_to(blob)
    with pytest.raises(OSError, match=r"several snapshots \(0a1b, 2c3d\)"):
        read(folder, "train")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("2c3d")
    (rows,) = open_inputs([folder], Reading("train"))
    assert "2c3d" in rows.name
    assert [row["prompt"] for _, row in rows if isinstance(row, dict)] == ["2c3d-train"]
    with pytest.raises(OSError, match="several splits"):
        read(folder)


def test_several_configurations_are_not_read_as_one(tmp_path: Path) -> None:
    folder = layout(tmp_path / "set", "easy/train.jsonl", "hard/train.jsonl")
    card = (
        "---\nconfigs:\n- config_name: easy\n  data_dir: easy\n- config_name: hard\n---\n# A set\n"
    )
    (folder / "README.md").write_text(card)
    with pytest.raises(OSError, match=r"several configurations \(easy, hard\)"):
        read(folder)
    assert read(folder / "easy") == ["train.jsonl"]
    (folder / "README.md").write_text("# config_name: easy\n")
    assert read(folder) == ["train.jsonl", "train.jsonl"]


def test_inspect_reads_the_split_that_is_asked_for(tmp_path: Path) -> None:
    folder = layout(tmp_path / "set", "train.jsonl", "test.jsonl")
    (file,) = inspect([folder], FormatSettings(split="test")).files
    assert file.name.endswith("test.jsonl")


NESTED: list[dict[str, Any]] = [
    {"prompt": "x", "call": {"name": "mul", "arguments": {"a": 3, "b": 18}}, "tags": [{"k": 1}]},
    {"prompt": "y", "call": {"name": "weather", "arguments": {"city": "Oslo"}}, "tags": [{"l": 2}]},
    {"prompt": "z", "call": {"name": "now", "arguments": {}}, "tags": []},
]


def written(path: Path, write: Callable[[pyarrow.Table, Path], None]) -> Path:
    write(pyarrow.Table.from_pylist(NESTED), path)
    return path


TABLES: dict[str, Callable[[Path], Any]] = {
    "parquet": lambda folder: written(folder / "a.parquet", parquet.write_table),
    "arrow": lambda folder: written(
        folder / "a.arrow", lambda table, path: feather.write_feather(table, path, "uncompressed")
    ),
    "pyarrow": lambda folder: pyarrow.Table.from_pylist(NESTED),
    "datasets": lambda folder: datasets.Dataset.from_list(NESTED),
    "polars": lambda folder: polars.DataFrame(NESTED),
    "duckdb": lambda folder: duckdb.connect().from_arrow(pyarrow.Table.from_pylist(NESTED)),
}


@pytest.mark.parametrize("kind", TABLES)
def test_fields_of_other_rows_are_dropped_from_a_row(kind: str, tmp_path: Path) -> None:
    """A table of structs has every field in every row, null where the row has none."""
    (rows,) = open_inputs([TABLES[kind](tmp_path)])
    assert [row for _, row in rows] == NESTED


def test_a_null_at_the_top_of_a_row_is_kept(tmp_path: Path) -> None:
    rows = [{**ROW, "chosen": None}, ROW]
    (opened,) = open_inputs([pyarrow.Table.from_pylist(rows)])
    assert [row for _, row in opened] == rows


def test_a_null_in_json_is_kept(tmp_path: Path) -> None:
    row = {"prompt": "x", "call": {"arguments": {"limit": None}}}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (opened,) = open_inputs([path])
    assert [found for _, found in opened] == [row]


def test_rows_of_tools_are_the_same_from_json_and_from_parquet(shared: Path) -> None:
    from logratio.data.formats import Decoder

    def records(name: str) -> list[Any]:
        (rows,) = open_inputs([shared / "cases" / name])
        decoder = Decoder()
        decoded = [decoder.decode(row, source) for source, row in rows if isinstance(row, dict)]
        parts = [record for one in decoded for record in one.records]
        return [(record.prompt, record.completions, record.tools) for record in parts]

    assert records("tools_two_schemas.jsonl") == records("tools_two_schemas.parquet") != []
