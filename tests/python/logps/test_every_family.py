"""Every causal language model of the installed transformers is scored correctly, or refused.

For minutes: `make families` runs it, and `make test` leaves it out.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from oracle import in_float64
from small_configs import kinds, small_config
from small_models import alone, groups_of, small_model
from torch import Tensor
from transformers import PreTrainedModel

from logratio.logps.checks import UnsupportedModelError, _crosstalk, batch_of, choose_layout
from logratio.logps.completion import score
from logratio.training.config import Precision
from logratio.training.models import (
    ModelFolderError,
    architecture,
    autocast,
    quietly,
)

pytestmark = [pytest.mark.families, pytest.mark.filterwarnings("default")]

CPU = torch.device("cpu")
REFUSED: Mapping[str, tuple[str, str]] = {
    "an encoder-decoder": (
        "an encoder-decoder",
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart "
        "prophetnet whisper",
    ),
    "head": (
        "its head is not supported",
        "bert big_bird camembert data2vec-text electra ernie inkling_text megatron-bert "
        "modernbert-decoder rembert roberta roberta-prelayernorm roc_bert roformer xlm-roberta "
        "xlm-roberta-xl xlstm",
    ),
    "body": ("its body and its head are not separate", "llama4 llama4_text mllama"),
    "future": ("is not causal", "bert-generation cpmant xlm xlnet"),
    "hashes": ("hashes tokens at random", "reformer"),
}
REASONS = {kind: reason for reason, names in REFUSED.values() for kind in names.split()}


def gaps(logps: Tensor, truth: Tensor) -> Tensor:
    return (logps.double() - truth).abs()


def layout_of(kind: str, model: PreTrainedModel, folder: Path) -> str | None:
    """Return the layout that a model gets; None where it is refused, for the reason above."""
    small_config(kind).save_pretrained(folder)
    try:
        architecture(folder)
        with quietly():
            return choose_layout(model)[0]
    except (ModelFolderError, UnsupportedModelError) as error:
        assert REASONS[kind] in str(error)
        return None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", kinds())
def test_each_completion_scores_as_if_alone_or_is_refused(
    kind: str, seed: int, tmp_path: Path
) -> None:
    model, groups = small_model(kind, seed), groups_of(seed)
    layout = layout_of(kind, model, tmp_path)
    assert (layout is None) == (kind in REASONS)
    if layout is None:
        return
    with torch.no_grad():
        truth = alone(in_float64(model), groups)
        rounding = gaps(alone(model, groups), truth)
        logps = score(model, batch_of(groups, layout))
        padded = score(model, batch_of(groups, "padded"))
    assert float(truth.std()) > 0.2
    for own in (logps, padded):
        assert float(gaps(own, truth).max()) <= 5e-6 + 5 * float(rounding.max())


LOW: tuple[Precision, ...] = ("bf16", "bf16-weights")
FAIL_THEMSELVES = {("dbrx", "bf16")}
"""transformers adds products of bfloat16 to float32 in a way that torch refuses."""


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("kind", [kind for kind in kinds() if kind not in REASONS])
def test_in_low_precision_batching_adds_only_rounding(kind: str, precision: Precision) -> None:
    model, groups = small_model(kind, 0), groups_of(0)
    layout = choose_layout(model)[0]
    if precision == "bf16-weights":
        model.bfloat16()
    if (kind, precision) in FAIL_THEMSELVES:
        with autocast(precision, CPU), pytest.raises(UnsupportedModelError, match="code fails"):
            choose_layout(model)
        return
    with torch.no_grad():
        truth = alone(in_float64(model), groups)
        with autocast(precision, CPU):
            assert choose_layout(model)[0] == layout
            rounding = gaps(alone(model, groups), truth)
            gap = gaps(score(model, batch_of(groups, layout)), truth)
            if layout == "shared":
                assert _crosstalk(model, groups) == 0
    assert float(gap.mean()) <= 1e-3 + 1.5 * float(rounding.mean())
