"""Warnings about a data set as a whole: when they are given, and in which words."""

from dataclasses import dataclass

from logratio.data.analysis.lengths import LengthBias
from logratio.data.analysis.noise import FlipEstimate
from logratio.data.analysis.similarity import Similarity
from logratio.data.analysis.tokens import TokenUse
from logratio.data.codes import CODES
from logratio.data.report import DataReport

NOTABLE_SIMILAR = 0.01
"""There is a warning where this share of the groups resembles an earlier one."""

NOTABLE_TOUCHING = 0.5
"""There is a warning where more than this share of plain prompts runs into the answer."""

NOTABLE_CUT = 0.05
"""There is a warning where this share of the completions was cut."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A warning (W508 …) about the data as a whole.

    Attributes:
        code: One of `logratio.data.codes.CODES`.
        text: What was found, with its numbers.
    """

    code: str
    text: str

    def __str__(self) -> str:
        return f"[{self.code}] {CODES[self.code]}: {self.text}"


def length_finding(bias: LengthBias | None) -> list[Finding]:
    """Warn where length alone tells chosen from rejected (W508)."""
    if bias is None or bias.strength is None:
        return []
    is_longer = bias.effect > 0 if bias.is_of_means else bias.superiority > 0.5
    direction = "longer" if is_longer else "shorter"
    accuracy = bias.superiority if is_longer else 1 - bias.superiority
    rule = f"“the {direction} wins” is right for {100 * accuracy:.1f} %"
    if bias.is_of_means:
        found = (
            f"the mean lengths differ by a {bias.strength} effect, d = {bias.effect:.2f}; {rule}"
        )
    else:
        found = f"{rule}, a {bias.strength} effect"
    text = f"{found}. Compare the policy's accuracy with that, or use a loss that divides by length"
    return [Finding("W508", text)]


def noise_finding(flips: FlipEstimate | None) -> list[Finding]:
    """Warn where repeated judgements contradict each other often (W509)."""
    if flips is None or not flips.is_notable:
        return []
    text = (
        f"{100 * flips.rate:.1f} % are estimated to be flipped; a label smoothing of "
        f"{flips.rate:.2f} allows for that"
    )
    return [Finding("W509", text)]


def similarity_finding(found: Similarity | None, groups: int) -> list[Finding]:
    """Warn where many groups are nearly the same as others (W510)."""
    if found is None or found.similar < NOTABLE_SIMILAR * groups:
        return []
    text = (
        f"{found.similar:,} of {groups:,} groups resemble an earlier one; they weigh more in "
        "training, and a random split puts them on both sides"
    )
    return [Finding("W510", text)]


def stop_finding(use: TokenUse) -> list[Finding]:
    """Warn where no completion ends with a token that ends an answer (W517)."""
    if use.ended != 0 or not use.completions:
        return []
    text = (
        f"none of {use.completions:,} completions ends with {' or '.join(use.stops)}: a model "
        "that is trained on them does not learn to stop. Compare the chat template with "
        "eos_token_id in generation_config.json"
    )
    return [Finding("W517", text)]


def mixture_finding(account: DataReport) -> list[Finding]:
    """Warn where some rows went through the chat template and others did not (W519)."""
    if not (account.text_rows and account.chat_rows):
        return []
    text = (
        f"{account.text_rows:,} rows of plain text as it stands, and {account.chat_rows:,} rows "
        "that the chat template wrote; --chat lets it write all of them"
    )
    return [Finding("W519", text)]


def space_finding(account: DataReport) -> list[Finding]:
    """Warn where most prompts and answers meet without white space (W520)."""
    if account.touching_rows <= NOTABLE_TOUCHING * account.text_rows:
        return []
    text = (
        f"in {account.touching_rows:,} of {account.text_rows:,} rows of plain text; the model "
        "reads them as one word: end the prompts, or begin the answers, with a space or a line end"
    )
    return [Finding("W520", text)]


def cut_finding(cut: int, completions: int) -> list[Finding]:
    """Warn where many completions were cut (W511)."""
    if not completions or cut < NOTABLE_CUT * completions:
        return []
    text = f"{cut:,} of {completions:,} ({100 * cut / completions:.1f} %); raise the limit"
    return [Finding("W511", text)]
