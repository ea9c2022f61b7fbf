"""Divide the candidates of many prompts into runs of the graph."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from logratio.serving.candidates import CandidateGroup

_PROMPT_SHARE = 4
"""A run may always have this multiple of its prompt's tokens: each run recomputes the prompt."""

Piece = tuple[int, list[tuple[int, ...]]]
"""The index of a group, and the ids of some of its candidates."""


@dataclass(frozen=True, slots=True)
class Run:
    """The input of one run of the graph.

    Attributes:
        pieces: The candidates, grouped by prompt.
        tokens: Tokens that the models compute, including padding: the cost of the run.
        real_tokens: Those of them that are not padding. The prompt that a padded graph computes
            again for each of its candidates is none.
        positions: Positions that the run holds in memory; see `plan_runs`.
    """

    pieces: list[Piece]
    tokens: int
    real_tokens: int
    positions: int


def plan_runs(
    groups: Sequence[CandidateGroup],
    token_budget: int,
    run_tokens: int | None = None,
    shared_tokens: int | None = None,
    *,
    repeats_prompts: bool = False,
) -> Iterator[Run]:
    """Divide groups into runs of the graph, with similar lengths together.

    A run of `G` prompts of up to `P` tokens and `N` candidates of up to `C` tokens computes
    `G·P + N·C` tokens and holds `G·P + N·(P + C)` positions: each prompt once, and per candidate a
    copy of its prompt's keys and values. A run exceeds the limits only if a single candidate does;
    a group that is too large for one run is divided over several.

    Args:
        groups: The groups to score.
        token_budget: Maximum positions per run, which bounds its memory.
        run_tokens: Maximum tokens per run, which bounds its time, but at least four times its
            longest prompt. None: no limit.
        shared_tokens: Maximum tokens of a run with several prompts. None: no limit.
        repeats_prompts: Whether the graph has the padded layout, which computes `N·(P + C)` tokens:
            each prompt again for each of its candidates.

    Yields:
        The runs; together they contain every distinct candidate once.
    """
    run: list[Piece] = []
    empty = _RunSize(repeats_prompts)
    size = empty
    by_length = sorted(range(len(groups)), key=lambda g: -len(groups[g].prompt_ids))
    for number in by_length:
        group = groups[number]
        tokens = size.tokens + _tokens(group, repeats_prompts=repeats_prompts)
        if run and shared_tokens is not None and tokens > shared_tokens:
            yield _run(groups, run, size)
            run, size = [], empty
        for ids in sorted(group.different(), key=len, reverse=True):
            is_new = not run or run[-1][0] != number
            grown = size.plus(len(group.prompt_ids) * is_new, len(ids))
            if run and not grown.fits(token_budget, run_tokens):
                yield _run(groups, run, size)
                run, size = [], empty
                grown = size.plus(len(group.prompt_ids), len(ids))
                is_new = True
            if is_new:
                run.append((number, []))
            run[-1][1].append(ids)
            size = grown
    if run:
        yield _run(groups, run, size)


def _tokens(group: CandidateGroup, *, repeats_prompts: bool) -> int:
    """Return the tokens of a prompt and its distinct candidates, without padding."""
    different = group.different()
    prompts = len(different) if repeats_prompts else 1
    return prompts * len(group.prompt_ids) + sum(map(len, different))


@dataclass(frozen=True, slots=True)
class _RunSize:
    repeats_prompts: bool
    prompts: int = 0
    longest_prompt: int = 0
    candidates: int = 0
    longest_candidate: int = 0

    @property
    def positions(self) -> int:
        view = self.longest_prompt + self.longest_candidate
        return self.prompts * self.longest_prompt + self.candidates * view

    @property
    def tokens(self) -> int:
        if self.repeats_prompts:
            return self.candidates * (self.longest_prompt + self.longest_candidate)
        return self.prompts * self.longest_prompt + self.candidates * self.longest_candidate

    def fits(self, token_budget: int, run_tokens: int | None) -> bool:
        if self.positions > token_budget:
            return False
        return run_tokens is None or self.tokens <= max(
            run_tokens, _PROMPT_SHARE * self.longest_prompt
        )

    def plus(self, prompt: int, candidate: int) -> "_RunSize":
        """Return the size with another candidate, and with its prompt unless `prompt` is 0."""
        return _RunSize(
            self.repeats_prompts,
            self.prompts + bool(prompt),
            max(self.longest_prompt, prompt),
            self.candidates + 1,
            max(self.longest_candidate, candidate),
        )


def _run(groups: Sequence[CandidateGroup], pieces: list[Piece], size: _RunSize) -> Run:
    real = 0
    for number, candidates in pieces:
        prompts = len(candidates) if size.repeats_prompts else 1
        real += prompts * len(groups[number].prompt_ids) + sum(map(len, candidates))
    return Run(pieces, size.tokens, real, size.positions)
