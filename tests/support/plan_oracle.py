"""An independent implementation of the planner: ChaCha8, Fisher-Yates, mixtures, best fit."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add

WINDOW = 64


@dataclass(frozen=True)
class Request:
    """Arguments of `Store.plan`, with the tokens of each group."""

    lengths: list[int]
    order: str
    seed: int
    epoch: int
    groups_per_update: int
    token_budget: int
    weights: list[float] | None = None
    dataset_of: list[int] | None = None


def chacha8(key: bytes) -> Iterator[int]:
    """Yield the 64-bit words of ChaCha with 8 rounds, stream 0."""

    def quarter(s: list[int], a: int, b: int, c: int, d: int) -> None:
        for x, y, z, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            s[x] = (s[x] + s[y]) & 0xFFFFFFFF
            mixed = s[z] ^ s[x]
            s[z] = (mixed << turn | mixed >> (32 - turn)) & 0xFFFFFFFF

    words = [int.from_bytes(key[at : at + 4], "little") for at in range(0, 32, 4)]
    for block in range(2**32):
        start = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *words, block, 0, 0, 0]
        s = start.copy()
        for _ in range(4):
            for column in range(4):
                quarter(s, column, column + 4, column + 8, column + 12)
            for a, b, c, d in ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)):
                quarter(s, a, b, c, d)
        out = [(one + other) & 0xFFFFFFFF for one, other in zip(s, start, strict=True)]
        for low, high in zip(out[::2], out[1::2], strict=True):
            yield high << 32 | low


def shuffled(items: list[int], words: Iterator[int]) -> list[int]:
    """Shuffle from the back; a number below n is the upper half of a word times n (Lemire)."""
    items = items.copy()
    for last in range(len(items) - 1, 0, -1):
        while True:
            product = next(words) * (last + 1)
            if product % 2**64 >= 2**64 % (last + 1):
                break
        at = product >> 64
        items[last], items[at] = items[at], items[last]
    return items


def words(seed: int, at: int, stream: int) -> Iterator[int]:
    """Begin the generator of a seed, an epoch or pass, and a stream."""
    return chacha8(b"".join(n.to_bytes(8, "little") for n in (seed, at, stream, 0)))


def drawn(request: Request) -> list[int]:
    """Return the groups of the epoch, dataset by dataset."""
    if request.weights is None or request.dataset_of is None:
        return list(range(len(request.lengths)))
    total = reduce(add, request.weights)  # `sum` rounds in another way
    shares = [len(request.lengths) * (w / total) for w in request.weights]
    counts = [int(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda d: counts[d] - shares[d])
    for dataset in order[: len(request.lengths) - sum(counts)]:
        counts[dataset] += 1
    found = []
    for dataset, count in enumerate(counts):
        members = [g for g, d in enumerate(request.dataset_of) if d == dataset]
        for at in range(request.epoch * count, (request.epoch + 1) * count):
            number, place = divmod(at, len(members))
            found.append(shuffled(members, words(request.seed, number, dataset + 1))[place])
    return found


def epoch_order(request: Request) -> list[int]:
    """Return the epoch's groups in order, before updates are cut into micro-batches."""
    order = drawn(request)

    def longest_first(groups: list[int]) -> list[int]:
        return sorted(groups, key=lambda group: -request.lengths[group])

    if request.order == "sorted":
        return longest_first(order)
    random = words(request.seed, request.epoch, 0)
    order = shuffled(order, random)
    if request.order == "shuffled":
        return order
    size = request.groups_per_update
    full = len(order) // size * size
    windows = [order[at : min(at + size * WINDOW, full)] for at in range(0, full, size * WINDOW)]
    grouped = [group for window in windows for group in longest_first(window)]
    updates = shuffled(list(range(full // size)), random)
    return [g for u in updates for g in grouped[u * size : (u + 1) * size]] + order[full:]


def packed(request: Request, groups: list[int]) -> list[list[int]]:
    """Cut one update into micro-batches: longest first, into the fullest that still holds it."""
    bins: list[list[int]] = []

    def room(bin_: list[int]) -> int:
        return request.token_budget - sum(request.lengths[group] for group in bin_)

    for group in sorted(groups, key=lambda group: -request.lengths[group]):
        fitting = [one for one in bins if room(one) >= request.lengths[group]]
        if not fitting:
            fitting = [[]]
            bins += fitting
        min(fitting, key=room).append(group)
    return bins


def planned(request: Request) -> list[list[list[int]]]:
    """Return the updates of an epoch, each a list of micro-batches."""
    order, size = epoch_order(request), request.groups_per_update
    return [packed(request, order[at : at + size]) for at in range(0, len(order), size)]
