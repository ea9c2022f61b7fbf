"""Every family that can be exported gives torch's numbers in ONNX Runtime, at every length.

For minutes: `make families` compares all of them, and `make test` a few. With ``WRITE_FAMILIES=1``
each comparison writes its row of `families.json`, from which `make docs`
makes the table of the manual.
"""

import fcntl
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
import transformers
from oracle import Group, in_float64
from small_configs import kinds, small_config
from small_models import alone, groups_of, model_of, small_model
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig, PreTrainedModel

from logratio._rust import candidate_layout
from logratio.bundle import PADDED
from logratio.bundle.graph_file import read_graph
from logratio.export import families
from logratio.export.families import FAMILIES, REFUSED, check_exportable, layout_of
from logratio.export.graph import OPSETS, GraphError, trace
from logratio.export.scorer import PolicyScorer
from logratio.export.traceable import use_exportable_attention
from logratio.graph_inputs import graph_inputs
from logratio.logps.checks import UnsupportedModelError
from logratio.logps.completion import limits_of

TABLE = Path(__file__).with_name("families.json")
NAT = 1e-4
"""Tolerance in nats per sequence, and as many times what float32 adds to torch's own forward."""
LONG = 1024
FEW = ("mixtral", "mamba2", "bloom")
"""Those of `make test`: experts, a state across tokens, and positions added to attention."""


def session_of(model: PreTrainedModel, opset: int) -> Any:
    """Trace a policy and open its graph, which contains only what a reranker would load."""
    scorer = PolicyScorer(model, "reference_free", 1.0, normalized=False)
    content = onnx_ir.to_proto(trace(scorer, opset)).SerializeToString()
    read_graph(content, None)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(session: Any, groups: list[Group], chunk: int) -> np.ndarray:
    """Score groups in one run: sums of log-probs, float64 `[N]`."""
    layout = candidate_layout(
        [np.array(prompt, np.int32) for prompt, _ in groups],
        [[np.array(ids, np.int32) for ids in answers] for _, answers in groups],
        chunk,
    )
    found: np.ndarray = session.run(["policy_logps"], graph_inputs(layout))[0]
    return found.astype(np.float64)


def sums(logps: torch.Tensor, groups: list[Group]) -> np.ndarray:
    lengths = [len(ids) for _, answers in groups for ids in answers]
    return np.array([float(part.double().sum()) for part in logps.split(lengths)])


def groups_within(config: PreTrainedConfig) -> list[Group]:
    """Groups of many lengths, most of them longer than the trace and than any window.

    They are shorter where a family computes longer sequences in another way, and longer than two
    of transformers' chunks where its layers carry a state.
    """
    longest = min((limit.tokens for limit in limits_of(config)), default=LONG)
    long = groups_of(7)[0]
    groups = [*groups_of(0), (long[0] * 5, [long[1][0] * 4, long[1][1][:1]])]
    if layout_of(config) == PADDED:
        groups.append((groups[-1][0] * 5, [groups[-1][1][0]]))
    return [
        (prompt[: longest // 2], [ids[: longest - longest // 2] for ids in answers])
        for prompt, answers in groups
    ]


def compare(model: PreTrainedModel, groups: list[Group]) -> dict[str, float]:
    """Compare graphs with the model's own forward in float64.

    Returns:
        The opset, the largest difference, and the largest that rounding to float32 explains.
    """
    use_exportable_attention(model)
    with torch.no_grad():
        truth = sums(alone(in_float64(model), groups), groups)
        rounding = float(np.abs(sums(alone(model, groups), groups) - truth).max())
    opset, session, together = first_that_runs(model, groups)
    single = [
        run(session, [(prompt, [ids])], 5)[0] for prompt, answers in groups for ids in answers
    ]
    worst = float(max(np.abs(together - truth).max(), np.abs(np.array(single) - truth).max()))
    assert truth.std() > 1
    return {"opset": opset, "nats": worst, "bound": NAT + 5 * rounding}


def first_that_runs(model: PreTrainedModel, groups: list[Group]) -> tuple[int, Any, np.ndarray]:
    """Return the first opset that ONNX Runtime can run, as an export does."""
    reasons = []
    for opset in OPSETS:
        try:
            session = session_of(model, opset)
            return opset, session, run(session, groups, 16)
        except (GraphError, onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument) as error:
            reasons.append(str(error))
    raise AssertionError(reasons)


def compared(kind: str) -> dict[str, float]:
    return compare(small_model(kind, 0), groups_within(small_config(kind)))


def record(kind: str, row: dict[str, Any]) -> None:
    """Write a row of the table; tests in other processes may write theirs at the same time."""
    with TABLE.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        rows = json.load(file) | {kind: row}
        file.seek(0)
        file.truncate()
        file.write(json.dumps({name: rows[name] for name in sorted(rows)}, indent=1) + "\n")


@pytest.mark.families
@pytest.mark.parametrize("kind", FAMILIES)
def test_each_familys_graph_gives_torchs_log_probs(kind: str) -> None:
    found = compared(kind)
    assert found["nats"] <= found["bound"]
    if os.environ.get("WRITE_FAMILIES"):
        nats = float(f"{found['nats']:.0e}")
        record(kind, {"layout": FAMILIES[kind], "opset": found["opset"], "nats": nats})


@pytest.mark.parametrize("kind", FEW)
def test_a_few_families_graphs_give_torchs_log_probs(kind: str) -> None:
    found = compared(kind)
    assert found["nats"] <= found["bound"]


def test_the_table_has_exactly_the_families_that_were_compared() -> None:
    written = json.loads(TABLE.read_text())
    assert {kind: row["layout"] for kind, row in written.items()} == dict(FAMILIES)
    assert all(row["nats"] < 1e-2 for row in written.values())


@pytest.mark.parametrize("kind", kinds())
def test_every_causal_language_model_is_exportable_or_refused_with_a_reason(kind: str) -> None:
    assert not (kind in FAMILIES and kind in REFUSED)
    if kind in FAMILIES:
        check_exportable(small_config(kind), 8)
        return
    reason = REFUSED.get(kind, "no test compares")
    with pytest.raises(UnsupportedModelError, match=re.escape(f"cannot be exported: {reason}")):
        check_exportable(small_config(kind), 0)


def test_recurrent_layers_are_refused_under_an_older_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(families, "_RECURRENT_SINCE", "99.1")
    installed = re.escape(transformers.__version__)
    with pytest.raises(UnsupportedModelError, match=f"transformers 99.1 or newer, and {installed}"):
        check_exportable(small_config("mamba2"), 8)
    for kind in ("llama", "lfm2"):
        check_exportable(small_config(kind), 8)


SMALL: dict[str, Any] = {
    **{"vocab_size": 199, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
}


def dynamic() -> PreTrainedConfig:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return LlamaConfig(**SMALL, max_position_embeddings=128, rope_parameters=rope)


def longrope() -> PreTrainedConfig:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0}
    factors = {"short_factor": [1.5] * 8, "long_factor": [4.0] * 8}
    return Phi3Config(
        **SMALL,
        max_position_embeddings=512,
        original_max_position_embeddings=128,
        rope_parameters=rope | factors,
    )


@pytest.mark.parametrize("make", [dynamic, longrope], ids=["dynamic", "longrope"])
def test_changing_rope_factors_are_exact_up_to_the_length_where_they_change(make: Any) -> None:
    config = make()
    check_exportable(config, 128)
    with pytest.raises(UnsupportedModelError, match="128"):
        check_exportable(config, 129)
    groups = groups_within(config)
    assert max(len(prompt) + len(ids) for prompt, answers in groups for ids in answers) > 100
    model = model_of(config, 0)
    found = compare(model, groups)
    assert found["nats"] <= found["bound"]
    too_long = [(groups[-1][0] * 2, [[5] * 40])]  # the graph would be wrong, so it is refused
    with torch.no_grad():
        truth = sums(alone(in_float64(model), too_long), too_long)
    assert abs(run(session_of(model, OPSETS[0]), too_long, 16) - truth).max() > 0.01
