"""The table of cluster.md is the forecast's."""

import re
from pathlib import Path

import pytest
from cluster_page import rows
from repository import ROOT

PAGE = (ROOT / "python" / "docs" / "cluster.md").read_text()


@pytest.mark.slow
def test_the_table_of_clusters_is_the_forecast(tmp_path: Path) -> None:
    (table,) = re.findall(r"<!-- cluster: .*? -->\n(.*?)<!-- /cluster -->", PAGE, re.S)
    shown = table.splitlines()[2:]
    computed = rows(tmp_path)
    assert len(computed) == 18
    assert shown == computed, "the rows are:\n" + "\n".join(computed)
