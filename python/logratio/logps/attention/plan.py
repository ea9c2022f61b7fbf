"""Split the attention of a shared-prompt row into calls of SDPA, and build their masks."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from logratio.logps.attention.kernels import forced_kernel
from logratio.logps.attention.parts import MASK_CELLS, Run
from logratio.logps.batch import SharedBatch

SPLIT_CELLS = 4_000
"""A group's prompt gets a separate call if this saves at least so many scores per head."""
ROW_TOKENS = 48
"""Largest number of tokens of a group that is batched with others in padded rows."""
ROW_STEP = 8
"""Widths of rows are multiples of this many tokens."""
TOKENS_PER_ROW = 60
"""Groups are moved into rows if the batch has at most so many tokens per group in rows."""


@dataclass(frozen=True)
class Shape:
    """Token counts of a group: of its prompt, and of each completion."""

    prompt: int
    completions: list[int]

    @cached_property
    def tokens(self) -> int:
        """Number of tokens of the group."""
        return self.prompt + sum(self.completions)

    @cached_property
    def lead(self) -> int:
        """Number of leading tokens with plain causal attention."""
        return self.prompt if len(self.completions) > 1 else self.tokens

    @cached_property
    def runs(self) -> list[Run]:
        """The prompt, and each completion after it, without empty ones."""
        ends = list(accumulate(self.completions, initial=self.prompt))
        path = ((0, self.prompt),) if self.prompt else ()
        runs = [Run(0, self.prompt), *(Run(a, b, path) for a, b in pairwise(ends))]
        return [run for run in runs if run.start < run.stop]

    @cached_property
    def saved_scores(self) -> int:
        """Number of scores saved by a separate call for the prompt."""
        return self.prompt * (self.tokens - self.prompt // 2)


@dataclass(frozen=True)
class Call:
    """One attention call: queries of a block, and the keys of the same block that they may see.

    Attributes:
        block: Index of the block of tokens in `Plan.blocks`.
        rows: `B`, the number of groups in the block, one per row.
        queries: `B * Lq`, the number of queries; calls of a block cover its queries in order.
        keys: `Lk`, the number of leading keys of each row.
        mask: 0 where a query sees a key and -inf elsewhere, `[B, 1, Lq, Lk]`; None for plain causal
            attention.
        runs: If the mask would be too large, the runs of the block that the queries belong to; they
            are computed in parts.
    """

    block: int
    rows: int
    queries: int
    keys: int
    mask: Tensor | None
    runs: tuple[Run, ...] = ()


@dataclass(frozen=True)
class Moves:
    """Permutation of tokens into padded rows, and back.

    Attributes:
        take: Token at each row position, int64 `[R]`. Padding repeats the last token of its group,
            so that tokens of different groups never meet.
        put: Row position of each token, int64 `[T]`.
        real: False for padding, bool `[R]`.
    """

    take: Tensor
    put: Tensor
    real: Tensor


@dataclass(frozen=True)
class Plan:
    """The attention calls of a row.

    Attributes:
        blocks: Number of (moved) tokens of each block, in order.
        calls: The calls, in order of their queries.
        moves: Permutation of the tokens; None if they stay in place.
    """

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
    """Choose the calls for concatenated groups, and build their masks.

    Args:
        shapes: Token counts of each group.
        position_ids: Positions of the tokens, int64 `[T]`.
        window: A token sees itself and the `window - 1` tokens before it; None: all before it.
        dtype: Dtype of the masks.
        masked: Build masks also for plain causal attention.
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
        rows = groups_in_rows(self.shapes)
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
        if lead < length and shape.saved_scores < SPLIT_CELLS:
            lead = 0
        if lead and self._plain(lead):
            self.calls.append(Call(block, 1, lead, lead, None))
        elif lead:
            self._add_masked(group, start, [Run(0, lead)])
        if lead < length:
            self._add_masked(group, start, [run for run in shape.runs if run.start >= lead])

    def _add_masked(self, group: int, start: int, runs: list[Run]) -> None:
        """Add a call of some runs of the newest block, whose group starts at token `start`."""
        first, stop, mask = runs[0].start, runs[-1].stop, None
        if stop * (stop - first) <= MASK_CELLS:
            owners = self._owners([group], self.shapes[group].tokens)
            positions = self.positions[start : start + stop][None]
            mask = self._mask(positions, owners[:, :stop], first)
        in_parts = tuple(runs) if mask is None else ()
        self.calls.append(Call(len(self.blocks) - 1, 1, stop - first, stop, mask, in_parts))

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
        """Return whether plain causal attention over `lead` tokens needs no mask."""
        return not self.masked and (self.window is None or self.window >= lead)

    def _places(self, groups: list[int], width: int) -> Tensor:
        """Return the token at each row position, int64 `[B, width]`; the last one is repeated."""
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
        """Return the mask of the queries from `start`: `[B, L]` each to `[B, 1, L - start, L]`."""
        hidden = hidden_keys(positions, owners, self.window, start)[:, None]
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


def hidden_keys(positions: Tensor, owners: Tensor, window: int | None, start: int = 0) -> Tensor:
    """Return which keys each query must not see: bool `[B, L - start, L]`.

    A query sees the prompt (owner 0) and its completion, up to its position. With a window, it sees
    only the `window` tokens that end with itself. Positions and owners are integers `[B, L]`.
    """
    own, mine = positions[:, start:, None], owners[:, start:, None]
    hidden = own < positions[:, None]
    if window is not None:
        hidden |= own - window >= positions[:, None]
    return hidden.logical_or_((owners[:, None] != mine).logical_and_((owners != 0)[:, None]))


def groups_in_rows(shapes: list[Shape]) -> dict[int, list[int]]:
    """Return the groups to batch in padded rows, by row width; empty if batching is not faster."""
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
    """Positions of prompts and completions in a row, and the attention calls of the row.

    Attributes:
        prompts: Prompt tokens of each group.
        completions: Tokens of each completion of each group.
        answers: Tokens of all completions of each group.
        groups: Tokens of each group.
        position_ids: Positions, which restart at the prompt's length for each completion, int64
            `[T]`.
    """

    def __init__(self, batch: SharedBatch) -> None:
        tokens = sum(batch.prompt_lengths) + sum(map(sum, batch.completion_lengths))
        # Padding at the end of the row is treated as a prompt without completions.
        filler = batch.input_ids.shape[1] - tokens
        self.prompts = batch.prompt_lengths + [filler] * (filler > 0)
        self.completions = batch.completion_lengths + [[]] * (filler > 0)
        self.answers = [sum(lengths) for lengths in self.completions]
        self.groups = [p + a for p, a in zip(self.prompts, self.answers, strict=True)]
        self.position_ids = batch.position_ids[0]
        self.sequences, self.kernel = batch.sequences, forced_kernel()
        self._plans: dict[tuple[int | None, torch.dtype, bool], Plan] = {}

    def plan(self, window: int | None, dtype: torch.dtype, *, masked: bool = False) -> Plan:
        """Return the attention calls of this row, computed once for all layers.

        Args:
            window: A token sees itself and the `window - 1` tokens before it; None: all before it.
            dtype: Dtype of the queries and masks.
            masked: Build masks also for plain causal attention.
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
