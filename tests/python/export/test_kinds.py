"""Graphs of the policy alone: rewards with cached log-probs of a reference, and without one."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from shared_traces import shared_traces
from tiny_bundle import BETA, plain_sums, rewrite_manifest
from tiny_models import save_tiny_model

from logratio.bundle import BundleError, read_manifest
from logratio.data import PreferenceTokenizer, TokenizationRules
from logratio.errors import ConfigError, SettingTypeError
from logratio.export import ExportConfig, export_bundle
from logratio.export.kinds import notes_of
from logratio.export.plan import make_plan
from logratio.serving import Reranker, Workers, rank_file
from logratio.training import PrecomputeConfig, load_model, precompute
from logratio.training.fingerprint import model_fingerprint

PROMPT = "the cat sits"
TEXTS = ["on the mat happy", "sad", "under a tree loud loud loud", "in the house"]


def trained(folder: Path, seed: int, **settings: Any) -> Path:
    """A tiny model whose folder records how it was trained."""
    save_tiny_model(folder, seed)
    rules = TokenizationRules().to_dict()
    (folder / "training.json").write_text(json.dumps({"rules": rules, **settings}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy trained by each method, and the bundles of two."""
    folder = tmp_path_factory.mktemp("kinds")
    trained(folder / "dpo", 0, loss="dpo", beta=BETA)
    trained(folder / "simpo", 0, loss="simpo", beta=2.0)
    trained(folder / "cpo", 0, loss="cpo", beta=0.5)
    for name, reference in (("dpo", "cached"), ("simpo", None)):
        config = ExportConfig(folder / name, reference, folder / f"{name}-bundle")
        with shared_traces():
            export_bundle(config, show_progress=False)
    return folder


@pytest.fixture(scope="module")
def cached(folder: Path) -> Reranker:
    return Reranker.load(folder / "dpo-bundle")


@pytest.fixture(scope="module")
def free(folder: Path) -> Reranker:
    return Reranker.load(folder / "simpo-bundle")


@pytest.fixture(scope="module")
def policy_logps(folder: Path) -> tuple[np.ndarray, list[int]]:
    """Torch's log-prob sums of the texts in float64, and their lengths."""
    tokenizer = PreferenceTokenizer.load(folder / "dpo", TokenizationRules())
    ids = [tokenizer.encode_completion(PROMPT, text) for text in TEXTS]
    model = load_model(folder / "dpo").double()
    return plain_sums(model, tokenizer.encode_prompt(PROMPT), ids), [len(one) for one in ids]


def test_given_log_probs_are_the_reference(
    cached: Reranker, policy_logps: tuple[np.ndarray, list[int]]
) -> None:
    given = [-30.5, -4.25, -60.0, -11.0]
    scores = cached.score(PROMPT, TEXTS, given)
    np.testing.assert_allclose([one.policy_logps for one in scores], policy_logps[0], atol=1e-4)
    assert [one.reference_logps for one in scores] == given
    expected = BETA * (policy_logps[0] - given)
    assert cached.best_of(PROMPT, TEXTS, given).index == int(expected.argmax())
    np.testing.assert_allclose([one.reward for one in scores], expected, atol=1e-4)
    assert cached.manifest.graph.kind == "cached_reference"
    assert cached.manifest.reference == {}  # this training recorded none


def test_simpos_reward_is_the_mean_log_prob(
    free: Reranker, policy_logps: tuple[np.ndarray, list[int]]
) -> None:
    sums, lengths = policy_logps
    scores = free.score(PROMPT, TEXTS)
    expected = 2.0 * sums / lengths
    np.testing.assert_allclose([one.reward for one in scores], expected, atol=1e-4)
    assert all(math.isnan(one.reference_logps) for one in scores)
    assert [one.index for one in free.rank(PROMPT, TEXTS)] == np.argsort(-expected).tolist()
    graph = free.manifest.graph
    assert (graph.kind, graph.length_normalized) == ("reference_free", True)
    assert "(log π) / tokens" in repr(free)


def test_a_candidates_score_does_not_depend_on_the_other_candidates(
    free: Reranker, cached: Reranker
) -> None:
    texts = [*TEXTS, "happy"]
    together = free.score(PROMPT, texts)
    for index, text in enumerate(texts):
        assert free.score(PROMPT, [text])[0].reward == together[index].reward
        alone = cached.score(PROMPT, [text], [-3.0])[0].reward
        assert alone == cached.score(PROMPT, texts, [-3.0] * 5)[index].reward


@pytest.mark.parametrize(
    ("name", "reference", "beta", "kind"),
    [
        ("simpo", None, None, ("reference_free", 2.0, True)),
        ("simpo", None, 3.0, ("reference_free", 3.0, True)),
        ("cpo", None, None, ("reference_free", 0.5, False)),
        ("dpo", "none", None, ("reference_free", BETA, True)),
        ("dpo", "cached", 0.5, ("cached_reference", 0.5, False)),
    ],
)
def test_the_training_decides_the_reward(
    folder: Path, tmp_path: Path, name: str, reference: str | None, beta: float | None, kind: Any
) -> None:
    reward = make_plan(ExportConfig(folder / name, reference, tmp_path / "b", beta)).reward
    assert (reward.name, reward.beta, reward.length_normalized) == kind


def test_a_missing_reference_is_an_error_that_names_the_choices(
    folder: Path, tmp_path: Path, cached: Reranker, free: Reranker
) -> None:
    with pytest.raises(ConfigError, match=r"reference is missing.*`cached`.*`none`"):
        make_plan(ExportConfig(folder / "dpo", None, tmp_path / "b"))
    with pytest.raises(ConfigError, match="give reference_logps"):
        cached.score(PROMPT, TEXTS)
    with pytest.raises(ConfigError, match="has 1 values, but there are 4 candidates"):
        cached.score(PROMPT, TEXTS, [-1.0])
    with pytest.raises(ConfigError, match="not a sum of log-probs"):
        cached.score(PROMPT, TEXTS, [0.5] * 4)
    with pytest.raises(ConfigError, match="differs between equal candidates"):
        cached.score(PROMPT, ["sad", "sad"], [-1.0, -2.0])
    with pytest.raises(SettingTypeError, match="prompt must be a string or a list"):
        free.score(7, TEXTS)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="takes no reference_logps"):
        free.score(PROMPT, TEXTS, [-1.0] * 4)
    with pytest.raises(ConfigError, match="this one needs none"):
        Reranker.load(folder / "simpo-bundle", cache=tmp_path)
    assert "no log-probs" in str(cached.score(PROMPT, ["sad", "happy"], [None, -2.0])[0].error)


def test_a_reward_that_is_not_that_of_the_training_is_named(folder: Path, tmp_path: Path) -> None:
    reference, other = (save_tiny_model(tmp_path / str(seed), seed) for seed in (1, 2))
    known = model_fingerprint(reference, "bf16").to_dict()["digest"]
    policy = trained(tmp_path / "policy", 0, loss="dpo", identity={"reference": known})

    def notes(reference: Path | None, of: Path = policy) -> str:
        given = {} if reference is None else model_fingerprint(reference).to_dict()
        return " ".join(notes_of(of, reference, given, model_fingerprint(of).to_dict()))

    assert notes(reference) == ""  # the precision of the training does not matter
    assert "is not the reference of" in notes(other)
    assert "every reward is 0" in notes(policy)
    assert "trained with a reference, and this reward has none" in notes(None)
    assert notes(None, folder / "simpo") == notes(other, folder / "dpo") == ""


def test_the_cache_of_precompute_gives_the_reference(
    folder: Path, tmp_path: Path, run: Run
) -> None:
    reference = save_tiny_model(tmp_path / "reference", 1)
    data, rows = tmp_path / "pairs.jsonl", tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": PROMPT, "chosen": TEXTS[0], "rejected": TEXTS[1]}) + "\n")
    precompute(PrecomputeConfig(reference, [data], tmp_path / "cache"), show_progress=False)
    rows.write_text(json.dumps({"prompt": PROMPT, "candidates": TEXTS[:3]}) + "\n")
    both = tmp_path / "both"
    with shared_traces():
        export_bundle(ExportConfig(folder / "dpo", reference, both), show_progress=False)
    expected = Reranker.load(both).score(PROMPT, TEXTS[:2])
    out = tmp_path / "out.jsonl"
    code, _, _ = run(
        *("rank", "--bundle", folder / "dpo-bundle", "--input", rows, "--output", out),
        *("--cache", tmp_path / "cache"),
    )
    assert code == 0
    row = json.loads(out.read_text())
    assert row["rewards"][:2] == pytest.approx([one.reward for one in expected], abs=1e-4)
    assert (row["rewards"][2], row["errors"]) == (None, {"2": "no log-probs of the reference"})


def test_a_cache_of_the_candidates_ranks_all_of_them(
    folder: Path, tmp_path: Path, run: Run
) -> None:
    reference = save_tiny_model(tmp_path / "reference", 1)
    rows, cache, out = tmp_path / "rows.jsonl", tmp_path / "cache", tmp_path / "out.jsonl"
    rows.write_text(json.dumps({"prompt": PROMPT, "candidates": TEXTS}) + "\n")
    code, _, error = run(
        *("precompute", "--model", reference, "--data", rows, "--rows", "candidates"),
        *("--cache", cache),
    )
    assert code == 0, error
    bundle = folder / "dpo-bundle"
    code, _, _ = run("rank", "--bundle", bundle, "--input", rows, "--output", out, "--cache", cache)
    row = json.loads(out.read_text())
    assert code == 0 and None not in row["rewards"] and "errors" not in row


def test_a_ranking_is_not_continued_after_its_cache_has_grown(folder: Path, tmp_path: Path) -> None:
    reference = save_tiny_model(tmp_path / "reference", 1)
    cache, bundle = tmp_path / "cache", folder / "dpo-bundle"
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text((json.dumps({"prompt": PROMPT, "candidates": TEXTS[:3]}) + "\n") * 70)

    def fill(chosen: str, rejected: str) -> Reranker:
        data = tmp_path / "pairs.jsonl"
        row = {"prompt": PROMPT, "chosen": chosen, "rejected": rejected}
        data.write_text(json.dumps(row) + "\n")
        precompute(PrecomputeConfig(reference, [data], cache), show_progress=False)
        return Reranker.load(bundle, cache=cache)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    reranker = fill(TEXTS[0], TEXTS[1])
    for _ in range(2):  # the same cache: the second call has nothing left of the first 64 rows
        with pytest.raises(KeyboardInterrupt):
            rank_file(reranker, rows, out, progress=interrupt)
    partial = out.with_name(".out.jsonl.partial").read_text()
    assert (len(partial.splitlines()), partial.count("no log-probs")) == (70, 70)
    reranker = fill(TEXTS[0], TEXTS[2])
    cached = Workers(bundle, 2, {"cache": cache}).cached
    assert cached is not None and reranker.cached is not None
    assert cached.state == reranker.cached.state
    assert rank_file(reranker, rows, out).failed_candidates == 0
    assert "no log-probs" not in out.read_text()


def test_rank_reads_the_references_log_probs_from_the_rows(
    folder: Path, tmp_path: Path, run: Run, cached: Reranker
) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    row = {"prompt": PROMPT, "candidates": TEXTS[:2]}
    given = [
        {**row, "reference_logps": [-9.0, -2.0]},
        row,
        {**row, "reference_logps": [-9.0]},
        {**row, "reference_logps": "x"},
    ]
    rows.write_text("".join(json.dumps(one) + "\n" for one in given))
    bundle = folder / "dpo-bundle"
    code, _, _ = run("rank", "--bundle", bundle, "--input", rows, "--output", out)
    assert code == 1
    first, *others = map(json.loads, out.read_text().splitlines())
    scores = cached.score(PROMPT, TEXTS[:2], [-9.0, -2.0])
    assert first["rewards"] == [one.reward for one in scores]
    for row, part in zip(others, ("E201", "E203", "E203"), strict=True):
        assert part in row["error"]


def test_values_per_token_need_a_list_of_candidates(free: Reranker) -> None:
    with pytest.raises(SettingTypeError, match="must be a list of strings"):
        free.token_scores(PROMPT, "sad")


def test_values_per_token_add_up_to_the_log_probs(free: Reranker, cached: Reranker) -> None:
    texts = [*TEXTS, ""]
    for reranker in (free, cached):
        *values, last = reranker.token_scores(PROMPT, texts)
        scores = free.score(PROMPT, texts)
        assert last is None
        for one, score in zip(values, scores, strict=False):
            assert one is not None and len(one) == score.tokens
            assert one.sum() == pytest.approx(score.policy_logps, abs=1e-4)


def test_a_manifest_with_another_reward_is_refused(folder: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(folder / "simpo-bundle", tmp_path / "bundle"))
    graph = json.loads((bundle / "bundle.json").read_text())["graph"]
    rewrite_manifest(bundle, graph=graph | {"length_normalized": False})
    with pytest.raises(BundleError, match="rewards are not"):
        Reranker.load(bundle)
    rewrite_manifest(bundle, graph=graph | {"kind": "cached_reference"})
    with pytest.raises(BundleError, match="a golden group has inconsistent lengths"):
        Reranker.load(bundle)
    assert read_manifest(folder / "simpo-bundle").format_version == 4
