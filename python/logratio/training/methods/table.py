"""The table of methods: for each its loss, data, options, default β, initial value and paper."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from logratio.training.methods import free, lists, margins, pairs, token_weights, unpaired
from logratio.training.methods import initial_values as start
from logratio.training.methods import statistics as over_update
from logratio.training.methods.logps import GroupLogps, PairLogps
from logratio.training.methods.statistics import Statistics

DataKind = Literal["pairs", "labelled answers", "lists", "demonstrations"]
"""What a group holds: chosen and rejected; one answer with a thumb; ranked answers; one answer."""

NAME_OF_GROUP: Mapping[DataKind, str] = {
    "pairs": "pair",
    "labelled answers": "labelled answer",
    "lists": "list",
    "demonstrations": "demonstration",
}
"""The name of one group."""

Rewards = Literal["implicit", "mean"]
"""Rewards of the metrics: β·(log π − log π_ref), or β·log π per token."""


@dataclass(frozen=True)
class Option:
    """A number that a method takes in addition to β.

    Attributes:
        default: Its default.
        meaning: What it is, for the table.
        low, high: Its range.
        is_open: Whether `low` and `high` themselves are excluded.
    """

    default: float
    meaning: str
    low: float = 0.0
    high: float = math.inf
    is_open: bool = False

    def allows(self, value: float) -> bool:
        """Return whether a value is finite and in the range."""
        if not math.isfinite(value):
            return False
        return self.low < value < self.high if self.is_open else self.low <= value <= self.high

    @property
    def range(self) -> str:
        """The range, after "must be": "above 0", "0 to 0.5"."""
        low, high = f"{self.low:g}", f"{self.high:g}"
        if self.low == -math.inf:  # an option of a loss by import path
            return "finite"
        if self.high == math.inf:
            return f"{'above' if self.is_open else 'at least'} {low}"
        return f"above {low} and below {high}" if self.is_open else f"{low} to {high}"


@dataclass(frozen=True)
class Method:
    """A method of preference optimization.

    Attributes:
        title: Its name in the literature.
        loss: Returns the loss of each group, `[B]`, from `PairLogps` or `GroupLogps` and, as
            keywords, β and the options.
        takes: `PairLogps` or `GroupLogps`.
        paper: Where the loss is defined.
        formula: The loss of one group; symbols as in the documentation.
        data: What its groups are.
        beta: Default β; β is not comparable across methods. None: the loss has no β.
        options: Its other numbers.
        needs_reference: False for a loss without reference log-probs.
        initial: Value at policy = reference, from β and the options; None: it depends on the data.
        rewards: The rewards whose margin the loss increases, in the metrics.
        statistics: Computes numbers of the whole update, in a pass before that for the gradients.
        token_weights: Weights of tokens in the sums of log-probs; None: each counts once.
        needs_confidences: Whether the loss uses how confident the policy is in each token.
        needs_divergences: Whether the loss compares whole distributions with a live reference.
        needs_margins: Whether the data must have a margin for each pair.
        needs_mismatches: Whether each group needs the answer to another prompt.
        scores: Whether it trains a reward model: a completion's score, the output of a scalar head,
            is then in place of its summed log-prob.
        note: A remark for the table.
    """

    title: str
    loss: Callable[..., Tensor]
    paper: str
    formula: str
    takes: type[PairLogps] | type[GroupLogps] = PairLogps
    data: DataKind = "pairs"
    beta: float | None = 0.1
    options: Mapping[str, Option] = field(default_factory=dict)
    needs_reference: bool = True
    initial: Callable[..., float | None] | None = None
    rewards: Rewards = "implicit"
    statistics: Statistics | None = None
    token_weights: Callable[..., Tensor] | None = None
    needs_confidences: bool = False
    needs_divergences: bool = False
    needs_margins: bool = False
    needs_mismatches: bool = False
    scores: bool = False
    note: str = ""

    @property
    def needs_values(self) -> bool:
        """Whether the loss uses scores, ranks or margins of the data."""
        return self.needs_margins or self.data == "lists"

    @property
    def default_initial_value(self) -> float | None:
        """The loss at policy = reference with the default β and options; None: it depends."""
        defaults = {name: option.default for name, option in self.options.items()}
        return self.initial_value(1.0 if self.beta is None else self.beta, defaults)

    def initial_value(self, beta: float, options: Mapping[str, float]) -> float | None:
        """Return the loss at policy = reference; None if it depends on the data."""
        return self.initial(beta=beta, **options) if self.initial else None


SMOOTHING = Option(0.0, "share of flipped labels, ε", high=0.5)
_FLIPPED = Option(0.1, "share of flipped labels, ε", 0.0, 0.5, is_open=True)
GAMMA = Option(1.0, "target margin, γ")

METHODS: dict[str, Method] = {
    "dpo": Method(
        "DPO",
        margins.dpo_loss,
        "arXiv 2305.18290",
        "-log σ(βD)",
        options={"label_smoothing": SMOOTHING},
        initial=start.ln2,
    ),
    "cdpo": Method(
        "conservative DPO",
        margins.dpo_loss,
        "ericmitchell.ai/cdpo.pdf",
        "-(1-ε) log σ(βD) - ε log σ(-βD)",
        options={"label_smoothing": _FLIPPED},
        initial=start.ln2,
        note="`dpo` with label smoothing",
    ),
    "robust": Method(
        "robust DPO",
        margins.robust_dpo_loss,
        "arXiv 2403.00409",
        "[-(1-ε) log σ(βD) + ε log σ(-βD)] / (1-2ε)",
        options={"label_smoothing": _FLIPPED},
        initial=start.ln2,
    ),
    "ipo": Method(
        "IPO",
        pairs.ipo_loss,
        "arXiv 2310.12036",
        "(r_w/n_w - r_l/n_l - 1/(2β))²",
        initial=start.ipo,
    ),
    "ipo-sum": Method(
        "IPO, summed",
        pairs.ipo_sum_loss,
        "arXiv 2310.12036",
        "(D - 1/(2β))²",
        initial=start.ipo,
    ),
    "hinge": Method(
        "RSO's hinge", pairs.hinge_loss, "arXiv 2309.06657", "max(0, 1 - βD)", initial=start.one
    ),
    "exo": Method(
        "EXO",
        pairs.exo_loss,
        "arXiv 2402.00856",
        "KL((σ(βD), σ(-βD)) ‖ (1-ε, ε))",
        options={
            "label_smoothing": Option(1e-3, "share of flipped labels, ε", 0.0, 0.5, is_open=True)
        },
        initial=start.exo,
    ),
    "nca": Method(
        "Noise Contrastive Alignment",
        pairs.nca_loss,
        "arXiv 2402.05369",
        "-log σ(βr_w) - ½ log σ(-βr_w) - ½ log σ(-βr_l)",
        initial=start.two_ln2,
    ),
    "bco": Method(
        "Binary Classifier Optimization",
        pairs.bco_loss,
        "arXiv 2404.04656",
        "-log σ(βr_w - δ) - log σ(δ - βr_l), δ the mean reward so far",
        initial=start.two_ln2,
        statistics=over_update.mean_reward,
    ),
    "sppo": Method(
        "SPPO, hard labels",
        pairs.sppo_loss,
        "arXiv 2405.00675",
        "(r_w - 1/(2β))² + (r_l + 1/(2β))²",
        initial=start.sppo,
    ),
    "aot": Method(
        "Alignment via Optimal Transport",
        margins.aot_loss,
        "arXiv 2406.05882",
        "-log σ(βd), d between order statistics of the update",
        options={"label_smoothing": SMOOTHING},
        initial=start.ln2,
        statistics=over_update.reference_quantiles,
    ),
    "aot-unpaired": Method(
        "unpaired AOT",
        unpaired.aot_unpaired_loss,
        "arXiv 2406.05882",
        "as aot, of sorted r_w and sorted r_l",
        takes=GroupLogps,
        options={"label_smoothing": SMOOTHING},
        initial=start.ln2,
        statistics=over_update.partners,
    ),
    "apo-zero": Method(
        "APO-zero",
        pairs.apo_zero_loss,
        "arXiv 2408.06266",
        "1 - σ(βr_w) + σ(βr_l)",
        initial=start.one,
    ),
    "apo-down": Method(
        "APO-down",
        pairs.apo_down_loss,
        "arXiv 2408.06266",
        "σ(βr_w) + 1 - σ(βD)",
        initial=start.one,
    ),
    "discopop": Method(
        "DiscoPOP",
        pairs.discopop_loss,
        "arXiv 2406.08414",
        "-(1-m) log σ(βD) + m exp(-βD), m = σ(βD/τ)",
        beta=0.05,
        options={"tau": Option(0.05, "temperature of the modulation, τ", is_open=True)},
        initial=start.discopop,
        note="with τ = 0.05, its gradient at policy = reference lowers βD, to a minimum at -0.12",
    ),
    "ln-dpo": Method(
        "length-normalized DPO",
        margins.ln_dpo_loss,
        "arXiv 2411.15124",
        "-log σ(β(r_w/n_w - r_l/n_l))",
        beta=5.0,
        options={"label_smoothing": SMOOTHING},
        initial=start.ln2,
    ),
    "r-dpo": Method(
        "length-regularized DPO",
        margins.r_dpo_loss,
        "arXiv 2403.19159",
        "-log σ(βD + α(n_w - n_l))",
        options={"alpha": Option(0.01, "penalty per token, α")},
    ),
    "ld-dpo": Method(
        "length-desensitized DPO",
        margins.dpo_loss,
        "arXiv 2409.06411",
        "-log σ(βD), tokens beyond the shorter length times α",
        options={"alpha": Option(0.5, "weight of the tokens beyond the shorter length", high=1.0)},
        initial=start.ln2,
        token_weights=token_weights.length_desensitized,
    ),
    "sampo": Method(
        "SamPO",
        margins.dpo_loss,
        "arXiv 2406.10957",
        "-log σ(βD), over as many sampled tokens of either side",
        initial=start.ln2,
        token_weights=token_weights.down_sampled,
    ),
    "dpop": Method(
        "DPO-Positive",
        margins.dpop_loss,
        "arXiv 2402.13228",
        "-log σ(β[D - λ max(0, -r_w)])",
        beta=0.3,
        options={"penalty": Option(50.0, "λ")},
        initial=start.ln2,
    ),
    "odpo": Method(
        "DPO with an offset",
        margins.odpo_loss,
        "arXiv 2402.10571",
        "-log σ(βD - α log Δ), Δ the pair's margin in the data",
        options={"alpha": Option(1.0, "scale of the offset, α")},
        needs_margins=True,
    ),
    "beta-dpo": Method(
        "β-DPO",
        margins.beta_dpo_loss,
        "arXiv 2407.08639",
        "-log σ(β_u D), β_u = β[1 + α(mean D - M)]",
        options={
            "alpha": Option(0.6, "how much β changes, α"),
            "momentum": Option(0.9, "of the moving average M", high=1.0),
        },
        initial=start.ln2,
        statistics=over_update.beta_of_update,
        note="without the paper's filter of pairs",
    ),
    "chi-po": Method(
        "χPO",
        margins.chi_po_loss,
        "arXiv 2407.13399",
        "-log σ(clip[βφ(e^r_w) - βφ(e^r_l)]), φ(z) = z + log z",
        options={"clip": Option(10.0, "largest difference of rewards", is_open=True)},
        initial=start.ln2,
    ),
    "cal-dpo": Method(
        "calibrated DPO",
        pairs.cal_dpo_loss,
        "arXiv 2412.14516",
        "-log σ(D) + (r_w - 1/(2β))² + (r_l + 1/(2β))²",
        initial=start.cal,
    ),
    "f-dpo-forward-kl": Method(
        "f-DPO, forward KL",
        margins.forward_kl_dpo_loss,
        "arXiv 2309.16240",
        "-log σ(β[e^-r_l - e^-r_w])",
        initial=start.ln2,
    ),
    "f-dpo-js": Method(
        "f-DPO, Jensen-Shannon",
        margins.js_dpo_loss,
        "arXiv 2309.16240",
        "-log σ(β[log σ(r_w) - log σ(r_l)])",
        initial=start.ln2,
    ),
    "f-dpo-alpha": Method(
        "f-DPO, α-divergence",
        margins.alpha_dpo_loss,
        "arXiv 2309.16240",
        "-log σ(β[e^-αr_l - e^-αr_w]/α)",
        options={"alpha": Option(0.5, "α of the divergence", 0.0, 1.0, is_open=True)},
        initial=start.ln2,
    ),
    "wpo": Method(
        "WPO",
        margins.wpo_loss,
        "arXiv 2406.11827",
        "-w_w w_l log σ(βD), w = exp(mean of log π(y_t) - log Σ_v π(v)²)",
        takes=GroupLogps,
        options={"label_smoothing": SMOOTHING},
        needs_confidences=True,
        note="held-out losses are without the weights",
    ),
    "tdpo1": Method(
        "TDPO1",
        margins.tdpo1_loss,
        "arXiv 2404.11999",
        "-log σ(β[D + K_w - K_l]), K the sum of KL(π_ref ‖ π) over tokens",
        takes=GroupLogps,
        initial=start.ln2,
        needs_divergences=True,
        note="needs the reference in memory; held-out losses are DPO's",
    ),
    "tdpo2": Method(
        "TDPO2",
        margins.tdpo2_loss,
        "arXiv 2404.11999",
        "-log σ(β[D + α(sg(K_w) - K_l)])",
        takes=GroupLogps,
        options={"alpha": Option(0.5, "weight of the divergences, α")},
        initial=start.ln2,
        needs_divergences=True,
        note="needs the reference in memory; held-out losses are DPO's",
    ),
    "step-dpo": Method(
        "Step-DPO",
        margins.dpo_loss,
        "arXiv 2406.18629",
        "-log σ(βD) of single steps of a solution",
        beta=0.4,
        initial=start.ln2,
        note="the data's steps end without EOS",
    ),
    "simpo": Method(
        "SimPO",
        free.simpo_loss,
        "arXiv 2405.14734",
        "-log σ(β(a_w - a_l) - γ)",
        beta=2.0,
        options={"gamma": GAMMA, "label_smoothing": SMOOTHING},
        needs_reference=False,
        rewards="mean",
    ),
    "alpha-po": Method(
        "AlphaPO",
        free.alpha_po_loss,
        "arXiv 2501.03884",
        "-log σ(β(R_w - R_l) - γ), R = (1 - e^-αa)/α",
        beta=2.5,
        options={
            "gamma": GAMMA,
            "alpha": Option(0.25, "bend of the reward, α", is_open=True),
        },
        needs_reference=False,
        rewards="mean",
    ),
    "cpo": Method(
        "CPO",
        free.cpo_loss,
        "arXiv 2401.08417",
        "-log σ(β(l_w - l_l)) - α a_w",
        options={
            "label_smoothing": SMOOTHING,
            "alpha": Option(1.0, "weight of the likelihood term, α"),
        },
        needs_reference=False,
    ),
    "orpo": Method(
        "ORPO",
        free.orpo_loss,
        "arXiv 2403.07691",
        "-a_w - β log σ(log odds_w - log odds_l)",
        needs_reference=False,
        rewards="mean",
    ),
    "slic": Method(
        "SLiC-HF",
        free.slic_loss,
        "arXiv 2305.10425",
        "max(0, δ - l_w + l_l) - λ l_w",
        beta=None,
        options={
            "delta": Option(1.0, "margin δ"),
            "weight": Option(0.1, "weight of the likelihood term, λ"),
        },
        needs_reference=False,
    ),
    "unweighted-dpo": Method(
        "DPO without its weight",
        pairs.unweighted_dpo_loss,
        "arXiv 2305.18290, section 4",
        "-βD",
        initial=start.zero,
        note="for study: without the weight σ(-βD) of each pair the policy degenerates",
    ),
    "unlikelihood": Method(
        "unlikelihood",
        free.unlikelihood_loss,
        "arXiv 2305.18290, section 6",
        "-l_w + α l_l",
        beta=None,
        options={"alpha": Option(1.0, "weight of the rejected completion, α", high=1.0)},
        needs_reference=False,
        note="a baseline without lower bound: the policy collapses",
    ),
    "kto": Method(
        "KTO",
        unpaired.kto_loss,
        "arXiv 2402.01306",
        "λ_D (1 - σ(β(r - z))) if good, λ_U (1 - σ(β(z - r))) if bad",
        takes=GroupLogps,
        data="labelled answers",
        options={
            "desirable_weight": Option(1.0, "λ_D", is_open=True),
            "undesirable_weight": Option(1.0, "λ_U", is_open=True),
        },
        initial=start.kto,
        statistics=over_update.reference_point,
        needs_mismatches=True,
        note="z from mismatched answers, which are added to the data",
    ),
    "bco-unpaired": Method(
        "BCO of single answers",
        unpaired.bco_unpaired_loss,
        "arXiv 2404.04656",
        "-log σ(βr - δ) if good, -log σ(δ - βr) if bad",
        takes=GroupLogps,
        data="labelled answers",
        initial=start.ln2,
        statistics=over_update.mean_reward,
    ),
    "apo-zero-unpaired": Method(
        "unpaired APO-zero",
        unpaired.apo_zero_unpaired_loss,
        "arXiv 2408.06266",
        "1 - σ(βr) if good, σ(βr) if bad",
        takes=GroupLogps,
        data="labelled answers",
        initial=start.half,
    ),
    "plackett-luce": Method(
        "Plackett-Luce DPO",
        lists.plackett_luce_loss,
        "arXiv 2305.18290, eq. 20",
        "-Σ_k log(e^βr_k / Σ_j e^βr_j), j = k or worse than k",
        takes=GroupLogps,
        data="lists",
    ),
    "lipo": Method(
        "LiPO-λ",
        lists.lipo_loss,
        "arXiv 2402.01878",
        "Σ_ij Δ_ij log(1 + e^-β(r_i - r_j)), i better than j",
        takes=GroupLogps,
        data="lists",
    ),
    "softmax-dpo": Method(
        "softmax DPO",
        lists.softmax_dpo_loss,
        "arXiv 2406.09215",
        "-log σ(-log Σ_l e^β(r_l - r_w)), l all that are not best",
        takes=GroupLogps,
        data="lists",
    ),
    "best-worst": Method(
        "DPO of best and worst",
        lists.best_worst_loss,
        "arXiv 2305.18290",
        "-log σ(β(r_best - r_worst))",
        takes=GroupLogps,
        data="lists",
        initial=start.ln2,
    ),
    "bradley-terry": Method(
        "Bradley-Terry reward model",
        free.bradley_terry_loss,
        "arXiv 2305.18290, eq. 2",
        "-log σ(s_w - s_l) + c (s_w + s_l)²",
        beta=None,
        options={"center": Option(0.0, "weight of the term that centers scores at 0, c")},
        needs_reference=False,
        scores=True,
        note="trains a reward model: s is the output of a scalar head",
    ),
    "sft": Method(
        "supervised fine-tuning",
        free.imitation_loss,
        "",
        "-a_w",
        takes=GroupLogps,
        data="demonstrations",
        beta=None,
        needs_reference=False,
        note="of pairs the chosen answers (Preferred-FT)",
    ),
    "raft": Method(
        "RAFT, best of N",
        free.imitation_loss,
        "arXiv 2304.06767",
        "-a of the best answer",
        takes=GroupLogps,
        data="demonstrations",
        beta=None,
        needs_reference=False,
        note="`sft` on the best answer of each list",
    ),
}
"""All methods by name."""

MIXTURES: dict[str, dict[str, float]] = {
    "mpo": {"dpo": 0.8, "bco": 0.2, "sft": 1.0},
    "iterative-rpo": {"dpo": 1.0, "sft": 1.0},
    "rpo": {"dpo": 1.0, "sft": 0.005},
}
"""Mixtures with a name: the weight of each method's loss. MPO (arXiv 2411.10442), iterative RPO
(arXiv 2404.19733), RPO (arXiv 2405.16436)."""
