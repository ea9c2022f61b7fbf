"""Ranking with a bundle against padded graphs, torch, and the machine's matrix products.

    python benches/bench_rank.py [--only NAME …] [--rounds 5] [--threads 2] [--quick]

Policy and reference are Llamas with random weights, of 6 layers × 384 and 12 × 768, with 32,000
and 50,257 words, one also in smaller precisions. 16 candidates of 64 tokens follow a prompt of 512
and of 25 tokens. The arms of `rank_arms.py` run in their own processes and take turns; all arms in
float32 must give the same rewards. Memory is the largest resident size minus that after loading.
Parts: the shapes; `curve`, from 1 to 256 candidates against a model of the operations; `own`, the
share of the time outside ONNX Runtime with a real model of 3 million parameters (LOGRATIO_SHARED,
default ../shared). Raw rows go to results/rank.jsonl.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from shared_material import SHARED, STORIES3M, check_shared
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "rank.jsonl"
PROMPTS, CANDIDATES, TOKENS = (512, 25), 16, 64
PRECISIONS: dict[str, dict[str, Any]] = {
    "ours-f16": {"dtype": "float16"},
    "ours-w8": {"bits": 8},
    "ours-w4": {"bits": 4},
}
FLOAT32 = ("ours-f32", "padded", "padded-whole", "torch")
TOLERANCE = 2e-4

Row = dict[str, Any]
Job = tuple[list[int], list[list[int]]]


@dataclass(frozen=True)
class Shape:
    """A model's shape."""

    layers: int
    width: int
    words: int

    @property
    def name(self) -> str:
        """Name in rows and on the command line."""
        return f"{self.layers}x{self.width}-{self.words // 1000}k"

    def config(self) -> LlamaConfig:
        """Return the model's config."""
        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_attention_heads=self.width // 64,
            num_key_value_heads=self.width // 64,
            vocab_size=self.words,
            max_position_embeddings=2048,
        )

    def operations(self, prompt: int, candidates: int, tokens: int) -> float:
        """Return the useful operations of policy and reference, the prompt computed once.

        The layers' products with their weights, attention over the past, and the head on the
        candidates' tokens.
        """
        rows = prompt + candidates * tokens
        layer = 2 * (4 * self.width**2 + 3 * self.width * 4 * self.width)
        seen = prompt * (prompt + 1) / 2
        seen += candidates * (tokens * prompt + tokens * (tokens + 1) / 2)
        attention = 4 * self.width * seen
        head = 2 * self.width * self.words * candidates * tokens
        return 2 * (self.layers * (layer * rows + attention) + head)


SHAPES = [Shape(6, 384, 32000), Shape(6, 384, 50257), Shape(12, 768, 32000), Shape(12, 768, 50257)]


class Padded(nn.Module):
    """Policy and reference over padded rows, with logits of the completions or of all tokens."""

    def __init__(self, policy: nn.Module, reference: nn.Module, beta: float, *, whole: bool):
        super().__init__()
        self.policy, self.reference, self.beta, self.whole = policy, reference, beta, whole

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_mask: Tensor,
        places: Tensor | None = None,
    ) -> Tensor:
        """Return the rewards, `[N]`; only tokens after `places`, `[C]`, are scored."""
        sums = [
            self._sum(model, input_ids, attention_mask, completion_mask, places)
            for model in (self.policy, self.reference)
        ]
        return self.beta * (sums[0] - sums[1])

    def _sum(
        self, model: Any, ids: Tensor, mask: Tensor, counted: Tensor, places: Tensor | None
    ) -> Tensor:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = model.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        hidden, targets, counted = hidden[:, :-1], ids[:, 1:], counted[:, 1:]
        if places is not None:
            hidden = hidden.index_select(1, places)
            targets = targets.index_select(1, places)
            counted = counted.index_select(1, places)
        logps = model.lm_head(hidden).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
        return torch.where(counted > 0, logps, 0.0).sum(-1)


def material(folder: Path, shape: Shape, beta: float, precisions: list[str]) -> None:
    """Write both models, the bundles and the padded graphs."""
    from logratio.export import ExportConfig, export_bundle

    models = []
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(shape.config()).eval()
        model.save_pretrained(folder / name)
        for file in (SHARED / STORIES3M).parent.glob("tokenizer*"):
            (folder / name / file.name).write_bytes(file.read_bytes())
        models.append(model)
    for name in ("ours-f32", *precisions):
        config = ExportConfig(
            folder / "policy",
            folder / "reference",
            folder / name,
            beta,
            force=name in PRECISIONS,
            **PRECISIONS.get(name, {}),
        )
        export_bundle(config, show_progress=False)
    dynamic = torch.export.Dim.DYNAMIC
    ids = torch.ones(2, 9, dtype=torch.int64)
    counted = torch.cat([torch.zeros(2, 5), torch.ones(2, 4)], 1).long()
    names = ["input_ids", "attention_mask", "completion_mask"]
    for whole in (True, False):
        given = (ids, torch.ones_like(ids), counted) + (() if whole else (torch.arange(4, 8),))
        shapes: dict[str, Any] = {name: {0: dynamic, 1: dynamic} for name in names}
        torch.onnx.export(
            Padded(models[0], models[1], beta, whole=whole).eval(),
            given,
            folder / ("padded-whole.onnx" if whole else "padded.onnx"),
            dynamo=True,
            opset_version=23,
            input_names=names if whole else [*names, "places"],
            dynamic_shapes=shapes if whole else shapes | {"places": {0: dynamic}},
            external_data=True,
            verbose=False,
        )


class Arm:
    """A scorer in a separate process."""

    def __init__(self, folder: Path, name: str, threads: int) -> None:
        command = [sys.executable, str(HERE / "rank_arms.py"), str(folder), name, str(threads)]
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.loaded = self._answer()["loaded"]

    def _answer(self) -> Row:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} has ended")
        answer: Row = json.loads(line)
        return answer

    def run(self, job: Job) -> Row:
        """Score a job."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def job_of(words: int, prompt: int, candidates: int, tokens: int, seed: int = 0) -> Job:
    """Return random ids."""
    random = np.random.default_rng(seed)
    draw = random.integers(3, words, size=(prompt + candidates * tokens)).tolist()
    rest = [draw[prompt + n * tokens : prompt + (n + 1) * tokens] for n in range(candidates)]
    return draw[:prompt], rest


def take_turns(arms: list[Arm], job: Job, rounds: int) -> Iterator[tuple[int, Arm, Row]]:
    """Score a job in each arm, round after round; round 0 warms up."""
    for number in range(rounds + 1):
        for arm in arms:
            times = 20 if arm.name == "product" else 0
            answer = arm.run(([times], [[]]) if times else job)
            if number:
                yield number, arm, answer


def compared(folder: Path, shape: Shape, prompt: int, rounds: int, threads: int) -> Iterator[Row]:
    """Compare all arms on one shape and prompt."""
    names = ["product", *FLOAT32, *(name for name in PRECISIONS if (folder / name).exists())]
    arms = [Arm(folder, name, threads) for name in names]
    job = job_of(shape.words, prompt, CANDIDATES, TOKENS)
    known: list[float] = []
    try:
        for number, arm, answer in take_turns(arms, job, rounds):
            row = {"part": "arms", "shape": shape.name, "prompt": prompt, "arm": arm.name}
            row |= {"round": number, "seconds": answer["seconds"]}
            if arm.name == "product":
                yield row | {"operations": answer["values"][0]}
                continue
            rewards = answer["values"]
            if arm.name == "ours-f32":
                known = rewards
            apart = float(np.abs(np.subtract(rewards, known)).max())
            if arm.name in FLOAT32 and apart > TOLERANCE:
                raise RuntimeError(f"{arm.name} differs from ours by {apart}")
            yield row | {
                "operations": shape.operations(prompt, CANDIDATES, TOKENS),
                "memory": answer["peak"] - arm.loaded,
                "loaded": arm.loaded,
                "reward_error": apart,
                "same_best": int(np.argmax(rewards)) == int(np.argmax(known)),
                "megabytes": megabytes(folder, arm.name),
            }
    finally:
        for arm in arms:
            arm.close()


def megabytes(folder: Path, arm: str) -> float:
    """Return the size of an arm's files."""
    files = list((folder / arm).glob("*")) or list(folder.glob(f"{arm}.onnx*"))
    return sum(file.stat().st_size for file in files) / 1e6


def curve(folder: Path, shape: Shape, rounds: int, threads: int) -> Iterator[Row]:
    """Time from 1 to 256 candidates, and the operations of each."""
    arm = Arm(folder, "ours-f32", threads)
    counts = (1, 4, 16, 64, 256)
    jobs = {count: job_of(shape.words, 512, count, TOKENS) for count in counts}
    try:
        for number in range(rounds + 1):
            for count, job in jobs.items():
                answer = arm.run(job)
                if number:
                    yield {
                        "part": "curve",
                        "shape": shape.name,
                        "candidates": count,
                        "round": number,
                        "seconds": answer["seconds"],
                        "operations": shape.operations(512, count, TOKENS),
                    }
    finally:
        arm.close()


def own_code(folder: Path, rounds: int, threads: int) -> Iterator[Row]:
    """Time text to ranking with a real small model, and the part inside ONNX Runtime."""
    from logratio.export import ExportConfig, export_bundle
    from logratio.serving import Reranker

    model = (SHARED / STORIES3M).parent
    export_bundle(ExportConfig(model, model, folder / "small", 0.1), show_progress=False)
    reranker = Reranker.load(folder / "small", threads=threads)
    session, inside = reranker._session, 0.0

    class Timed:
        def run(self, *given: Any) -> Any:
            nonlocal inside
            start = time.perf_counter()
            found = session.run(*given)
            inside += time.perf_counter() - start
            return found

    reranker._session = Timed()
    story = "Once upon a time there was a little dog who liked to play in the park. "
    candidates = [f"One day the dog saw cat number {n}. " + story * 3 for n in range(CANDIDATES)]
    for number in range(rounds + 1):
        inside, start = 0.0, time.perf_counter()
        scores = reranker.rank(story * 4, candidates)
        seconds = time.perf_counter() - start
        if number:
            tokens = sum(score.tokens for score in scores)
            yield {"part": "own", "round": number, "seconds": seconds, "inside": inside} | {
                "tokens": tokens
            }


def summary(rows: list[Row]) -> str:
    """Return the medians as text."""
    lines = []
    arms = [row for row in rows if row["part"] == "arms"]
    for key in dict.fromkeys((row["shape"], row["prompt"]) for row in arms):
        group = [row for row in arms if (row["shape"], row["prompt"]) == key]
        by_arm = {
            arm: [row for row in group if row["arm"] == arm]
            for arm in dict.fromkeys(row["arm"] for row in group)
        }
        product = by_arm.pop("product")
        limit = median(row["operations"] / row["seconds"] for row in product)
        ours = median(row["seconds"] for row in by_arm["ours-f32"])
        lines.append(f"{key[0]}, prompt {key[1]}; matrix product {limit / 1e9:.0f} GFLOP/s")
        for arm, found in by_arm.items():
            seconds = median(row["seconds"] for row in found)
            share = found[0]["operations"] / seconds / limit
            lines.append(
                f"  {arm:13} {seconds:7.3f} s  {seconds / ours:5.2f}×  "
                f"useful work {share:4.0%} of the product  "
                f"memory {max(row['memory'] for row in found) / 1e9:5.2f} GB  "
                f"files {found[0]['megabytes']:6.0f} MB  "
                f"reward error {max(row['reward_error'] for row in found):.1e}"
            )
    for shape in dict.fromkeys(row["shape"] for row in rows if row["part"] == "curve"):
        found = [row for row in rows if row["part"] == "curve" and row["shape"] == shape]
        lines.append(f"{shape}, seconds per 10¹² operations, from 1 to 256 candidates")
        for count in dict.fromkeys(row["candidates"] for row in found):
            rate = median(
                row["seconds"] / row["operations"] * 1e12
                for row in found
                if row["candidates"] == count
            )
            lines.append(f"  {count:4} {rate:.2f}")
    own = [row for row in rows if row["part"] == "own"]
    if own:
        share = median(1 - row["inside"] / row["seconds"] for row in own)
        lines.append(f"outside ONNX Runtime: {share:.1%}")
    return "\n".join(lines)


def main() -> None:
    """Run the parts, and append their rows to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="names of shapes, curve or own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="the smallest shape, one round")
    given = parser.parse_args()
    check_shared(STORIES3M)
    shapes = SHAPES[:1] if given.quick else SHAPES
    rounds = 1 if given.quick else given.rounds
    rows: list[Row] = []
    for shape in shapes:
        is_compared = not given.only or shape.name in given.only
        is_curve = shape is SHAPES[0] and (not given.only or "curve" in given.only)
        if not (is_compared or is_curve):
            continue
        with tempfile.TemporaryDirectory() as folder:
            material(Path(folder), shape, 0.1, list(PRECISIONS) if shape is SHAPES[1] else [])
            for prompt in PROMPTS if is_compared else ():
                rows += compared(Path(folder), shape, prompt, rounds, given.threads)
            if is_curve:
                rows += curve(Path(folder), shape, rounds, given.threads)
    if not given.only or "own" in given.only:
        with tempfile.TemporaryDirectory() as folder:
            rows += own_code(Path(folder), 10 * rounds, given.threads)
    print(summary(rows))
    about = {"date": date.today().isoformat(), "threads": given.threads}
    about |= {"load": round(os.getloadavg()[0], 2), "command": " ".join(sys.argv[1:])}
    with RESULTS.open("a") as file:
        file.writelines(json.dumps(about | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
