"""Compare the rewards of a graph in a smaller precision with torch's in float32."""

from collections.abc import Iterator, Sequence
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from logratio.bundle import Agreement, Precision
from logratio.data.readers.inputs import open_file
from logratio.data.records import InvalidRecordError, Refusal
from logratio.data.tokenization.tokenizer import PreferenceTokenizer
from logratio.errors import ConfigError
from logratio.export.parity import GoldenInput, Ids, ParityError

REWARD_BOUND = 1e-2
"""Largest error of a reward in float16 or bfloat16."""
PAIRWISE_BOUND, TOP1_BOUND = 0.99, 0.95
"""Smallest agreement of quantized weights: of pairs, and of the best candidate."""
SAMPLED = "sampled"
"""`Agreement.source` of candidates from the policy itself."""

_PROMPTS, _CANDIDATES = 24, 8
_PROMPT_TOKENS, _CANDIDATE_TOKENS = 12, 24
_MOST_ROWS = 256


@torch.no_grad()
def sampled_groups(
    model: Any, tokenizer: PreferenceTokenizer, max_length: int
) -> list[GoldenInput]:
    """Sample prompts from a policy, and for each eight continuations: text that it knows.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        max_length: Maximum tokens of prompt + candidate.

    Returns:
        The groups with at least two different candidates; the same at every call.
    """
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    prompt = max(1, min(_PROMPT_TOKENS, max_length // 2))
    length = min(_CANDIDATE_TOKENS, max_length - prompt)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = torch.full((_PROMPTS, 1), start or 0)
        prompts = _continued(model, first, prompt - 1, None, 1) if prompt > 1 else first
        rows = _continued(model, prompts, length, tokenizer.eos_id, _CANDIDATES)
    candidates = [_until(row, tokenizer.eos_id) for row in rows[:, prompt:].tolist()]
    groups = [
        GoldenInput(ids, _different(candidates[number * _CANDIDATES :][:_CANDIDATES]))
        for number, ids in enumerate(prompts.tolist())
    ]
    return [group for group in groups if len(group.candidates) > 1]


def _continued(model: Any, ids: Tensor, tokens: int, eos: int | None, times: int) -> Tensor:
    settings = GenerationConfig(
        do_sample=True, top_k=0, temperature=1.0, max_new_tokens=tokens, eos_token_id=eos,
        pad_token_id=eos or 0, num_return_sequences=times,
    )  # fmt: skip
    found: Tensor = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
    )
    return found


def _until(ids: Ids, end: int | None) -> Ids:
    return ids[: ids.index(end) + 1] if end in ids else ids


def _different(candidates: Sequence[Ids]) -> list[Ids]:
    return [list(ids) for ids in dict.fromkeys(map(tuple, candidates))]


def groups_of_file(
    path: Path, tokenizer: PreferenceTokenizer
) -> tuple[list[GoldenInput], list[list[float]]]:
    """Read the groups of a file for `logratio rank`: rows with ``prompt`` and ``candidates``.

    Args:
        path: The file; its first 256 rows are read.
        tokenizer: The tokenizer with the bundle's rules.

    Returns:
        The groups, and the ``reference_logps`` of their rows; empty where a row has none.

    Raises:
        ConfigError: A row cannot be used, or none has two candidates; the message names it.
    """
    groups, references = [], []
    for source, row in islice(open_file(path), _MOST_ROWS):
        try:
            if isinstance(row, Refusal):
                raise InvalidRecordError(row.code, row.reason)
            groups.append(_group(tokenizer, row))
            references.append([float(value) for value in row.get("reference_logps", [])])
        except KeyError as error:
            raise ConfigError(f"--data {source}: no {error}") from error
        except (InvalidRecordError, TypeError, ValueError) as error:
            raise ConfigError(
                f"--data {source}: the row cannot be used ({error}): correct or remove it; a row "
                'is {"prompt": text or messages, "candidates": [text, …]}'
            ) from error
    if not any(len(group.candidates) > 1 for group in groups):
        raise ConfigError(f"--data {path}: no row has two candidates to compare")
    return groups, references


def _group(tokenizer: PreferenceTokenizer, row: Any) -> GoldenInput:
    if not (isinstance(row["candidates"], list) and row["candidates"]):
        raise TypeError("candidates is not a list with at least one text")
    found = tokenizer.encode_completions(row["prompt"], row["candidates"])
    candidates = [completion.ids for completion in found.completions]
    longest = len(found.prompt_ids) + max(map(len, candidates))
    if longest > tokenizer.rules.max_length:
        raise ValueError(f"{longest:,} tokens, more than {tokenizer.rules.max_length:,}")
    return GoldenInput(found.prompt_ids, candidates)


def agreement(
    source: str, expected: Sequence[Sequence[float]], found: Sequence[Sequence[float]]
) -> Agreement:
    """Compare rewards with the expected ones, group by group.

    Args:
        source: Where the candidates come from.
        expected: Torch's rewards, per group.
        found: The graph's rewards, per group.
    """
    errors = [
        abs(one - other)
        for known, rewards in zip(expected, found, strict=True)
        for one, other in zip(known, rewards, strict=True)
    ]
    order = [same for pair in zip(expected, found, strict=True) for same in _same_order(*pair)]
    best = [
        _best(known) == _best(rewards)
        for known, rewards in zip(expected, found, strict=True)
        if len(known) > 1  # a single candidate is always the best
    ]
    return Agreement(
        source,
        groups=len(expected),
        candidates=len(errors),
        reward_error_mean=sum(errors) / len(errors),
        reward_error_max=max(errors),
        pairwise=sum(order) / max(1, len(order)),
        top1=sum(best) / max(1, len(best)),
    )


def _same_order(known: Sequence[float], found: Sequence[float]) -> Iterator[bool]:
    """Yield for each pair of candidates that torch distinguishes whether the graph agrees."""
    for one, other in combinations(range(len(known)), 2):
        if known[one] != known[other]:
            yield (known[one] > known[other]) == (found[one] > found[other])


def _best(rewards: Sequence[float]) -> int:
    return max(range(len(rewards)), key=rewards.__getitem__)


def faults(precision: Precision, measured: Agreement) -> list[str]:
    """Return how a comparison exceeds the bounds of its precision; empty if it does not."""
    if precision.bits is None:
        error = measured.reward_error_max
        return [] if error <= REWARD_BOUND else [f"a reward differs by {error:.3g}"]  # also NaN
    found = []
    if not measured.pairwise >= PAIRWISE_BOUND:
        found.append(f"{measured.pairwise:.1%} of the pairs keep their order")
    if not measured.top1 >= TOP1_BOUND:
        found.append(f"{measured.top1:.1%} of the prompts keep their best candidate")
    return found


def bounds(precision: Precision) -> str:
    """Return the bounds of a precision in words."""
    if precision.bits is None:
        return f"no reward may differ by more than {REWARD_BOUND:g}"
    return f"at least {PAIRWISE_BOUND:.0%} of the pairs and {TOP1_BOUND:.0%} of the best are needed"


def check_agreement(precision: Precision, measured: Agreement, *, force: bool) -> bool:
    """Check that a graph's rewards agree with torch's.

    Returns:
        Whether they do not, and the export was forced.

    Raises:
        ParityError: They do not agree, and the export is not forced.
    """
    found = faults(precision, measured)
    if found and not force:
        raise ParityError(
            f"{precision.name}: of {measured.candidates} candidates ({measured.source}), "
            f"{' and '.join(found)}; {bounds(precision)}. {_advice(measured)}"
            "use a larger precision, or accept the error with --force"
        )
    return bool(found)


def _advice(measured: Agreement) -> str:
    if measured.source != SAMPLED:
        return ""
    return "Give --data with your own prompts and candidates to measure again, "
