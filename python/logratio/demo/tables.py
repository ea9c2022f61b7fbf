"""The demo's numbers as rows of words, for the terminal, the picture and `demo.json`."""

from dataclasses import asdict
from typing import Any

import numpy as np

from logratio.demo.run import DemoResult, Judged


def summary(result: DemoResult) -> dict[str, Any]:
    """Return the table's numbers, for `demo.json` and the tests."""
    return {
        "win_rate": result.win_rate,
        "sft_rule": float(result.sft.rewards.mean()),
        "dpo_rule": float(result.dpo.rewards.mean()),
        "evaluation": result.evaluation.to_dict(),
        "best_of": [asdict(row) for row in result.best_of],
        "seconds": result.seconds,
    }


def rows(result: DemoResult) -> list[tuple[str, str, str]]:
    """Return the comparison's rows: what, SFT model, DPO policy."""
    evaluation, kl = result.evaluation, result.evaluation.kl
    assert kl is not None
    accuracy = f"{evaluation.accuracy:.3f} ± {1.96 * evaluation.accuracy_standard_error:.3f}"
    return [
        ("hidden rule, mean score", _mean(result.sft), _mean(result.dpo)),
        ("win rate by the rule", "0.500", f"{result.win_rate:.3f}"),
        ("preference accuracy", "0.500 (ties)", accuracy),
        ("reward margin", "0", f"{evaluation.margin:.3f}"),
        ("KL to the reference, nats", "0", f"{kl.nats:.2f} ± {1.96 * kl.standard_error:.2f}"),
        ("mean length, words", _length(result.sft), _length(result.dpo)),
    ]


def best_of_rows(result: DemoResult) -> list[tuple[str, str, str, str]]:
    """Return best-of-N's rows: N, chosen by the reward, at random, by the rule itself."""
    return [
        (
            f"best of {row.n}",
            f"{row.reward:.2f} ± {1.96 * row.standard_error:.2f}",
            f"{row.random:.2f}",
            f"{row.oracle:.2f}",
        )
        for row in result.best_of
    ]


def _mean(judged: Judged) -> str:
    error = judged.rewards.std(ddof=1) / np.sqrt(len(judged.rewards))
    return f"{judged.rewards.mean():.2f} ± {1.96 * error:.2f}"


def _length(judged: Judged) -> str:
    return f"{judged.lengths.mean():.1f}"
