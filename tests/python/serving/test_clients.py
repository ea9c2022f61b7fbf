"""The clients of other projects, unmodified: each gives the order of the reranker.

`make clients` runs this, with the packages in an environment of their own, whose interpreter the
variable LOGRATIO_CLIENTS names.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import client_calls
import pytest
from client_calls import CALLS
from running_server import running
from tiny_bundle import tiny_bundle

from logratio.serving import Reranker

pytestmark = pytest.mark.clients

QUERY = "the cat sits"
DOCUMENTS = ["on the mat happy", "sad", "under a tree loud loud loud", "in the house"]
KEY = "a-key-of-the-clients-test"
WITHOUT_KEY = {"llama-index-xinference"}
"""Clients that cannot send a key."""
VARIABLES = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # otherwise loads prices at import
    # Requests to other hosts fail.
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "NO_PROXY": "127.0.0.1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory) / "bundle"


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Reranker:
    return Reranker.load(folder)


@pytest.fixture(scope="module")
def hosts(folder: Path) -> Iterator[list[str]]:
    """Two servers: one refuses unknown fields, and the other requests without the key."""
    with ExitStack() as stack:
        strict = stack.enter_context(running(folder, "--strict"))
        keyed = stack.enter_context(running(folder, LOGRATIO_API_KEYS=KEY))
        yield [f"127.0.0.1:{port}" for _, port in (strict, keyed)]


def called(name: str, folder: Path, **given: object) -> list[list[tuple[int, float]]]:
    """What a client returns for each host."""
    done = subprocess.run(
        [os.environ["LOGRATIO_CLIENTS"], client_calls.__file__, name],
        input=json.dumps({"query": QUERY, "documents": DOCUMENTS, **given}),
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | VARIABLES,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[list[tuple[int, float]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CALLS)
def test_a_client_gives_the_order_and_the_scores_of_the_reranker(
    hosts: list[str], reranker: Reranker, tmp_path: Path, name: str
) -> None:
    expected = reranker.rank(QUERY, DOCUMENTS)
    asked = hosts[:1] if name in WITHOUT_KEY else hosts
    rankings = called(name, tmp_path, hosts=asked, key=KEY, model=reranker.manifest.name)
    assert len(rankings) == len(asked)
    for ranking in rankings:
        assert [index for index, _ in ranking] == [score.index for score in expected]
        assert [number for _, number in ranking] == pytest.approx(
            [score.reward for score in expected], abs=1e-5
        )


def test_a_wrong_key_is_refused(hosts: list[str], reranker: Reranker, tmp_path: Path) -> None:
    name = reranker.manifest.name
    with pytest.raises(AssertionError, match="UnauthorizedError"):
        called("cohere-v2", tmp_path, hosts=hosts[1:], key="another-key-than-it", model=name)
