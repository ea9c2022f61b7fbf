"""Check that losses agree with TRL's DPOTrainer on the same batches to 1e-5.

    python benches/bench_trl_losses.py

Creates an environment in a temporary folder, installs TRL there (it is not a dependency of this
project), and compares DPO and IPO on random batches, with different policy and reference.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

TRL = "trl==1.16.0"
LOSSES = {"dpo": "sigmoid", "ipo": "ipo"}
BATCHES, PAIRS, BETA, TOLERANCE = 20, 6, 0.1, 1e-5
RESULTS = Path(__file__).parent / "results" / "trl_losses.jsonl"


def models() -> list[PreTrainedModel]:
    """Build the policy and the reference: two random models of one kind."""
    built: list[PreTrainedModel] = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=211, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            parameter.data.mul_(3.0)
        built.append(model.eval())
    return built


def groups(seed: int) -> list[tuple[list[int], list[list[int]]]]:
    """Draw ragged pairs of token ids."""
    random = np.random.default_rng(seed)

    def ids(longest: int) -> list[int]:
        return [int(i) for i in random.integers(3, 211, int(random.integers(1, longest)))]

    return [(ids(30), [ids(20), ids(20)]) for _ in range(PAIRS)]


def ours() -> dict[str, list[float]]:
    """Compute the mean loss of each batch with this library."""
    from logratio.logps.checks import batch_of
    from logratio.logps.completion import score
    from logratio.training.losses import PAIR_LOSSES, PairLogps

    found: dict[str, list[float]] = {name: [] for name in LOSSES}
    policy, reference = models()
    for seed in range(BATCHES):
        batch = batch_of(groups(seed), "shared")
        with torch.no_grad():
            sums = [batch.targets.sums(score(model, batch)) for model in (policy, reference)]
        (
            (chosen, rejected),
            (reference_chosen, reference_rejected),
            (chosen_lengths, rejected_lengths),
        ) = ((values[0::2], values[1::2]) for values in (*sums, batch.targets.lengths))
        pairs = PairLogps(
            chosen, rejected, reference_chosen, reference_rejected, chosen_lengths, rejected_lengths
        )
        for name in LOSSES:
            losses = PAIR_LOSSES[name].function(pairs, beta=BETA)
            found[name].append(float(losses.mean()))
    return found


def theirs(folder: str) -> dict[str, list[float]]:
    """Compute the same with TRL's trainer."""
    found: dict[str, list[float]] = {}
    for name, loss_type in LOSSES.items():
        trainer = trl_trainer(folder, loss_type)
        trainer.model.eval()
        with torch.no_grad():
            found[name] = [
                float(trainer.compute_loss(trainer.model, trl_batch(groups(seed))))
                for seed in range(BATCHES)
            ]
    return found


def trl_trainer(folder: str, loss_type: str) -> Any:
    """Build TRL's trainer; its dataset only satisfies the constructor."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = {f"w{i}": i for i in range(208)} | {"<pad>": 208, "<bos>": 209, "</s>": 210}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")),
        pad_token="<pad>", bos_token="<bos>", eos_token="</s>",
    )  # fmt: skip
    policy, reference = models()
    arguments = DPOConfig(
        output_dir=folder, loss_type=[loss_type], beta=BETA, report_to=[], use_cpu=True,
        bf16=False, gradient_checkpointing=False, remove_unused_columns=False,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "w5", "chosen": "w6", "rejected": "w7"}])
    return DPOTrainer(
        model=policy, ref_model=reference, args=arguments, train_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip


def trl_batch(pairs: list[tuple[list[int], list[list[int]]]]) -> dict[str, torch.Tensor]:
    """Lay out pairs as TRL's collator does: right-padded rows, chosen first."""
    rows = [(p, c[side]) for side in range(2) for p, c in pairs]
    width = max(len(p) + len(c) for p, c in rows)
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


def run_theirs(folder: Path) -> dict[str, list[float]]:
    """Install TRL in addition to our packages, and run this file there."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.check_output(where, text=True).strip())
    (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", TRL], check=True)
    out = subprocess.run(
        [python, __file__, "--theirs", folder], check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, list[float]] = json.loads(out.splitlines()[-1])
    return found


def main() -> None:
    """Compare, print and store the rows, and fail beyond the tolerance."""
    if sys.argv[1:2] == ["--theirs"]:
        print(json.dumps(theirs(sys.argv[2])))
        return
    with tempfile.TemporaryDirectory() as folder:
        there = run_theirs(Path(folder))
    here = ours()
    RESULTS.parent.mkdir(exist_ok=True)
    worst = {}
    for name in LOSSES:
        gaps = [abs(a - b) / max(1.0, abs(b)) for a, b in zip(here[name], there[name], strict=True)]
        worst[name] = max(gaps)
        print(f"{name}: {BATCHES} batches of {PAIRS} pairs, largest difference {max(gaps):.1e}")
    row = {
        "against": TRL,
        "batches": BATCHES,
        "largest_difference": worst,
        "torch": torch.__version__,
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    if max(worst.values()) > TOLERANCE:
        sys.exit(f"beyond {TOLERANCE}")


if __name__ == "__main__":
    main()
