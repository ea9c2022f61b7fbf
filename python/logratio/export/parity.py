"""Verify an exported graph against torch's log-probs on golden groups."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from logratio._rust import candidate_layout
from logratio.bundle import CHUNK, PADDED, PARITY, REFERENCE_INPUT, tolerance
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.errors import LogratioError
from logratio.export.families import layout_of
from logratio.graph_inputs import graph_inputs
from logratio.logps.checks import batch_of
from logratio.logps.completion import score
from logratio.logps.scores import score_completions

_LENGTHS = ((7, (1, 4, 9)), (3, (6, 2)), (23, (17, 30)), (96, (48, 3)))
"""Tokens of prompts and candidates; the last group is much longer than the trace."""
_PAST_WINDOW = 9
_PAST_CHUNKS = 512
"""transformers computes recurrent layers in chunks of up to 256 tokens."""
_PROMPT = "Say in one line how the day went — naïve café, 3.14 − 2 = ?"
_COMPLETIONS = (" It went well, thank you.", " 今日は 🙂 and\tthen some.")
_SIMPLE, _SIMPLE_COMPLETIONS = "a", ("a a", "a")
"""For vocabularies without the words above; `serving` expects a text group if it can encode "a"."""

Ids = list[int]
Values = tuple[float, ...]
"""Of a candidate: its reward, then its log-prob sums under the models of the graph, in nats."""
Given = Callable[[Ids, Ids], float]
"""The reference's log-probs that are an input, by the ids of prompt and candidate."""


@dataclass(frozen=True)
class GoldenInput:
    """Token ids of a prompt and its candidates, with their text if they come from text."""

    prompt_ids: Ids
    candidates: list[Ids]
    prompt: str | None = None
    completions: list[str] | None = None
    messages: list[dict[str, str]] | None = None
    max_length: int | None = None

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longest candidate."""
        return len(self.prompt_ids) + max(map(len, self.candidates))

    def alone(self) -> "list[GoldenInput]":
        """Return each candidate as a separate group."""
        return [GoldenInput(self.prompt_ids, [ids]) for ids in self.candidates]


def golden_inputs(
    tokenizer: PreferenceTokenizer, vocabulary_size: int, max_length: int
) -> list[GoldenInput]:
    """Return the groups stored in a bundle.

    They are random ids of several lengths, one of them long; a text, a chat, and a truncated text.
    """
    lengths = [_fitted(prompt, candidates, max_length) for prompt, candidates in _LENGTHS]
    chosen = [_random_group(*group, vocabulary_size) for group in lengths]
    return chosen + list(_text_groups(tokenizer, max_length))


def probing_inputs(
    config: PreTrainedConfig, vocabulary_size: int, max_length: int
) -> list[GoldenInput]:
    """Return groups checked only at export, because they may take long.

    They are longer than any window, and than two chunks of a layer that carries a state.
    """
    window = getattr(config, "sliding_window", None) or 0
    longest = max(window, _PAST_CHUNKS if layout_of(config) == PADDED else 0)
    prompt = min(longest + _PAST_WINDOW, max_length - _PAST_WINDOW)
    if not longest or prompt <= max(window, _LENGTHS[-1][0]):
        return []
    return [_random_group(prompt, (_PAST_WINDOW, 1), vocabulary_size)]


def _fitted(prompt: int, candidates: Sequence[int], max_length: int) -> tuple[int, tuple[int, ...]]:
    prompt = max(1, min(prompt, max_length // 2))
    return prompt, tuple(min(length, max_length - prompt) for length in candidates)


def _random_group(prompt: int, candidates: Sequence[int], vocabulary_size: int) -> GoldenInput:
    random = np.random.default_rng(prompt)
    draw = [random.integers(0, vocabulary_size, n).tolist() for n in (prompt, *candidates)]
    return GoldenInput(draw[0], draw[1:])


def _text_groups(tokenizer: PreferenceTokenizer, max_length: int) -> Iterator[GoldenInput]:
    """Yield a text, a truncated text and a chat, if the tokenizer can encode them."""
    eos = tokenizer.files.special_tokens.get("eos_token", "")
    # The name of a special token in a text shows how such names are tokenized.
    choices = [(f"{_PROMPT} {eos}", _COMPLETIONS), (_PROMPT, _COMPLETIONS)]
    choices.append((_SIMPLE, _SIMPLE_COMPLETIONS))
    texts = (_encoded(tokenizer, *choice, max_length) for choice in choices)
    if text := next(filter(None, texts), None):
        yield text
        yield from _truncated(tokenizer, text)
    if tokenizer.chat_template is not None:
        chats = [([{"role": "user", "content": prompt}], texts) for prompt, texts in choices[1:]]
        found = (_encoded(tokenizer, *chat, max_length) for chat in chats)
        yield from list(filter(None, found))[:1]


def _encoded(
    tokenizer: PreferenceTokenizer,
    prompt: str | list[dict[str, str]],
    completions: Sequence[str],
    max_length: int,
) -> GoldenInput | None:
    """Encode a prompt and its completions; None if it fails or exceeds the limit."""
    try:
        group = tokenizer.encode_completions(prompt, completions)
    except Exception:  # tokenizers raises plain Exception for unknown words
        return None
    candidates = [completion.ids for completion in group.completions]
    text, chat = (prompt, None) if isinstance(prompt, str) else (None, prompt)
    known = GoldenInput(group.prompt_ids, candidates, text, list(completions), chat)
    return known if known.longest < max_length else None


def _truncated(tokenizer: PreferenceTokenizer, text: GoldenInput) -> Iterator[GoldenInput]:
    """Yield the group of a text under a limit at which its prompt or completions are truncated."""
    assert text.prompt is not None
    if max(map(len, text.candidates)) < 2:
        return
    # The first limit also truncates the prompt, unless the rules refuse that.
    for limit in (len(text.prompt_ids) * 3 // 4, (len(text.prompt_ids) + text.longest) // 2):
        if limit < 2:
            continue
        shortened = PreferenceTokenizer(tokenizer.files, tokenizer.rules.limited(limit))
        if group := _encoded(shortened, text.prompt, text.completions or (), limit + 1):
            yield replace(group, max_length=limit)
            return


@torch.no_grad()
def plain_logps(model: nn.Module, groups: Sequence[GoldenInput]) -> list[list[float]]:
    """Score candidates one unpadded sequence at a time, with the model's own forward.

    Shares no code with the exported module, so it is an independent check.

    Args:
        model: A causal language model.
        groups: Prompts and candidates.

    Returns:
        Log-prob sums in nats, one list per group, computed in float64 from the logits.
    """
    return [
        [_plain_sum(model, group.prompt_ids, candidate) for candidate in group.candidates]
        for group in groups
    ]


def _plain_sum(model: nn.Module, prompt: Ids, candidate: Ids) -> float:
    ids = torch.tensor([prompt + candidate])
    output = model(input_ids=ids, use_cache=False, logits_to_keep=len(candidate) + 1)
    logps = torch.log_softmax(output.logits[0, :-1].double(), -1)
    return float(logps.gather(-1, torch.tensor(candidate)[:, None]).sum())


@torch.no_grad()
def training_logps(model: nn.Module, groups: Sequence[GoldenInput]) -> list[list[float]]:
    """Score candidates with training's code: `completion_logps` in the padded layout."""
    batch = batch_of([(group.prompt_ids, group.candidates) for group in groups], "padded")
    sums: Tensor = batch.targets.sums(score(model, batch))
    rows = iter(sums.tolist())
    return [[next(rows) for _ in group.candidates] for group in groups]


@torch.no_grad()
def plain_scores(model: nn.Module, groups: Sequence[GoldenInput]) -> list[list[float]]:
    """Score candidates one unpadded sequence at a time, with the model's own forward.

    Shares no code with the exported module, so it is an independent check.
    """
    return [
        [
            float(model(input_ids=torch.tensor([group.prompt_ids + ids]), use_cache=False).logits)
            for ids in group.candidates
        ]
        for group in groups
    ]


@torch.no_grad()
def training_scores(model: nn.Module, groups: Sequence[GoldenInput]) -> list[list[float]]:
    """Score candidates with training's code, in the padded layout."""
    batch = batch_of([(group.prompt_ids, group.candidates) for group in groups], "padded")
    rows = iter(score_completions(model, batch).tolist())
    return [[next(rows) for _ in group.candidates] for group in groups]


_OTHER_CHUNK = 32


class ParityError(LogratioError, RuntimeError):
    """The graph's log-probs differ from torch's."""


@dataclass
class ParityReport:
    """The largest difference per check, in nats per sequence; of a reward model, in its scores."""

    beta: float
    limits: tuple[float, float] = PARITY
    largest: dict[str, float] = field(default_factory=dict)

    def compare(self, check: str, expected: Sequence[Values], rows: Sequence[Values]) -> None:
        """Compare a run's values with the expected ones, candidate by candidate.

        Raises:
            ParityError: A difference is larger than rounding can explain.
        """
        for (known, *logps), (reward, *found) in zip(expected, rows, strict=True):
            slack = 0.0
            for one, other in zip(logps, found, strict=True):
                slack += tolerance(one, self.limits)
                self._record(check, one, other, "nats")
            if not logps:
                self._record(check, known, reward, "as its score")
            elif not abs(reward - known) <= self.beta * slack + 1e-6 * abs(known):
                raise ParityError(f"{check}: a reward is {reward:.6g} instead of {known:.6g}")

    def _record(self, check: str, known: float, found: float, unit: str) -> None:
        gap, slack = abs(found - known), tolerance(known, self.limits)
        if not gap <= slack:  # also if the gap is NaN
            raise ParityError(
                f"{check}: a candidate has {found:.6f} {unit} instead of {known:.6f} "
                f"(tolerance {slack:.1e})"
            )
        self.largest[check] = max(self.largest.get(check, 0.0), gap)


@dataclass(frozen=True)
class Graph:
    """A session on an exported graph.

    Attributes:
        session: The ONNX Runtime session.
        given: Log-probs of the reference that are an input, by candidate; None if the graph has no
            such input.
    """

    session: Any
    given: "Given | None" = None

    def values(self, groups: Sequence[GoldenInput], chunk: int = CHUNK) -> list[Values]:
        """Score groups in one run: the outputs of each candidate."""
        names = [output.name for output in self.session.get_outputs() if len(output.shape) == 1]
        columns = self._run(names, groups, chunk)[1]
        return [tuple(row) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def token_sums(self, groups: Sequence[GoldenInput]) -> list[float] | None:
        """Sum the output per token for each candidate; None if the graph has no such output."""
        names = [output.name for output in self.session.get_outputs() if len(output.shape) == 2]
        if not names:
            return None
        layout, (tokens,) = self._run(names, groups, _OTHER_CHUNK)
        rows = layout.token_row.ravel()
        sums = np.bincount(rows, weights=tokens.ravel())
        return [float(value) for value in sums[: sum(len(group.candidates) for group in groups)]]

    def _run(self, names: list[str], groups: Sequence[GoldenInput], chunk: int) -> Any:
        layout = candidate_layout(
            [np.array(group.prompt_ids, dtype=np.int32) for group in groups],
            [[np.array(ids, dtype=np.int32) for ids in group.candidates] for group in groups],
            chunk,
        )
        inputs: dict[str, Any] = dict(graph_inputs(layout))
        if self.given is not None:
            known = [
                self.given(group.prompt_ids, ids) for group in groups for ids in group.candidates
            ]
            inputs[REFERENCE_INPUT] = np.array(known, dtype=np.float32)
        return layout, self.session.run(names, inputs)


def check_parity(
    graph: Graph,
    beta: float,
    groups: Sequence[GoldenInput],
    expected: Sequence[Values],
    limits: tuple[float, float] = PARITY,
) -> dict[str, float]:
    """Compare a graph with the expected values, with the groups batched in several ways.

    Args:
        graph: The exported graph.
        beta: Reward per nat; 1 for a reward model.
        groups: The groups to score.
        expected: The values of each candidate of all groups.
        limits: The tolerance, for `bundle.tolerance`.

    Returns:
        The largest difference per check: in nats, or in scores.

    Raises:
        ParityError: A value differs by more than the tolerance.
    """
    report = ParityReport(beta, limits)
    for check, rows in _variants(graph, groups):
        report.compare(check, expected, rows)
    sums = graph.token_sums(groups)
    if sums is not None:
        known = [(0.0, logps[0] - sum(logps[1:2])) for _, *logps in expected]
        loose = (2 * limits[0], 2 * limits[1])
        tokens = ParityReport(1.0, (loose[0], loose[1] + _SUM_ROUNDING), report.largest)
        tokens.compare("log-probs per token", known, [(0.0, value) for value in sums])
    return report.largest


_SUM_ROUNDING = 1e-4


def _variants(graph: Graph, groups: Sequence[GoldenInput]) -> Iterator[tuple[str, list[Values]]]:
    """Score all candidates in several batchings; yield its name and the values."""
    yield "all groups padded together", graph.values(groups)
    yield "each group alone", [row for group in groups for row in graph.values([group])]
    single = [one for group in groups for one in group.alone()]
    alone = [graph.values([group], _OTHER_CHUNK) for group in single]
    yield "each candidate alone, in smaller chunks", [row for rows in alone for row in rows]
