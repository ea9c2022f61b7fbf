"""The losses in plain Python floats, written from the formulas and not from the package's code.

An oracle gets all groups of an update, the memory of the run, β and the options, and returns a loss
for each group. A pair is (chosen, rejected).
"""

from collections.abc import Callable, Sequence
from math import exp, expm1, isnan, log, log1p, log2
from statistics import fmean, pstdev
from typing import Any

import numpy as np
from loss_inputs import Answer

from logratio.training.methods.logps import CHOSEN, MISMATCHED

Update = Sequence[Sequence[Answer]]
Memory = dict[str, Any]
Oracle = Callable[..., list[float]]

ORACLES: dict[str, Oracle] = {}
"""The oracle of each method."""


def whole(*names: str) -> Callable[[Oracle], Oracle]:
    """Enter an oracle for an update under the names of its methods."""

    def enter(oracle: Oracle) -> Oracle:
        ORACLES.update(dict.fromkeys(names, oracle))
        return oracle

    return enter


def each(*names: str) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """Enter an oracle for one pair."""

    def enter(of: Callable[..., float]) -> Callable[..., float]:
        def oracle(update: Update, memory: Memory, **numbers: float) -> list[float]:
            return [of(chosen, rejected, **numbers) for chosen, rejected in update]

        ORACLES.update(dict.fromkeys(names, oracle))
        return of

    return enter


def nll(margin: float) -> float:
    """-log σ(margin)."""
    return log1p(exp(-margin)) if margin > 0 else log1p(exp(margin)) - margin


def sigmoid(x: float) -> float:
    return exp(-nll(x))


def smooth(margin: float, label_smoothing: float) -> float:
    return (1 - label_smoothing) * nll(margin) + label_smoothing * nll(-margin)


def bent(x: float) -> float:
    """exp(x) - 1, and from 30 on its tangent."""
    return expm1(x) if x <= 30 else expm1(30) + exp(30) * (x - 30)


def mean(answer: Answer) -> float:
    return answer.policy / answer.length


# Margins.


def gap(c: Answer, r: Answer) -> float:
    return (c.policy - c.reference) - (r.policy - r.reference)


@each("dpo", "cdpo", "step-dpo", "sampo", "ld-dpo")
def dpo(c: Answer, r: Answer, beta: float, label_smoothing: float = 0.0, **_: float) -> float:
    return smooth(beta * gap(c, r), label_smoothing)


@each("robust")
def robust(c: Answer, r: Answer, beta: float, label_smoothing: float) -> float:
    m, e = beta * gap(c, r), label_smoothing
    return ((1 - e) * nll(m) - e * nll(-m)) / (1 - 2 * e)


@each("ln-dpo")
def ln_dpo(c: Answer, r: Answer, beta: float, label_smoothing: float) -> float:
    return smooth(beta * (c.logratio / c.length - r.logratio / r.length), label_smoothing)


@each("r-dpo")
def r_dpo(c: Answer, r: Answer, beta: float, alpha: float) -> float:
    return nll(beta * gap(c, r) + alpha * (c.length - r.length))


@each("dpop")
def dpop(c: Answer, r: Answer, beta: float, penalty: float) -> float:
    return nll(beta * (gap(c, r) - penalty * max(0.0, c.reference - c.policy)))


@each("odpo")
def odpo(c: Answer, r: Answer, beta: float, alpha: float) -> float:
    return nll(beta * gap(c, r) - alpha * log(c.margin))


@each("wpo")
def wpo(c: Answer, r: Answer, beta: float, label_smoothing: float) -> float:
    return exp(c.confidence) * exp(r.confidence) * smooth(beta * gap(c, r), label_smoothing)


@each("tdpo1")
def tdpo1(c: Answer, r: Answer, beta: float) -> float:
    return nll(beta * (gap(c, r) + c.divergence - r.divergence))


@each("tdpo2")
def tdpo2(c: Answer, r: Answer, beta: float, alpha: float) -> float:
    return nll(beta * (gap(c, r) + alpha * (c.divergence - r.divergence)))


@each("unweighted-dpo")
def unweighted_dpo(c: Answer, r: Answer, beta: float) -> float:
    return -beta * gap(c, r)


@each("chi-po")
def chi_po(c: Answer, r: Answer, beta: float, clip: float) -> float:
    linked = [bent(one.logratio) + 1 + one.logratio for one in (c, r)]
    return nll(min(clip, max(-clip, beta * linked[0] - beta * linked[1])))


@each("f-dpo-forward-kl")
def forward_kl(c: Answer, r: Answer, beta: float) -> float:
    return nll(beta * (bent(-r.logratio) - bent(-c.logratio)))


@each("f-dpo-js")
def js(c: Answer, r: Answer, beta: float) -> float:
    links = [log(2) - nll(one.logratio) for one in (c, r)]
    return nll(beta * (links[0] - links[1]))


@each("f-dpo-alpha")
def alpha_divergence(c: Answer, r: Answer, beta: float, alpha: float) -> float:
    links = [-bent(-alpha * one.logratio) / alpha for one in (c, r)]
    return nll(beta * (links[0] - links[1]))


# Other losses of pairs.


@each("ipo")
def ipo(c: Answer, r: Answer, beta: float) -> float:
    return (c.logratio / c.length - r.logratio / r.length - 1 / (2 * beta)) ** 2


@each("ipo-sum")
def ipo_sum(c: Answer, r: Answer, beta: float) -> float:
    return (gap(c, r) - 1 / (2 * beta)) ** 2


@each("hinge")
def hinge(c: Answer, r: Answer, beta: float) -> float:
    return max(0.0, 1 - beta * gap(c, r))


@each("exo")
def exo(c: Answer, r: Answer, beta: float, label_smoothing: float) -> float:
    found = 0.0
    for margin, share in ((1, 1 - label_smoothing), (-1, label_smoothing)):
        log_q = -nll(margin * beta * gap(c, r))
        found += exp(log_q) * (log_q - log(share))
    return found


@each("nca")
def nca(c: Answer, r: Answer, beta: float) -> float:
    good, bad = beta * c.logratio, beta * r.logratio
    return nll(good) + nll(-good) / 2 + nll(-bad) / 2


@each("sppo")
def sppo(c: Answer, r: Answer, beta: float) -> float:
    return (c.logratio - 0.5 / beta) ** 2 + (r.logratio + 0.5 / beta) ** 2


@each("cal-dpo")
def cal_dpo(c: Answer, r: Answer, beta: float) -> float:
    return nll(gap(c, r)) + sppo(c, r, beta=beta)


@each("apo-zero")
def apo_zero(c: Answer, r: Answer, beta: float) -> float:
    return sigmoid(-beta * c.logratio) + sigmoid(beta * r.logratio)


@each("apo-down")
def apo_down(c: Answer, r: Answer, beta: float) -> float:
    return sigmoid(beta * c.logratio) + sigmoid(-beta * gap(c, r))


@each("discopop")
def discopop(c: Answer, r: Answer, beta: float, tau: float) -> float:
    m = beta * gap(c, r)
    return sigmoid(-m / tau) * nll(m) + 1 + bent(-nll(m / tau) - m)


# Without a reference.


@each("simpo")
def simpo(c: Answer, r: Answer, beta: float, gamma: float, label_smoothing: float) -> float:
    return smooth(beta * (mean(c) - mean(r)) - gamma, label_smoothing)


@each("alpha-po")
def alpha_po(c: Answer, r: Answer, beta: float, gamma: float, alpha: float) -> float:
    rewards = [-bent(-alpha * mean(one)) / alpha for one in (c, r)]
    return nll(beta * (rewards[0] - rewards[1]) - gamma)


@each("cpo")
def cpo(c: Answer, r: Answer, beta: float, label_smoothing: float, alpha: float) -> float:
    return smooth(beta * (c.policy - r.policy), label_smoothing) - alpha * mean(c)


@each("orpo")
def orpo(c: Answer, r: Answer, beta: float) -> float:
    odds = [mean(one) - log(-expm1(mean(one))) for one in (c, r)]
    return -mean(c) + beta * nll(odds[0] - odds[1])


@each("slic")
def slic(c: Answer, r: Answer, delta: float, weight: float) -> float:
    return max(0.0, delta - c.policy + r.policy) - weight * c.policy


@each("bradley-terry")
def bradley_terry(c: Answer, r: Answer, center: float) -> float:
    return nll(c.policy - r.policy) + center * (c.policy + r.policy) ** 2


@each("unlikelihood")
def unlikelihood(c: Answer, r: Answer, alpha: float) -> float:
    return -c.policy + alpha * r.policy


@whole("sft", "raft")
def sft(update: Update, memory: Memory) -> list[float]:
    return [-mean(group[0]) for group in update]


# Of the whole update.


@whole("bco", "bco-unpaired")
def bco(update: Update, memory: Memory, beta: float) -> list[float]:
    seen = memory.setdefault("rewards", [])
    counted = [[one for one in group if one.role != MISMATCHED] for group in update]
    seen += [beta * one.logratio for group in counted for one in group]
    shift = fmean(seen)

    def of(one: Answer) -> float:
        return nll((1 if one.role == CHOSEN else -1) * (beta * one.logratio - shift))

    return [sum(map(of, group)) for group in counted]


@whole("beta-dpo")
def beta_dpo(
    update: Update, memory: Memory, beta: float, alpha: float, momentum: float, keep: float
) -> list[float]:
    gaps = [gap(*group) for group in update]
    average, spread = memory.get("average", fmean(gaps)), memory.get("spread", 0)
    spread = spread if spread > 1e-3 else pstdev(gaps)
    kept = [*range(len(gaps))]
    if spread > 1e-3:
        noise = np.random.default_rng(memory.get("number", 0)).gumbel(size=len(gaps)).tolist()
        density = [-0.5 * ((one - average) / spread) ** 2 for one in gaps]
        order = sorted(kept, key=lambda i: density[i] + noise[i], reverse=True)
        kept = order[: max(1, round(keep * len(gaps)))]
    chosen = fmean(gaps[i] for i in kept)
    scaled = beta * max(0.01, 1 + alpha * (chosen - average))
    memory["average"] = momentum * average + (1 - momentum) * fmean(gaps)
    memory["spread"] = momentum * spread + (1 - momentum) * pstdev(gaps)
    memory["number"] = memory.get("number", 0) + 1
    share = len(gaps) / len(kept)
    return [share * nll(scaled * one) if i in kept else 0.0 for i, one in enumerate(gaps)]


def rank_of(values: Sequence[float], at: int) -> int:
    """How many values come before one in ascending order; equal ones by position."""
    return sum((value, i) < (values[at], at) for i, value in enumerate(values))


@whole("aot")
def aot(update: Update, memory: Memory, beta: float, label_smoothing: float) -> list[float]:
    own = [c.policy - r.policy for c, r in update]
    reference = sorted(c.reference - r.reference for c, r in update)
    deltas = [own[i] - reference[rank_of(own, i)] for i in range(len(own))]
    return [smooth(beta * delta, label_smoothing) for delta in deltas]


@whole("aot-unpaired")
def aot_unpaired(
    update: Update, memory: Memory, beta: float, label_smoothing: float
) -> list[float]:
    good, bad = [c.logratio for c, _ in update], [r.logratio for _, r in update]
    halves = []
    for i in range(len(update)):
        deltas = (
            good[i] - sorted(bad)[rank_of(good, i)],
            sorted(good)[rank_of(bad, i)] - bad[i],
        )
        halves.append(sum(smooth(beta * delta, label_smoothing) / 2 for delta in deltas))
    return halves


@whole("kto")
def kto(
    update: Update,
    memory: Memory,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> list[float]:
    others = [one.logratio for group in update for one in group if one.role == MISMATCHED]
    z = max(0.0, fmean(others)) if others else 0.0

    def of(one: Answer) -> float:
        if one.role == CHOSEN:
            return desirable_weight * (1 - sigmoid(beta * (one.logratio - z)))
        return undesirable_weight * (1 - sigmoid(beta * (z - one.logratio)))

    return [of(group[0]) for group in update]


@whole("apo-zero-unpaired")
def apo_zero_unpaired(update: Update, memory: Memory, beta: float) -> list[float]:
    first = [group[0] for group in update]
    sides = [-1 if one.role == CHOSEN else 1 for one in first]
    return [sigmoid(s * beta * one.logratio) for s, one in zip(sides, first, strict=True)]


# Lists.


def grades_of(group: Sequence[Answer]) -> list[float]:
    """The scores of a list, or its ranks, or its order: larger is better."""
    for values in ([one.score for one in group], [-one.rank for one in group]):
        if not any(isnan(value) for value in values):
            return values
    return [-float(i) for i in range(len(group))]


def per_list(*names: str) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """Enter an oracle for the rewards and the grades of one list."""

    def enter(of: Callable[..., float]) -> Callable[..., float]:
        def oracle(update: Update, memory: Memory, beta: float) -> list[float]:
            return [
                of([beta * one.logratio for one in group], grades_of(group)) for group in update
            ]

        ORACLES.update(dict.fromkeys(names, oracle))
        return of

    return enter


def log_sum_exp(values: Sequence[float]) -> float:
    top = max(values)
    return top + log(sum(exp(value - top) for value in values))


@per_list("plackett-luce")
def plackett_luce(rewards: list[float], grades: list[float]) -> float:
    found = 0.0
    for k, grade in enumerate(grades):
        worse = [reward for reward, other in zip(rewards, grades, strict=True) if other < grade]
        found += log_sum_exp([rewards[k], *worse]) - rewards[k]
    return found


@per_list("lipo")
def lipo(rewards: list[float], grades: list[float]) -> float:
    low, high, count = min(grades), max(grades), len(grades)
    gains = [2 ** ((grade - low) / (high - low)) for grade in grades]
    keys = [(-rewards[i], -grades[i], i) for i in range(count)]
    ranks = [1 + sum(other < key for other in keys) for key in keys]
    found = 0.0
    for i in range(count):
        for j in range(count):
            if grades[i] > grades[j]:
                discounts = 1 / log2(1 + ranks[i]) - 1 / log2(1 + ranks[j])
                weight = abs(gains[i] - gains[j]) * abs(discounts)
                found += weight * nll(rewards[i] - rewards[j])
    return found


@per_list("softmax-dpo")
def softmax_dpo(rewards: list[float], grades: list[float]) -> float:
    both = list(zip(rewards, grades, strict=True))
    worse = [reward for reward, grade in both if grade < max(grades)]
    return fmean(
        nll(-log_sum_exp([one - reward for one in worse]))
        for reward, grade in both
        if grade == max(grades)
    )


@per_list("best-worst")
def best_worst(rewards: list[float], grades: list[float]) -> float:
    best, worst = grades.index(max(grades)), grades.index(min(grades))
    return nll(rewards[best] - rewards[worst])
