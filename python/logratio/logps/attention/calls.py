"""Which calls of attention a shared-prompt row is cut into, and their masks.

A group is one call or two, and many short groups are one call together. What is faster was measured
on a shared, busy CPU: least CPU time of one thread over 30 rounds, forward and backward of one
layer of 6 heads of 32 to 48, two completions a group, in ms; one arm run twice differs by up to 8%.

- **Two calls**, the prompt (plain causal, which needs no mask) and the completions: they spare the
  scores of the prompt's queries that nobody sees. Limits of 4,000 and 16,000 spared scores in three
  runs: 16 groups of 150 tokens take 30 to 33 and 32 to 36, 8 of 220 take 23 and 24 to 25; below 100
  tokens, and where the prompt is most of 150, they are alike within the noise. Always two calls
  take 33 to 35 for 64 groups of 64, and 31 with the limit.
- **Rows.** Groups of like width lie below one another, filled up to a multiple of `ROW_STEP`
  tokens, for which all tokens of the batch are moved. 256 groups of 12 take 19 in rows and 29 to 31
  in a call each; 64 of 24 take 7.4 to 8.7 and 8.0 to 9.7; 64 of 48 take 19 to 20 and 20 to 22. Of
  equal groups, 32 of 96 take 33 and 27 (wall time): hence `ROW_TOKENS`. `TOKENS_PER_ROW` is a
  line through these by eye: about 0.05 ms spared a group, 0.8 us paid a token.

No choice changes a result beyond rounding. Masks are of the queries' dtype, 0 or -inf: torch turns
a bool mask into such a one at each call, and keeps one a layer until the backward pass.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

SPLIT_CELLS = 4_000
"""Scores of a head that a second call must spare a group."""
ROW_TOKENS = 48
"""Tokens of the longest group that is put in a row with others."""
ROW_STEP = 8
"""Widths of rows are multiples of this many tokens."""
TOKENS_PER_ROW = 60
"""Tokens of a batch for each group in rows, up to which moving the batch pays."""


@dataclass(frozen=True)
class Shape:
    """Tokens of a group: its prompt's, and each completion's."""

    prompt: int
    completions: list[int]

    @cached_property
    def tokens(self) -> int:
        """Tokens of the whole group."""
        return self.prompt + sum(self.completions)

    @cached_property
    def lead(self) -> int:
        """Tokens from the start of which each sees all before it."""
        return self.prompt if len(self.completions) > 1 else self.tokens

    @cached_property
    def spared(self) -> int:
        """Scores that are not computed if the prompt has a call of its own."""
        return self.prompt * (self.tokens - self.prompt // 2)


@dataclass(frozen=True)
class Call:
    """One call: some queries of a block, and the keys of the same block that they may see.

    Attributes:
        block: number of the block of tokens in `Plan.blocks`.
        rows: `B`, groups that lie below one another in it.
        queries: `B * Lq`, those of the call; a block's calls follow one another.
        keys: `Lk`, the first of each row.
        mask: `[B, 1, Lq, Lk]`, 0 where a query (row) sees a key (column) and -inf elsewhere;
            None where the queries see every key up to their own place.
    """

    block: int
    rows: int
    queries: int
    keys: int
    mask: Tensor | None


@dataclass(frozen=True)
class Moves:
    """Where tokens go so that groups lie in rows, and come from again.

    Attributes:
        take: int64 `[R]`, the token in each place; a place that fills a row up takes its group's
            last token, so that nothing of another group is ever near.
        put: int64 `[T]`, the place of each token.
        real: bool `[R]`, False in places that fill up.
    """

    take: Tensor
    put: Tensor
    real: Tensor


@dataclass(frozen=True)
class Plan:
    """The calls of a row: `blocks` holds the (moved) tokens of each block, in order."""

    blocks: list[int]
    calls: list[Call]
    moves: Moves | None


def make_plan(
    shapes: list[Shape],
    position_ids: Tensor,
    *,
    window: int | None,
    dtype: torch.dtype,
    masked: bool,
) -> Plan:
    """Choose the calls for groups that lie end to end, and make their masks.

    Args:
        shapes: tokens of each group.
        position_ids: int64 `[T]`.
        window: tokens that a query looks back on, itself included; None: all.
        dtype: of the masks.
        masked: make a mask also where plain causal attention says the same.
    """
    return _Planner(shapes, position_ids, window, dtype, masked).plan()


class _Planner:
    def __init__(
        self,
        shapes: list[Shape],
        position_ids: Tensor,
        window: int | None,
        dtype: torch.dtype,
        masked: bool,
    ) -> None:
        self.shapes, self.positions, self.window = shapes, position_ids.int(), window
        self.dtype, self.masked, self.device = dtype, masked, position_ids.device
        self.blocks: list[int] = []
        self.calls: list[Call] = []
        lengths = torch.tensor([shape.tokens for shape in shapes], device=self.device)
        self.lengths, self.starts = lengths, lengths.cumsum(0) - lengths

    def plan(self) -> Plan:
        rows = alike(self.shapes)
        in_rows = {group for groups in rows.values() for group in groups}
        alone = [group for group in range(len(self.shapes)) if group not in in_rows]
        for group, start in zip(alone, self.starts[alone].tolist(), strict=True):
            self._add_alone(group, start)
        takes: list[tuple[Tensor, Tensor | None]] = []
        if rows:
            takes = [(self._places([group], self.shapes[group].tokens), None) for group in alone]
        for width, groups in rows.items():
            take, real = self._places(groups, width), self._real(groups, width)
            self._add_rows(groups, width, take, real)
            takes.append((take, real))
        return Plan(self.blocks, self.calls, self._moves(takes) if rows else None)

    def _add_alone(self, group: int, start: int) -> None:
        shape, block = self.shapes[group], len(self.blocks)
        length, lead = shape.tokens, shape.lead
        self.blocks.append(length)
        positions = self.positions[start : start + length][None]
        owners = self._owners([group], length)
        if lead < length and shape.spared < SPLIT_CELLS:
            lead = 0
        if lead:
            first = None if self._plain(lead) else self._mask(positions[:, :lead], owners[:, :lead])
            self.calls.append(Call(block, 1, lead, lead, first))
        if lead < length:
            mask = self._mask(positions, owners, lead)
            self.calls.append(Call(block, 1, length - lead, length, mask))

    def _add_rows(self, groups: list[int], width: int, take: Tensor, real: Tensor) -> None:
        block, places = len(self.blocks), len(groups) * width
        self.blocks.append(places)
        plain = all(self.shapes[g].lead == self.shapes[g].tokens for g in groups)
        mask = None
        if not (plain and self._plain(width)):
            owners = self._owners(groups, width).masked_fill(~real, -1)
            mask = self._mask(self.positions[take], owners)
        self.calls.append(Call(block, len(groups), places, width, mask))

    def _plain(self, lead: int) -> bool:
        """Tell whether plain causal attention over `lead` tokens needs no mask."""
        return not self.masked and (self.window is None or self.window >= lead)

    def _places(self, groups: list[int], width: int) -> Tensor:
        """Return the tokens of groups in rows: int64 `[B, width]`, the last one repeated."""
        last = self.lengths[groups][:, None] - 1
        across = torch.arange(width, device=self.device)[None]
        return self.starts[groups][:, None] + torch.minimum(across, last)

    def _real(self, groups: list[int], width: int) -> Tensor:
        across = torch.arange(width, device=self.device)[None]
        return across < self.lengths[groups][:, None]

    def _owners(self, groups: list[int], width: int) -> Tensor:
        """Number the parts of groups in rows: 0 for the prompt, k for completion k."""
        parts = [[self.shapes[g].prompt, *self.shapes[g].completions] for g in groups]
        numbers = [_numbered(lengths, width) for lengths in parts]
        return torch.tensor(numbers, dtype=torch.int32, device=self.device)

    def _mask(self, positions: Tensor, owners: Tensor, start: int = 0) -> Tensor:
        """Say whom the queries from `start` on see: `[B, L]` twice to `[B, 1, L - start, L]`."""
        hidden = unseen(positions, owners, self.window, start)[:, None]
        zeros = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
        return zeros.masked_fill_(hidden, -torch.inf)

    def _moves(self, takes: list[tuple[Tensor, Tensor | None]]) -> Moves:
        take = torch.cat([places.flatten() for places, _ in takes])
        real = torch.cat(
            [
                (torch.ones_like(places, dtype=torch.bool) if kept is None else kept).flatten()
                for places, kept in takes
            ]
        )
        put = torch.empty(len(self.positions), dtype=torch.int64, device=self.device)
        put[take[real]] = torch.arange(len(take), device=self.device)[real]
        return Moves(take, put, real)


def unseen(positions: Tensor, owners: Tensor, window: int | None, start: int = 0) -> Tensor:
    """Return who must not be seen: bool `[B, L - start, L]`, queries down and keys across.

    A query sees the prompt (owner 0) and its own part, up to its own position, and no further back
    than `window` tokens, itself included. Positions and owners are integers `[B, L]`.
    """
    own, mine = positions[:, start:, None], owners[:, start:, None]
    hidden = own < positions[:, None]
    if window is not None:
        hidden |= own - window >= positions[:, None]
    return hidden.logical_or_((owners[:, None] != mine).logical_and_((owners != 0)[:, None]))


def alike(shapes: list[Shape]) -> dict[int, list[int]]:
    """Return the groups that go in rows, by the rows' width; none if it does not pay."""
    rows: dict[int, list[int]] = {}
    for group, shape in enumerate(shapes):
        if shape.tokens <= ROW_TOKENS:
            rows.setdefault(-(-shape.tokens // ROW_STEP) * ROW_STEP, []).append(group)
    rows = {width: groups for width, groups in rows.items() if len(groups) > 1}
    in_rows = sum(map(len, rows.values()))
    return rows if sum(s.tokens for s in shapes) <= TOKENS_PER_ROW * in_rows else {}


def _numbered(lengths: list[int], width: int) -> list[int]:
    numbers = [part for part, length in enumerate(lengths) for _ in range(length)]
    return numbers + [0] * (width - len(numbers))
