"""Evaluate a policy on held-out preferences: accuracy, calibration, KL from the reference."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig

from logratio._rust import Store
from logratio.data.analysis.evaluation_result import Evaluation, KlEstimate, summarize
from logratio.data.analysis.token_use import BatchSharing
from logratio.data.feed import Feed, FeedSettings, lay_out
from logratio.data.readers.inputs import Inputs
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.durable import write_atomic
from logratio.errors import ConfigError
from logratio.forecast import Forecast, check_writable
from logratio.logps.attention.interface import own_attention
from logratio.logps.batch import Batch, buffers_for, shape_for, to_torch
from logratio.logps.checks import choose_layout, layout_note
from logratio.logps.completion import batch_of, limits_of, score, transformer
from logratio.logps.scores import has_scalar_head, score_completions
from logratio.progress import Advance, be_silent, progress, say
from logratio.training import memory, run_folder
from logratio.training.config import EvaluateConfig, PathLike, with_local_models
from logratio.training.dataset import (
    Dataset,
    check_reference,
    load_dataset,
    max_positions,
    once_per_host,
)
from logratio.training.methods.data_checks import check_groups, check_whole_answers, kinds_of
from logratio.training.methods.method import DataKind
from logratio.training.methods.table import METHODS
from logratio.training.methods.token_weights import WeightedTurns, weighted_sums
from logratio.training.models import (
    autocast,
    base_folder,
    check_model_folder,
    default_device,
    load_model,
    precision_note,
    precision_of,
    quietly,
)
from logratio.training.parallel.lifeline import ending_together
from logratio.training.parallel.processes import Processes, join_processes
from logratio.training.parallel.shares import updates_of
from logratio.training.reward_model import is_reward_model
from logratio.training.run_folder import note_unfinished, reward_beta, settings_of
from logratio.training.torch_settings import ask_for_expandable_segments, exact_products
from logratio.validation import check_kind

SAMPLE_ROWS = 256
"""Number of completions sampled in one batch."""


@torch.no_grad()
def sample_completions(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    seed: int = 0,
    greedy: bool = False,
) -> list[list[int]]:
    """Sample one completion of each prompt at temperature 1, without top-k or top-p.

    Args:
        model: The policy, in eval mode.
        prompts: Token ids of each prompt.
        max_new_tokens: Completions are truncated to this length.
        stop_ids: A completion ends at the first of these tokens; empty: only at `max_new_tokens`.
        seed: Seed of the sampling. The caller's random state is restored.
        greedy: Take the most likely token instead of sampling.

    Returns:
        Token ids of each completion, including its stop token.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    drawn: list[list[int]] = [[] for _ in prompts]
    with torch.random.fork_rng(), own_attention(transformer(model)):
        torch.manual_seed(seed)
        for start in range(0, len(order), SAMPLE_ROWS):
            rows = order[start : start + SAMPLE_ROWS]
            ids = _generate(model, [prompts[i] for i in rows], max_new_tokens, stop_ids, greedy)
            for row, completion in zip(rows, ids, strict=True):
                drawn[row] = _until_stop(completion, stop_ids)
    return drawn


def _generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    greedy: bool,
) -> list[list[int]]:
    inner = transformer(model)
    ids, mask = _left_padded(prompts, inner.device)
    how = {} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    own = inner.generation_config
    inner.generation_config = GenerationConfig()  # the model's could change the distribution
    try:
        with quietly():
            out = model.generate(  # type: ignore[operator]  # defined by transformers and peft
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=not greedy,
                eos_token_id=list(stop_ids) or None,
                pad_token_id=next(iter(stop_ids), 0),
                **how,
            )
    finally:
        inner.generation_config = own
    return out[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _until_stop(completion: list[int], stop_ids: Sequence[int]) -> list[int]:
    ends = (place for place, token in enumerate(completion, 1) if token in stop_ids)
    return completion[: next(ends, None)]


@dataclass(frozen=True)
class Sample:
    """A prompt with a completion of the policy and one of the reference, as text.

    Attributes:
        prompt: The prompt, without the token that begins every text.
        policy: The policy's completion, without the token that ends it.
        reference: The reference's completion; None: there is no reference.
        policy_truncated: Whether the policy's completion was cut at the maximum length.
        reference_truncated: The same for the reference; None: there is no reference.
    """

    prompt: str
    policy: str
    reference: str | None
    policy_truncated: bool = False
    reference_truncated: bool | None = None


def sample_texts(
    tokenizer: PreferenceTokenizer,
    prompts: list[list[int]],
    drawn: list[list[int]],
    others: list[list[int]] | None,
) -> list[Sample]:
    """Decode sampled completions.

    Args:
        tokenizer: The tokenizer of the models.
        prompts: Token ids of the prompts.
        drawn: The policy's completion of each.
        others: The reference's completion of each, or None.
    """
    theirs: Sequence[list[int] | None] = others or [None] * len(drawn)
    return [
        Sample(
            tokenizer.decode(prompt[prompt[:1] == [tokenizer.bos_id] :]),
            _text(tokenizer, mine),
            None if other is None else _text(tokenizer, other),
            _is_truncated(tokenizer, mine),
            None if other is None else _is_truncated(tokenizer, other),
        )
        for prompt, mine, other in zip(prompts, drawn, theirs, strict=True)
    ]


def _text(tokenizer: PreferenceTokenizer, ids: list[int]) -> str:
    """Decode a completion without the stop token and the space between it and the prompt."""
    return tokenizer.decode(ids if _is_truncated(tokenizer, ids) else ids[:-1]).lstrip(" ")


def _is_truncated(tokenizer: PreferenceTokenizer, ids: list[int]) -> bool:
    return not ids or ids[-1] not in tokenizer.stop_ids


def evaluate(config: EvaluateConfig, *, show_progress: bool = True) -> Evaluation:
    """Compare policy and reference, or test a reward model, on held-out preference pairs.

    Args:
        config: Settings of the evaluation.
        show_progress: Draw progress bars and print notes.

    Raises:
        ModelFolderError, BadDataError, ConfigError, OutputError: A model folder, data row, setting
            or the place of a file is invalid; raised before any model is loaded.

    Example:
        >>> evaluate(EvaluateConfig("policy", "sft-model", "held-out.jsonl")).accuracy
        0.715
    """
    ready = prepare(config, show_progress=show_progress)
    if show_progress:
        say(precision_note(config))
    return ready.run()


def prepare(config: EvaluateConfig, *, show_progress: bool = True) -> "Evaluating":
    """Check the settings and folders, and tokenize the data, without loading a model."""
    check_kind(config, EvaluateConfig)
    processes = join_processes()
    if not processes.is_first:
        be_silent()
        show_progress = False
    with ending_together(processes.lifeline, processes.rank):
        return _prepare(config, processes, show_progress=show_progress)


def _prepare(config: EvaluateConfig, processes: Processes, *, show_progress: bool) -> "Evaluating":
    ask_for_expandable_segments(config.device)
    default_device(config.device)
    config = with_local_models(config)
    if config.samples_file is not None:
        if not config.samples:
            raise ConfigError("--samples-file needs --samples, the number of completions to sample")
        check_writable(Path(config.samples_file).parent)
    beta = _check_models(config)
    note_unfinished(config.policy)

    def load(data: Inputs, path: Path | None) -> Dataset:
        return load_dataset(
            config.policy,
            data,
            config.rules,
            replace(config.formats, kinds=("pair", "unpaired", "group")),
            path=path,
            max_bad_fraction=config.max_bad_fraction,
            show_progress=show_progress,
            recorded_date=lambda: run_folder.date_of_policy(config.policy),
        )

    is_alone = processes.count == 1
    data = config.data
    dataset = load(data, None) if is_alone else once_per_host(load, data, None, processes)
    _check_pairs(dataset.store, is_scored=beta is None)
    if config.reference is not None:
        check_reference(config.reference, config.policy, dataset.tokenizer, dataset.store)
    check_sampling(config.models, config.samples, config.max_new_tokens, dataset.store)
    return Evaluating(config, dataset, beta, show_progress, processes)


def _check_pairs(store: Store, *, is_scored: bool) -> None:
    """Check that the held-out data has pairs, and name what evaluates other data.

    A reward model scores (`is_scored`) whole answers, so turns have no weights.
    """
    found = kinds_of(store)
    for kind, advice in _ELSEWHERE.items():
        if found[kind].any() and not found["pairs"].all():
            raise ConfigError(f"evaluate measures pairs, and the data has {kind}: {advice}")
    check_groups(store, "pairs", "an evaluation")
    if is_scored:
        check_whole_answers(store, "a reward model", "remove them")


_ELSEWHERE: Mapping[DataKind, str] = {
    "labelled answers": "give them as --eval-data to `logratio train`, which measures the loss and "
    "the mean rewards of good and bad answers",
    "lists": "give --lists pairs, which makes all pairs of a list, or give them as --eval-data to "
    "`logratio train`",
    "demonstrations": "give them as --eval-data to `logratio train`",
}
"""What evaluates data of other kinds."""


def _check_models(config: EvaluateConfig) -> float | None:
    """Check the models of an evaluation; return β of the rewards, or None for a reward model."""
    policy = Path(config.policy)
    is_scored = is_reward_model(policy)
    for folder in config.models:
        check_model_folder(Path(folder), rewards=is_scored)
    if not is_scored:
        if config.reference is None:
            raise ConfigError(_no_reference(policy))
        return reward_beta(policy, config.beta)
    given = {"reference": config.reference, "beta": config.beta, "samples": config.samples or None}
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{policy} is a reward model: its scores need no reference and no β, and it cannot "
                f"write; remove --{name}"
            )
    return None


def _no_reference(policy: Path) -> str:
    """Say why an evaluation needs a reference, and what evaluates a loss without one."""
    loss = (settings_of(policy) or {}).get("loss")
    needed = (
        "--reference is missing: the reward of a policy is β times its log-ratio to the reference"
    )
    if (method := METHODS.get(loss or "")) and not method.needs_reference:
        return (
            f"{needed}. {policy} was trained with {loss}, whose own rewards have none: --eval-data "
            "of `logratio train` measures them"
        )
    return f"{needed}. Only a reward model (--loss bradley-terry) needs none"


def check_sampling(
    models: Sequence[PathLike], samples: int, max_new_tokens: int, store: Store
) -> None:
    """Check the settings of the sampling against the prompts and the models.

    Args:
        models: Folders of the models that complete or score the samples; the policy first.
        samples: Number of completions to sample.
        max_new_tokens: Maximum length of a completion.
        store: The groups whose prompts are completed.

    Raises:
        ConfigError: A setting is out of range, or a sample could be longer than a model allows.
    """
    if samples < 0 or max_new_tokens < 1:
        raise ConfigError("--samples must be at least 0 and --max-new-tokens at least 1")
    if not samples:
        return
    positions = max_positions(models[0])
    needed = int(store.prompt_lengths().max()) + max_new_tokens
    if positions and needed > positions:
        raise ConfigError(
            f"the longest prompt and --max-new-tokens need {needed} positions, and the model has "
            f"{positions}: lower --max-new-tokens or --max-prompt-length"
        )
    for folder in models:
        _check_length_limits(folder, needed)


def _check_length_limits(folder: PathLike, needed: int) -> None:
    """Refuse to sample if the length or the other rows of a batch change the distribution.

    Some families switch RoPE factors or keys beyond a length: see `limits_of`.
    """
    model = AutoConfig.from_pretrained(base_folder(folder), local_files_only=True)
    for limit in limits_of(model):
        if needed > limit.tokens:
            raise ConfigError(
                f"{folder}: cannot sample up to {needed} tokens, because its {limit.what} "
                f"uses different factors or keys beyond {limit.tokens} tokens: lower "
                "--max-new-tokens or --max-prompt-length until both fit, or draw no samples"
            )


class Evaluating:
    """A prepared evaluation: `run` performs it, `forecast` estimates its cost.

    Under torchrun, processes share the pairs, each with whole models. The first one samples.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        dataset: Dataset,
        beta: float | None,
        show_progress: bool,
        processes: Processes,
    ) -> None:
        self.processes = processes
        self.config, self.dataset, self.show_progress = config, dataset, show_progress
        self.beta = beta
        self.device, self.precision = default_device(config.device), precision_of(config)
        self._turns = WeightedTurns.of(dataset.store)

    @cached_property
    def forecast(self) -> Forecast:
        """Memory and time of the evaluation."""
        tokens = (
            self.sharing.together
            if self.sharing
            else int(self.dataset.store.shared_lengths().sum())
        )
        shared = f", {self.sharing.to_text()}, if the models can" if self.sharing else ""
        return Forecast(
            memory_bytes=memory.scoring_bytes(
                self.config.models,
                min(self.config.token_budget, tokens),
                precision=self.precision,
            ),
            disk_bytes=0,
            disk_path=Path(),
            seconds=memory.evaluation_seconds(self.config, self.dataset.store, tokens),
            notes=f"{len(self.dataset.store):,} pairs, {self.config.samples} samples, "
            f"{precision_note(self.config)}{shared}",
        )

    @cached_property
    def sharing(self) -> BatchSharing | None:
        """The tokens of this process's batches with shared beginnings; None: not requested."""
        if not self.config.share_beginnings:
            return None
        store, budget = self.dataset.store, self.config.token_budget
        settings = _feed_settings(store, budget, "tree", self.device)
        plan = settings.plan(store, 0, self.processes.rank, self.processes.count)
        return BatchSharing.of(store, plan.order, plan.micro_offsets)

    def run(self) -> Evaluation:
        """Score the pairs, sample completions if requested, and summarize.

        Only the first of several processes has the KL.
        """
        with ending_together(self.processes.lifeline, self.processes.rank):
            self.processes.start_group(self.device)
            return self._run()

    def _run(self) -> Evaluation:
        models = [self._load(folder) for folder in self.config.models]
        store = self.dataset.store
        total = len(models) * len(store)
        with (
            exact_products(),
            autocast(self.precision, self.device),
            progress("evaluating", total, "pairs", show=self.show_progress) as advance,
        ):
            layouts = [self._layout(model) for model in models]
            if self.sharing and self.show_progress and {*layouts} == {"tree"}:
                say(self.sharing.to_text())
            values, *others = (
                self._sums(model, layout, advance)
                for model, layout in zip(models, layouts, strict=True)
            )
            samples = self.config.samples and self.processes.is_first
            kl = self._kl(*models) if samples else None
        self.processes.wait()
        lengths = self._turns.lengths().numpy() if self._turns else None
        return summarize(store, values - others[0] if others else values, self.beta, kl, lengths)

    def _layout(self, model: nn.Module) -> str:
        """Choose the best layout that a model supports; print a note if it is slower."""
        wanted = self.config.share_beginnings
        layout, reason = choose_layout(model, share_beginnings=wanted)
        note = layout_note(layout, reason, share_beginnings=wanted)
        if note and self.show_progress:
            say(note)
        return layout

    def _sums(self, model: nn.Module, layout: str, advance: Advance) -> np.ndarray:
        """Return the summed log-probs, or scores, of every completion, float64 `[N]`."""
        return sums_over(
            self.dataset.store,
            lambda batch: model_sums(model, batch, self._turns),
            self.config.token_budget,
            layout,
            self.device,
            advance,
            self.processes,
        )

    def _load(self, folder: PathLike) -> nn.Module:
        return load_model(folder, device=self.device, precision=self.precision, frozen=True)

    def _kl(self, policy: nn.Module, reference: nn.Module) -> KlEstimate:
        """Estimate the KL from completions sampled from the policy for held-out prompts."""
        store, wanted = self.dataset.store, self.config.samples
        prompts = [store.group(i % len(store))[0].tolist() for i in range(wanted)]
        drawn = self._draw(policy, prompts)
        if self.config.samples_file is not None:
            others = self._draw(reference, prompts)
            samples = sample_texts(self.dataset.tokenizer, prompts, drawn, others)
            rows = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in samples)
            write_atomic(Path(self.config.samples_file), rows)
        elif self.show_progress:
            say("the texts of the samples are not kept: --samples-file writes both models' texts")
        return kl_estimate(drawn_logratios(policy, reference, prompts, drawn), drawn)

    def _draw(self, model: nn.Module, prompts: list[list[int]]) -> list[list[int]]:
        return sample_completions(
            model,
            prompts,
            max_new_tokens=self.config.max_new_tokens,
            stop_ids=self.dataset.tokenizer.stop_ids,
            seed=self.config.seed,
        )


def kl_estimate(logratios: np.ndarray, drawn: Sequence[Sequence[int]]) -> KlEstimate:
    """Estimate the KL divergence from the log-ratios `[n]` of completions drawn from the policy."""
    samples = len(logratios)
    error = float(logratios.std(ddof=1) / np.sqrt(samples)) if samples > 1 else float("nan")
    length = float(np.mean([len(ids) for ids in drawn]))
    return KlEstimate(float(logratios.mean()), error, samples, length)


def drawn_logratios(
    policy: nn.Module,
    reference: nn.Module,
    prompts: list[list[int]],
    drawn: list[list[int]],
) -> np.ndarray:
    """Return log π − log π_ref of each sampled completion, float64 `[n]`."""
    ratios: np.ndarray = drawn_sums(policy, prompts, drawn) - drawn_sums(reference, prompts, drawn)
    return ratios


def drawn_sums(model: nn.Module, prompts: list[list[int]], drawn: list[list[int]]) -> np.ndarray:
    """Return the summed log-prob of each sampled completion, float64 `[n]`, in nats."""
    parts = []
    for start in range(0, len(prompts), 64):
        stop = start + 64
        groups = [(p, [c]) for p, c in zip(prompts[start:stop], drawn[start:stop], strict=True)]
        batch = batch_of(groups, "padded", next(model.parameters()).device)
        with own_attention(transformer(model)):
            parts.append(model_sums(model, batch).cpu().numpy())
    return np.concatenate(parts)


def sums_over(
    store: Store,
    sums_of: Callable[[Batch], Tensor],
    token_budget: int,
    layout: str,
    device: torch.device,
    advance: Advance = lambda *_: None,
    processes: Processes | None = None,
) -> np.ndarray:
    """Return the sums that `sums_of` gives for every completion in a store, float64 `[N]`.

    Several processes divide the work, and all get the whole result. All compute the same number of
    batches, as a sharded model needs.

    Args:
        store: Tokenized groups.
        sums_of: Returns the sums of a batch's completions, `[n]`.
        token_budget: Tokens computed at a time.
        layout: Batch layout: "shared", "tree" or "padded".
        device: Device of the batches.
        advance: Called with the number of groups after each batch.
        processes: The processes that do the work together; None: this one alone.
    """
    processes = processes or Processes()
    sums = np.zeros(store.completions)
    own = Feed(
        store,
        _feed_settings(store, token_budget, layout, device),
        rank=processes.data_rank,
        world_size=processes.data_count,
        allocate=buffers_for(device),
    )
    for most, found in updates_of(own, processes, 0, own.updates_per_epoch):
        done = 0
        for micro in found:
            batch = to_torch(micro.layout, device)
            sums[batch.targets.rows] = sums_of(batch).cpu().numpy()
            done += 1
            advance(len(batch.targets.groups))
        for _ in range(done, most):
            shortest = np.array([store.shared_lengths().argmin()])
            sums_of(to_torch(lay_out(store, shortest, layout, **shape_for(layout, device)), device))
            advance(0)
    whole: np.ndarray = processes.total_of_data(torch.from_numpy(sums)).numpy()
    return whole


def _feed_settings(
    store: Store, token_budget: int, layout: str, device: torch.device
) -> FeedSettings:
    """Return the settings of one pass over a store."""
    return FeedSettings(
        order="sorted",
        groups_per_update=len(store),
        token_budget=token_budget,
        layout=layout,
        **shape_for(layout, device),
    )


@torch.no_grad()
def model_sums(model: nn.Module, batch: Batch, turns: WeightedTurns | None = None) -> Tensor:
    """Return the summed log-probs, or the scores, of a batch's completions, float64 `[n]`.

    Args:
        model: A language model or a reward model.
        batch: The groups.
        turns: The weights of turns, by which log-probs are multiplied; None: all are 0 or 1.
    """
    if has_scalar_head(model):
        return score_completions(model, batch).double()
    weights = None if turns is None else turns.of_tokens(batch.targets)
    return weighted_sums(batch.targets, score(model, batch), weights)
