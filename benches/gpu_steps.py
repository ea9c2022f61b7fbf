"""Measurements of `gpu.py`; each result is printed as a JSON line immediately.

    python benches/gpu_steps.py smoke|train [--device cpu] [--tiny]

`smoke`: versions, the products of the head, and every kernel's trial at the heads of Llama 3, Qwen2
and GPT-2. `train`: three updates of a model of random weights from a cache, with torch's warnings
about each wait for the device counted by place; then one update in the profiler: launches, waits,
the operations that take most, the peak.
"""

import argparse
import json
import platform
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from shared_material import GPT2, HH, SHARED
from step_material import Wanted, make
from torch.profiler import ProfilerActivity, profile

from logratio.logps.attention import kernels
from logratio.logps.attention.fused import failure
from logratio.training import TrainConfig
from logratio.training.config import Precision
from logratio.training.trainer import DPOTrainer
from logratio.training.update import Updater

HEADS = ((32, 8, 128), (14, 2, 64), (12, 12, 64))
PACKAGES = ("torch", "transformers", "numpy", "triton", "trl", "datasets", "tensorboardX")
WATCHED = 3
"""Updates whose waits are counted, before the one in the profiler."""


def say(**found: Any) -> None:
    """Print a result."""
    print(json.dumps(found), flush=True)


def smoke(options: argparse.Namespace) -> None:
    """Check the requirements of all later steps."""
    say(what="versions", python=platform.python_version(), **{p: _version(p) for p in PACKAGES})
    on_gpu = options.device == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else platform.processor()
    say(what="device", name=name, missing=dict(kernels.missing_kernels()))
    low = torch.randn(64, 128, device=options.device).bfloat16()
    truth, out = low.double() @ low.double().t(), torch.empty(64, 64, device=options.device)
    if on_gpu:
        torch.mm(low, low.t(), out_dtype=torch.float32, out=out)
    else:
        torch.mm(low.float(), low.float().t(), out=out)
    say(what="product to float32", gap=float((out.double() - truth).norm() / truth.norm()))
    expected = out.double().softmax(1)
    torch.softmax(out, 1, out=out)
    say(what="softmax into its input", gap=float((out.double() - expected).abs().max()))
    for (heads, keys, size), windowed in product(HEADS, (False, True)):
        wanted = kernels.Wanted(
            options.device, torch.bfloat16, size, size, heads, keys, windowed=windowed
        )
        for kernel in kernels.KERNELS[:-1]:
            say(
                what="kernel",
                kernel=kernel,
                heads=[heads, keys, size],
                windowed=windowed,
                failure=_failure(kernel, wanted),
            )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _failure(kernel: kernels.Kernel, wanted: kernels.Wanted) -> str | None:
    """Return why a kernel is not used here; None if it works."""
    try:
        kernels.kernel_for(wanted, kernels.missing_kernels(), kernel)
    except kernels.KernelError as error:
        return str(error)
    return failure(kernel, wanted, torch.device(wanted.device))


def train(options: argparse.Namespace) -> None:
    """Train for a few instrumented updates."""
    real = not options.tiny and (SHARED / HH).exists() and (SHARED / GPT2).exists()
    model, batch = ("toy", 2) if options.tiny else ("0.5B", 16)
    precision = "bf16-weights"
    with tempfile.TemporaryDirectory() as folder:
        wanted = Wanted(
            *(folder, model, "hh" if real else "short-prompt", batch, WATCHED + 1),
            *(0, torch.get_num_threads(), options.device, precision),
        )
        start = perf_counter()
        make(wanted)
        say(what="material", model=model, data=wanted.data, seconds=perf_counter() - start)
        config = TrainConfig(
            **{"model": f"{folder}/model", "data": [f"{folder}/pairs.store"]},  # type: ignore[arg-type]
            output=f"{folder}/out",
            cache=f"{folder}/cache",
            batch_size=batch,
            save_every=0,
            device=options.device,
            precision=cast(Precision, precision),
        )
        with _watched(options.device == "cuda"):
            DPOTrainer(config=config, show_progress=False).train()


@contextmanager
def _watched(on_gpu: bool) -> Iterator[None]:
    """Print the time and device waits of each update, and profile the last one."""
    update: Callable[..., Any] = Updater.update
    done = 0

    def watched(self: Updater, *given: Any) -> Any:
        nonlocal done
        done += 1
        if done > WATCHED:
            return _profiled(lambda: update(self, *given), on_gpu)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if on_gpu:
                torch.cuda.set_sync_debug_mode("warn")
            start = perf_counter()
            result = update(self, *given)
            taken = perf_counter() - start
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
        places = Counter(
            f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)
        )
        waits = dict(places.most_common(30))
        say(what="update", number=done, seconds=taken, waits=sum(places.values()), places=waits)
        return result

    setattr(Updater, "update", watched)  # noqa: B010
    try:
        yield
    finally:
        setattr(Updater, "update", update)  # noqa: B010


def _profiled(run: Callable[[], Any], on_gpu: bool) -> Any:
    """Do one update in the profiler."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with profile(activities=activities) as seen:
        result = run()
    found: list[Any] = list(seen.key_averages())
    time = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found.sort(key=lambda event: -getattr(event, time))
    counts = {event.key: event.count for event in found}
    names = ("cudaLaunchKernel", "cudaStreamSynchronize", "cudaMemcpyAsync", "aten::item")
    say(
        what="profile",
        counts={name: counts.get(name, 0) for name in names},
        top=[[event.key, event.count, getattr(event, time) / 1000] for event in found[:25]],
        peak=torch.cuda.max_memory_allocated() if on_gpu else None,
    )
    return result


def main(given: list[str] | None = None) -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("smoke", "train"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a rehearsal")
    options = parser.parse_args(given)
    {"smoke": smoke, "train": train}[options.part](options)


if __name__ == "__main__":
    main()
