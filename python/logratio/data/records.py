"""Records of text (a prompt and its completions), and the codes of refusals and warnings."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from logratio.errors import LogratioError

CODES: dict[str, str] = {
    "E101": "malformed JSON",
    "E102": "the file ends inside a record",
    "E103": "not UTF-8",
    "E104": "a lone surrogate, which no tokenizer can encode",
    "E105": "a JSON array among JSON lines",
    "E106": "the file holds no record",
    "E107": "the line is too long",
    "E108": "damaged data (gzip, zstd, Parquet, Arrow)",
    "E109": "a malformed JSON array",
    "E110": "a CSV record whose number of cells differs from the header",
    "E111": "malformed quotes or header in CSV",
    "E112": "an unsupported file type",
    "E113": "two columns with one name",
    "E201": "a key is missing",
    "E202": "a value is null",
    "E203": "a value has the wrong type",
    "E204": "a row of another kind than the rows before it in its file",
    "E205": "a key that occurs twice in one object",
    "E206": "an unknown format",
    "E207": "content that is not text",
    "E208": "an invalid weight of a turn, or all weights 0",
    "E209": "a label whose meaning differs between datasets and was not given",
    "E210": "a row that could be read in two ways",
    "E211": "a prompt that does not match the whole chats or texts of the answers",
    "E212": "a label, rank or score that cannot be read",
    "E213": "a row in another format than `--format`",
    "E214": "steps that do not match",
    "E215": "a string that could be plain text, or a chat written as a string",
    "E217": "the row function failed, or returned no row",
    "E304": "a prompt longer than its limit, with `--prompt-truncation error`",
    "E401": "messages, but no chat template",
    "E402": "two beginning-of-text or two end-of-text tokens",
    "E403": "turns whose roles do not form a prompt and an answer",
    "E404": "the chat template changes the prompt when the answer follows",
    "E405": "a message that is already rendered by the chat template",
    "E601": "a token id outside the vocabulary",
    "E605": "the graph of the bundle failed in ONNX Runtime",
    "R301": "an empty completion",
    "R302": "identical completions",
    "R303": "completions that are identical once truncated",
    "R304": "a prompt longer than its limit",
    "R305": "an empty prompt, and the tokenizer adds no beginning-of-text token",
    "R306": "the limit leaves no token of the answer",
    "R307": "a special token in a message, with `--split-special-tokens`",
    "R308": "the opposite pair occurs as often or more often",
    "R310": "a tie: no answer is better than another",
    "R311": "the chat template writes nothing of an answer",
    "R312": "a tool call whose arguments are not a JSON object",
    "R316": "the row function left the row out",
    "R317": "an answer or row without a rating, rank or label",
    "R318": "a prompt without candidates to rank",
    "W501": "a special token in the text",
    "W502": "the tokens of the prompt change when the answer follows (boundary moved)",
    "W503": "a completion was truncated",
    "W504": "an empty prompt",
    "W505": "a NUL character in the text",
    "W506": "a prompt was truncated",
    "W507": "the same pair occurs with chosen and rejected exchanged",
    "W508": "length alone predicts which answer is chosen",
    "W509": "repeated judgements contradict each other",
    "W510": "many groups are nearly the same",
    "W511": "many completions were truncated",
    "W512": "the generation prompt of the chat template differs from its text before an answer: "
    "the prompt ends before the difference",
    "W513": "the chat template leaves out a part of the row",
    "W514": "the chat template leaves out the reasoning of turns before the answer",
    "W515": "turns that follow the last assistant turn were left out",
    "W517": "no completion ends with a stop token",
    "W518": "plain text, which bypasses the tokenizer's chat template (--chat wraps it as turns; "
    "--text keeps it and removes this warning)",
    "W519": "part of the data went through the chat template, and part did not",
    "W520": "the answer follows the prompt without white space",
    "W522": "a chat written as a string, read as a chat (--strings text reads it as text)",
    "W523": "a message that contains the markup of another chat template",
    "W525": "a list that another score could also rank",
    "W526": "a chosen answer that is scored lower than the rejected one: the pair has no margin",
    "W527": "single answers with one label only: all are good, or all are bad",
    "W528": "good and bad answers out of balance for KTO",
    "W529": "the first update lowers chosen and raises rejected answers",
    "W530": "a pair or an answer of a list was left out",
}
"""The meaning of every code. W502 and W503 are counted per completion; W508 to W511, W517, W519,
W520 and W527 once per dataset; W528 and W529 once per run; all others per record."""


CURES: dict[str, str] = {
    "E101": "Correct the line; JSON lines need one object per line.",
    "E102": "The file was cut off: copy or download it again.",
    "E103": "Save the file as UTF-8, or name its encoding, as `--encoding cp1252`.",
    "E104": "Remove the surrogate; it comes from text cut inside an emoji.",
    "E105": "Write one record per line, or a single array as the whole file.",
    "E106": "Check the path, and that the export was complete.",
    "E107": "Write one record per line; a record may have 64 MiB.",
    "E108": "Download or write the file again; compare its checksum.",
    "E109": "Close the array, and put nothing after it.",
    "E110": "Quote cells that contain the separator or a line break.",
    "E111": "Write the file with a CSV library, which doubles quotes inside a cell.",
    "E112": "Unpack or convert the file; see the list of readable files.",
    "E113": "Rename one of the columns.",
    "E201": "Add the key, or name the data's key with `--columns prompt=question`.",
    "E202": "Fill the value, or remove the row.",
    "E203": "Convert the value to the type that the message names.",
    "E204": "Put pairs, lists and unpaired feedback into separate files.",
    "E205": "Remove one of the two; parsers disagree on which one counts.",
    "E206": "Rename keys with `--columns`, or convert rows with `--rows module:function`.",
    "E207": "Keep the text; images and audio are not supported.",
    "E208": "Give numbers from -10,000 to 10,000, below 0 for bad turns, not all 0.",
    "E209": "Give `--label`; `data inspect` prints the flag where the values allow it.",
    "E210": "Give the flag that the message names, or remove one of the keys.",
    "E211": "Keep the prompt either in its own key or in the answers.",
    "E212": "Correct the value, or describe it with `--label`.",
    "E213": "Remove `--format`, or the row.",
    "E214": "Both solutions must share the steps before they differ.",
    "E215": "Give `--strings messages` or `--strings text`.",
    "E217": "Correct the function that `--rows` names; the message has its exception.",
    "E304": "Raise `--max-prompt-length`, or choose another `--prompt-truncation`.",
    "E401": "Use an instruct model's tokenizer, or add `chat_template.jinja` to its folder.",
    "E402": "Remove the token from the data or from the chat template.",
    "E403": "A conversation ends with an answer, which begins with the assistant's turn.",
    "E404": "Correct the template: it must not rewrite earlier turns.",
    "E405": "Pass rendered text as a plain prompt, as with `--columns prompt=input`.",
    "E601": "Use the model's tokenizer.",
    "E605": "The message has ONNX Runtime's reason. If memory ran out, rank fewer or shorter "
    "candidates a row, or use fewer `--workers`; then rank the row again.",
    "R301": "Remove the row, or fill the answer.",
    "R302": "Nothing to do: nothing can be learned from the pair.",
    "R303": "Raise `--max-length`.",
    "R304": "Raise `--max-prompt-length`, or choose another `--prompt-truncation`.",
    "R305": "Add a prompt, or use a tokenizer with a beginning-of-text token.",
    "R306": "Raise `--max-length`.",
    "R307": "Remove the token from the message, or `--split-special-tokens`.",
    "R308": "Keep the pairs with `--conflicts keep`.",
    "R310": "Nothing to do: ties are left out.",
    "R311": "Use a template that writes tool calls, or remove the row.",
    "R312": "Correct the arguments of the call that the message names.",
    "R316": "Nothing to do, if the row function should skip the row.",
    "R317": "Nothing to do: the row has no judgement to train on.",
    "R318": "Add candidates, or remove the row.",
    "W501": "Use `--split-special-tokens` if the text only quotes the token.",
    "W502": "Nothing to do; the completion was encoded separately.",
    "W503": "Raise `--max-length` if many completions are truncated.",
    "W504": "Check that the prompt should be empty.",
    "W505": "Remove the character; it usually comes from a faulty export.",
    "W506": "Raise `--max-prompt-length` if many prompts are truncated.",
    "W507": "`--conflicts drop_both` or `majority` removes contradictions.",
    "W508": "Balance the lengths, or compare with `--loss simpo` or `ipo`.",
    "W509": "See the estimate of label noise; use its rate as `--label-smoothing`.",
    "W510": "Remove near-duplicates unless they should weigh more.",
    "W511": "Raise `--max-length`.",
    "W512": "Nothing to do; the prompt is the part that both have in common.",
    "W513": "Choose a template that writes the part, or accept that it is not trained.",
    "W514": "Nothing to do, if the model also drops earlier reasoning when it is used.",
    "W515": "Nothing to do, if the turns after the last answer are not needed.",
    "W517": "Check `--no-eos` and the template: the policy will not learn to stop.",
    "W518": "`--chat` wraps the text as turns; `--text` confirms that plain text, or text that is "
    "already rendered, is intended.",
    "W519": "Use `--chat`, or put text and chats into separate runs.",
    "W520": "Begin answers with a space or a line break, if the prompt does not end with one.",
    "W522": "Nothing to do; `--strings text` keeps the strings as text.",
    "W523": "Look for prompts that were rendered for another model; give the messages instead.",
    "W525": "Choose with `--score NAME`.",
    "W526": "Compare the scores with the choice; the pair is trained as it was chosen.",
    "W527": "Add answers with the other label, or weights below 0 for bad turns; `--loss sft` "
    "trains on good answers alone, without labels.",
    "W528": "Set one of `--loss-option desirable_weight=` and `undesirable_weight=` as advised.",
    "W529": "Choose another value of the option, for `discopop` `--loss-option tau=1`.",
    "W530": "The codes counted with it give the reason.",
}
"""The remedy for each code, for the troubleshooting page."""


class Cut(str):
    """The code of a truncation (W503, W506), with the number of lost tokens.

    Attributes:
        tokens: Number of lost tokens, at least one.
    """

    tokens: int

    def __new__(cls, code: str, tokens: int) -> "Cut":
        """Attach a number of tokens to a code; the result equals the code."""
        cut = super().__new__(cls, code)
        cut.tokens = tokens
        return cut


class Omitted(str):
    """The code of an omission (W513), with its description.

    Attributes:
        what: The missing parts, in words.
    """

    what: str

    def __new__(cls, code: str, what: str) -> "Omitted":
        """Attach a description to a code; the result equals the code."""
        omitted = super().__new__(cls, code)
        omitted.what = what
        return omitted


def stops(code: str) -> bool:
    """Return whether a code means broken structure, which stops the run by default."""
    return code.startswith("E")


Message = Mapping[str, Any]
"""One turn of a chat: ``{"role": …, "content": …}`` and other keys for the template."""

Text = str | tuple[Message, ...]
"""Plain text, or turns of a chat that a template renders."""

Values = tuple[float | None, float | None, float | None, float | None]
"""Score, rank, margin and weight of a completion; None where the data has no such number."""

NO_VALUES: Values = (None, None, None, None)

CHOSEN, REJECTED, CANDIDATE, DEMONSTRATION = "chosen", "rejected", "candidate", "demonstration"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a record came from.

    Attributes:
        file: The name of the file, as given.
        line: The line or row, from 1. 0: the whole file.
    """

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer to a prompt.

    Attributes:
        role: ``chosen``, ``rejected``, ``candidate`` or ``demonstration``.
        answer: The trained part; of turns, only the assistant's are trained.
        context: The untrained part between prompt and answer: the history that the completions
            do not share. It has the type of the answer.
        score: The number that the data gives it; larger is better. None: the data has none, as
            for the next three.
        rank: Its place in a list, as the data has it: lower is better, and usually 1 is the best.
        margin: Of the chosen side of a pair: how much better it is than the other; at least 0.
        weight: The weight of its row, at least 0.

    An assistant's turn has a ``weight`` unless it is 1; with 0, it is not trained, and below 0, it
    is bad. A string after a prompt of turns begins the assistant's next turn, which does not end.
    """

    role: str
    answer: Text
    context: Text = ""
    score: float | None = None
    rank: float | None = None
    margin: float | None = None
    weight: float | None = None

    @property
    def values(self) -> Values:
        """Score, rank, margin and weight, in the order of `logratio._rust.VALUES`."""
        return self.score, self.rank, self.margin, self.weight


PAIR_SIDES = (Completion(CHOSEN, ""), Completion(REJECTED, ""))
"""The sides of a pair without text, as of token ids."""


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """One prompt and its completions as text.

    Attributes:
        prompt: The prompt of all completions.
        completions: Chosen before rejected; a ranked list from best to worst.
        source: File and line.
        tools: Descriptions of functions, which a chat template may render.
        ends: Whether the completions are complete. A single step of a solution is not, and no EOS
            follows it.
    """

    prompt: Text
    completions: tuple[Completion, ...]
    source: Source
    tools: tuple[Message, ...] = ()
    ends: bool = True

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is a chat, which a chat template renders."""
        return not isinstance(self.prompt, str)

    def texts(self) -> Iterator[str]:
        """Yield every text that a person or a model wrote."""
        parts = [self.prompt]
        for completion in self.completions:
            parts += [completion.context, completion.answer]
        for part in parts:
            if isinstance(part, str):
                yield part
            else:
                yield from (str(turn.get("content") or "") for turn in part)

    def digest(self, *, swapped: bool = False) -> bytes:
        """Hash the content without its values, independent of the order of completions.

        Args:
            swapped: Whether to exchange the roles of the completions first.

        Returns:
            16 bytes.
        """
        roles = [completion.role for completion in self.completions]
        if swapped:
            roles.reverse()
        parts = sorted(
            (role, repr(completion.context), repr(completion.answer))
            for role, completion in zip(roles, self.completions, strict=True)
        )
        text = repr((self.prompt, self.tools, parts))
        return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Refusal:
    """A refused row, with the reason.

    Attributes:
        source: File and line.
        code: One of `logratio.data.records.CODES`.
        reason: A sentence for the user who repairs the row.
        column: Column of the line, in characters from 1, if known.
    """

    source: Source
    code: str
    reason: str
    column: int | None = None

    @property
    def stops(self) -> bool:
        """Whether the row's structure is broken, which stops the run by default."""
        return stops(self.code)

    def __str__(self) -> str:
        column = "" if self.column is None else f":{self.column}"
        return f"{self.source}{column} [{self.code}] {self.reason}"


class InvalidRecordError(LogratioError, ValueError):
    """A row, or a prompt and completion, is refused.

    Attributes:
        code: One of `logratio.data.records.CODES`.
        reason: A sentence for the user who repairs it.
        format: The row's format, if it was detected before the error.
    """

    def __init__(self, code: str, reason: str, format: str | None = None) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason
        self.format = format

    def __str__(self) -> str:
        return f"[{self.code}] {self.reason}"
