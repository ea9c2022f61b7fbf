"""Measure whether the cost per pair is constant, and the gain of sharing prompts."""

import json
import sys
from typing import Any

from step_record import Spec
from step_rounds import run_script
from step_summary import steady_seconds

BATCH = 10
Row = dict[str, Any]


def cost_per_pair(record: Row, spec: Spec, material: Row) -> Row:
    """Return what a pair and a token cost in ours, after one update that does not count.

    A few pairs are not as long as many on average, so a token's cost is the fairer figure.
    """
    pairs, seconds = spec.batch * spec.measured, steady_seconds(record, spec.warmup)
    prompts, completions = material["prompt_tokens"], material["completion_tokens"]
    each = (sum(prompts) + sum(map(sum, completions))) / len(prompts)
    return {
        "arm": "ours",
        "device": record["device"],
        "measured_pairs": pairs,
        "seconds_per_pair": seconds / pairs,
        "tokens_per_pair": each,
        "microseconds_per_token": 1e6 * seconds / (pairs * each),
        "seconds": record["seconds"],
        "memory": record["memory"],
    }


def sharing(spec: Spec, model: str, rounds: int) -> Row:
    """Run `step_sharing.py` on the material; return its row."""
    key = (spec.device, spec.precision, str(spec.threads), str(rounds))
    arguments = [spec.material, model, *key]
    row: Row = json.loads(run_script(sys.executable, "step_sharing.py", arguments, spec.threads))
    return row
