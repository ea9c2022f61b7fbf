"""What only a GPU can show: each kernel, memory, time, and a run from cache to trained policy.

`pytest tests/python/gpu/test_gpu.py -s` on a machine with CUDA; needs the wheel, torch,
transformers, numpy and pytest. Skipped elsewhere. Kernels that are not installed are skipped with
the reason. Flex is compiled anew for each test: `-k flex` and `-k "not flex"` take some minutes
each.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from gpu_families import FAMILIES, WINDOW
from layout_oracle import store_of
from oracle import Group, in_float64, per_token_logps
from tiny_models import SIZES, VOCABULARY, tiny
from torch import Tensor
from transformers import (
    LlamaConfig,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from logratio.data.feed import lay_out
from logratio.logps.attention import SharedPrompt, SharedPromptError, flex, kernels, use_kernel
from logratio.logps.attention.fused import failure
from logratio.logps.attention.interface import NAME, shared_prompt_attention
from logratio.logps.attention.kernels import (
    KERNELS,
    Kernel,
    KernelError,
    Wanted,
    kernel_for,
    missing_kernels,
)
from logratio.logps.batch import SharedBatch, fields_for, pinned, to_torch
from logratio.logps.checks import batch_of, choose_layout
from logratio.logps.completion import score
from logratio.training import PrecomputeConfig, TrainConfig, precompute, train

# Versions on machines with GPUs differ from the pinned ones, and warn of other things.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]

# Read when cuBLAS starts; without it torch refuses its products under deterministic algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float32]


@dataclass(frozen=True)
class Case:
    """What a family asks of its attention, with heads as large models have them."""

    heads: int
    kv: int
    size: int
    window: int | None = None
    softcap: float | None = None
    scaling: float | None = None


SHORT = 20
"""Tokens of a prompt or completion of which a row stays below 128, one tile of FlexAttention."""

CASES = {
    "llama3": Case(8, 1, 64),
    "llama": Case(8, 2, 64),
    "mistral": Case(8, 2, 128, window=WINDOW),
    "gemma2": Case(4, 2, 256, window=WINDOW, softcap=5.0, scaling=1 / 12),
    "gpt2": Case(12, 12, 64),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Compile anew in each test, so that none depends on another."""
    yield
    torch.compiler.reset()
    flex._compiled.cache_clear()
    failure.cache_clear()
    torch.cuda.empty_cache()


def random_groups(seed: int = 0, completions: int = 2, longest: int = 300) -> list[Group]:
    """Ragged groups, longer and shorter than the kernels' tiles of 64 and 128."""
    random = np.random.default_rng(seed)

    def ids(most: int) -> list[int]:
        length = int(random.integers(1, most))
        return [int(token) for token in random.integers(3, VOCABULARY, length)]

    groups = [(ids(longest), [ids(longest) for _ in range(completions)]) for _ in range(4)]
    return [([5], [[6], [7]][:completions]), *groups]  # and one as short as can be


def batch_on_gpu(groups: list[Group]) -> SharedBatch:
    batch = batch_of(groups, "shared", DEVICE)
    assert isinstance(batch, SharedBatch)
    return batch


def states_of(case: Case, length: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values on the device, rounded to `dtype`."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(heads: int) -> Tensor:
        shape = (1, length, heads, case.size)
        drawn = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float32)
        return drawn.to(dtype).transpose(1, 2).detach().requires_grad_()

    return [random(case.heads), random(case.kv), random(case.kv)]


def in_words(case: Case, states: list[Tensor], batch: SharedBatch) -> Tensor:
    """Attention by its definition, in float64, under a mask made from the lengths alone."""
    query, key, value = (part.double() for part in states)
    times = case.heads // case.kv
    scores = query @ key.repeat_interleave(times, 1).mT * (case.scaling or case.size**-0.5)
    if case.softcap is not None:
        scores = torch.tanh(scores / case.softcap) * case.softcap
    scores = scores.masked_fill(~seen(batch, case.window), -torch.inf)
    return (scores.softmax(-1) @ value.repeat_interleave(times, 1)).transpose(1, 2)


def seen(batch: SharedBatch, window: int | None) -> Tensor:
    """Who sees whom, bool `[T, T]` on the device."""
    mask = torch.zeros(batch.input_ids.shape[1], batch.input_ids.shape[1], dtype=torch.bool)
    start = 0
    for prompt, answers in zip(batch.prompt_lengths, batch.completion_lengths, strict=True):
        end = start + prompt
        mask[start:end, start:end] = True
        at = end
        for length in answers:
            mask[at : at + length, start:end] = mask[at : at + length, at : at + length] = True
            at += length
        start = at
    mask = mask.tril().to(DEVICE)
    if window is not None:
        position = batch.position_ids[0]
        mask &= position[:, None] - position[None] < window
    return mask


def attend(kernel: Kernel, case: Case, states: list[Tensor], batch: SharedBatch) -> Tensor:
    """Attend with a kernel, or skip the test with the reason why it cannot."""
    query, key, value = states
    with use_kernel(kernel):
        shared_prompt = SharedPrompt(batch)
    try:
        out, _ = shared_prompt_attention(
            torch.nn.Identity(),
            query,
            key,
            value,
            ALL_MASK_ATTENTION_FUNCTIONS[NAME](
                local_size=case.window, device=DEVICE
            ),  # as a model asks
            shared_prompt=shared_prompt,
            scaling=case.scaling,
            sliding_window=case.window,
            softcap=case.softcap,
        )
    except SharedPromptError as error:
        pytest.skip(str(error))
    return out


def gap(found: Tensor, truth: Tensor) -> float:
    """The distance of two tensors, relative to the second."""
    truth = truth.detach().double()
    return float((found.detach().double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", CASES)
def test_a_kernel_is_attention_forward_and_backward(
    family: str, kernel: Kernel, dtype: torch.dtype
) -> None:
    case = CASES[family]
    for seed, completions, longest in ((0, 2, 300), (1, 1, 300), (2, 3, 300), (3, 1, SHORT)):
        batch = batch_on_gpu(random_groups(seed, completions, longest))
        states = states_of(case, batch.input_ids.shape[1], dtype)
        out = attend(kernel, case, states, batch)
        truth = in_words(case, states, batch)
        assert out.dtype == dtype
        assert out.shape == truth.shape
        upstream = torch.randn_like(out)
        gradients = torch.autograd.grad(out, states, upstream)
        expected = torch.autograd.grad(truth, states, upstream.double())
        forward, backward = (1e-2, 2e-2) if dtype == torch.bfloat16 else (1e-4, 1e-4)
        assert gap(out, truth) <= forward
        for name, one, other in zip("qkv", gradients, expected, strict=True):
            assert gap(one, other) <= backward, name


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", CASES)
def test_a_kernel_gives_the_same_bits_again(family: str, kernel: Kernel) -> None:
    case, batch = CASES[family], batch_on_gpu(random_groups())
    states = states_of(case, batch.input_ids.shape[1], torch.bfloat16)

    def run() -> tuple[Tensor, ...]:
        out = attend(kernel, case, states, batch)
        return out, *torch.autograd.grad(out, states, torch.ones_like(out))

    once, again = run(), run()
    for place in (0, 2, 3) if kernel != "sdpa" else (0,):  # a flash kernel adds up dq in any order
        assert torch.equal(once[place], again[place])
    with deterministic():
        once, again = run(), run()
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("completions", [1, 2, 4])
def test_a_batch_brings_its_sequences_to_the_device(completions: int) -> None:
    groups = random_groups(3, completions)
    store = store_of([(p, [(c, [1] * len(c), 2) for c in answers]) for p, answers in groups])
    arrays = lay_out(store, np.arange(len(groups)), fields=fields_for("shared", DEVICE))
    here, there = to_torch(arrays), to_torch(arrays, DEVICE)
    assert isinstance(here, SharedBatch)
    assert isinstance(there, SharedBatch)
    assert here.sequences is not None
    assert there.sequences is not None
    for name in ("of_token", "own_place", "positions", "ends", "key_index"):
        own = getattr(there.sequences, name)
        assert own.device.type == DEVICE
        assert torch.equal(own.cpu(), getattr(here.sequences, name)), name
    (ours,), (theirs,) = there.sequences.shared_keys, here.sequences.shared_keys
    for own, other in zip(ours, theirs, strict=True):
        assert (own is None) == (other is None)
        if own is not None and other is not None:
            assert torch.equal(own.cpu(), other)


def moved(model: PreTrainedModel, device: str, dtype: torch.dtype) -> PreTrainedModel:
    return torch.nn.Module.to(model, device, dtype)


def rounded(family: str) -> PreTrainedModel:
    """A model on the CPU whose weights bfloat16 holds exactly."""
    model = moved(tiny(FAMILIES[family](), scale=3.0), "cpu", torch.bfloat16)
    return moved(model, "cpu", torch.float32)


def logps_and_gradient(model: PreTrainedModel, logps: Tensor) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1, 1, len(logps), dtype=torch.float64, device=logps.device)
    (weights * logps).sum().backward()
    parts = [p.grad.double().cpu().flatten() for p in model.parameters() if p.grad is not None]
    return logps.detach().double().cpu(), torch.cat(parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_is_padded_is_the_oracle(family: str, kernel: Kernel, dtype: torch.dtype) -> None:
    """In bfloat16 shared rows may be as wrong as padded ones are, and half as much again."""
    check_layout("shared", random_groups(4), family, kernel, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_tree_is_the_oracle(family: str, kernel: Kernel, dtype: torch.dtype) -> None:
    """Later turns of each conversation, and answers that begin alike."""
    groups = random_groups(4)
    groups += [(p + a[0] + [5, 6], [[7, *a[1]], [7, *a[0]]]) for p, a in groups[1:]]
    check_layout("tree", groups, family, kernel, dtype)


def check_layout(
    layout: str, groups: list[Group], family: str, kernel: Kernel, dtype: torch.dtype
) -> None:
    model = rounded(family)
    double = in_float64(model)
    truth, slope = logps_and_gradient(double, per_token_logps(double, groups))
    on_gpu = moved(model, DEVICE, dtype)
    padded = logps_and_gradient(on_gpu, score(on_gpu, batch_of(groups, "padded", DEVICE)))
    try:
        with use_kernel(kernel):
            logps = score(on_gpu, batch_of(groups, layout, DEVICE))
    except SharedPromptError as error:
        pytest.skip(str(error))
    shared = logps_and_gradient(on_gpu, logps)
    for own, other, exact in zip(shared, padded, (truth, slope), strict=True):
        floor = 2e-3 if dtype == torch.bfloat16 else 1e-5
        assert gap(own, exact) <= 1.5 * gap(other, exact) + floor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", CASES)
def test_a_kernel_passes_its_trial_or_is_refused(
    family: str, kernel: Kernel, dtype: torch.dtype
) -> None:
    """What a run tries before the first use of a kernel, and why it would pass one over here."""
    case = CASES[family]
    heads: dict[str, Any] = {"heads": case.heads, "key_heads": case.kv}
    heads |= {"softcap": case.softcap, "windowed": case.window is not None}
    wanted = Wanted(DEVICE, dtype, case.size, case.size, **heads)
    try:
        kernel_for(wanted, missing_kernels(), kernel)
    except KernelError as error:
        pytest.skip(str(error))
    if kernel != "sdpa":
        assert failure(kernel, wanted, torch.device(DEVICE)) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_completion_sees_another(
    family: str, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels.report_choice.cache_clear()
    model = moved(rounded(family), DEVICE, dtype)
    layout, reason = choose_layout(model)
    assert (layout, reason) == ("shared", "leak check passed")
    message = capsys.readouterr().err
    assert "shared-prompt attention: " in message
    with capsys.disabled():
        print(f"\n{family}, {dtype}: {message.strip()}")
    (prompt, (first, second)), *rest = random_groups(5)[1:]
    other = [(token + 1) % VOCABULARY for token in second]
    with torch.no_grad():
        before = score(model, batch_on_gpu([(prompt, [first, second]), *rest]))
        after = score(model, batch_on_gpu([(prompt, [first, other]), *rest]))
    changed = slice(len(first), len(first) + len(second))
    same = torch.ones(len(before), dtype=torch.bool)
    same[changed] = False
    assert torch.equal(before[same.to(DEVICE)], after[same.to(DEVICE)])
    assert not torch.equal(before[changed], after[changed])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_dpo_learns_the_preference_from_a_cache(
    precision: str, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    same: dict[str, Any] = {"precision": precision, "device": DEVICE}
    cache = tmp_path / "cache"
    first = PrecomputeConfig(tiny_model, [pairs_file], cache, **same)
    precompute(first, show_progress=False)
    rates: dict[str, Any] = {"lr": 3e-3, "batch_size": 4, "epochs": 10, "save_every": 0}
    output = tmp_path / "out"
    config = TrainConfig(tiny_model, [pairs_file], output, cache, **rates, **same)
    history = train(config, show_progress=False).history
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=2e-2)
    assert history[-1]["rewards/accuracies"] == 1.0
    assert history[-1]["rewards/margins"] > 0.5


def test_training_twice_gives_the_same_weights(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Bit for bit, where `deterministic` is set; the process is as before afterwards."""
    from safetensors.torch import load_file

    trained = []
    for name in ("once", "again"):
        config = TrainConfig(
            tiny_model,
            [pairs_file],
            tmp_path / name,
            lr=1e-3,
            batch_size=4,
            save_every=0,
            deterministic=True,
            device=DEVICE,
        )
        train(config, show_progress=False)
        trained.append(load_file(tmp_path / name / "model.safetensors"))
    assert not torch.are_deterministic_algorithms_enabled()
    once, again = trained
    assert all(torch.equal(once[name], again[name]) for name in once)


def larger_model() -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2816, "head_dim": 64}
    heads: dict[str, Any] = {"num_attention_heads": 16, "num_key_value_heads": 4}
    more: dict[str, Any] = {"vocab_size": 8192, "num_hidden_layers": 8}
    config = LlamaConfig(**{**SIZES, **sizes, **heads, **more, "max_position_embeddings": 2048})
    return moved(tiny(config, scale=1.0), DEVICE, torch.bfloat16)


def long_prompts(count: int = 16) -> list[Group]:
    random = np.random.default_rng(0)

    def ids(low: int, high: int) -> list[int]:
        return [int(i) for i in random.integers(3, 8192, int(random.integers(low, high)))]

    return [(ids(300, 700), [ids(50, 250), ids(50, 250)]) for _ in range(count)]


def one_by_one(groups: list[Group]) -> list[Group]:
    """Each completion with a separate prompt."""
    return [(prompt, [answer]) for prompt, answers in groups for answer in answers]


def test_shared_prompts_take_less_memory_than_padded_rows() -> None:
    model, groups = larger_model(), long_prompts()
    peaks = {}
    for layout in ("padded", "shared"):
        batch = batch_of(groups, layout, DEVICE)
        score(model, batch).sum().backward()  # what is made once: workspaces, gradients
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        score(model, batch).sum().backward()
        peaks[layout] = torch.cuda.max_memory_allocated() - before
    print(f"\npeak above the model: { {k: f'{v / 2**20:.0f} MiB' for k, v in peaks.items()} }")
    assert peaks["shared"] < 0.7 * peaks["padded"]


def seconds(run: Callable[[], object], times: int = 10) -> float:
    """The median time of a run on the device."""
    for _ in range(3):
        run()
    measured: list[float] = []
    for _ in range(times):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        measured.append(start.elapsed_time(stop) / 1000)
    return median(measured)


@pytest.mark.parametrize("kernel", KERNELS)
def test_time_follows_the_tokens(kernel: Kernel) -> None:
    """Says what sharing gains; timings on a shared machine are no ground to fail on."""
    model, groups = larger_model(), long_prompts(32)

    def step(groups: list[Group]) -> tuple[float, int]:
        batch = batch_on_gpu(groups)
        with use_kernel(kernel):
            taken = seconds(lambda: score(model, batch).sum().backward())
        return taken, batch.input_ids.numel()

    try:
        (shared, fewer), (apart, more) = step(groups), step(one_by_one(groups))
    except SharedPromptError as error:
        pytest.skip(str(error))
    print(
        f"\n{kernel}: {shared * 1000:.1f} ms shared, {apart * 1000:.1f} ms separate: "
        f"{shared / apart:.3f} of the time for {fewer / more:.3f} of the tokens"
    )
    assert fewer < more
    assert shared > 0


def test_pinned_buffers_are_not_refilled_while_they_are_copied() -> None:
    device, random = torch.device(DEVICE), np.random.default_rng(0)
    groups = random_groups(3, longest=20)
    store = store_of([(p, [(c, [1] * len(c), 2) for c in answers]) for p, answers in groups])
    for _ in range(500):
        numbers = random.integers(0, len(groups), 200)
        arrays = lay_out(store, numbers, "padded", arena=pinned)
        batch, expected = to_torch(arrays, device), arrays.input_ids.copy()
        del arrays
        lay_out(store, numbers[:9], "padded", arena=pinned)
        assert np.array_equal(batch.input_ids.cpu().numpy(), expected)
