"""The HTML report: complete from any folder of a run, safe with any text in it."""

import base64
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run

from logratio.data.analysis.distributions import distributions
from logratio.errors import MissingInputError
from logratio.report import pictures, write_report
from logratio.report.page import page_of
from logratio.report.pictures import POINTS, averaged
from logratio.report.run_files import RunFiles, read_run

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>{{ 7*7 }}'


def update(step: int) -> dict[str, Any]:
    values = {"loss": 0.7 - 0.01 * step, "rewards/accuracies": 0.5, "rewards/margins": 0.1 * step}
    values |= {"logratios/chosen": -0.4 * step, "logratios/rejected": -1.0 * step}
    values |= {"rewards/chosen": 0.1, "rewards/rejected": 0.0, "gradient_weight": 0.4}
    return {"step": step, **values, "grad_norm": 1.0, "lr": 1e-6, "epoch": step / 40}


def evaluation(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    return {
        "step": step,
        "groups": 50,
        "eval_loss": 0.6,
        "eval_rewards/accuracies": 0.8,
        "eval_kl": 1.5,
        "accuracy_interval": [0.66, 0.89],
        "sources": {EVIL: {"groups": 50, "value": 0.8}},
        "kl": {"nats": 1.5, "standard_error": 0.2, "samples": 2, "mean_length": 4.0},
        "distributions": distributions(rng.standard_normal(50) + 1, rng.standard_normal(50)),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The output folder of a run that was killed while it wrote a row."""
    sample = {"prompt": EVIL, "policy": "two\nlines", "reference": None, "policy_truncated": True}
    files = {
        "metrics.jsonl": [update(step) for step in range(1, 41)],
        "evaluations.jsonl": [evaluation(20), evaluation(40)],
        "samples.jsonl": [{"step": step, **sample} for step in (20, 40, 40)],
        "speed.jsonl": [{"step": step, "speed/tokens_per_second": 9.0} for step in range(1, 41)],
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(text + '{"step": 41, "lo')
    info = {
        "started": "now",
        "updates": 80,
        "settings": {"loss": "dpo", "beta": 0.125, "run_name": EVIL, "rules": {"max_length": 64}},
        "data": {"read": 99, "refused_by_code": {"empty_prompt": 3}},
        "versions": {"torch": "9.9"},
    }
    (tmp_path / "run_info.json").write_text(json.dumps(info))
    return tmp_path


class Tags(HTMLParser):
    """Collects elements with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_everything_is_on_the_page(folder: Path) -> None:
    text = Tags(page_of(read_run(folder))).text
    for part in (
        *("Started now. Not finished: 40 of 80 updates done", "less likely than at the start"),
        *("0.8 [0.660, 0.890]", "1.5 ± 0.39", "speed/tokens_per_second", "two\nlines"),
        *(
            "refused_by_code.empty_prompt",
            "rules.max_length",
            "0.125",
            "torch",
            "9.9",
            "two\nlines […]",
        ),
        *("Samples after update 40", "Distributions in the last evaluation", "Curves"),
    ):
        assert part in text, part


def test_the_page_is_one_file_and_executes_no_text(folder: Path) -> None:
    page = page_of(read_run(folder))
    tags = Tags(page)
    assert {name for name, _ in tags.found}.isdisjoint({"script", "link", "iframe", "object"})
    assert not [key for _, attrs in tags.found for key in attrs if key.startswith("on")]
    sources = [attrs["src"] or "" for name, attrs in tags.found if name == "img"]
    assert len(sources) == 2
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert tags.text.count(EVIL) >= 4, "title, source and samples show it as text"
    assert "default-src 'none'" in page


def test_pictures_are_svg_with_every_panel(folder: Path) -> None:
    page = page_of(read_run(folder))
    first, second = (
        base64.b64decode(found).decode() for found in re.findall(r"svg\+xml;base64,([^\"]+)", page)
    )
    ET.fromstring(first)
    titles = ("Loss", "Preference accuracy", "KL from the reference", "Gradient norm", "update")
    assert all(title in first for title in titles)
    assert "MFU" not in first, "a run without a figure has no empty panel"
    assert all(title in second for title in ("Rewards of held-out", "Calibration", "confidence"))


def test_a_folder_without_rows_gives_a_page_too(folder: Path) -> None:
    for path in folder.glob("*.jsonl"):
        path.unlink()
    page = page_of(read_run(folder))
    assert "Not finished: 0 of 80 updates" in page
    assert "<img" not in page
    (folder / "run_info.json").write_text("[broken")
    page_of(read_run(folder))


def test_a_finished_run_has_its_end(folder: Path) -> None:
    end = {"steps": 40, "best_step": 20, "stop_reason": "no improvement"}
    (folder / "training.json").write_text(json.dumps(end))
    text = Tags(page_of(read_run(folder))).text
    assert "Finished after 40 updates. Stopped early: no improvement." in text
    assert "The saved model is that of update 20." in text
    (folder / "training.json").write_text(json.dumps(end | {"steps": 8}))
    assert "Not finished" in page_of(read_run(folder)), "the model of an earlier run"


def test_without_matplotlib_there_are_tables_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setattr(pictures, "can_draw", lambda: False)
    page = page_of(read_run(folder))
    assert "<img" not in page
    assert "Evaluations" in page
    code, out, err = run("report", folder)
    assert (code, out.strip()) == (0, str(folder / "report.html"))
    assert "pip install 'logratio[plots]'" in err


def test_the_command_writes_where_it_is_asked(folder: Path, run: Run, tmp_path: Path) -> None:
    target = tmp_path / "new" / "page.html"
    assert run("report", folder, "--file", target, "--quiet")[:2] == (0, "")
    assert target.read_text().startswith("<!doctype html>")
    assert not (folder / "report.html").exists()
    (tmp_path / "empty").mkdir()
    code, _, err = run("report", tmp_path / "empty")
    assert code == 2
    assert "give the output folder of a run" in err
    with pytest.raises(MissingInputError):
        write_report(tmp_path / "absent")


def test_long_runs_are_averaged() -> None:
    series = np.stack([np.arange(10_000.0), np.ones(10_000)], 1)
    assert averaged(series).shape == (POINTS, 2)
    assert averaged(series)[:, 0].mean() == pytest.approx(series[:, 0].mean(), rel=1e-2)
    assert averaged(series[:10]) is not None and len(averaged(series[:10])) == 10
    assert pictures.draw_curves(RunFiles(Path())) is None
