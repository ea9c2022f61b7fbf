"""A model that cannot share prompts, exported and used by the reranker like any other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import in_float64
from small_configs import small_config
from small_models import alone, groups_of, model_of
from tiny_models import word_tokenizer
from transformers import AutoModelForCausalLM

from logratio.bundle import BundleError, inspection, manifest_bytes, parse_manifest
from logratio.errors import ConfigError
from logratio.export import ExportConfig, export_bundle, plan_export
from logratio.export.parity import probing_inputs
from logratio.serving import Reranker
from logratio.serving.candidates import Candidate, CandidateGroup


def saved(folder: Path, kind: str, seed: int) -> Path:
    model_of(small_config(kind), seed).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `policy`, `reference` and `bundle`, of models with convolutions."""
    root = tmp_path_factory.mktemp("padded")
    policy, reference = saved(root / "policy", "lfm2", 0), saved(root / "reference", "lfm2", 1)
    export_bundle(ExportConfig(policy, reference, root / "bundle", 0.3), show_progress=False)
    return root


def test_its_rewards_are_torchs(folders: Path) -> None:
    reranker = Reranker.load(folders / "bundle", threads=1)
    groups = groups_of(3)
    asked = [
        CandidateGroup(tuple(prompt), False, tuple(Candidate(tuple(ids)) for ids in answers))
        for prompt, answers in groups
    ]
    found = [score.reward for scores in reranker.score_groups(asked) for score in scores]
    logps = []
    for name in ("policy", "reference"):
        model = AutoModelForCausalLM.from_pretrained(folders / name, dtype=torch.float32).eval()
        with torch.no_grad():
            logps.append(alone(in_float64(model), groups))
    lengths = [len(ids) for _, answers in groups for ids in answers]
    expected = [0.3 * float(part.sum()) for part in (logps[0] - logps[1]).split(lengths)]
    assert np.std(expected) > 1
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_inspect_shows_that_prompts_are_computed_again(folders: Path) -> None:
    content = manifest_bytes(folders / "bundle")
    manifest = parse_manifest(content, folders / "bundle")
    found = inspection.describe(folders / "bundle", content, manifest, None)
    assert found["layout"] == manifest.graph.layout == "padded"


def test_an_unknown_layout_is_refused(folders: Path) -> None:
    content = manifest_bytes(folders / "bundle").replace(b'"padded"', b'"spiral"')
    with pytest.raises(BundleError, match="layout 'spiral'"):
        parse_manifest(content, folders / "bundle")


def test_its_runs_are_counted_with_the_prompt_of_each_candidate(folders: Path) -> None:
    reranker = Reranker.load(folders / "bundle", threads=1)
    group = reranker.encode("the cat sits", ["on the mat", "in a tree"])
    (run,) = reranker.runs([group])
    longest = max(len(ids) for ids in group.different())
    assert run.tokens == 2 * (len(group.prompt_ids) + longest)


@pytest.mark.parametrize(
    ("kind", "part"), [("mixtral", "experts"), ("lfm2", "layers that carry a state")]
)
def test_what_is_not_a_product_of_matrices_is_not_quantized(
    kind: str, part: str, tmp_path: Path
) -> None:
    policy = saved(tmp_path / "policy", kind, 0)
    message = f"the {part}.* of {kind} models .*remove bits; dtype float16"
    with pytest.raises(ConfigError, match=message):
        plan_export(ExportConfig(policy, "none", tmp_path / "bundle", 1.0, bits=8))


@pytest.mark.parametrize(("max_length", "longest"), [(4096, 530), (300, 300), (100, 0)])
def test_an_export_is_compared_past_the_chunks_of_recurrent_layers(
    max_length: int, longest: int
) -> None:
    found = probing_inputs(small_config("mamba2"), 64, max_length)
    assert max((group.longest for group in found), default=0) == longest
