"""Every loss at fixed inputs: a number, the arithmetic that gives it, and the package's value.

The arithmetic is written out with the numbers of the inputs, so that it can be checked by hand.
"""

from collections.abc import Sequence
from math import e, exp, log, log2
from typing import NamedTuple

import pytest
from loss_inputs import Answer, bad, good, groups_of, objective_of, pair, with_statistics

from logratio.training.methods.table import METHODS

# r is the log-ratio, a the mean log-prob of a token, D = r_w - r_l.
A = pair(
    Answer(-10.0, -11.0, 5, confidence=-0.5, divergence=2.0),
    Answer(-14.0, -12.0, 4, confidence=-0.25, divergence=0.5),
    margin=2.0,
)
"""r = 1 and -2, D = 3; a = -2 and -3.5; K = 2 and 0.5."""
B = pair(
    Answer(-9.5, -8.0, 2, confidence=0.5, divergence=1.0),
    Answer(-6.0, -6.5, 8, confidence=-1.5, divergence=3.0),
    margin=0.5,
)
"""r = -1.5 and 0.5, D = -2; a = -4.75 and -0.75; K = 1 and 3."""
C = pair(Answer(-6.0, -3.0, 3), Answer(-4.0, -9.0, 6), margin=1.0)
"""r = -3 and 5, D = -8."""

GOOD, BAD = Answer(-10.0, -11.0, 5), Answer(-14.0, -12.0, 4)
LABELLED = [
    good(GOOD, Answer(-7.0, -7.5, 3)),
    bad(BAD, Answer(-8.0, -9.5, 2)),
    good(Answer(-6.5, -6.0, 2), Answer(-3.0, -2.8, 1)),
]
"""r = 1, -2 and -0.5; of the mismatched completions 0.5, 1.5 and -0.2, whose mean is 0.6."""

LISTS = [
    [
        Answer(-10.0, -11.0, score=7.0),
        Answer(-14.0, -12.0, score=2.0),
        Answer(-5.0, -5.5, score=9.0),
    ],
    [
        Answer(-3.0, -3.25, rank=3.0),
        Answer(-9.0, -8.0, rank=1.0),
        Answer(-4.0, -6.0, rank=1.0),
        Answer(-7.0, -7.5, rank=4.0),
    ],
    [Answer(-10.0, -11.0), Answer(-14.0, -12.0)],
]
"""With β = 1/2, β·r is 0.5, -1, 0.25; 0.125, -0.5, 1, 0.25; 0.5, -1. The order of the first list is
third, first, second; in the second list, the second and third tie; the third is in order."""


def s(x: float) -> float:
    """The logistic function σ."""
    return 1 / (1 + exp(-x))


def mean(*values: float) -> float:
    return sum(values) / len(values)


AB, ABC = [A, B], [A, B, C]


class Gold(NamedTuple):
    """A method at fixed inputs.

    `values` are the losses of the groups of the update, and `arithmetic` their derivation; `before`
    are earlier updates of the run.
    """

    name: str
    settings: dict[str, float]
    values: list[float]
    arithmetic: list[float]
    update: Sequence[Sequence[Answer]] = AB
    before: Sequence[Sequence[Sequence[Answer]]] = ()


ODDS = [exp(a) / (1 - exp(a)) for a in (-2.0, -3.5, -4.75, -0.75)]
PSI, THIRD = 5 / 7, 1 / 3  # grades in [0, 1]: 7 from 2 to 9; rank 3 from 4 to 1

PAIRS = [
    Gold("dpo", {}, [0.554355244469, 0.798138869382], [-log(s(0.1 * 3)), -log(s(0.1 * -2))]),
    Gold(
        "dpo",
        {"beta": 0.5, "label_smoothing": 0.2},
        [0.501413277983, 1.11326168752],
        [-0.8 * log(s(1.5)) - 0.2 * log(s(-1.5)), -0.8 * log(s(-1)) - 0.2 * log(s(1))],
    ),
    Gold(
        "cdpo",
        {},
        [0.584355244469, 0.778138869382],
        [-0.9 * log(s(0.3)) - 0.1 * log(s(-0.3)), -0.9 * log(s(-0.2)) - 0.1 * log(s(0.2))],
    ),
    Gold(
        "cdpo",
        {"label_smoothing": 0.25},
        [0.629355244469, 0.748138869382],
        [-0.75 * log(s(0.3)) - 0.25 * log(s(-0.3)), -0.75 * log(s(-0.2)) - 0.25 * log(s(0.2))],
    ),
    Gold(
        "robust",
        {},
        [0.516855244469, 0.823138869382],
        [
            (-0.9 * log(s(0.3)) + 0.1 * log(s(-0.3))) / 0.8,
            (-0.9 * log(s(-0.2)) + 0.1 * log(s(0.2))) / 0.8,
        ],
    ),
    Gold(
        "robust",
        {"beta": 1.0, "label_smoothing": 0.4},
        [-5.95141264843, 6.12692801104],
        [(-0.6 * log(s(3)) + 0.4 * log(s(-3))) / 0.2, (-0.6 * log(s(-2)) + 0.4 * log(s(2))) / 0.2],
    ),
    Gold(
        "ipo", {}, [18.49, 33.78515625], [(1 / 5 + 2 / 4 - 5) ** 2, (-1.5 / 2 - 0.5 / 8 - 5) ** 2]
    ),
    Gold("ipo", {"beta": 0.25}, [1.69, 7.91015625], [(0.7 - 2) ** 2, (-0.8125 - 2) ** 2]),
    Gold("ipo-sum", {}, [4, 49], [(3 - 5) ** 2, (-2 - 5) ** 2]),
    Gold("hinge", {}, [0.7, 1.2], [1 - 0.3, 1 + 0.2]),
    Gold("hinge", {"beta": 0.5}, [0, 2], [0, 1 + 1]),
    Gold(
        "exo",
        {},
        [2.25819919151, 3.11039701882],
        [
            s(0.3) * log(s(0.3) / 0.999) + s(-0.3) * log(s(-0.3) / 0.001),
            s(-0.2) * log(s(-0.2) / 0.999) + s(0.2) * log(s(0.2) / 0.001),
        ],
    ),
    Gold(
        "exo",
        {"label_smoothing": 0.1},
        [0.358383387364, 0.625297218089],
        [
            s(0.3) * log(s(0.3) / 0.9) + s(-0.3) * log(s(-0.3) / 0.1),
            s(-0.2) * log(s(-0.2) / 0.9) + s(0.2) * log(s(0.2) / 0.1),
        ],
    ),
    Gold(
        "nca",
        {},
        [1.3156644248, 1.44066539569],
        [
            -log(s(0.1)) - log(s(-0.1)) / 2 - log(s(0.2)) / 2,
            -log(s(-0.15)) - log(s(0.15)) / 2 - log(s(-0.05)) / 2,
        ],
    ),
    Gold("sppo", {}, [25, 72.5], [(1 - 5) ** 2 + (-2 + 5) ** 2, (-1.5 - 5) ** 2 + (0.5 + 5) ** 2]),
    Gold(
        "cal-dpo",
        {},
        [25.0485873516, 74.626928011],
        [-log(s(3)) + 4**2 + 3**2, -log(s(-2)) + 6.5**2 + 5.5**2],
    ),
    Gold(
        "cal-dpo",
        {"beta": 0.5},
        [1.04858735157, 10.626928011],
        [-log(s(3)) + (1 - 1) ** 2 + (-2 + 1) ** 2, -log(s(-2)) + 2.5**2 + 1.5**2],
    ),
    Gold(
        "apo-zero",
        {},
        [0.925186815209, 1.04992724183],
        [1 - s(0.1) + s(-0.2), 1 - s(-0.15) + s(0.05)],
    ),
    Gold(
        "apo-down",
        {},
        [0.950536670667, 1.01240415197],
        [s(0.1) + 1 - s(0.3), s(-0.15) + 1 - s(-0.2)],
    ),
    Gold(
        "discopop",
        {},
        [0.849337579289, 0.787402005818],
        [
            (1 - s(3)) * -log(s(0.15)) + s(3) * exp(-0.15),
            (1 - s(-2)) * -log(s(-0.1)) + s(-2) * exp(0.1),
        ],
    ),
    Gold(
        "discopop",
        {"beta": 0.1, "tau": 2.0},
        [0.654566012937, 0.99919802574],
        [
            (1 - s(0.15)) * -log(s(0.3)) + s(0.15) * exp(-0.3),
            (1 - s(-0.1)) * -log(s(-0.2)) + s(-0.1) * exp(0.2),
        ],
    ),
    Gold(
        "ln-dpo",
        {},
        [0.0297504182726, 4.07955960436],
        [-log(s(5 * (1 / 5 + 2 / 4))), -log(s(5 * (-1.5 / 2 - 0.5 / 8)))],
    ),
    Gold(
        "ln-dpo",
        {"beta": 2.0, "label_smoothing": 0.1},
        [0.360417409918, 1.64224463539],
        [-0.9 * log(s(1.4)) - 0.1 * log(s(-1.4)), -0.9 * log(s(-1.625)) - 0.1 * log(s(1.625))],
    ),
    Gold(
        "r-dpo",
        {},
        [0.550111886439, 0.831573486442],
        [-log(s(0.3 + 0.01 * 1)), -log(s(-0.2 - 0.01 * 6))],
    ),
    Gold(
        "r-dpo",
        {"alpha": 0.5},
        [0.371100665948, 3.23995333316],
        [-log(s(0.3 + 0.5)), -log(s(-0.2 - 3))],
    ),
    Gold(
        "ld-dpo", {}, [0.554355244469, 0.798138869382], [-log(s(0.3)), -log(s(-0.2))]
    ),  # see test_token_weights.py
    Gold("sampo", {}, [0.554355244469, 0.798138869382], [-log(s(0.3)), -log(s(-0.2))]),
    Gold(
        "dpop",
        {},
        [0.341153874732, 23.1000000001],
        [-log(s(0.3 * 3)), -log(s(0.3 * (-2 - 50 * 1.5)))],
    ),
    Gold(
        "dpop",
        {"beta": 0.1, "penalty": 5.0},
        [0.554355244469, 1.27695640685],
        [-log(s(0.3)), -log(s(0.1 * (-2 - 7.5)))],
    ),
    Gold(
        "odpo",
        {},
        [0.908918197957, 0.476669723313],
        [-log(s(0.3 - log(2))), -log(s(-0.2 - log(0.5)))],
    ),
    Gold(
        "odpo",
        {"alpha": 0.5},
        [0.716705088612, 0.622543462099],
        [-log(s(0.3 - log(2) / 2)), -log(s(-0.2 + log(2) / 2))],
    ),
    Gold(
        "wpo",
        {},
        [0.261858875824, 0.293618881245],
        [exp(-0.75) * -log(s(0.3)), exp(-1) * -log(s(-0.2))],
    ),
    Gold(
        "wpo",
        {"label_smoothing": 0.1},
        [0.276029872406, 0.286261292422],
        [
            exp(-0.75) * (-0.9 * log(s(0.3)) - 0.1 * log(s(-0.3))),
            exp(-1) * (-0.9 * log(s(-0.2)) - 0.1 * log(s(0.2))),
        ],
    ),
    Gold(
        "tdpo1",
        {},
        [0.493248945997, 0.9130152524],
        [-log(s(0.1 * (3 + 2 - 0.5))), -log(s(0.1 * (-2 + 1 - 3)))],
    ),
    Gold(
        "tdpo2",
        {},
        [0.52312326414, 0.854355244469],
        [-log(s(0.1 * (3 + 0.5 * 1.5))), -log(s(0.1 * (-2 - 0.5 * 2)))],
    ),
    Gold(
        "tdpo2",
        {"alpha": 2.0},
        [0.437487950486, 1.03748795049],
        [-log(s(0.1 * (3 + 3))), -log(s(0.1 * (-2 - 4)))],
    ),
    Gold("unweighted-dpo", {}, [-0.3, 0.2], [-0.1 * 3, 0.1 * 2]),
    Gold(
        "chi-po",
        {},
        [0.452465737864, 0.879023915187],
        [-log(s(0.1 * (e + 1 - e**-2 + 2))), -log(s(0.1 * (e**-1.5 - 1.5 - e**0.5 - 0.5)))],
    ),
    Gold(
        "chi-po", {"clip": 0.25}, [0.575939419879, 0.825939419879], [-log(s(0.25)), -log(s(-0.25))]
    ),
    Gold(
        "f-dpo-forward-kl",
        {},
        [0.402483878505, 0.905559878594],
        [-log(s(0.1 * (-(e**-1) + e**2))), -log(s(0.1 * (-(e**1.5) + e**-0.5)))],
    ),
    Gold(
        "f-dpo-js",
        {},
        [0.606569973181, 0.756395757583],
        [
            -log(s(0.1 * (log(2 * s(1)) - log(2 * s(-2))))),
            -log(s(0.1 * (log(2 * s(-1.5)) - log(2 * s(0.5))))),
        ],
    ),
    Gold(
        "f-dpo-alpha",
        {},
        [0.504105747536, 0.835894392761],
        [-log(s(0.1 * (e**1 - e**-0.5) / 0.5)), -log(s(0.1 * (e**-0.25 - e**0.75) / 0.5))],
    ),
    Gold(
        "f-dpo-alpha",
        {"alpha": 0.25},
        [0.534222568469, 0.814186809494],
        [-log(s(0.1 * (e**0.5 - e**-0.25) / 0.25)), -log(s(0.1 * (e**-0.125 - e**0.375) / 0.25))],
    ),
    Gold("step-dpo", {}, [0.263282467338, 1.17110066595], [-log(s(0.4 * 3)), -log(s(0.4 * -2))]),
    Gold("simpo", {}, [0.126928011043, 9.00012340219], [-log(s(2 * 1.5 - 1)), -log(s(2 * -4 - 1))]),
    Gold(
        "simpo",
        {"beta": 2.5, "gamma": 0.5, "label_smoothing": 0.1},
        [0.363041371688, 9.45002753607],
        [-0.9 * log(s(3.25)) - 0.1 * log(s(-3.25)), -0.9 * log(s(-10.5)) - 0.1 * log(s(10.5))],
    ),
    Gold(
        "alpha-po",
        {},
        [0.00149999976686, 21.7264351855],
        [
            -log(s(2.5 * ((1 - e**0.5) - (1 - e**0.875)) / 0.25 - 1)),
            -log(s(2.5 * ((1 - e**1.1875) - (1 - e**0.1875)) / 0.25 - 1)),
        ],
    ),
    Gold(
        "alpha-po",
        {"alpha": 1.0, "gamma": 0.0, "beta": 0.1},
        [0.0735606270762, 11.346740259],
        [-log(s(0.1 * (e**3.5 - e**2))), -log(s(0.1 * (e**0.75 - e**4.75)))],
    ),
    Gold(
        "cpo", {}, [2.5130152524, 5.63338215542], [-log(s(0.1 * 4)) + 2, -log(s(0.1 * -3.5)) + 4.75]
    ),
    Gold(
        "cpo",
        {"alpha": 0.5, "label_smoothing": 0.2},
        [1.5930152524, 3.18838215542],
        [
            -0.8 * log(s(0.4)) - 0.2 * log(s(-0.4)) + 1,
            -0.8 * log(s(-0.35)) - 0.2 * log(s(0.35)) + 2.375,
        ],
    ),
    Gold(
        "orpo",
        {},
        [2.01814380431, 5.21403652015],
        [2 - 0.1 * log(s(log(ODDS[0] / ODDS[1]))), 4.75 - 0.1 * log(s(log(ODDS[2] / ODDS[3])))],
    ),
    Gold("slic", {}, [1, 5.45], [0 + 0.1 * 10, 1 + 3.5 + 0.1 * 9.5]),
    Gold("slic", {"delta": 5.0, "weight": 0.2}, [3, 10.4], [5 - 4 + 0.2 * 10, 5 + 3.5 + 0.2 * 9.5]),
    Gold("unlikelihood", {}, [-4, 3.5], [10 - 14, 9.5 - 6]),
    Gold("unlikelihood", {"alpha": 0.5}, [3, 6.5], [10 - 0.5 * 14, 9.5 - 0.5 * 6]),
    # Of a reward model the policy's "log-probs" are scores.
    Gold("bradley-terry", {}, [0.0181499279178, 3.52975041827], [-log(s(4)), -log(s(-3.5))]),
    Gold(
        "bradley-terry",
        {"center": 0.5},
        [288.018149928, 123.654750418],
        [-log(s(4)) + 0.5 * (10 + 14) ** 2, -log(s(-3.5)) + 0.5 * (9.5 + 6) ** 2],
    ),
    Gold("sft", {}, [2, 4.75], [10 / 5, 9.5 / 2], update=[A[:1], B[:1]]),
    Gold("raft", {}, [0.666666666667], [4 / 6], update=[C[1:]]),
]

UPDATES = [
    # The mean of the rewards 0.1, -0.2, -0.15 and 0.05 is -0.05.
    Gold(
        "bco",
        {},
        [1.24191409558, 1.48879332015],
        [-log(s(0.1 + 0.05)) - log(s(-0.05 + 0.2)), -log(s(-0.15 + 0.05)) - log(s(-0.05 - 0.05))],
    ),
    # With those of C before, -0.3 and 0.5, the mean is 0.
    Gold(
        "bco",
        {},
        [1.24253552946, 1.4894166958],
        [-log(s(0.1)) - log(s(0.2)), -log(s(-0.15)) - log(s(-0.05))],
        before=[[C]],
    ),
    # Policy margins 4, -3.5, -2; of the reference 1, -1.5, 6. By rank: 4 - 6, -3.5 + 1.5, -2 - 1.
    Gold(
        "aot",
        {},
        [0.798138869382, 0.798138869382, 0.854355244469],
        [-log(s(0.1 * -2)), -log(s(0.1 * -2)), -log(s(0.1 * -3))],
        update=ABC,
    ),
    Gold(
        "aot",
        {"label_smoothing": 0.1},
        [0.778138869382, 0.778138869382, 0.824355244469],
        [
            -0.9 * log(s(-0.2)) - 0.1 * log(s(0.2)),
            -0.9 * log(s(-0.2)) - 0.1 * log(s(0.2)),
            -0.9 * log(s(-0.3)) - 0.1 * log(s(0.3)),
        ],
        update=ABC,
    ),
    # Chosen -3, -1.5, 1 and rejected -2, 0.5, 5 in order: differences -1, -2, -4. A and C are in
    # the first and the last.
    Gold(
        "aot-unpaired",
        {},
        [0.828705956237, 0.798138869382, 0.828705956237],
        [mean(-log(s(-0.1)), -log(s(-0.4))), -log(s(-0.2)), mean(-log(s(-0.1)), -log(s(-0.4)))],
        update=ABC,
    ),
    Gold(
        "aot-unpaired",
        {"label_smoothing": 0.2},
        [0.678459648013, 0.678459648013],
        [
            mean(
                -0.8 * log(s(0.05)) - 0.2 * log(s(-0.05)), -0.8 * log(s(0.05)) - 0.2 * log(s(-0.05))
            ),
            mean(
                -0.8 * log(s(0.05)) - 0.2 * log(s(-0.05)), -0.8 * log(s(0.05)) - 0.2 * log(s(-0.05))
            ),
        ],
    ),
    # The first update: the mean of D is its own moving average.
    Gold(
        "beta-dpo",
        {"keep": 1},
        [0.554355244469, 0.798138869382],
        [-log(s(0.1 * 3)), -log(s(0.1 * -2))],
    ),
    # M = 0.9·3 + 0.1·(-2) = 2.5 and the mean of D is 0.5: the factor is 1 + 0.2·(0.5 - 2.5) = 0.6.
    Gold(
        "beta-dpo",
        {"alpha": 0.2, "keep": 1},
        [0.607191724841, 0.754946101596],
        [-log(s(0.06 * 3)), -log(s(0.06 * -2))],
        before=[[A], [B]],
    ),
    # M = 3: 1 + 0.6·(0.5 - 3) is below 0.01, the least factor.
    Gold(
        "beta-dpo",
        {"keep": 1},
        [0.69164830556, 0.69414768056],
        [-log(s(0.001 * 3)), -log(s(0.001 * -2))],
        before=[[A]],
    ),
    # M = 0.5·3 + 0.5·(-2) = 0.5: the factor is 1.
    Gold(
        "beta-dpo",
        {"momentum": 0.5, "keep": 1},
        [0.554355244469, 0.798138869382],
        [-log(s(0.3)), -log(s(-0.2))],
        before=[[A], [B]],
    ),
    # D is 3, -2 and -8: mean -7/3, variance 182/9. Seed 0 draws the noise -0.013, 1.157 and 3.174,
    # and with the log densities -0.703, -0.003 and -0.794 the second and third pair are largest.
    # Their mean of D is -5, so the factor is 1 + 0.15·(-5 + 7/3) = 0.6.
    Gold(
        "beta-dpo",
        {"alpha": 0.15, "keep": 2 / 3},
        [0, 1.132419152393, 1.442512311594],
        [0, -1.5 * log(s(0.06 * -2)), -1.5 * log(s(0.06 * -8))],
        update=[A, B, C],
    ),
    Gold(
        "kto",
        {},
        [0.49000133312, 0.435363708197, 0.527472304345],
        [1 - s(0.1 * (1 - 0.6)), 1 - s(0.1 * (0.6 + 2)), 1 - s(0.1 * (-0.5 - 0.6))],
        update=LABELLED,
    ),
    Gold(
        "kto",
        {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.75},
        [0.675249004031, 0.160623762718, 0.951203386516],
        [1.5 * (1 - s(0.5 * 0.4)), 0.75 * (1 - s(0.5 * 2.6)), 1.5 * (1 - s(0.5 * -1.1))],
        update=LABELLED,
    ),
    # A mean log-ratio of mismatched completions below 0, or none, counts as 0.
    Gold(
        "kto",
        {},
        [0.512497396484, 0.450166002688],
        [1 - s(0.1 * -0.5), 1 - s(0.1 * 2)],
        update=[LABELLED[2], bad(BAD)],
    ),
    Gold(
        "kto",
        {},
        [0.475020812521, 0.450166002688],
        [1 - s(0.1), 1 - s(0.2)],
        update=[good(GOOD), bad(BAD)],
    ),
    # The mean of the rewards 0.1, -0.2 and -0.05 is -0.05; mismatched completions do not count.
    Gold(
        "bco-unpaired",
        {},
        [0.62095704779, 0.62095704779, 0.69314718056],
        [-log(s(0.1 + 0.05)), -log(s(-0.05 + 0.2)), -log(s(-0.05 + 0.05))],
        update=LABELLED,
    ),
    Gold(
        "apo-zero-unpaired",
        {},
        [0.475020812521, 0.450166002688, 0.512497396484],
        [1 - s(0.1), s(-0.2), 1 - s(-0.05)],
        update=LABELLED,
    ),
]

RANKED = [
    Gold(
        "plackett-luce",
        {"beta": 0.5},
        [1.14552546438, 3.00025036336, 0.201413277983],
        [
            -log(exp(0.25) / (exp(0.25) + exp(0.5) + exp(-1)))
            - log(exp(0.5) / (exp(0.5) + exp(-1))),
            -log(exp(-0.5) / (exp(-0.5) + exp(0.125) + exp(0.25)))
            - log(exp(1) / (exp(1) + exp(0.125) + exp(0.25)))
            - log(exp(0.125) / (exp(0.125) + exp(0.25))),
            -log(s(1.5)),
        ],
        update=LISTS,
    ),
    # Ranks by β·r: first, third, second; third, fourth, first, second; first, second.
    Gold(
        "lipo",
        {"beta": 0.5},
        [0.207039033209, 0.579224958066, 0.0743356481391],
        [
            (2 - 2**PSI) * (1 - 1 / log2(3)) * -log(s(-0.25))
            + (2 - 1) * (1 / log2(3) - 1 / 2) * -log(s(1.25))
            + (2**PSI - 1) * (1 - 1 / 2) * -log(s(1.5)),
            (2 - 2**THIRD) * (1 / 2 - 1 / log2(5)) * -log(s(-0.625))
            + (2 - 1) * (1 / log2(3) - 1 / log2(5)) * -log(s(-0.75))
            + (2 - 2**THIRD) * (1 - 1 / 2) * -log(s(0.875))
            + (2 - 1) * (1 - 1 / log2(3)) * -log(s(0.75))
            + (2**THIRD - 1) * (1 / log2(3) - 1 / 2) * -log(s(-0.125)),
            (2 - 1) * (1 - 1 / log2(3)) * -log(s(1.5)),
        ],
        update=LISTS,
    ),
    Gold(
        "softmax-dpo",
        {"beta": 0.5},
        [0.944112186402, 1.12132566402, 0.201413277983],
        [
            log(1 + exp(0.5 - 0.25) + exp(-1 - 0.25)),
            mean(
                log(1 + exp(0.125 + 0.5) + exp(0.25 + 0.5)), log(1 + exp(0.125 - 1) + exp(0.25 - 1))
            ),
            -log(s(1.5)),
        ],
        update=LISTS,
    ),
    Gold(
        "best-worst",
        {"beta": 0.5},
        [0.251929081345, 1.13687100611, 0.201413277983],
        [-log(s(0.25 + 1)), -log(s(-0.5 - 0.25)), -log(s(1.5))],
        update=LISTS,
    ),
    Gold("plackett-luce", {}, [0.554355244469, 0.798138869382], [-log(s(0.3)), -log(s(-0.2))]),
    Gold(
        "lipo",
        {},
        [0.204596026685, 0.294569309207],
        [(1 - 1 / log2(3)) * -log(s(0.3)), (1 - 1 / log2(3)) * -log(s(-0.2))],
    ),
    Gold("softmax-dpo", {}, [0.554355244469, 0.798138869382], [-log(s(0.3)), -log(s(-0.2))]),
    Gold("best-worst", {}, [0.554355244469, 0.798138869382], [-log(s(0.3)), -log(s(-0.2))]),
]

GOLD = [*PAIRS, *UPDATES, *RANKED]


def test_every_method_has_gold_values() -> None:
    assert {one.name for one in GOLD} == METHODS.keys()


def test_every_option_has_gold_values_at_another_value_than_its_default() -> None:
    found = {(one.name, name) for one in GOLD for name in one.settings}
    options = {(name, one) for name, method in METHODS.items() for one in method.options}
    # The alpha of ld-dpo weighs tokens: test_token_weights.py.
    assert options - found == {("ld-dpo", "alpha")}


@pytest.mark.parametrize("gold", GOLD, ids=lambda one: one.name)
def test_losses_are_the_gold_values(gold: Gold) -> None:
    assert gold.values == pytest.approx(gold.arithmetic, rel=1e-11)
    objective = objective_of(gold.name, **gold.settings)
    for update in gold.before:
        with_statistics(objective, groups_of(*update))
    losses = objective.losses(with_statistics(objective, groups_of(*gold.update)))
    assert losses.tolist() == pytest.approx(gold.values, rel=1e-10)
