"""Tokenize records: the only place that decides chat template, BOS, EOS, boundary, truncation.

Training, the reference cache and serving all use this module, so a completion has the same ids
everywhere.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from logratio._rust import EncodedPairs, PairRules
from logratio.data import conversations
from logratio.data.conversations import as_chat
from logratio.data.records import (
    CANDIDATE,
    CODES,
    Completion,
    InvalidRecordError,
    Message,
    PreferenceRecord,
    Refusal,
    Source,
)
from logratio.data.tokenization.chat_template import ChatTemplate
from logratio.data.tokenization.groups import (
    Fitting,
    TokenizationRules,
    TokenizedCompletion,
    TokenizedGroup,
    check_different,
)
from logratio.data.tokenization.rendering import (
    AS_TEXT,
    UNWRAPPED,
    Markers,
    Script,
    chat_script,
    plain_script,
)
from logratio.data.tokenization.tokenizer_files import TokenizerFiles, read_tokenizer, splitting
from logratio.data.tokenization.word_cache import PieceEncoder
from logratio.errors import ConfigError
from logratio.validation import PATH, check_argument

_HEADERS = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|turn>|\[/?INST\]|<\|START_OF_TURN_TOKEN\|>"
    r"|<\|(?:user|assistant|system|User|Assistant)\|>|<\uff5c(?:User|Assistant)\uff5c>"
)
"""Headers that common chat templates write before a turn."""


def text_notes(record: PreferenceRecord, spelled: re.Pattern[str] | None) -> list[str]:
    """Return the warnings about a record's text.

    Args:
        record: The record, before a chat template adds special tokens.
        spelled: Matches special tokens; see `special_pattern`.

    Returns:
        Those of W501, W504, W505 and W523 that apply.
    """
    texts = list(record.texts())
    notes = []
    if spells(record, spelled):
        notes.append("W501")
    if record.prompt == "":
        notes.append("W504")
    if any("\0" in text for text in texts):
        notes.append("W505")
    if is_rendered(record):
        notes.append("W523")
    return notes


def is_rendered(record: PreferenceRecord) -> bool:
    """Return whether a message of a record contains the markup of a common chat template."""
    return record.is_chat and any(map(_HEADERS.search, record.texts()))


def spells(record: PreferenceRecord, spelled: re.Pattern[str] | None) -> bool:
    """Return whether a record's text contains a special token."""
    return spelled is not None and any(map(spelled.search, record.texts()))


def special_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return a pattern of all special tokens, longest first, or None if there are none."""
    added = tokenizer.get_added_tokens_decoder().values()
    special = sorted((token.content for token in added if token.special), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, special))) if special else None


def are_seen_as_ids(tokenizer: Tokenizer) -> bool:
    """Return whether a special token in a text always becomes its id, never part of another."""
    added = tokenizer.get_added_tokens_decoder().values()
    special = [token.content for token in added if token.special]
    return not any(
        content in token.content and content != token.content
        for token in added
        for content in special
    )


@dataclass(frozen=True, slots=True)
class Tail:
    """The ids of a completion, after a prompt.

    Attributes:
        ids: All tokens.
        mask: Weight of each token's log-prob; 0: not trained.
        moved: Whether joint tokenization would have moved the boundary of the prompt (W502).
    """

    ids: list[int]
    mask: list[float]
    moved: bool


def tails_of(
    script: Script,
    running: Sequence[list[int]],
    encoder: PieceEncoder,
) -> Iterator[Tail]:
    """Cut each completion's ids from the ids of the whole text.

    A tokenizer may merge the end of the prompt with the beginning of the answer. The prompt's ids
    must not depend on the answer, so such an answer is encoded separately.

    Args:
        script: The record as text.
        running: Ids of each of the script's running texts, without added special tokens.
        encoder: The encoder that produced them.
    """
    prompt, *rest = running
    texts = iter(rest)
    for pieces in script.completions:
        moved = False
        ids: list[int] = []
        mask: list[float] = []
        before, text = prompt, script.prompt
        for piece, whole in zip(pieces, islice(texts, len(pieces)), strict=True):
            if _is_stable(before, whole, text, piece.text, encoder):
                own = whole[len(before) :]
            else:
                own = encoder.encode([piece.text])[0]
                moved = True
            ids += own
            mask += [piece.weight] * len(own)
            before, text = whole, text + piece.text
        yield Tail(ids, mask, moved)


def _is_stable(
    before: list[int], whole: list[int], text: str, more: str, encoder: PieceEncoder
) -> bool:
    """Return whether the tokens of a text stay the same when more text follows."""
    if whole[: len(before)] != before:
        return False
    if not before or before[-1] != encoder.unknown_id:
        return True
    return encoder.end_of(text + more, len(before)) <= len(text)


NO_TEMPLATE = (
    "the row holds messages, but the tokenizer has no chat template: put chat_template.jinja into "
    "its folder"
)
Prompt = str | Sequence[Message]
"""Text, or the turns of a chat before the assistant's answer."""

_HERE = Source("this record", 0)


class PreferenceTokenizer:
    """Tokenizes records under one set of rules.

    Attributes:
        rules: Lengths, truncation, whether to append EOS, and the date in the chat template.
        reads_date: Whether the ids depend on the rules' date.
        has_given_date: Whether the caller's rules contained the date.
        files: The parsed files of the tokenizer's folder.
        chat_template: The template's text, or None.
        digest: Hex; equal digests and rules give equal ids.
        bos_id: The beginning-of-text token, or None.
        eos_id: The end-of-text token, or None.
        stop_ids: Tokens that end an answer, in ascending order: the tokenizer's EOS, those in
            generation_config.json and config.json, and the one that the chat template writes after
            an answer.
        closing_ids: The ids that the chat template writes after an answer, from the stop token
            on, possibly with white space. Empty if it writes no such token.
        pad_id: The padding token. The default is EOS, then 0.
        vocabulary_size: The largest id plus one.
        fitting: Checks and truncates ids.
        takes_pairs: Whether `encode_pairs` may be called.

    Example:
        >>> tokenizer = PreferenceTokenizer.load("model", TokenizationRules(max_length=512))
        >>> prompt = [{"role": "user", "content": "2 + 2?"}]
        >>> group = tokenizer.encode_completions(prompt, ["4", "5"])
        >>> [completion.ids for completion in group.completions]  # lists of token ids
    """

    def __repr__(self) -> str:
        template = "a chat template" if self.chat_template is not None else "no chat template"
        return (
            f"PreferenceTokenizer({self.vocabulary_size:,} ids, {template}, "
            f"max_length={self.rules.max_length})"
        )

    def __init__(self, files: TokenizerFiles, rules: TokenizationRules) -> None:
        """Compile the chat template and the rules.

        Args:
            files: The parsed files of the tokenizer's folder.
            rules: Lengths, truncation, EOS and date.

        Raises:
            ValueError: The chat template is malformed, or the rules append EOS but the tokenizer
                has none.
        """
        self._template: ChatTemplate | None = None
        if files.chat_template is not None:
            self._template = ChatTemplate(files.chat_template, files.special_tokens, rules.date)
        self.has_given_date = rules.date is not None
        self.reads_date = self._template is not None and self._template.reads_date
        self.rules = rules = replace(rules, date=self._template.date if self._template else None)
        self.files = files
        self.chat_template = files.chat_template
        self.digest = files.digest
        self.bos_id = files.id_of("bos_token")
        self.eos_id = files.id_of("eos_token")
        pad_id = files.id_of("pad_token")
        self.pad_id = pad_id if pad_id is not None else self.eos_id or 0
        self._tokenizer = files.tokenizer
        self._chats = self._plain = PieceEncoder(files.tokenizer, files.settings)
        if rules.split_special_tokens:
            self._plain = PieceEncoder(splitting(files.tokenizer), files.settings)
        self.vocabulary_size = max(self._tokenizer.get_vocab().values()) + 1
        self._opening_ids = list(files.opening_ids)
        self._eos_token = files.special_tokens.get("eos_token")
        self._spelled = special_pattern(files.tokenizer)
        self.closing_ids = self._closing_ids()
        own = () if self.eos_id is None else (self.eos_id,)
        self.stop_ids = tuple(sorted({*files.stop_ids, *own, *self.closing_ids[:1]}))
        self.fitting = Fitting(rules, self.bos_id, self.vocabulary_size)
        self._ending: list[int] = []
        if rules.append_eos:
            if self.eos_id is None:
                raise ConfigError("the tokenizer names no eos_token: give --no-eos")
            self._ending = [self.eos_id]
        exact = self._plain.is_exact and are_seen_as_ids(files.tokenizer)
        self.takes_pairs = exact and not self.wraps_text
        self._pair_rules = PairRules(
            opening=self._opening_ids,
            ending=self.eos_id if self._ending else None,
            bos=self.bos_id,
            eos=self.eos_id,
            special=[] if rules.split_special_tokens else [*self.special_ids().values()],
            prompt_budget=rules.prompt_budget,
            max_length=rules.max_length,
        )

    @classmethod
    def load(
        cls,
        folder: Path | str,
        rules: TokenizationRules | None = None,
        chat_template: str | None = None,
    ) -> "PreferenceTokenizer":
        """Load a tokenizer's folder.

        Args:
            folder: Folder with ``tokenizer.json``, usually ``tokenizer_config.json``, and
                ``chat_template.jinja`` unless the config contains the template.
            rules: Lengths, truncation, EOS and date. None: the defaults.
            chat_template: Replaces the folder's template.

        Raises:
            OSError: The folder or its ``tokenizer.json`` is missing or cannot be read.
            SettingTypeError: `folder` is not a path.
            ValueError: A file is malformed, or a special token is missing.
        """
        check_argument("folder", PATH, folder)
        return cls(read_tokenizer(Path(folder), chat_template), rules or TokenizationRules())

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Encode a prompt, which has the same ids for all its completions.

        Args:
            prompt: Text, or the turns of a chat.

        Returns:
            The prompt's token ids.

        Raises:
            InvalidRecordError: The prompt is empty or too long, or the template refuses it.
        """
        return self._encode_one(_candidates(prompt, [])).prompt_ids

    def encode_completion(self, prompt: Prompt, completion: str) -> list[int]:
        """Encode a completion of a prompt.

        Args:
            prompt: Text, or the turns of a chat.
            completion: The text of the answer.

        Returns:
            The ids that are scored, including EOS or the template's end of turn.

        Raises:
            InvalidRecordError: The prompt or the completion is refused.
        """
        return self.encode_completions(prompt, [completion]).completions[0].ids

    def encode_completions(self, prompt: Prompt, completions: Sequence[str]) -> TokenizedGroup:
        """Encode a prompt with several completions in one batch.

        Args:
            prompt: Text, or the turns of a chat; then each completion is the assistant's next turn.
            completions: The texts of the answers.

        Returns:
            The ids of the prompt and of each completion, in order.

        Raises:
            InvalidRecordError: The prompt or a completion is refused.
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
            For each record its group, or its refusal: E401 to E404, R301 to R306.
        """
        records = [self._as_read(record) for record in records]
        scripts = [self._script(record) for record in records]
        texts = [
            list(script.running_texts()) if isinstance(script, Script) else [] for script in scripts
        ]
        plain = iter(self._plain.encode(_texts_of(records, texts, is_chat=False)))
        chats = iter(self._chats.encode(_texts_of(records, texts, is_chat=True)))
        return [
            script
            if isinstance(script, Refusal)
            else self._group(
                record, script, list(islice(chats if record.is_chat else plain, len(own)))
            )
            for record, script, own in zip(records, scripts, texts, strict=True)
        ]

    def encode_pairs(self, columns: Sequence[Any]) -> EncodedPairs:
        """Encode many pairs of plain text at once, with the same ids as `encode_records`.

        Rows with a warning, refusal or truncation are marked `odd` and not encoded: pass them to
        `encode_records`. Requires `takes_pairs`.

        Args:
            columns: Prompts, chosen and rejected: lists of strings, or the UTF-8 bytes (uint8) and
                the offsets (int64) of string arrays.
        """
        return self._plain.encode_pairs(columns, self._pair_rules)

    def special_ids(self) -> dict[str, int]:
        """Return the id of each special token, by its text."""
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {token.content: number for number, token in added if token.special}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Decode token ids to text."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def _closing_ids(self) -> tuple[int, ...]:
        """Return the ids that the chat template writes after an answer, from its stop token on."""
        closing = self._template.closing() if self._template else ""
        added = self._tokenizer.get_added_tokens_decoder()
        ids = self._tokenizer.encode(closing, add_special_tokens=False).ids if closing else []
        start = next((place for place, number in enumerate(ids) if number in added), len(ids))
        return tuple(ids[start:])

    def _encode_one(self, record: PreferenceRecord) -> TokenizedGroup:
        """Encode a record from a caller rather than a file; raise its refusal."""
        try:
            "".join(record.texts()).encode()
        except UnicodeEncodeError:
            raise InvalidRecordError("E104", CODES["E104"]) from None
        group = self.encode_record(record)
        if isinstance(group, Refusal):
            raise InvalidRecordError(group.code, group.reason)
        return group

    @property
    def wraps_text(self) -> bool:
        """Whether plain text goes through the chat template."""
        return self.rules.text_as == "chat"

    @property
    def bypasses_template(self) -> bool:
        """Whether plain text bypasses the chat template by default (W518)."""
        return self.chat_template is not None and self.rules.text_as is None

    def _as_read(self, record: PreferenceRecord) -> PreferenceRecord:
        return as_chat(record) if self.wraps_text and not record.is_chat else record

    def _script(self, record: PreferenceRecord) -> Script | Refusal:
        try:
            if not record.is_chat:
                return plain_script(record)
            if self.rules.split_special_tokens and spells(record, self._spelled):
                raise InvalidRecordError("R307", CODES["R307"])
            if self._template is None:
                raise InvalidRecordError("E401", NO_TEMPLATE)
            self._markers.check(record.texts(), UNWRAPPED if self.wraps_text else AS_TEXT)
            return chat_script(record, self._template, self._eos_token)
        except InvalidRecordError as error:
            return Refusal(record.source, error.code, error.reason)

    @cached_property
    def _markers(self) -> Markers:
        assert self._template is not None
        tokens = self.files.special_tokens
        return Markers(self._template, [tokens.get(f"{name}_token", "") for name in ("bos", "eos")])

    def _group(
        self, record: PreferenceRecord, script: Script, running: list[list[int]]
    ) -> TokenizedGroup | Refusal:
        """Assemble the ids of a record.

        Args:
            record: The record.
            script: The record as text.
            running: Ids of each of the script's running texts.
        """
        encoder = self._chats if record.is_chat else self._plain
        # A template ends its turn itself; a single step does not end.
        ends_itself = record.is_chat or not record.ends
        notes = text_notes(record, None if self.rules.split_special_tokens else self._spelled)
        notes += script.notes
        try:
            prompt_ids = self._prompt_ids(running[0], record.is_chat, notes)
            completions = [
                self._completion(completion, tail, prompt_ids, notes, ends_itself)
                for completion, tail in zip(
                    record.completions, tails_of(script, running, encoder), strict=True
                )
            ]
            check_different(completions, notes)
        except InvalidRecordError as error:
            return Refusal(record.source, error.code, error.reason)
        return TokenizedGroup(prompt_ids, completions, record.source, notes)

    def _prompt_ids(self, ids: list[int], is_chat: bool, notes: list[str]) -> list[int]:
        """Prepend BOS as the tokenizer would, but never twice, and truncate."""
        opening = self._opening_ids
        if not is_chat and ids[: len(opening)] != opening:
            ids = opening + ids
        return self.fitting.prompt(ids, notes)

    def _completion(
        self,
        completion: Completion,
        tail: Tail,
        prompt_ids: list[int],
        notes: list[str],
        ends_itself: bool,
    ) -> TokenizedCompletion:
        """Append EOS to a completion, then truncate: a truncated completion has no EOS."""
        ids, mask, role = tail.ids, tail.mask, completion.role
        if not any(mask):
            raise InvalidRecordError("R301", f"the {role} completion has no token")
        if self._ending and not ends_itself and ids[-1:] != self._ending:
            ids, mask = ids + self._ending, [*mask, 1]
        if ids[-2:] == [self.eos_id] * 2:
            raise InvalidRecordError("E402", f"the {role} completion ends with two EOS tokens")
        if prompt_ids == [self.bos_id] and ids[0] == self.bos_id:
            raise InvalidRecordError("E402", "the text begins with two beginning-of-text tokens")
        if tail.moved:
            notes.append("W502")
        return self.fitting.completion(completion, ids, mask, len(prompt_ids), notes)


def _texts_of(
    records: Sequence[PreferenceRecord], texts: Sequence[list[str]], *, is_chat: bool
) -> list[str]:
    pairs = zip(records, texts, strict=True)
    return [text for record, own in pairs if record.is_chat is is_chat for text in own]


def _candidates(prompt: Prompt, completions: Sequence[str]) -> PreferenceRecord:
    if isinstance(prompt, str):
        plain = tuple(Completion(CANDIDATE, text) for text in completions)
        return PreferenceRecord(prompt, plain, _HERE)
    turns = tuple(
        Completion(CANDIDATE, ({"role": "assistant", "content": text},), ()) for text in completions
    )
    return PreferenceRecord(conversations.prompt(prompt, "prompt"), turns, _HERE)
