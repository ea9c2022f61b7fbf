"""Which candidates go through the graph together, and what a run of it costs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from logratio.serving.candidates import CandidateGroup

_PROMPT_SHARE = 4
"""A bounded run may have this many times its prompt's tokens: the prompt is run anew in each."""

Piece = tuple[int, list[tuple[int, ...]]]
"""Number of a group, and ids of some of its candidates."""


@dataclass(frozen=True, slots=True)
class Run:
    """What goes through the graph at once.

    Attributes:
        pieces: Candidates, group after group.
        tokens: That the models compute, padding included: the run's cost.
    """

    pieces: list[Piece]
    tokens: int


def plan_runs(
    groups: Sequence[CandidateGroup], token_budget: int, run_tokens: int | None = None
) -> Iterator[Run]:
    """Cut groups into runs of the graph, similar lengths together.

    A run of `G` prompts up to `P` tokens and `N` candidates up to `C` computes `G·P + N·C` tokens
    and holds `G·P + N·(P + C)` positions: each prompt once, and for each candidate its own view of
    a prompt's keys and values. A run stays within both bounds unless a single candidate is above
    them; a group too large for one is spread over several.

    Args:
        groups: What is to be scored.
        token_budget: Most positions in a run, which bounds its memory.
        run_tokens: Most tokens in a run, which bounds its time; four times its longest prompt
            where that is more. None: no bound.
    """
    run: list[Piece] = []
    size = _RunSize()
    by_length = sorted(range(len(groups)), key=lambda g: -len(groups[g].prompt_ids))
    for number in by_length:
        group = groups[number]
        for ids in sorted(group.different(), key=len, reverse=True):
            is_new = not run or run[-1][0] != number
            grown = size.plus(len(group.prompt_ids) * is_new, len(ids))
            if run and not grown.fits(token_budget, run_tokens):
                yield Run(run, size.tokens)
                run, size = [], _RunSize()
                grown = size.plus(len(group.prompt_ids), len(ids))
                is_new = True
            if is_new:
                run.append((number, []))
            run[-1][1].append(ids)
            size = grown
    if run:
        yield Run(run, size.tokens)


@dataclass(frozen=True, slots=True)
class _RunSize:
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
        return self.prompts * self.longest_prompt + self.candidates * self.longest_candidate

    def fits(self, token_budget: int, run_tokens: int | None) -> bool:
        if self.positions > token_budget:
            return False
        return run_tokens is None or self.tokens <= max(
            run_tokens, _PROMPT_SHARE * self.longest_prompt
        )

    def plus(self, prompt: int, candidate: int) -> "_RunSize":
        """Add a candidate, and its prompt where `prompt` is not 0."""
        return _RunSize(
            self.prompts + bool(prompt),
            max(self.longest_prompt, prompt),
            self.candidates + 1,
            max(self.longest_candidate, candidate),
        )
