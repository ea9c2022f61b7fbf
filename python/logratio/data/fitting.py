"""Ids to a group that the rules allow: checked, and cut where the rules say so."""

from logratio.data.codes import CODES, Cut
from logratio.data.groups import TokenizedCompletion, TokenizedGroup, check_different
from logratio.data.records import CHOSEN, REJECTED, InvalidRecordError, Refusal, Source
from logratio.data.truncation import TokenizationRules, cut_prompt


class Fitting:
    """Checks and cuts ids, wherever they come from.

    Attributes:
        rules: Lengths, and what to cut.
        bos_id: The beginning-of-text token, if there is one.
        vocabulary_size: Ids are below it.
    """

    def __init__(self, rules: TokenizationRules, bos_id: int | None, vocabulary_size: int) -> None:
        self.rules = rules
        self.bos_id = bos_id
        self.vocabulary_size = vocabulary_size

    def prompt(self, ids: list[int], notes: list[str]) -> list[int]:
        """Return a prompt's ids as the rules allow them; W506 in `notes` where they were cut.

        Raises:
            InvalidRecordError: R305, E402, R304 or E304.
        """
        if not ids:
            raise InvalidRecordError("R305", CODES["R305"])
        if len(ids) > 1 and ids[0] == ids[1] == self.bos_id:
            raise InvalidRecordError("E402", "the text begins with two beginning-of-text tokens")
        fitted = cut_prompt(ids, self.rules, self.bos_id)
        if fitted is None:
            code = "E304" if self.rules.prompt_truncation == "error" else "R304"
            reason = f"the prompt has {len(ids)} tokens, the limit is {self.rules.prompt_budget}"
            raise InvalidRecordError(code, reason)
        if len(fitted) < len(ids):
            notes.append(Cut("W506", len(ids) - len(fitted)))
        return fitted

    def completion(
        self, role: str, ids: list[int], mask: list[int], prompt_length: int, notes: list[str]
    ) -> TokenizedCompletion:
        """Return a completion as the rules allow it; W503 in `notes` where it was cut.

        Raises:
            InvalidRecordError: R301 or R306.
        """
        if not any(mask):
            raise InvalidRecordError("R301", f"the {role} completion has no token")
        budget = self.rules.max_length - prompt_length
        if len(ids) > budget:
            notes.append(Cut("W503", len(ids) - budget))
            ids, mask = ids[:budget], mask[:budget]
            if not any(mask):
                raise InvalidRecordError("R306", f"the history of {role} leaves it no room")
        return TokenizedCompletion(role, ids, mask)

    def group(
        self, prompt: list[int], chosen: list[int], rejected: list[int], source: Source
    ) -> TokenizedGroup | Refusal:
        """Make a pair of ids from elsewhere; nothing is added to them.

        Returns:
            The group, or why it is refused: E402, E601, R301 to R305.
        """
        notes: list[str] = []
        try:
            for ids in (prompt, chosen, rejected):
                self._check(ids)
            prompt_ids = self.prompt(prompt, notes)
            completions = [
                self.completion(role, ids, [1] * len(ids), len(prompt_ids), notes)
                for role, ids in ((CHOSEN, chosen), (REJECTED, rejected))
            ]
            check_different(completions, notes)
        except InvalidRecordError as error:
            return Refusal(source, error.code, error.reason)
        return TokenizedGroup(prompt_ids, completions, source, notes)

    def _check(self, ids: list[int]) -> None:
        """Refuse ids that no row of an embedding answers to: on a GPU they end the process."""
        size = self.vocabulary_size
        wrong = next((value for value in ids if not 0 <= value < size), None)
        if wrong is not None:
            raise InvalidRecordError("E601", f"the token id {wrong} is not in 0 … {size - 1}")
