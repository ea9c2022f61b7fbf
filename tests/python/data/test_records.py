"""Properties of records."""

from logratio.data.records import Completion, PreferenceRecord, Source


def test_digest_knows_content_and_roles_only() -> None:
    def record(chosen: str, rejected: str, line: int) -> PreferenceRecord:
        pair = (Completion("chosen", chosen), Completion("rejected", rejected))
        return PreferenceRecord("p", pair, Source("f", line))

    one, same, swapped = record("a", "b", 1), record("a", "b", 2), record("b", "a", 3)
    assert one.digest() == same.digest() == swapped.digest(swapped=True)
    assert one.digest() != swapped.digest()
