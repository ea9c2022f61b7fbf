"""Groups with known answers: what the export is checked on, and what every load replays."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from logratio.data import PreferenceTokenizer
from logratio.logps.checks import batch_of
from logratio.logps.completion import score

_LENGTHS = ((7, (1, 4, 9)), (3, (6, 2)), (23, (17, 30)))
_LONG = (96, (48, 3))
_PAST_WINDOW = 9
_PROMPT = "Say in one line how the day went — naïve café, 3.14 − 2 = ?"
_COMPLETIONS = (" It went well, thank you.", " 今日は 🙂 and\tthen some.")

Ids = list[int]


@dataclass(frozen=True)
class GoldenInput:
    """A prompt and candidates, with their text where they come from text."""

    prompt_ids: Ids
    candidates: list[Ids]
    prompt: str | None = None
    completions: list[str] | None = None
    messages: list[dict[str, str]] | None = None


def golden_inputs(
    tokenizer: PreferenceTokenizer, vocabulary_size: int, max_length: int
) -> list[GoldenInput]:
    """Choose the groups that a bundle carries: random ids of many lengths, a text and a chat."""
    lengths = [_fitted(prompt, candidates, max_length) for prompt, candidates in _LENGTHS]
    chosen = [_random_group(*group, vocabulary_size) for group in lengths]
    return chosen + list(_text_groups(tokenizer, max_length))


def probing_inputs(
    config: PreTrainedConfig, vocabulary_size: int, max_length: int
) -> list[GoldenInput]:
    """Choose groups for the export alone: far longer than was traced, and past any window."""
    groups = [_fitted(*_LONG, max_length)]
    window = getattr(config, "sliding_window", None)
    if window and window + 2 * _PAST_WINDOW <= max_length:
        groups.append((window + _PAST_WINDOW, (_PAST_WINDOW, 1)))
    return [_random_group(*group, vocabulary_size) for group in groups]


def _fitted(prompt: int, candidates: Sequence[int], max_length: int) -> tuple[int, tuple[int, ...]]:
    prompt = max(1, min(prompt, max_length // 2))
    return prompt, tuple(min(length, max_length - prompt) for length in candidates)


def _random_group(prompt: int, candidates: Sequence[int], vocabulary_size: int) -> GoldenInput:
    random = np.random.default_rng(prompt)
    draw = [random.integers(0, vocabulary_size, n).tolist() for n in (prompt, *candidates)]
    return GoldenInput(draw[0], draw[1:])


def _text_groups(tokenizer: PreferenceTokenizer, max_length: int) -> Iterator[GoldenInput]:
    """Yield groups made from text and from a chat, as far as the tokenizer can write them."""
    completions = list(_COMPLETIONS)
    if group := _encoded(tokenizer, _PROMPT, max_length):
        yield GoldenInput(*group, _PROMPT, completions)
    messages = [{"role": "user", "content": _PROMPT}]
    if tokenizer.chat_template and (group := _encoded(tokenizer, messages, max_length)):
        yield GoldenInput(*group, None, completions, messages)


def _encoded(
    tokenizer: PreferenceTokenizer, prompt: str | list[dict[str, str]], max_length: int
) -> tuple[Ids, list[Ids]] | None:
    """Encode a prompt and its completions; None where the tokenizer or the limit has no room."""
    try:
        group = tokenizer.encode_completions(prompt, _COMPLETIONS)
    except Exception:  # what tokenizers raises for words it does not know has no type of its own
        return None
    candidates = [completion.ids for completion in group.completions]
    longest = max(map(len, candidates)) + len(group.prompt_ids)
    return (group.prompt_ids, candidates) if longest < max_length else None


@torch.no_grad()
def plain_logps(model: nn.Module, groups: Sequence[GoldenInput]) -> list[list[float]]:
    """Score candidates the plain way: one unpadded sequence at a time, by the model's own forward.

    Shares nothing with the exported module, so that a fault of either shows.
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
    """Score candidates as training does: `completion_logps` in the padded layout."""
    batch = batch_of([(group.prompt_ids, group.candidates) for group in groups], "padded")
    sums: Tensor = batch.targets.sums(score(model, batch))
    rows = iter(sums.tolist())
    return [[next(rows) for _ in group.candidates] for group in groups]
