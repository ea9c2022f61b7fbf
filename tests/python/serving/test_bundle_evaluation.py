"""`evaluate --bundle` agrees with torch's evaluation of the same models, without torch."""

import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT
from tiny_bundle import BETA, copy_bundle, tiny_bundle, with_template

from logratio.bundle import CACHED_REFERENCE
from logratio.cli.app import main
from logratio.cli.evaluate import REFUSED
from logratio.data.store.build import build_store
from logratio.data.store.load import StoreMismatchError
from logratio.data.tokenization.groups import TokenizationRules
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.errors import ConfigError
from logratio.intervals import wilson
from logratio.serving import Reranker, bundle_pairs, evaluate_bundle
from logratio.training import EvaluateConfig, evaluate

WORDS = ("on the mat", "sad", "under a tree loud", "in the house", "happy happy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"the {'cat ' * (n % 4)}sits",
            "chosen": WORDS[n % 5],
            "rejected": f"{WORDS[(n + 1) % 5]} {'the ' * (n % 3)}dog",
        }
        for n in range(count)
    ]


def test_it_is_the_evaluation_of_the_models(folder: Path, tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", pairs(40)), write(tmp_path / "b.jsonl", pairs(90)[40:])]
    store, report = bundle_pairs(folder / "bundle", files, show_progress=False)
    found = evaluate_bundle(Reranker.load(folder / "bundle"), store, show_progress=False)
    policy, reference = folder / "policy", folder / "reference"
    known = evaluate(
        EvaluateConfig(policy, reference, files, beta=BETA, device="cpu"), show_progress=False
    )
    assert found.pairs == known.pairs == report.kept
    assert found.accuracy == known.accuracy
    assert found.sources == known.sources
    assert found.beta == BETA
    for name in ("margin", "logratio_chosen", "logratio_rejected", "length_rejected"):
        assert getattr(found, name) == pytest.approx(getattr(known, name), abs=1e-4)
    assert found.calibration.expected_error == pytest.approx(
        known.calibration.expected_error, abs=1e-4
    )


def test_a_sealed_store_is_taken_if_it_has_the_bundles_tokens(folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", pairs(10))
    rules = Reranker.load(folder / "bundle").manifest.tokenization
    for longest, path in ((rules["max_length"], "same"), (64, "other")):
        own = TokenizationRules.from_dict(rules | {"max_length": longest})
        tokenizer = PreferenceTokenizer.load(folder / "bundle", own)
        build_store([file], tokenizer, tmp_path / path)
    assert len(bundle_pairs(folder / "bundle", tmp_path / "same")[0]) == 10
    with pytest.raises(StoreMismatchError, match="max_length"):
        bundle_pairs(folder / "bundle", tmp_path / "other")


def test_other_data_is_refused(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "the cat", "completion": "sits", "label": True}]
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ConfigError, match=r"needs pairs.*1 group \(first: .*a\.jsonl:1\)"):
        bundle_pairs(folder / "bundle", file, show_progress=False)


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([{"role": "assistant", "content": "sits", "weight": -1}], "with a `weight` other than 1"),
        (
            [
                {"role": "assistant", "content": "sits"},
                {"role": "user", "content": "on"},
                {"role": "assistant", "content": "runs", "weight": 1},
            ],
            "that do not count",
        ),
    ],
)
def test_turns_that_a_bundle_cannot_weigh_are_refused(
    turns: list[dict[str, Any]],
    words: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    bundle = with_template(copy_bundle(tmp_path_factory, tmp_path / "bundle"), template)
    plain = [{"role": "assistant", "content": "happy"}]
    row = {"prompt": [{"role": "user", "content": "cat"}], "chosen": turns, "rejected": plain}
    file = write(tmp_path / "a.jsonl", [row | {"chosen": [{**turns[0], "weight": 1}]}, row])
    with pytest.raises(ConfigError, match=rf"{words}; evaluate the models.*1 group \(first: .*:2"):
        bundle_pairs(bundle, file, show_progress=False)


def test_a_bundle_that_needs_the_references_log_probs_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    reranker = Reranker.load(folder / "bundle")
    graph = replace(reranker.manifest.graph, kind=CACHED_REFERENCE)
    reranker.manifest = replace(reranker.manifest, graph=graph)
    store, _ = bundle_pairs(folder / "bundle", write(tmp_path / "a.jsonl", pairs(3)))
    with pytest.raises(ConfigError, match="evaluate the models"):
        evaluate_bundle(reranker, store, show_progress=False)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_the_command_prints_and_writes_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", pairs(30))
    given = ("evaluate", "--bundle", folder / "bundle", "--data", file)
    code, out, _ = run(capsys, *given)
    assert code == 0
    assert "preference accuracy" in out and "calibration error" in out
    code, shown, _ = run(capsys, *given, "--json", "-")
    result = json.loads(shown)
    low, high = wilson(result["accuracy"], 30)
    assert (result["pairs"], result["accuracy_interval"]) == (30, [low, high])
    assert f"(95 %: {low:.3f} to {high:.3f})" in out
    code, out, err = run(capsys, *given, "--dry-run")
    assert (code, out) == (0, "") and "30" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--policy", "p"), "remove --policy"),
        (("--beta", "0.1"), "remove --beta"),
        (("--samples", "3"), "remove --samples: a bundle cannot write"),
        (("--samples-file", "s"), "remove --samples-file: a bundle cannot write"),
        (("--token-budget", "64"), "remove --token-budget: the reranker divides"),
        (("--share-beginnings",), "remove --share-beginnings: its graph shares a prompt only"),
        (
            ("--beta", "0.1", "--policy", "p", "--device", "cpu"),
            "with --bundle, remove --policy, --beta: the bundle has its own models and β; remove "
            "--device: ONNX Runtime computes it on the CPU",
        ),
        (("--max-length", "64"), "its own tokenization rules"),
    ],
)
def test_settings_that_a_bundle_has_itself_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    code, _, err = run(
        capsys, "evaluate", "--bundle", folder / "bundle", "--data", "nothing.jsonl", *more
    )
    assert code != 0 and message in err


_VALUES = {
    **dict.fromkeys(("policy", "reference", "samples-file"), "x"),
    **dict.fromkeys(("beta", "samples", "seed", "token-budget", "max-new-tokens"), "3"),
    **dict.fromkeys(("max-length", "max-prompt-length"), "64"),
    **{"device": "cpu", "precision": "fp32", "prompt-truncation": "keep_end"},
    "date": "2026-11-29",
}
"""A value of each flag that takes one."""


def test_the_flags_that_the_manual_lists_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "python/docs/serving.md").read_text()
    listed = page.partition("`--bundle` refuses")[2].partition("\n\n")[0]
    flags = re.findall(r"`--([a-z-]+)`", listed)
    assert {*flags} >= {name.replace("_", "-") for name in REFUSED}
    for flag in flags:
        more = (f"--{flag}", *filter(None, [_VALUES.get(flag)]))
        given = ("evaluate", "--bundle", folder / "bundle", "--data", "nothing.jsonl")
        code, _, err = run(capsys, *given, *more)
        assert code != 0 and "--bundle" in err and "remove" in err, flag
    rules = {field.name for field in dataclasses.fields(TokenizationRules)}
    assert len([flag for flag in flags if flag.replace("-", "_") not in REFUSED]) > len(rules)


def test_a_policy_or_a_bundle_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "evaluate", "--data", "nothing.jsonl")
    assert code != 0 and "--policy is missing" in err


def test_it_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", pairs(5))
    code = (
        "import sys\nfor name in ('torch', 'transformers'): sys.modules[name] = None\n"
        "from logratio.cli.app import main\nmain(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "evaluate", "--bundle", str(folder / "bundle")]
    done = subprocess.run(
        [*command, "--data", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "preference accuracy" in done.stdout
