"""Real files: every layout of the same pairs gives the same records; others lose nothing."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from logratio.data.formats import Decoded, Decoder, FormatSettings, detect
from logratio.data.records import InvalidRecordError, PreferenceRecord, Source, Text

pytestmark = pytest.mark.shared
Said = tuple[str, str, str]
"""Return the last question, the better and the worse answer, stripped."""

FORMATS = {
    "anthropic_hh": "hh",
    "kto_unpaired": "kto",
    "llamafactory_alpaca": "alpaca",
    "llamafactory_kto": "kto-chat",
    "llamafactory_sharegpt": "sharegpt",
    "ms_swift_messages": "ms-swift",
    "nemo_aligner": "nemo-aligner",
    "nemo_rl_ranked": "ranked",
    "openai_dpo": "openai",
    "orca_pairs": "orca",
    "ranked_ab": "ab",
    "shp": "shp",
    "stack_exchange_paired": "stack-exchange",
    "step_dpo": "step-dpo",
    "text_score": "text-score",
    "trl_conversational": "trl-chat",
    "trl_conversational_implicit": "trl-chat-implicit",
    "trl_standard": "trl",
    "ultrafeedback_binarized": "ultrafeedback",
}
LABELS = {"ranked_ab": "preference: 1=output_1 2=output_2"}
LAST_ONLY = {"ranked_ab", "stack_exchange_paired"}  # layouts without room for a history


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".gz":
        return [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if path.suffix == ".json" else map(json.loads, text.splitlines())
    return list(rows)


def decode(path: Path, **settings: Any) -> list[Decoded | InvalidRecordError]:
    decoder = Decoder(FormatSettings(**settings))
    results: list[Decoded | InvalidRecordError] = []
    for line, row in enumerate(read(path), 1):
        try:
            results.append(decoder.decode(row, Source(path.name, line)))
        except InvalidRecordError as error:
            results.append(error)
    return results


def records(path: Path, **settings: Any) -> list[PreferenceRecord]:
    found = decode(path, **settings)
    assert all(isinstance(one, Decoded) for one in found)
    return [record for one in found if isinstance(one, Decoded) for record in one.records]


def turns_of(text: Text) -> list[str]:
    """Return the words of each turn, from plain text or messages."""
    if isinstance(text, tuple):
        return [turn["content"].strip() for turn in text if turn["role"] != "system"]
    names = f"\n\n{text}".replace("\n\nAssistant:", "\n\nHuman:").split("\n\nHuman:")
    return [said.strip() for said in names if said.strip()]


def said(record: PreferenceRecord) -> Said:
    prompt = turns_of(record.prompt)
    if len(prompt) == 1 and isinstance(record.prompt, tuple):
        prompt = turns_of(prompt[0])  # SHP's post contains the whole transcript
    good, bad = (
        side.answer.strip() if isinstance(side.answer, str) else " ".join(turns_of(side.answer))
        for side in record.completions
    )
    return "\n".join(prompt), good, bad


def pairs_of_thumbs(found: list[PreferenceRecord]) -> list[Said]:
    """Pair the good and the bad answer to a question again."""
    pairs = []
    for good, bad in zip(found[::2], found[1::2], strict=True):
        assert good.prompt == bad.prompt
        assert [one.completions[0].role for one in (good, bad)] == ["chosen", "rejected"]
        both = PreferenceRecord(good.prompt, (good.completions[0], bad.completions[0]), good.source)
        pairs.append(said(both))
    return pairs


@pytest.fixture(scope="module")
def expected(shared: Path) -> list[Said]:
    found = [said(record) for record in records(shared / "data/formats/trl_conversational.jsonl")]
    assert len(set(found)) == 48
    return found


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"step_dpo"}))
def test_every_layout_holds_the_same_pairs(shared: Path, expected: list[Said], name: str) -> None:
    path = shared / f"data/formats/{name}.jsonl"
    found = records(path, label=LABELS.get(name))
    if name in ("kto_unpaired", "llamafactory_kto"):
        assert len(found) == 96
        assert pairs_of_thumbs(found) == expected
    elif name == "orca_pairs":
        assert len(found) == 12
        assert [said(one) for one in found] == [one for one in expected if one[0].count("\n") == 0]
        assert {one.prompt[0]["role"] for one in found if isinstance(one.prompt, tuple)} == {
            "system"
        }
    elif name in LAST_ONLY:
        last = [(question.split("\n")[-1], good, bad) for question, good, bad in expected]
        theirs = [(one[0].split("\n")[-1], *one[1:]) for one in map(said, found)]
        assert theirs == last
    else:
        assert [said(one) for one in found] == expected


@pytest.mark.parametrize("name", FORMATS)
def test_advice_about_each_layout(shared: Path, name: str) -> None:
    rows = read(shared / f"data/formats/{name}.jsonl")
    known = detect(rows, FormatSettings(label=LABELS.get(name)))
    assert (known.format, dict(known.counts)) == (FORMATS[name], {FORMATS[name]: len(rows)})
    assert not known.refused
    if name in LABELS:
        untold = detect(rows)
        assert untold.format is None
        assert f"--label '{LABELS[name]}'" in untold.reason


def test_steps(shared: Path) -> None:
    first, *_ = found = records(shared / "data/formats/step_dpo.jsonl")
    assert len(found) == 48
    assert all(not one.ends for one in found)
    rows = read(shared / "data/formats/step_dpo.jsonl")
    for row, record in zip(rows, found, strict=True):
        for side, whole in zip(record.completions, ("full_chosen", "full_rejected"), strict=True):
            assert row[whole].startswith(f"{side.context}{side.answer}")
    assert str(first.completions[0].context).endswith("$5p+e=1.82$.\n")
    benched = decode(shared / "data/prmbench_steps.jsonl")
    assert len(benched) == 1500
    refused = Counter(one.code for one in benched if isinstance(one, InvalidRecordError))
    assert refused == {"R301": 12}  # the better solution ends where the worse one continues
    firsts = {
        (str(record.prompt), *((side.context, side.answer) for side in record.completions))
        for one in benched
        if isinstance(one, Decoded)
        for record in one.records
    }
    same = [
        (str(record.prompt), *((side.context, side.answer) for side in record.completions))
        for record in found
    ]
    assert set(same) <= firsts


def test_transcripts(shared: Path) -> None:
    found = decode(shared / "data/hh/harmless-base.test.jsonl.gz")
    assert len(found) == 2312
    refused = [line for line, one in enumerate(found, 1) if isinstance(one, InvalidRecordError)]
    assert refused == [87, 517, 926, 1104]
    differ = [
        one.records[0].source.line
        for one in found
        if isinstance(one, Decoded) and any(side.context for side in one.records[0].completions)
    ]
    assert differ == [1255, 1689, 1951, 1953, 2037]


@pytest.mark.parametrize(
    ("name", "count", "roles"),
    [
        ("llamafactory/dpo_en_demo.json", 300, {"chosen": 300, "rejected": 300}),
        ("llamafactory/kto_en_demo.json", 300, {"chosen": 150, "rejected": 150}),
        ("llamafactory/v1_dpo_demo.jsonl", 10, {"chosen": 10, "rejected": 10}),
        ("story_prefs.jsonl", 863, {"chosen": 863, "rejected": 863}),
    ],
)
def test_other_files(shared: Path, name: str, count: int, roles: dict[str, int]) -> None:
    found = records(shared / "data" / name)
    assert len(found) == count
    assert Counter(side.role for one in found for side in one.completions) == roles
    assert all(one.is_chat == name.startswith("llamafactory") for one in found)
