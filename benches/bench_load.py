"""The server under load, faults and attacks; `make load` runs all of it.

    python benches/bench_load.py [SCENARIO …] [--quick] [--seconds 100] [--install] [--table]

The server has one core and one thread, the client another core. Requests arrive on an open loop:
at Poisson times drawn beforehand, and latency counts from the planned arrival. Capacity is the
rate of answers with four requests in flight. Policy and reference are Llamas with random weights,
of 6 layers × 384 with 50,257 words, and of 2 × 64 with 32,000 words where the time in the models
is of no interest; the small one also for `overload`, where it makes the server itself the limit.

Scenarios: overload (0.8 to 3 times the capacity), mixed (requests of 256 documents next to small
ones), same-scores (alone, in a batch, under load), baseline (plain FastAPI loops), cross-encoder
(sentence-transformers), stop (SIGTERM under load), kill (kill -9), connections (idle and slow
ones), memory, fuzz (schemathesis), network (no route), hostile (tests of hostile requests).
Without names all run: about 80 minutes, or 10 with --quick, which uses the small models only.
Rows are appended to results/load.jsonl, and `--table` shows the last ones as Markdown.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from load_baseline import baseline, cross_encoder
from load_faults import connections, kill, memory, stop
from load_figures import RESULTS, Record
from load_material import models
from load_overload import mixed, overload, same_scores
from load_security import fuzz, hostile, network, program
from load_server import claim_cores
from load_tables import latest, tables
from shared_material import STORIES3M, check_shared

LARGE, SMALL = "6x384-50k", "2x64-32k"
_QUICK_SECONDS = 8.0


@dataclass(frozen=True)
class Plan:
    """The sizes of a run.

    Attributes:
        seconds: Length of each load.
        shape: Models of the scenarios about time.
        signals: SIGTERMs.
        kills: Kills.
        requests: Requests of the memory scenario.
        cases: Cases of schemathesis.
    """

    seconds: float
    shape: str
    signals: int
    kills: int
    requests: int
    cases: int


def plan_of(given: argparse.Namespace) -> Plan:
    """Return the sizes that the flags ask for."""
    if given.quick:
        return Plan(given.seconds or _QUICK_SECONDS, SMALL, 4, 2, 500, 300)
    return Plan(given.seconds or 100.0, LARGE, 100, 10, 10_000, 20_000)


def scenarios(
    plan: Plan, given: argparse.Namespace, logs: Path, record: Record
) -> dict[str, Callable[[], None]]:
    """Return the scenarios by name."""
    seconds, short = plan.seconds, min(plan.seconds, 30)

    def large() -> Path:
        return models(given.folder, plan.shape)

    def small() -> Path:
        return models(given.folder, SMALL)

    def overloads() -> None:
        for shape in dict.fromkeys((SMALL, plan.shape)):
            overload(models(given.folder, shape), logs, record, seconds, shape)

    def crossed() -> None:
        if not given.install and find_spec("sentence_transformers") is None:
            print("cross-encoder: left out without --install", flush=True)
            return
        packages = Path(tempfile.gettempdir()) / "logratio-sentence-transformers"
        cross_encoder(large(), logs, record, short, plan.shape, packages)

    def fuzzed() -> None:
        if found := program(given.schemathesis, install=given.install):
            fuzz(small(), logs, record, plan.cases, SMALL, found)
        else:
            print("fuzz: left out without schemathesis (--install downloads it)", flush=True)

    return {
        "overload": overloads,
        "mixed": lambda: mixed(large(), logs, record, seconds, plan.shape),
        "same-scores": lambda: same_scores(large(), logs, record, seconds, plan.shape),
        "baseline": lambda: baseline(large(), logs, record, short, plan.shape),
        "cross-encoder": crossed,
        "stop": lambda: stop(small(), logs, record, plan.signals, SMALL),
        "kill": lambda: kill(small(), logs, record, plan.kills, SMALL),
        "connections": lambda: connections(
            small(), logs, record, short, SMALL, idle=2000, slow=200
        ),
        "memory": lambda: memory(small(), logs, record, plan.requests, SMALL),
        "fuzz": fuzzed,
        "network": lambda: network(small(), logs, record, SMALL),
        "hostile": lambda: hostile(record),
    }


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="default: all")
    parser.add_argument("--quick", action="store_true", help="short, with the small models")
    parser.add_argument("--seconds", type=float, help="length of each load; default: 100")
    parser.add_argument("--folder", type=Path, help="where models are kept for the next run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines")
    parser.add_argument("--schemathesis", help="path of the program")
    parser.add_argument(
        "--install", action="store_true", help="download schemathesis and sentence-transformers"
    )
    parser.add_argument("--table", action="store_true", help="only show the results")
    return parser.parse_args()


def main() -> None:
    """Run the scenarios."""
    given = parsed()
    if given.table:
        print(tables(latest(given.results, quick=given.quick)))
        return
    check_shared(STORIES3M)
    claim_cores()
    with tempfile.TemporaryDirectory() as temporary:
        given.folder = given.folder or Path(temporary)
        logs = Path(temporary) / "logs"
        logs.mkdir()
        record = Record(given.results, given.quick)
        known = scenarios(plan_of(given), given, logs, record)
        if unknown := set(given.scenarios) - known.keys():
            sys.exit(f"no scenario {', '.join(unknown)}: there are {', '.join(known)}")
        for name in given.scenarios or known:
            known[name]()
        print(tables(record.rows))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
