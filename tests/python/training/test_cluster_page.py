"""The table of planning.md is the forecast's."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from cluster_page import folders, pairs, rows, settings
from repository import ROOT

from logratio.training import Cluster, LoraSettings
from logratio.training.cluster_plan import plan_with

PAGE = (ROOT / "python" / "docs" / "planning.md").read_text()


@pytest.mark.slow
def test_the_table_of_clusters_is_the_forecast(tmp_path: Path) -> None:
    (table,) = re.findall(r"<!-- cluster: .*? -->\n(.*?)<!-- /cluster -->", PAGE, re.S)
    shown = table.splitlines()[2:]
    computed = rows(tmp_path)
    assert len(computed) == 18
    assert shown == computed, "the rows are:\n" + "\n".join(computed)


@pytest.mark.slow
@pytest.mark.parametrize(("label", "gpus"), [("70B", 8), ("405B", 64)])
@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_adapters_fit_where_the_page_has_them(
    label: str, gpus: int, gpu: str, tmp_path: Path
) -> None:
    assert "With `--lora`, 70B fits on 8 GPUs of either kind, and 405B on 64." in PAGE
    run = replace(settings(folders(tmp_path)[label], gpus), lora=LoraSettings())
    assert plan_with(run, Cluster(gpus, gpu), pairs(gpus)).fits
