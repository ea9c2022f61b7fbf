"""Text to ids. The one place that decides chat template, BOS, EOS, prompt boundary, truncation.

Training, the reference cache and serving all come through here, so a completion has the same ids
wherever it is scored.
"""

from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path

from logratio.data import conversations
from logratio.data.boundary import Tail, tails_of
from logratio.data.chat import ChatTemplate
from logratio.data.codes import CODES, Cut
from logratio.data.groups import TokenizedCompletion, TokenizedGroup, check_different
from logratio.data.notes import special_pattern, text_notes
from logratio.data.records import (
    CANDIDATE,
    Completion,
    InvalidRecordError,
    Message,
    PreferenceRecord,
    Refusal,
    Source,
)
from logratio.data.scripts import Script, chat_script, plain_script
from logratio.data.tokenizer_files import TokenizerFiles, read_tokenizer
from logratio.data.truncation import TokenizationRules, cut_prompt

__all__ = [
    "PreferenceTokenizer",
    "TokenizationRules",
    "TokenizedCompletion",
    "TokenizedGroup",
]

NO_TEMPLATE = (
    "the row holds messages and the tokenizer has no chat template: put chat_template.jinja into "
    "its folder, or give one"
)
Prompt = str | Sequence[Message]
"""Text, or the turns of a chat that ask the assistant to speak."""

_HERE = Source("this record", 0)


class PreferenceTokenizer:
    """Turns records into ids under one set of rules.

    Attributes:
        rules: Lengths, what to cut, whether to append EOS.
        chat_template: The template's text, or None.
        digest: Hex; equal digests and rules give equal ids.
        bos_id: The beginning-of-text token, if the folder names one.
        eos_id: The end-of-text token, if the folder names one.
        pad_id: The padding token; EOS, else 0, where the folder names none.
        vocabulary_size: The largest id plus one.
    """

    def __init__(self, files: TokenizerFiles, rules: TokenizationRules) -> None:
        """Use a tokenizer under rules.

        Raises:
            ValueError: The chat template is malformed, or the rules append a token that the
                tokenizer does not have.
        """
        self.rules = rules
        self.chat_template = files.chat_template
        self.digest = files.digest
        self.bos_id = files.id_of("bos_token")
        self.eos_id = files.id_of("eos_token")
        pad_id = files.id_of("pad_token")
        self.pad_id = pad_id if pad_id is not None else self.eos_id or 0
        self._tokenizer = files.tokenizer
        self.vocabulary_size = max(self._tokenizer.get_vocab().values()) + 1
        self._opening_ids = list(files.opening_ids)
        self._eos_token = files.special_tokens.get("eos_token")
        self._spelled = special_pattern(files.tokenizer)
        self._template: ChatTemplate | None = None
        if files.chat_template is not None:
            self._template = ChatTemplate(files.chat_template, files.special_tokens)
        self._ending: list[int] = []
        if rules.append_eos:
            if self.eos_id is None:
                raise ValueError("the tokenizer names no eos_token: set append_eos to False")
            self._ending = [self.eos_id]

    @classmethod
    def load(
        cls,
        folder: Path | str,
        rules: TokenizationRules | None = None,
        chat_template: str | None = None,
    ) -> "PreferenceTokenizer":
        """Load a tokenizer's folder.

        Args:
            folder: Holds ``tokenizer.json``, usually ``tokenizer_config.json``, and
                ``chat_template.jinja`` if the template is not in the latter.
            rules: None: the default rules.
            chat_template: Replaces the folder's own template.

        Raises:
            OSError: The folder or its ``tokenizer.json`` is missing or cannot be read.
            ValueError: A file is malformed, or a special token is missing.
        """
        return cls(read_tokenizer(Path(folder), chat_template), rules or TokenizationRules())

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Encode a prompt alone, as every completion of it sees it.

        Raises:
            InvalidRecordError: It is too long for the rules, empty, or the template refuses it.
        """
        return self._encode_one(_candidates(prompt, [])).prompt_ids

    def encode_completion(self, prompt: Prompt, completion: str) -> list[int]:
        """Encode a completion as it follows a prompt: the ids that are scored.

        Raises:
            InvalidRecordError: The prompt or the completion cannot be taken.
        """
        return self.encode_completions(prompt, [completion]).completions[0].ids

    def encode_completions(self, prompt: Prompt, completions: Sequence[str]) -> TokenizedGroup:
        """Encode a prompt and completions of it that are to be compared, in one go.

        Args:
            prompt: Text, or the turns of a chat; then each completion is the assistant's next.
            completions: The candidates.

        Raises:
            InvalidRecordError: The prompt or a completion cannot be taken.
        """
        if any(not completion.strip() for completion in completions):
            raise InvalidRecordError("R301", "a completion is empty")
        return self._encode_one(_candidates(prompt, completions))

    def encode_record(self, record: PreferenceRecord) -> TokenizedGroup | Refusal:
        """Encode one record; see `encode_records`."""
        return self.encode_records([record])[0]

    def encode_records(self, records: Sequence[PreferenceRecord]) -> list[TokenizedGroup | Refusal]:
        """Encode records in one parallel batch.

        Returns:
            For each record its group, or why it is refused: E401 to E404, R301 to R306.
        """
        scripts = [self._script(record) for record in records]
        texts = [
            list(script.running_texts()) if isinstance(script, Script) else [] for script in scripts
        ]
        ids = iter(self._encode(list(chain.from_iterable(texts))))
        return [
            script
            if isinstance(script, Refusal)
            else self._group(record, script, list(islice(ids, len(own))))
            for record, script, own in zip(records, scripts, texts, strict=True)
        ]

    def special_ids(self) -> dict[str, int]:
        """Return the tokenizer's special tokens: text to id."""
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {token.content: number for number, token in added if token.special}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Turn ids back into text."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def _encode_one(self, record: PreferenceRecord) -> TokenizedGroup:
        """Encode what a caller, and no file, brought."""
        try:
            "".join(record.texts()).encode()
        except UnicodeEncodeError:
            raise InvalidRecordError("E104", CODES["E104"]) from None
        group = self.encode_record(record)
        if isinstance(group, Refusal):
            raise InvalidRecordError(group.code, group.reason)
        return group

    def _script(self, record: PreferenceRecord) -> Script | Refusal:
        try:
            if not record.is_chat:
                return plain_script(record)
            if self._template is None:
                raise InvalidRecordError("E401", NO_TEMPLATE)
            return chat_script(record, self._template, self._eos_token)
        except InvalidRecordError as error:
            return Refusal(record.source, error.code, error.reason)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _group(
        self, record: PreferenceRecord, script: Script, running: list[list[int]]
    ) -> TokenizedGroup | Refusal:
        """Put a record's ids together.

        Args:
            record: The record.
            script: Its text.
            running: Ids of each of the script's running texts.
        """
        notes = text_notes(record, self._spelled)
        try:
            prompt_ids = self._prompt_ids(running[0], record.is_chat, notes)
            completions = [
                self._completion(completion.role, tail, prompt_ids, notes, record.is_chat)
                for completion, tail in zip(
                    record.completions, tails_of(script, running, self._encode_own), strict=True
                )
            ]
            check_different(completions, notes)
        except InvalidRecordError as error:
            return Refusal(record.source, error.code, error.reason)
        return TokenizedGroup(prompt_ids, completions, record.source, notes)

    def _encode_own(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _prompt_ids(self, ids: list[int], is_chat: bool, notes: list[str]) -> list[int]:
        """Open a prompt with BOS as the tokenizer itself would, never twice, and fit it."""
        opening = self._opening_ids
        if not is_chat and ids[: len(opening)] != opening:
            ids = opening + ids
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

    def _completion(
        self, role: str, tail: Tail, prompt_ids: list[int], notes: list[str], ends_itself: bool
    ) -> TokenizedCompletion:
        """End a completion with EOS, or cut it: then it has not ended."""
        ids, mask = tail.ids, tail.mask
        if not any(mask):
            raise InvalidRecordError("R301", f"the {role} completion has no token")
        if self._ending and not ends_itself and ids[-1:] != self._ending:
            ids, mask = ids + self._ending, [*mask, 1]
        if ids[-2:] == [self.eos_id] * 2:
            raise InvalidRecordError("E402", f"the {role} completion ends with two EOS tokens")
        if prompt_ids == [self.bos_id] and ids[0] == self.bos_id:
            raise InvalidRecordError("E402", "the text begins with two beginning-of-text tokens")
        budget = self.rules.max_length - len(prompt_ids)
        if len(ids) > budget:
            notes.append(Cut("W503", len(ids) - budget))
            ids, mask = ids[:budget], mask[:budget]
            if not any(mask):
                raise InvalidRecordError("R306", f"the history of {role} leaves it no room")
        if tail.moved:
            notes.append("W502")
        return TokenizedCompletion(role, ids, mask)


def _candidates(prompt: Prompt, completions: Sequence[str]) -> PreferenceRecord:
    if isinstance(prompt, str):
        plain = tuple(Completion(CANDIDATE, text) for text in completions)
        return PreferenceRecord(prompt, plain, _HERE)
    turns = tuple(
        Completion(CANDIDATE, ({"role": "assistant", "content": text},), ()) for text in completions
    )
    return PreferenceRecord(conversations.prompt(prompt, "prompt"), turns, _HERE)
