"""Near-duplicates from Python: types, planted pairs, places, errors."""

import numpy as np
import pytest
from numpy.typing import NDArray

from logratio._rust import Census, Store, StoreWriter, near_duplicates
from logratio.data.analysis.pairs import similarity
from logratio.data.analysis.statistics import Places

SHINGLE = 4
Document = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]


def make(documents: list[Document], metadata: str = "{}") -> Store:
    writer = StoreWriter()
    for number, (prompt, chosen, rejected) in enumerate(documents):
        lengths = np.array([len(chosen), len(rejected)], np.uint32)
        ids = np.concatenate([chosen, rejected])
        roles = np.array([0, 1], np.uint8)
        writer.push(prompt, ids, np.ones(len(ids), np.uint8), lengths, roles, 0, number + 1)
    return writer.finish(metadata)


def shingles(document: Document) -> set[tuple[int, ...]]:
    found: set[tuple[int, ...]] = set()
    for text in document:
        width = min(SHINGLE, len(text))
        found |= {tuple(text[at : at + width].tolist()) for at in range(len(text) - width + 1)}
    return found


def jaccard(a: Document, b: Document) -> float:
    left, right = shingles(a), shingles(b)
    return len(left & right) / len(left | right)


def planted(count: int, seed: int) -> list[Document]:
    """Random documents; two of five repeat an earlier one with up to four changed tokens."""
    random = np.random.default_rng(seed)
    documents: list[Document] = []
    for number in range(count):
        if number > 10 and random.random() < 0.4:
            prompt, chosen, rejected = documents[random.integers(len(documents))]
            copy = (prompt.copy(), chosen.copy(), rejected.copy())
            for _ in range(random.integers(5)):
                text = copy[random.integers(3)]
                text[random.integers(len(text))] = random.integers(500)
            documents.append(copy)
        else:
            sizes = random.integers(5, 60, 3)
            prompt, chosen, rejected = (random.integers(0, 500, n).astype(np.int32) for n in sizes)
            documents.append((prompt, chosen, rejected))
    return documents


def components(count: int, links: NDArray[np.int64]) -> list[int]:
    labels = list(range(count))
    for first, second in links.tolist():
        low, high = sorted((labels[first], labels[second]))
        labels = [low if label == high else label for label in labels]
    return labels


@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.95])
def test_all_pairs_of_the_exact_search_are_found(threshold: float) -> None:
    documents = planted(300, seed=4)
    links, similarities, clusters = near_duplicates(make(documents), threshold, SHINGLE)
    for (first, second), found in zip(links.tolist(), similarities, strict=True):
        exact = jaccard(documents[first], documents[second])
        assert found == pytest.approx(exact)
        assert exact >= threshold
    similar = [
        (first, second)
        for second in range(len(documents))
        for first in range(second)
        if jaccard(documents[first], documents[second]) >= threshold
    ]
    labels = components(len(documents), links)
    missed = [pair for pair in similar if labels[pair[0]] != labels[pair[1]]]
    assert len(missed) <= 0.005 * len(similar)
    assert len(similar) > 20
    assert clusters.tolist() == [labels[first] for first, _ in links.tolist()]


def test_arrays_have_their_types_and_order() -> None:
    store = make(planted(200, seed=5))
    links, similarities, clusters = near_duplicates(store)
    assert [one.dtype.name for one in (links, similarities, clusters)] == [
        "int64",
        "float32",
        "int64",
    ]
    assert links.shape == (len(similarities), 2) == (len(clusters), 2)
    assert (links[:, 0] < links[:, 1]).all()
    assert np.lexsort((links[:, 1], clusters)).tolist() == list(range(len(links)))
    again = near_duplicates(store)
    assert again[0].tolist() == links.tolist()
    assert again[1].tolist() == similarities.tolist()
    assert again[2].tolist() == clusters.tolist()


@pytest.mark.parametrize(("threshold", "shingle"), [(0, 5), (1.5, 5), (float("nan"), 5), (0.8, 0)])
def test_a_wrong_request_is_an_error(threshold: float, shingle: int) -> None:
    with pytest.raises(ValueError, match=r"threshold is|shingle has"):
        near_duplicates(make(planted(2, seed=0)), threshold, shingle)


def test_examples_come_from_the_largest_clusters_by_place() -> None:
    a, b, c = planted(3, seed=6)
    store = make([a, b, c, b, a, b], '{"files": ["some.jsonl"]}')
    found = similarity(store, Places(store))
    assert (found.similar, found.clusters, found.largest) == (3, 2, 3)
    assert found.examples == (
        "some.jsonl:4 resembles some.jsonl:2 (1.00)",
        "some.jsonl:5 resembles some.jsonl:1 (1.00)",
    )
    assert Places(make([a]))[0] == "file 0:1"


def test_nothing_is_similar_in_an_empty_store() -> None:
    store = StoreWriter().finish()
    found = similarity(store, Places(store))
    assert (found.similar, found.clusters, found.largest, found.examples) == (0, 0, 1, ())


def test_a_census_agrees_with_the_tokens() -> None:
    documents = planted(50, seed=7)
    census = Census(make(documents))
    tokens = np.concatenate([text for document in documents for text in document])
    assert census.uses.tolist() == np.bincount(tokens).tolist()
    last = np.array([text[-1] for document in documents for text in document[1:]])
    assert census.ends.tolist() == np.bincount(last, minlength=len(census.uses)).tolist()
    assert census.compared == 50
    assert census.same_start == sum(bool(b[0] == c[0]) for _, b, c in documents)
    assert census.beyond == 0
