"""The calls of attention that a shared-prompt row is cut into, and their masks."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from logratio.logps.attention.kernels import forced_kernel
from logratio.logps.batch import SharedBatch

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


class SharedPrompt:
    """Where each prompt and completion lies in the row, and the attention calls that follow.

    Attributes:
        prompts: prompt tokens of each group.
        completions: for each group, the tokens of each of its completions.
        answers: tokens of all completions of each group.
        groups: tokens of each group.
        position_ids: int64 `[T]`, restarting at the prompt's length for each completion.
    """

    def __init__(self, batch: SharedBatch) -> None:
        tokens = sum(batch.prompt_lengths) + sum(map(sum, batch.completion_lengths))
        # What fills the row up to a fixed width is a prompt that none answers.
        filler = batch.input_ids.shape[1] - tokens
        self.prompts = batch.prompt_lengths + [filler] * (filler > 0)
        self.completions = batch.completion_lengths + [[]] * (filler > 0)
        self.answers = [sum(lengths) for lengths in self.completions]
        self.groups = [p + a for p, a in zip(self.prompts, self.answers, strict=True)]
        self.position_ids = batch.position_ids[0]
        self.sequences, self.kernel = batch.sequences, forced_kernel()
        self._plans: dict[tuple[int | None, torch.dtype, bool], Plan] = {}

    def plan(self, window: int | None, dtype: torch.dtype, *, masked: bool = False) -> Plan:
        """Return the calls that attend for this row, made once and used by every layer alike.

        Args:
            window: tokens that a query looks back on, itself included; None: all.
            dtype: of the queries, and so of the masks.
            masked: give a mask also where plain causal attention says the same.
        """
        key = (window, dtype, masked)
        if key not in self._plans:
            self._plans[key] = make_plan(
                list(map(Shape, self.prompts, self.completions)),
                self.position_ids,
                window=window,
                dtype=dtype,
                masked=masked,
            )
        return self._plans[key]
