"""The scorers that bench_rank.py compares, each in a process that answers line by line.

    python benches/rank_arms.py FOLDER ARM THREADS

`ours-…` are bundles and run through `Reranker.score_groups`. `padded` and `padded-whole` are the
graph that most people would export: every candidate with its prompt as one padded row, and logits
of the completions or of all tokens. `torch` is the same in torch, as RewardBench scores with DPO
models.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Job = tuple[list[int], list[list[int]]]
"""Ids of the prompt and of each candidate."""
BETA = 0.1
TORCH_BATCH = 8


def resident_bytes(name: str) -> int:
    """Return VmRSS, the resident size of this process, or VmHWM, its peak since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def forget_peak() -> None:
    """Begin a new peak: loading a bundle needs more than running it."""
    Path("/proc/self/clear_refs").write_text("5")


def padded(job: Job) -> dict[str, np.ndarray]:
    """Return the rows of a job: prompt and candidate, padded on the right."""
    prompt, candidates = job
    longest = len(prompt) + max(map(len, candidates))
    ids = np.zeros((len(candidates), longest), np.int64)
    mask, counted = np.zeros_like(ids), np.zeros_like(ids)
    for row, candidate in enumerate(candidates):
        whole = prompt + candidate
        ids[row, : len(whole)] = whole
        mask[row, : len(whole)] = 1
        counted[row, len(prompt) : len(whole)] = 1
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": counted}


def ours(folder: Path, arm: str, threads: int) -> Callable[[Job], list[float]]:
    """Load a bundle."""
    from logratio.serving.candidates import Candidate, CandidateGroup
    from logratio.serving.reranker import Reranker

    reranker = Reranker.load(folder / arm, threads=threads)

    def score(job: Job) -> list[float]:
        prompt, candidates = job
        group = CandidateGroup(
            tuple(prompt), False, tuple(Candidate(tuple(ids)) for ids in candidates)
        )
        return [one.reward for one in reranker.score_groups([group])[0]]

    return score


def graph(folder: Path, arm: str, threads: int) -> Callable[[Job], list[float]]:
    """Load a padded graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        str(folder / f"{arm}.onnx"), options, providers=["CPUExecutionProvider"]
    )

    def score(job: Job) -> list[float]:
        feed = padded(job)
        if arm == "padded":
            feed["places"] = np.arange(len(job[0]) - 1, feed["input_ids"].shape[1] - 1)
        found: list[float] = session.run(None, feed)[0].tolist()
        return found

    return score


def torch_loop(folder: Path, _arm: str, threads: int) -> Callable[[Job], list[float]]:
    """Load both models in torch."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    models = [
        AutoModelForCausalLM.from_pretrained(folder / name).eval()
        for name in ("policy", "reference")
    ]

    def sums(model: Any, feed: dict[str, Any]) -> Any:
        ids, counted = feed["input_ids"], feed["completion_mask"]
        out = model(input_ids=ids, attention_mask=feed["attention_mask"], use_cache=False).logits
        logps = out[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return (logps * counted[:, 1:]).sum(-1)

    @torch.inference_mode()
    def score(job: Job) -> list[float]:
        rewards = []
        prompt, candidates = job
        for start in range(0, len(candidates), TORCH_BATCH):
            rows = padded((prompt, candidates[start : start + TORCH_BATCH]))
            feed = {name: torch.from_numpy(value) for name, value in rows.items()}
            policy, reference = (sums(model, feed) for model in models)
            rewards += (BETA * (policy - reference)).tolist()
        return rewards

    return score


def product(_folder: Path, _arm: str, threads: int) -> Callable[[Job], list[float]]:
    """Multiply matrices with ONNX Runtime's own kernel: the limit of this machine.

    A job is ([size], [[]]); the result is the number of operations.
    """
    import onnx
    import onnxruntime

    size = 1024
    left = onnx.helper.make_tensor_value_info("a", 1, [size, size])
    right = onnx.helper.make_tensor("b", 1, [size, size], np.ones(size * size, np.float32))
    out = onnx.helper.make_tensor_value_info("c", 1, [size, size])
    node = onnx.helper.make_node("MatMul", ["a", "b"], ["c"])
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "product", [left], [out], [right]),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"a": np.ones((size, size), np.float32)}

    def multiply(job: Job) -> list[float]:
        times = job[0][0]
        for _ in range(times):
            session.run(None, feed)
        return [2.0 * size**3 * times]

    return multiply


def loader(arm: str) -> Callable[[Path, str, int], Callable[[Job], list[float]]]:
    """Return the function that loads an arm."""
    if arm.startswith("ours"):
        return ours
    return {"torch": torch_loop, "product": product}.get(arm, graph)


def main() -> None:
    """Load an arm, then score a job for each line of standard input."""
    folder, arm, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    score = loader(arm)(folder, arm, threads)
    forget_peak()
    print(json.dumps({"loaded": resident_bytes("VmRSS")}), flush=True)
    for line in sys.stdin:
        job = tuple(json.loads(line))
        start = time.perf_counter()
        values = score(job)
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "values": values, "peak": resident_bytes("VmHWM")}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
