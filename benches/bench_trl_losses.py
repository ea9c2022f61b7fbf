"""Check that losses agree with TRL's trainers on the same batches to 1e-5.

    python benches/bench_trl_losses.py

Creates an environment in a temporary folder, installs TRL there (it is not a dependency of this
project), and compares every loss that TRL has with ours on random batches, with a reference that is
close to the policy. Where the two differ by definition, the note of the row describes how, and the
batches or settings are such that the difference vanishes.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

TRL = "trl==1.16.0"
BATCHES, GROUPS, TOLERANCE = 20, 6, 1e-5
RESULTS = Path(__file__).parent / "results" / "trl_losses.jsonl"


class Case(NamedTuple):
    """One comparison.

    `loss` and `ours` are our settings; `trainer` and `theirs` are TRL's. `groups` is the number of
    pairs, or of labelled answers, in a batch, and `prompt` the number of tokens in the longest
    prompt. `fixed` are numbers of the update that replace ours.
    """

    loss: str
    trainer: str
    theirs: dict[str, Any]
    ours: dict[str, Any] = {}  # noqa: RUF012
    note: str = ""
    groups: int = GROUPS
    prompt: int = 30
    fixed: dict[str, float] = {}  # noqa: RUF012


def dpo(loss: str, loss_type: str | list[str], ours: Mapping[str, Any] = {}, **rest: Any) -> Case:
    """Return a comparison with DPOTrainer; β and label smoothing have the same names there."""
    same = {name: ours[name] for name in ("beta", "label_smoothing") if name in ours}
    types = [loss_type] if isinstance(loss_type, str) else loss_type
    fields = {"beta": 0.1, "loss_type": types} | same | rest.pop("theirs", {})
    return Case(loss, "DPOTrainer", fields, {"beta": 0.1} | dict(ours), **rest)


ONE_PAIR = (
    "TRL's likelihood term is the mean over the tokens of a micro-batch, ours that of each pair: "
    "batches of one pair"
)
NO_SHIFT = "TRL has no reward shift: ours is set to 0"
FREE = {"max_length": 64}

CASES = [
    dpo("dpo", "sigmoid"),
    dpo("robust", "robust", {"label_smoothing": 0.1}),
    dpo("ipo", "ipo"),
    dpo("hinge", "hinge"),
    dpo("exo", "exo_pair", {"label_smoothing": 0.1}),
    dpo("nca", "nca_pair"),
    dpo("bco", "bco_pair", note=NO_SHIFT, fixed={"shift": 0.0}),
    dpo("sppo", "sppo_hard"),
    dpo("aot", "aot", {"label_smoothing": 0.1}, note="the batch is the update"),
    dpo("aot-unpaired", "aot_unpaired", {"label_smoothing": 0.1}, note="the batch is the update"),
    dpo("apo-zero", "apo_zero"),
    dpo("apo-down", "apo_down"),
    dpo("discopop", "discopop", {"beta": 0.05}),
    dpo(
        "discopop",
        "discopop",
        {"beta": 0.1, "loss_options": {"tau": 0.5}},
        theirs={"discopop_tau": 0.5},
    ),
    dpo("ln-dpo", "sigmoid_norm", {"beta": 5.0}),
    dpo("f-dpo-forward-kl", "sigmoid", theirs={"f_divergence_type": "forward_kl"}),
    dpo("f-dpo-js", "sigmoid", theirs={"f_divergence_type": "js_divergence"}),
    dpo(
        "f-dpo-alpha",
        "sigmoid",
        {"loss_options": {"alpha": 0.3}},
        note="TRL's coefficient is 1 - α",
        theirs={"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    ),
    dpo("ld-dpo", "sigmoid", {"loss_options": {"alpha": 0.4}}, theirs={"ld_alpha": 0.4}),
    dpo("wpo", "sigmoid", theirs={"use_weighting": True}),
    Case("sft", "DPOTrainer", {"loss_type": ["sft"]}, note=ONE_PAIR, groups=1),
    dpo(
        "mpo",
        ["sigmoid", "bco_pair", "sft"],
        note=f"{ONE_PAIR}; {NO_SHIFT}",
        groups=1,
        fixed={"shift": 0.0},
        theirs={"loss_weights": [0.8, 0.2, 1.0]},
    ),
    dpo("iterative-rpo", ["sigmoid", "sft"], note=ONE_PAIR, groups=1),
    dpo(
        "rpo",
        ["sigmoid", "sft"],
        note=ONE_PAIR,
        groups=1,
        theirs={"loss_weights": [1.0, 0.005]},
    ),
    Case(
        "kto",
        "KTOTrainer",
        {"loss_type": "kto", "beta": 0.1, "desirable_weight": 1.5, "undesirable_weight": 0.75},
        {"beta": 0.1, "loss_options": {"desirable_weight": 1.5, "undesirable_weight": 0.75}},
        note="the batch is the update",
    ),
    Case(
        "apo-zero-unpaired",
        "KTOTrainer",
        {"loss_type": "apo_zero_unpaired", "beta": 0.1},
        {"beta": 0.1},
    ),
    Case(
        "orpo",
        "ORPOTrainer",
        {"beta": 0.1} | FREE,
        {"beta": 0.1},
        note=ONE_PAIR + " whose prompt is one token, as TRL's covers the prompt after its first",
        groups=1,
        prompt=1,
    ),
    Case(
        "cpo",
        "CPOTrainer",
        {"beta": 0.1, "cpo_alpha": 0.5, "label_smoothing": 0.1} | FREE,
        {"beta": 0.1, "label_smoothing": 0.1, "loss_options": {"alpha": 0.5}},
        note=ONE_PAIR,
        groups=1,
    ),
    Case(
        "simpo",
        "CPOTrainer",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "label_smoothing": 0.1}
        | {"cpo_alpha": 0.0}
        | FREE,
        {"beta": 2.0, "gamma": 0.7, "label_smoothing": 0.1},
    ),
    Case(
        "alpha-po",
        "CPOTrainer",
        {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 0.7, "alpha": 0.25, "cpo_alpha": 0.0}
        | FREE,
        {"beta": 2.5, "gamma": 0.7, "loss_options": {"alpha": 0.25}},
    ),
    Case(
        "slic",
        "CPOTrainer",
        {"loss_type": "hinge", "beta": 1.0, "cpo_alpha": 0.0} | FREE,
        {"loss_options": {"delta": 1.0, "weight": 0.0}},
        note="TRL's hinge without a reference; its likelihood term is a mean, ours a sum: left out",
    ),
]

Example = tuple[list[int], list[list[int]]]
"""Token ids of a prompt and of its two completions."""


def models() -> list[PreTrainedModel]:
    """Build the policy and the reference, whose weights differ a little.

    TRL's sums are float32, so large log-ratios would amplify rounding in the exponentials of f-DPO.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=211, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    built: list[PreTrainedModel] = [LlamaForCausalLM(config).eval() for _ in range(2)]
    with torch.no_grad():
        pairs = zip(*(model.parameters() for model in built), strict=True)
        for own, reference in pairs:
            own.mul_(3.0)
            reference.copy_(own + 0.005 * torch.randn_like(own))
    return built


def examples(case: Case, seed: int) -> list[Example]:
    """Draw ragged groups of token ids; of labelled answers, the second is the next one's first."""
    random = np.random.default_rng(seed)

    def ids(longest: int) -> list[int]:
        return [int(i) for i in random.integers(3, 211, int(random.integers(1, longest + 1)))]

    drawn: list[Example] = [(ids(case.prompt), [ids(20), ids(20)]) for _ in range(case.groups)]
    if case.trainer != "KTOTrainer":
        return drawn
    return [
        (prompt, [answers[0], drawn[(i + 1) % len(drawn)][1][0]])
        for i, (prompt, answers) in enumerate(drawn)
    ]


def is_good(number: int) -> bool:
    """Whether the answer of a group is a good one; one of three is not."""
    return number % 3 != 1


def ours(cases: Sequence[Case]) -> list[list[float]]:
    """Compute the mean loss of each batch of each case with this library."""
    policy, reference = models()
    return [
        [our_loss(case, policy, reference, examples(case, seed)) for seed in range(BATCHES)]
        for case in cases
    ]


def our_loss(
    case: Case, policy: PreTrainedModel, reference: PreTrainedModel, groups: list[Example]
) -> float:
    """Compute the mean loss of a batch that is a whole update."""
    from logratio.logps.checks import batch_of
    from logratio.logps.completion import score
    from logratio.training.config import TrainConfig
    from logratio.training.methods.logps import CHOSEN, MISMATCHED, REJECTED, GroupLogps
    from logratio.training.methods.objective import Objective
    from logratio.training.methods.token_weights import weighted_sums

    objective = Objective.of(TrainConfig("model", "data", "out", loss=case.loss, **case.ours))
    batch = batch_of(groups, "shared")
    weights = objective.token_weights(batch.targets)
    with torch.no_grad():
        own, fixed = (
            weighted_sums(batch.targets, score(model, batch), weights)
            for model in (policy, reference)
        )
    roles = [CHOSEN, REJECTED] * len(groups)
    if case.trainer == "KTOTrainer":
        firsts = [CHOSEN if is_good(i) else REJECTED for i in range(len(groups))]
        roles = [role for first in firsts for role in (first, MISMATCHED)]
    lengths, offsets = batch.targets.lengths, batch.targets.group_offsets
    inputs = GroupLogps(own, fixed, lengths, torch.tensor(roles, dtype=torch.uint8), offsets)
    if objective.needs_confidences:
        inputs = replace(inputs, confidences=policy_confidences(policy, batch))
    found = objective.statistics(inputs, trains=True)
    found |= {name: torch.tensor(value).double() for name, value in case.fixed.items()}
    return float(objective.losses(replace(inputs, statistics=found)).mean())


def policy_confidences(policy: PreTrainedModel, batch: Any) -> Tensor:
    """Return WPO's numbers of each completion, from the pass in which training computes them."""
    from logratio.logps.attention.interface import shared_prompts
    from logratio.logps.completion import completion_loss
    from logratio.training.update import confidences_of

    found = []

    def share(logps: Tensor, part: Any) -> Tensor:
        found.append(confidences_of(part, logps, part.collisions))
        return logps.sum()

    with shared_prompts(policy):
        completion_loss(policy, batch, share, collisions=True)
    return torch.cat(found)


def theirs(folder: str) -> list[list[float]]:
    """Compute the same with TRL's trainers."""
    found = []
    for case in CASES:
        trainer = trl_trainer(case, folder)
        trainer.model.eval()
        layout = {"DPOTrainer": dpo_batch, "KTOTrainer": kto_batch}.get(case.trainer, cpo_batch)
        with torch.no_grad():
            found.append(
                [
                    float(trainer.compute_loss(trainer.model, layout(examples(case, seed))))
                    for seed in range(BATCHES)
                ]
            )
    return found


def trl_trainer(case: Case, folder: str) -> Any:
    """Build TRL's trainer; its dataset only satisfies the constructor."""
    import trl
    from datasets import Dataset
    from trl.experimental import cpo, orpo

    kinds = {
        "DPOTrainer": (trl.DPOTrainer, trl.DPOConfig),
        "KTOTrainer": (trl.KTOTrainer, trl.KTOConfig),
        "ORPOTrainer": (orpo.ORPOTrainer, orpo.ORPOConfig),
        "CPOTrainer": (cpo.CPOTrainer, cpo.CPOConfig),
    }
    trainer, config = kinds[case.trainer]
    arguments = config(
        output_dir=folder, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        remove_unused_columns=False, **case.theirs,
    )  # fmt: skip
    policy, reference = models()
    rows: list[dict[str, Any]] = [{"prompt": "w5", "chosen": "w6", "rejected": "w7"}]
    if case.trainer == "KTOTrainer":
        answer = {"prompt": "w5", "completion": "w6"}
        rows = [answer | {"label": label} for label in (True, False)] * 4
    has_reference = {"DPOTrainer", "KTOTrainer"} & {case.trainer}
    return trainer(
        model=policy,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        **({"ref_model": reference} if has_reference else {}),
    )


def tokenizer() -> Any:
    """Build a tokenizer of 211 words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(208)} | {"<pad>": 208, "<bos>": 209, "</s>": 210}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")),
        pad_token="<pad>", bos_token="<bos>", eos_token="</s>",
    )  # fmt: skip


def padded(rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Lay out prompts and completions as right-padded rows."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    batch = {
        name: torch.zeros(len(rows), width, dtype=torch.int64)
        for name in ("input_ids", "attention_mask", "completion_mask")
    }
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        batch["input_ids"][row, :end] = torch.tensor(prompt + completion)
        batch["attention_mask"][row, :end] = 1
        batch["completion_mask"][row, len(prompt) : end] = 1
    return batch


def dpo_batch(groups: list[Example]) -> dict[str, Tensor]:
    """Lay out pairs as DPOTrainer's collator does: all chosen completions first."""
    return padded([(prompt, answers[side]) for side in range(2) for prompt, answers in groups])


def kto_batch(groups: list[Example]) -> dict[str, Tensor]:
    """Lay out labelled answers and their mismatched completions as KTOTrainer's collator does."""
    own, other = (padded([(prompt, both[side]) for prompt, both in groups]) for side in range(2))
    labels = torch.tensor([is_good(i) for i in range(len(groups))])
    return own | {f"KL_{name}": value for name, value in other.items()} | {"label": labels}


def cpo_batch(groups: list[Example]) -> dict[str, Tensor]:
    """Lay out pairs as the collator of CPOTrainer and ORPOTrainer does: with labels."""
    batch = {}
    for side, name in enumerate(("chosen", "rejected")):
        rows = padded([(prompt, answers[side]) for prompt, answers in groups])
        mask = rows.pop("completion_mask")
        batch[f"{name}_labels"] = rows["input_ids"].masked_fill(mask == 0, -100)
        batch |= {f"{name}_{column}": value for column, value in rows.items()}
    return batch


def run_theirs(folder: Path) -> list[list[float]]:
    """Install TRL in addition to our packages, and run this file there."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.check_output(where, text=True).strip())
    (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", TRL], check=True)
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    out = subprocess.run(
        [python, __file__, "--theirs", folder],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | quiet,
    ).stdout
    found: list[list[float]] = json.loads(out.splitlines()[-1])
    return found


def compared(case: Case, here: Sequence[float], there: Sequence[float]) -> dict[str, Any]:
    """Return the row of a case."""
    gaps = [abs(a - b) / max(1.0, abs(b)) for a, b in zip(here, there, strict=True)]
    return {
        "against": TRL,
        "loss": case.loss,
        "settings": case.ours,
        "trainer": case.trainer,
        "trl_settings": case.theirs,
        "batches": len(there),
        "groups": case.groups,
        "mean_loss": sum(there) / len(there),
        "largest_difference": max(gaps),
        "note": case.note,
        "torch": torch.__version__,
    }


def main() -> None:
    """Compare, print and store the rows, and fail beyond the tolerance."""
    if sys.argv[1:2] == ["--theirs"]:
        print(json.dumps(theirs(sys.argv[2])))
        return
    with tempfile.TemporaryDirectory() as folder:
        there = run_theirs(Path(folder))
    rows = [compared(*one) for one in zip(CASES, ours(CASES), there, strict=True)]
    for row in rows:
        print("{loss:18} {trainer:12} {mean_loss:10.5f} {largest_difference:9.1e}".format(**row))
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if far := [row["loss"] for row in rows if not row["largest_difference"] <= TOLERANCE]:
        sys.exit(f"beyond {TOLERANCE}: {', '.join(far)}")


if __name__ == "__main__":
    main()
