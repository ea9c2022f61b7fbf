"""Every reason for which data is not taken as it stands: a stable code and what it means.

E: the structure is broken, and the run stops unless it was told to go on. R: the content is of no
use to training, so the row is refused and counted. W: the row is kept, and counted.
"""

CODES: dict[str, str] = {
    "E101": "malformed JSON",
    "E102": "the file ends inside a record",
    "E103": "not UTF-8",
    "E104": "a lone surrogate, which no tokenizer can encode",
    "E105": "a JSON array where a record a line was begun",
    "E106": "the file holds no record",
    "E107": "the line is too long",
    "E108": "damaged data (gzip, zstd, Parquet, Arrow)",
    "E109": "a JSON array that cannot be followed",
    "E110": "a CSV record with another number of cells than the header",
    "E111": "CSV whose quotes or header do not fit",
    "E112": "a kind of file that is not read",
    "E113": "two columns of one name",
    "E201": "a key is missing",
    "E202": "a value is null",
    "E203": "a value has the wrong type",
    "E204": "a row that says another kind of thing than the rows before it in its file",
    "E205": "a key stands twice in one object",
    "E206": "a shape that is not known",
    "E207": "content that is not text",
    "E208": "a turn's weight that is neither 0 nor 1, or weights by which no turn counts",
    "E209": "a label whose meaning differs from set to set and was not told",
    "E210": "a row that could be read in two ways",
    "E211": "a prompt and whole answers that do not go together",
    "E212": "a label, rank or score that cannot be read",
    "E213": "a row that is not of the format that was named",
    "E214": "steps that do not fit together",
    "E215": "a string that could be text or a chat that was written as text",
    "E217": "the row function failed, or returned no row",
    "E304": "a prompt longer than its limit, where the rules say that this is an error",
    "E401": "messages, but no chat template",
    "E402": "two beginning-of-text or two end-of-text tokens",
    "E403": "turns whose roles make no prompt and answer",
    "E404": "the chat template does not repeat the prompt when the answer follows",
    "E405": "a message that the chat template has already written",
    "E601": "a token id outside the vocabulary",
    "R301": "an empty completion",
    "R302": "identical completions",
    "R303": "completions that are identical once truncated",
    "R304": "a prompt longer than its limit",
    "R305": "an empty prompt, and the tokenizer adds no beginning-of-text token",
    "R306": "the limit leaves no token of the answer",
    "R307": "a special token is spelled in a message, where the rules split special tokens",
    "R308": "the opposite is said too, as often or more",
    "R310": "a tie: nothing is better than anything else",
    "R311": "the chat template writes nothing of an answer",
    "R312": "a tool call whose arguments are no JSON object",
    "R316": "the row function left the row out",
    "R317": "an answer, or a row, that nobody rated, ranked or labelled",
    "W501": "a special token is spelled in the text",
    "W502": "the tokens of the prompt change when the answer follows (boundary moved)",
    "W503": "a completion was cut at the limit",
    "W504": "an empty prompt",
    "W505": "a NUL character in the text",
    "W506": "a prompt was cut at its limit",
    "W507": "the same two completions stand elsewhere the other way round",
    "W508": "length alone tells chosen from rejected",
    "W509": "repeated judgements contradict each other",
    "W510": "many groups are nearly the same",
    "W511": "many completions were cut at the limit",
    "W512": "the chat template asks with text that it does not write before an answer: "
    "the prompt ends before it",
    "W513": "the chat template leaves out a part of the row",
    "W514": "the chat template leaves out the reasoning of turns before the answer",
    "W515": "turns that follow the last assistant turn were left out",
    "W517": "no completion ends with a token that ends an answer",
    "W518": "plain text, which passes by the tokenizer's chat template (--chat: as the turns of a "
    "chat; --text: as it stands, without this warning)",
    "W519": "part of the data went through the chat template, and part did not",
    "W520": "the answer follows the prompt without white space",
    "W522": "a chat that was written as text, read as a chat (else: --strings text)",
    "W525": "a list that another score could rank",
    "W530": "a pair or an answer of a list was left out",
}
"""W502 and W503 are counted per completion, W508 to W511, W517, W519 and W520 once a data set, all
others per record."""


class Cut(str):
    """The code of a cut (W503, W506) that also says how many tokens were lost.

    Attributes:
        tokens: At least one.
    """

    tokens: int

    def __new__(cls, code: str, tokens: int) -> "Cut":
        """Join a code and a number of tokens; equal to the bare code."""
        cut = super().__new__(cls, code)
        cut.tokens = tokens
        return cut


class Omitted(str):
    """The code of something that was left out (W513) that also names it.

    Attributes:
        what: What is missing, in words.
    """

    what: str

    def __new__(cls, code: str, what: str) -> "Omitted":
        """Join a code and words; equal to the bare code."""
        omitted = super().__new__(cls, code)
        omitted.what = what
        return omitted


def stops(code: str) -> bool:
    """Say whether a code means broken structure, which stops the run by default."""
    return code.startswith("E")
