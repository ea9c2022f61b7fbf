"""The picture of a data report: its numbers are read back from matplotlib's figure."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from tokenizers_for_tests import save, word_level

from logratio._rust import Store
from logratio.data import FormatSettings, PreferenceTokenizer, TokenizationRules, build_store
from logratio.data.analysis import Analysis, analyse
from logratio.data.analysis.plots import draw, figure
from logratio.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("words"), word_level())


def analysed(
    rows: Sequence[dict[str, str]], place: Path, folder: Path, **options: Any
) -> tuple[Store, Analysis]:
    """Build a store of rows without truncation, and analyse it."""
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = PreferenceTokenizer.load(folder, TokenizationRules(max_length=2000))
    store, account = build_store([path], tokenizer, **options)
    return store, analyse(store, account)


def pair(prompt: int, chosen: int, rejected: int) -> dict[str, str]:
    """Return a pair of the given word counts; each completion has one more token, EOS."""
    return {
        "prompt": f"the{' cat' * (prompt - 1)}",
        "chosen": " sat" * chosen,
        "rejected": " ran" * rejected,
    }


@pytest.fixture
def few(tmp_path: Path, folder: Path) -> Analysis:
    """Five pairs, one of them duplicated, and a refused row."""
    lengths = [(2, 4, 1), (2, 4, 1), (3, 1, 4), (4, 9, 1), (5, 1, 2), (6, 0, 1), (7, 4, 1)]
    return analysed([pair(*each) for each in lengths], tmp_path, folder)[1]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> tuple[Store, Analysis]:
    """Pairs of many lengths; a few are so long that they are outside all bins."""
    lengths = np.random.default_rng(0).geometric(0.02, (400, 3)).clip(max=150).tolist()
    lengths[:4] = [[300, 1, 900], [300, 1, 900], [1, 900, 1], [1, 900, 1]]
    rows = [pair(*each) for each in lengths]
    return analysed(rows, tmp_path_factory.mktemp("many"), folder, deduplicate=False)


def texts_in(svg: Path) -> list[str]:
    return [text for one in ElementTree.parse(svg).iter() for text in [one.text] if text]


def panels_of(drawn: Figure) -> dict[str, Axes]:
    legends = [axes.get_legend() for axes in drawn.axes]
    assert None not in legends
    return {one.get_title().get_text(): one.axes for one in legends if one is not None}


def legend_of(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def test_each_histogram_counts_the_lengths_in_its_bins(many: tuple[Store, Analysis]) -> None:
    store, analysis = many
    panels = panels_of(figure(analysis))
    chosen, rejected = store.counted_lengths().astype(int).reshape(-1, 2).T
    prompts = store.prompt_lengths().astype(int)
    groups = prompts + store.completion_lengths().astype(int).reshape(-1, 2).sum(1)
    ends: set[str] = set()
    for title, columns in {
        "Prompt": [prompts],
        "Chosen and rejected": [chosen, rejected],
        "Group: prompt once, all completions": [groups],
        "Chosen − rejected, pair by pair": [chosen - rejected],
    }.items():
        axes = panels[title]
        marks = {text.get_text()[0]: text.get_text()[2:] for text in axes.texts}
        start = float(marks.get("<", "-inf").replace("−", "-"))
        end = float(marks.get("≥", "inf").replace(",", ""))
        steps = [patch for patch in axes.patches if isinstance(patch, StepPatch)]
        assert len(steps) == len(columns)
        for patch, column in zip(steps, columns, strict=True):
            counts, edges, _ = patch.get_data()
            lows, highs = edges[:-1], edges[1:]
            assert counts.sum() == len(column)
            assert counts[highs <= start].sum() == (column < start).sum()
            assert counts[lows >= end].sum() == (column >= end).sum()
            for count, low, high in zip(counts, lows, highs, strict=True):
                inside = (low <= column) & (column < high)
                assert not start <= low < end or count == inside.sum(), (title, low, high)
        ends |= marks.keys()
    assert ends == {"<", "≥"}


def test_the_picture_names_medians_means_and_intervals(few: Analysis) -> None:
    panels = panels_of(figure(few))
    assert legend_of(panels["Prompt"]) == ["prompt: median 4.0, mean 4.2"]
    assert legend_of(panels["Chosen and rejected"]) == [
        "chosen: median 5.0, mean 4.8",
        "rejected: median 2.0, mean 2.8",
    ]
    assert legend_of(panels["Chosen − rejected, pair by pair"]) == [
        "Cohen's d_z = 0.47 (95 %: −0.45 … 1.40)\nP(chosen longer) = 0.600 (95 %: 0.231 … 0.882)"
    ]


def test_the_bars_of_tokens_computed_add_up(many: tuple[Store, Analysis]) -> None:
    store, analysis = many
    axes = panels_of(figure(analysis))["Tokens computed, batches of 8 groups"]
    bars = [one for one in axes.containers if isinstance(one, BarContainer)]
    parts = {one.get_label(): [bar.get_width() for bar in one] for one in bars}
    prompts = store.prompt_lengths().astype(int)
    answers = store.completion_lengths().astype(int).reshape(-1, 2)
    rows = (prompts[:, None] + answers).max(1)
    once, completions = prompts.sum(), answers.sum()
    padded = [2 * 8 * order.reshape(-1, 8).max(1).sum() for order in (rows, np.sort(rows))]
    padding = [total - 2 * once - completions for total in padded]
    assert parts == {
        "prompt once": [once] * 3,
        "completions": [completions] * 3,
        "prompt again": [once, once, 0],
        "padding": [*padding, 0],
    }
    assert [text.get_text() for text in axes.texts] == [
        f"{padded[0]:,} tokens\n{100 * padding[0] / padded[0]:.1f} % padding",
        f"{padded[1]:,} tokens\n{100 * padding[1] / padded[1]:.1f} % padding",
        f"{once + completions:,} tokens\n"
        f"{100 * once / (2 * once + completions):.1f} % less than unpadded rows",
    ]


def test_text_in_an_svg_is_text(tmp_path: Path, few: Analysis) -> None:
    draw(few, tmp_path / "new folder" / "a.svg")
    texts = texts_in(tmp_path / "new folder" / "a.svg")
    assert "5 preference pairs" in texts
    assert "7 rows read = 5 kept + 1 refused + 1 duplicate left out" in texts
    assert "chosen: median 5.0, mean 4.8" in texts


@pytest.mark.parametrize(
    ("suffix", "start"), [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")]
)
def test_the_same_data_gives_the_same_bytes(
    tmp_path: Path, few: Analysis, suffix: str, start: bytes
) -> None:
    first, again = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    draw(few, first)
    with rc_context({"axes.facecolor": "black", "svg.fonttype": "path"}):  # a user's matplotlibrc
        draw(few, again)
    drawn = first.read_bytes()
    assert drawn.startswith(start)
    assert drawn == again.read_bytes()
    assert b"CreationDate" not in drawn and b"<dc:date>" not in drawn


def test_a_picture_of_other_kinds_of_groups(tmp_path: Path, folder: Path) -> None:
    rows = [{"prompt": "the cat", "completion": f" sat{' and' * n}"} for n in range(4)]
    _, analysis = analysed(rows, tmp_path, folder, formats=FormatSettings(demonstrations=True))
    drawn = figure(analysis)
    assert drawn.get_suptitle().startswith("4 preference groups\n4 rows read")
    assert [*panels_of(drawn)][:3] == [
        "Prompt",
        "Completion",
        "Group: prompt once, all completions",
    ]
    assert len(drawn.axes) == 4


def test_no_picture_of_another_kind_or_of_nothing(tmp_path: Path, few: Analysis) -> None:
    with pytest.raises(ConfigError, match=r"a picture is \.svg, \.png or \.pdf"):
        draw(few, tmp_path / "a.jpg")
    with pytest.raises(ConfigError, match="no group to draw"):
        figure(replace(few, groups=0, padding=None))
