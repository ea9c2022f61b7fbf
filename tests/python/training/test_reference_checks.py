"""Wrong log-probs are refused before training or storing: samples, first loss, limits."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import write_pairs
from torch import Tensor, nn

from logratio._rust import CacheReader, CacheWriter, Store
from logratio.data.feed import lay_out
from logratio.logps.batch import Batch, to_torch
from logratio.logps.completion import score, transformer
from logratio.training import (
    LoraSettings,
    PrecomputeConfig,
    TrainConfig,
    load_model,
    precompute,
    train,
)
from logratio.training import reference_scorer as scorer_module
from logratio.training.checkpoint import RunInterruptedError
from logratio.training.config import Precision
from logratio.training.dataset import load_dataset
from logratio.training.fingerprint import model_fingerprint
from logratio.training.lora import with_lora
from logratio.training.methods.objective import Objective
from logratio.training.methods.table import METHODS
from logratio.training.models import precision_of
from logratio.training.reference import (
    CachedReference,
    CachedSums,
    FrozenReference,
    ImpossibleLogpError,
    PerToken,
    StaleCacheError,
    open_cache,
)
from logratio.training.reference_checks import (
    SAMPLE,
    TOLERANCES,
    EndCheck,
    UntrustedReferenceError,
    check_start,
    conditions,
    sample_groups,
    sample_rows,
    sampled,
    starts_at_reference,
)
from logratio.training.trainer import DPOTrainer
from logratio.training.update import Updater


@pytest.fixture
def config(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        tiny_model, [pairs_file], tmp_path / "out", lr=1e-3, batch_size=4, save_every=0
    )


@pytest.fixture
def store(config: TrainConfig) -> Store:
    return load_dataset(config.model, config.data, config.rules, show_progress=False).store


def with_(config: TrainConfig, **changes: object) -> TrainConfig:
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def fill(config: TrainConfig, **changes: object) -> Path:
    """Fill a cache next to the output with the reference's log-probs."""
    cache = Path(config.output).parent / "cache"
    wanted = PrecomputeConfig(config.model, config.data, cache, precision=config.precision)
    precompute(dataclasses.replace(wanted, **changes), show_progress=False)  # type: ignore[arg-type]
    return cache


def rewritten(cache: Path, config: TrainConfig, store: Store, edit: Callable[..., None]) -> Path:
    """Write a copy of the cache next to it, with `edit` done to its offsets and log-probs."""
    fingerprint = model_fingerprint(config.model, precision_of(config))
    reader = open_cache(cache, fingerprint)
    offsets, logps = reader.read(reader.join(store.keys()))
    logps = logps.copy()
    edit(offsets, logps)
    folder = cache.with_name("rewritten") / fingerprint.name
    folder.mkdir(parents=True)
    shutil.copy(cache / fingerprint.name / "fingerprint.json", folder)
    writer = CacheWriter(folder, fingerprint.digest)
    writer.append(store.keys(), offsets, logps)
    writer.close()
    return folder.parent


def two_that_cancel(offsets: np.ndarray, logps: np.ndarray) -> None:
    """Change two tokens of one completion so that their sum stays."""
    logps[offsets[0] : offsets[0] + 2] += np.array([0.01, -0.01], dtype=np.float32)


def one_completion(offsets: np.ndarray, logps: np.ndarray) -> None:
    logps[offsets[31] : offsets[32]] -= 0.001


@pytest.mark.parametrize(
    ("edit", "what"), [(two_that_cancel, "of a token"), (one_completion, "of a completion")]
)
def test_a_sample_is_scored_again_before_training(
    config: TrainConfig, store: Store, edit: Callable[..., None], what: str
) -> None:
    cache = fill(config)
    train(with_(config, cache=cache), show_progress=False)
    cache = rewritten(cache, config, store, edit)
    with pytest.raises(UntrustedReferenceError, match=rf"{what} of .*pairs\.jsonl:\d+ "):
        train(with_(config, cache=cache, overwrite=True), show_progress=False)


def test_hits_are_scored_again_before_others_are_added(
    config: TrainConfig, store: Store, tmp_path: Path
) -> None:
    cache = fill(config)
    cache = rewritten(cache, config, store, one_completion)
    more = write_pairs(tmp_path / "more.jsonl", 20)
    before = len(open_cache(cache, model_fingerprint(config.model)))
    with pytest.raises(UntrustedReferenceError, match="the reference cannot be trusted"):
        fill(config, data=[more], cache=cache)
    assert len(open_cache(cache, model_fingerprint(config.model))) == before


def test_with_adapters_the_cache_is_compared_on_resuming_too(
    config: TrainConfig, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy has changed, but without its adapters it still is the reference."""
    cache = fill(config)
    config = with_(config, cache=cache, lora=LoraSettings(rank=4), lr=1e-2, save_every=1)
    update = Updater.update

    def stopping(updater: Updater, step: int, *rest: object) -> object:
        if step == 3:
            raise RunInterruptedError(15, "stopped")
        return update(updater, step, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(RunInterruptedError):
        patch.setattr(Updater, "update", stopping)
        train(config, show_progress=False)
    wrong = rewritten(cache, config, store, two_that_cancel)
    with pytest.raises(UntrustedReferenceError, match="the reference cannot be trusted"):
        train(with_(config, resume=True, cache=wrong), show_progress=False)


def test_the_sample_is_even_and_always_the_same(store: Store, tmp_path: Path) -> None:
    rows = np.arange(3, 30, dtype=np.int64)
    picked = sample_rows(store, rows)
    assert picked.completions == len(rows) <= SAMPLE
    assert set(map(bytes, picked.keys())) == set(map(bytes, store.keys()[rows]))
    assert picked.keys().tolist() == sample_rows(store, rows).keys().tolist()
    groups = sample_groups(store)
    assert groups.keys().tolist() == store.keys().tolist()  # there are no more than 32
    assert groups.roles().tolist() == store.roles().tolist()


def test_a_tight_bound_is_stated_for_each_dtype_and_layout() -> None:
    for precision in get_args(Precision):
        same, other = TOLERANCES[precision, True], TOLERANCES[precision, False]
        assert same.token <= other.token
        assert same.sequence <= other.sequence
        lengths = torch.tensor([1.0, 64.0, 256.0])
        assert same.of_sums(lengths).tolist() == [same.sequence] * 2 + [2 * same.sequence]


@pytest.mark.parametrize("precision", get_args(Precision))
def test_both_layouts_are_within_the_bounds(
    config: TrainConfig, store: Store, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_(config, precision=precision)
    with monkeypatch.context() as patch:
        patch.setattr(scorer_module, "choose_layout", lambda *_, **__: ("padded", "asked for"))
        cache = fill(config)
    (path,) = cache.glob("*/conditions-*.json")
    assert json.loads(path.read_text())["layout"] == "padded"
    result = train(with_(config, cache=cache), show_progress=False)
    assert result.steps == len(result.history) > 0


def test_different_conditions_are_reported_with_the_sample(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], make_model: Callable[..., Path]
) -> None:
    cache = fill(config)
    (path,) = cache.glob("*/conditions-*.json")
    stored = json.loads(path.read_text())
    known = {"layout": "shared", "device": "cpu", "attention": "logratio_shared_prompt"}
    assert stored | known == stored
    train(with_(config, cache=cache, overwrite=True), show_progress=False)
    assert "filled under" not in capsys.readouterr().err
    path.write_text(json.dumps(stored | {"transformers": "4.0", "layout": "padded"}))
    train(with_(config, cache=cache, overwrite=True), show_progress=False)
    (printed,) = [line for line in capsys.readouterr().err.splitlines() if "filled under" in line]
    assert "layout padded (here shared), transformers 4.0 (here " in printed
    assert "32 completions scored again" in printed
    other = with_(
        config, cache=cache, overwrite=True, model=make_model("b", 5), reference=config.model
    )
    train(other, show_progress=False)
    assert "reference is not in memory" in capsys.readouterr().err


def test_a_damaged_fingerprint_stops_training(config: TrainConfig) -> None:
    cache = fill(config)
    (path,) = cache.glob("*/fingerprint.json")
    path.write_text(path.read_text().replace("float32", "float64"))
    with pytest.raises(ValueError, match=r"fingerprint\.json"):
        train(with_(config, cache=cache), show_progress=False)


def offset_loss(change: float) -> Callable[..., Tensor]:
    """The DPO loss with something added: its first value is wrong."""
    real = METHODS["dpo"].loss

    def loss(pairs: object, *, beta: float, label_smoothing: float) -> Tensor:
        return real(pairs, beta=beta, label_smoothing=label_smoothing) + change

    return loss


@pytest.mark.parametrize("loss", ["dpo", "ipo", "sppo", "aot", "cal-dpo"])
@pytest.mark.parametrize("precision", get_args(Precision))
def test_the_first_loss_is_the_known_one(
    config: TrainConfig, store: Store, loss: str, precision: Precision
) -> None:
    config = with_(config, loss=loss, precision=precision, beta=0.3)
    policy = load_model(config.model, precision=precision)
    assert starts_at_reference(config)
    reference = FrozenReference(load_model(config.model, precision=precision))
    objective = Objective.of(config)
    assert check_start(config, store, policy, reference, "shared", objective) == []


@pytest.mark.parametrize("change", [1e-2, -1e-3, math.nan])
def test_a_wrong_initial_loss_is_refused(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, change: float
) -> None:
    wrong = dataclasses.replace(METHODS["dpo"], loss=offset_loss(change))
    monkeypatch.setitem(METHODS, "dpo", wrong)
    with pytest.raises(UntrustedReferenceError, match=r"instead of 0\.693147"):
        train(config, show_progress=False)
    assert not list(Path(config.output).glob("*.safetensors"))


def test_the_checks_move_no_generator_and_leave_the_mode(config: TrainConfig, store: Store) -> None:
    policy = with_lora(load_model(config.model), LoraSettings(rank=2), Path(config.model))
    policy.train()
    for layer in transformer(policy).model.layers:
        layer.self_attn.attention_dropout = 0.5
    reference, before = FrozenReference(load_model(config.model)), torch.get_rng_state()
    check_start(config, store, policy, reference, "shared", Objective.of(config))
    assert torch.equal(before, torch.get_rng_state())
    assert all(module.training for module in policy.modules())


@pytest.mark.parametrize(
    ("value", "code"), [(math.nan, "E602"), (-math.inf, "E602"), (0.01, "E603")]
)
def test_impossible_values_name_the_record_and_are_not_written(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, value: float, code: str
) -> None:
    def poisoned(model: nn.Module, batch: object) -> Tensor:
        logps = score(model, batch)  # type: ignore[arg-type]
        targets = batch.targets  # type: ignore[attr-defined]
        bad = torch.from_numpy(targets.rows)[targets.completion_of] == 7
        return torch.where(bad, torch.full_like(logps, value), logps)

    monkeypatch.setattr(scorer_module, "score", poisoned)
    with pytest.raises(ImpossibleLogpError, match=rf"pairs\.jsonl:4: \[{code}\]"):
        fill(config)
    cache = Path(config.output).parent / "cache"
    assert len(open_cache(cache, model_fingerprint(config.model))) == 0


def test_a_cache_with_another_number_of_tokens_is_refused(
    config: TrainConfig, store: Store, tmp_path: Path
) -> None:
    fingerprint = model_fingerprint(config.model)
    writer = CacheWriter(tmp_path, fingerprint.digest)
    offsets = np.arange(store.completions + 1, dtype=np.int64)
    writer.append(store.keys(), offsets, np.full(store.completions, -1.0, dtype=np.float32))
    writer.close()
    reader = CacheReader.open(tmp_path, fingerprint.digest)
    batch = to_torch(lay_out(store, np.array([3]), "padded"))
    with pytest.raises(StaleCacheError, match=r"\[E604\] the cache has 2 tokens"):
        CachedReference(store, reader, tmp_path).logps(batch)


def fill_sums(config: TrainConfig, edit: Callable[[np.ndarray, np.ndarray], None]) -> Path:
    """Copy the sums of a cache to another one, with `edit` done to the counts and sums."""
    cache = fill(config, sums_only=True)
    fingerprint = model_fingerprint(config.model)
    reader = open_cache(cache, fingerprint, sums=True)
    store = load_dataset(config.model, config.data, config.rules, show_progress=False).store
    counts, sums = reader.read_sums(reader.join(store.sum_keys()))
    counts, sums = counts.copy(), sums.copy()
    edit(counts, sums)
    folder = cache.with_name("copy") / f"{fingerprint.name}.sums"
    folder.mkdir(parents=True)
    shutil.copy(cache / folder.name / "fingerprint.json", folder)
    writer = CacheWriter(folder, fingerprint.digest, sums=True)
    writer.append_sums(store.sum_keys(), counts, sums)
    writer.close()
    return folder.parent


def nothing(_counts: np.ndarray, _sums: np.ndarray) -> None:
    """Change nothing."""


def one_more(counts: np.ndarray, _sums: np.ndarray) -> None:
    counts[5] += 1


def a_bit_less(_counts: np.ndarray, sums: np.ndarray) -> None:
    sums[5] -= 0.01


@pytest.mark.parametrize("loss", ["dpo", "ipo", "nca"])
def test_sums_serve_every_loss_as_tokens_do(config: TrainConfig, loss: str) -> None:
    config = with_(config, loss=loss, cache=fill_sums(config, nothing), overwrite=True)
    sums = train(config, show_progress=False).history
    assert isinstance(DPOTrainer(config=config, show_progress=False).cached, CachedSums)
    config = with_(config, cache=fill(config))
    assert isinstance(DPOTrainer(config=config, show_progress=False).cached, CachedReference)
    for one, other in zip(sums, train(config, show_progress=False).history, strict=True):
        for name in ("loss", "rewards/margins", "grad_norm"):  # a tie may fall to either side
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5)


def test_the_flag_adds_to_sums_where_there_are_only_sums(
    config: TrainConfig, tmp_path: Path
) -> None:
    few = with_(config, data=[write_pairs(tmp_path / "few.jsonl", 3)])
    cache = fill_sums(few, nothing)
    train(with_(config, cache=cache, precompute=True), show_progress=False)
    (folder,) = cache.iterdir()
    assert folder.suffix == ".sums"


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (one_more, StaleCacheError, r"\[E604\] the cache has sums of"),
        (a_bit_less, UntrustedReferenceError, r"of a completion of .*pairs\.jsonl:3 "),
    ],
)
def test_wrong_sums_are_refused(
    config: TrainConfig, edit: Callable[..., None], error: type[Exception], message: str
) -> None:
    cache = fill_sums(config, edit)
    with pytest.raises(error, match=message):
        train(with_(config, cache=cache), show_progress=False)


def test_sums_are_no_tokens(config: TrainConfig, store: Store) -> None:
    cached = DPOTrainer(
        config=with_(config, cache=fill_sums(config, nothing)), show_progress=False
    ).cached
    assert isinstance(cached, CachedSums)
    with pytest.raises(StaleCacheError, match="log-probs of tokens are needed"):
        cached.logps(to_torch(lay_out(store, np.array([2]), "padded")))


def test_conditions_of_a_model(tiny_model: Path) -> None:
    model = load_model(tiny_model)
    assert conditions(model, "shared")["attention"] == "logratio_shared_prompt"
    assert conditions(model, "padded")["attention"] == "sdpa"
    assert model_fingerprint(tiny_model).soft.items() <= conditions(model, "padded").items()


STOP = 2


class Fixed(PerToken):
    """A reference that gives each stop token one log-prob, and each other token -1."""

    def __init__(self, at_end: float) -> None:
        self.at_end = at_end

    def logps(self, batch: Batch) -> Tensor:
        return torch.where(batch.targets.target_ids == STOP, self.at_end, -1.0)


class Counting(FrozenReference):
    """A model that notes the groups and tokens of its passes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.groups, self.tokens = list[int](), list[int]()

    def logps(self, batch: Batch) -> Tensor:
        self.groups += batch.targets.groups.tolist()
        self.tokens.append(batch.input_ids.numel())
        return super().logps(batch)


@pytest.mark.parametrize("is_resumed", [False, True])
def test_the_reference_scores_the_sample_once_several_groups_at_a_time(
    config: TrainConfig, store: Store, is_resumed: bool
) -> None:
    """Of a sharded model each pass gathers all weights; a resumed run has nothing to compare."""
    config = with_(config, token_budget=60)
    policy, reference = load_model(config.model), Counting(load_model(config.model))
    objective = None if is_resumed else Objective.of(config)
    assert not check_start(config, store, policy, reference, "shared", objective, {STOP})
    sample = sample_groups(store)
    assert sorted(reference.groups) == ([] if is_resumed else list(range(len(sample))))
    assert max(reference.tokens, default=0) <= 60
    assert len(reference.tokens) <= len(sample) / 2


@pytest.mark.parametrize(("at_end", "is_doubted"), [(-26.0, True), (-10.5, True), (-9.5, False)])
def test_a_reference_that_hardly_ever_ends_answers_is_doubted(
    store: Store, at_end: float, is_doubted: bool
) -> None:
    def note(stop_ids: set[int]) -> str | None:
        ends = EndCheck(stop_ids)
        for group in sampled(store, "padded", torch.device("cpu"), Fixed(at_end)):
            ends.add(group)
        return ends.note()

    found = note({STOP})
    assert bool(found) is is_doubted
    if found:
        assert f"{at_end:.1f} nats" in found
        assert "cut off, give --no-eos" in found
    assert note({99}) is None


def test_a_run_prints_the_doubt_once(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logratio.training.reference_checks.RAREST_END", 0.0)
    train(config, show_progress=False)
    (said,) = (s for s in capsys.readouterr().err.splitlines() if "been trained to answer" in s)
    assert "give rules.append_eos=False" in said
