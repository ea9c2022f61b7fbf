"""Ids of the Hugging Face hub are folders of its cache, and a missing one is explained."""

import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from logratio import EvaluateConfig, PrecomputeConfig, TrainConfig, evaluate, precompute, train
from logratio.errors import ConfigError
from logratio.hub import HubError, _snapshot, local_folder, origin
from logratio.training.fingerprint import model_fingerprint
from logratio.training.models import load_model
from logratio.training.run_folder import settings_of

Run = Callable[..., tuple[int, str, str]]
FIRST, SECOND = "a" * 40, "b" * 40
"""Commits: the tag v1, and the branch main."""


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of huggingface_hub, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _snapshot.cache_clear()
    return tmp_path / "hub"


@pytest.fixture
def org_tiny(hub_cache: Path, make_model: Callable[..., Path]) -> Path:
    """The cache's folder of org/tiny, with two commits."""
    folder = hub_cache / "models--org--tiny"
    for seed, (commit, ref) in enumerate(((FIRST, "v1"), (SECOND, "main"))):
        shutil.copytree(make_model(f"copy{seed}", seed), folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return folder


@pytest.mark.parametrize(
    ("given", "revision", "commit"),
    [
        ("org/tiny", None, SECOND),
        ("org/tiny", "v1", FIRST),
        ("org/tiny@v1", None, FIRST),
        ("org/tiny", FIRST, FIRST),
        ("hf://org/tiny@main", None, SECOND),
        (Path("org/tiny@v1"), None, FIRST),
        ("https://huggingface.co/org/tiny", None, SECOND),
    ],
)
def test_an_id_is_the_folder_of_its_revision(
    given: str | Path, revision: str | None, commit: str, org_tiny: Path
) -> None:
    folder = local_folder(given, revision)
    assert folder == org_tiny / "snapshots" / commit
    assert origin(folder) == f"org/tiny@{commit}"
    assert local_folder(origin(folder)) == folder


def test_an_existing_folder_takes_precedence(
    org_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert local_folder("org/tiny") == Path("org/tiny")
    assert origin("org/tiny") == str(tmp_path / "org" / "tiny")
    with pytest.raises(ConfigError, match="revision v1: org/tiny is not an id"):
        local_folder("org/tiny", "v1")


def test_two_revisions_are_refused(org_tiny: Path) -> None:
    with pytest.raises(ConfigError, match="revision main is given too"):
        local_folder("org/tiny@v1", "main")


def test_a_name_without_an_organisation_is_only_looked_up_in_the_cache(
    org_tiny: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    shutil.copytree(org_tiny, hub_cache / "models--distil")
    assert local_folder("distil") == hub_cache / "models--distil" / "snapshots" / SECOND
    assert local_folder("sft-modle") == Path("sft-modle")


def test_only_files_that_are_read_are_downloaded(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []

    def downloaded(name: str, **given: object) -> str:
        asked.append({"name": name, **given})
        return str(hub_cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", downloaded)
    for weights in (True, False, True):
        local_folder("org/large", "v2", weights=weights)
    assert [("*.safetensors" in one["allow_patterns"]) for one in asked] == [True, False]  # type: ignore[operator]
    assert {(one["name"], one["revision"]) for one in asked} == {("org/large", "v2")}
    assert all("*/*" in one["ignore_patterns"] for one in asked)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (errors.GatedRepoError, "accept the model's terms"),
        (errors.RevisionNotFoundError, "org/large: the model has no revision v9"),
        (errors.RepositoryNotFoundError, "no such folder, and the Hugging Face hub has no such"),
        (errors.HfHubHTTPError, "cannot be downloaded: broken"),
    ],
)
def test_a_refusal_of_the_hub_is_explained(
    kind: type[errors.HfHubHTTPError],
    sentence: str,
    hub_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object, **__: object) -> str:
        raise kind("broken\nmore", response=MagicMock())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(HubError, match=sentence):
        local_folder("org/large", "v9")


def test_every_command_takes_ids(
    org_tiny: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, output = tmp_path / "cache", tmp_path / "policy"
    precompute(PrecomputeConfig("org/tiny", pairs_file, cache, revision="v1"), show_progress=False)
    config = TrainConfig(
        "org/tiny", pairs_file, output, reference="org/tiny@v1", cache=cache, lr=1e-2
    )
    train(config, show_progress=False)
    assert (settings_of(output) or {})["model"] == f"org/tiny@{SECOND}"
    assert (settings_of(output) or {})["reference"] == f"org/tiny@{FIRST}"
    found = evaluate(EvaluateConfig(output, "org/tiny@v1", pairs_file), show_progress=False)
    plain = EvaluateConfig(output, org_tiny / "snapshots" / FIRST, pairs_file)
    assert found == evaluate(plain, show_progress=False)
    assert found.logratio_chosen != 0
    weights = load_model("org/tiny@v1").state_dict()
    plain_weights = load_model(org_tiny / "snapshots" / FIRST).state_dict()
    assert all(weights[name].equal(plain_weights[name]) for name in weights)


def test_an_adapter_finds_its_base_on_the_hub_at_the_same_commit(
    run: Run, org_tiny: Path, pairs_file: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    given = ("--data", pairs_file, "--lora", "--output", adapter)
    code, _, err = run("train", "--model", "org/tiny", "--revision", "v1", *given)
    assert code == 0, err
    text = (adapter / "adapter_config.json").read_text()
    assert '"org/tiny"' in text
    assert FIRST in text
    (org_tiny / "refs" / "v1").unlink()
    base = model_fingerprint(org_tiny / "snapshots" / FIRST)
    assert model_fingerprint(adapter).hard["weights"] == base.hard["weights"]
    code, _, err = run("data", "inspect", pairs_file, "--tokenizer", "org/tiny")
    assert code == 0, err


def test_a_missing_model_is_explained_before_anything_is_written(
    run: Run, hub_cache: Path, pairs_file: Path, tmp_path: Path
) -> None:
    given = ("--data", pairs_file, "--output", tmp_path / "o")
    code, _, err = run("train", "--model", "org/absent", *given)
    assert code == 2
    assert "org/absent: no such model folder" in err
    assert "it is not in the cache, and the Hugging Face hub cannot be reached" in err
    assert "hf download org/absent --local-dir absent" in err
    code, _, err = run("train", "--model", "org/absent", "--loss", "sft", "--beta", 1, *given)
    assert "--loss sft has no --beta" in err  # a wrong setting is reported before a download
    assert not (tmp_path / "o").exists()
