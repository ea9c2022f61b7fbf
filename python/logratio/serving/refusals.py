"""Answers other than a ranking: a status, a stable code, a sentence without anyone's text."""

import re

from logratio.data import CODES
from logratio.errors import LogratioError

_CODE = re.compile(r"\[(\w+)\]")


class RefusedError(LogratioError):
    """A request gets no ranking.

    Attributes:
        status: Of HTTP.
        code: Stable, for programs.
        message: For people; holds no prompt, no path.
        retry_after: Seconds after which it would be taken, for 429 and 503.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: int = 1) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message
        self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str]]:
        """Return the JSON to answer with."""
        return {"error": {"code": self.code, "message": self.message}}

    def headers(self) -> dict[str, str]:
        """Return the headers that go with it."""
        return {"Retry-After": str(self.retry_after)} if self.status in (429, 503) else {}


def public_reason(reason: str) -> str:
    """Replace the reason behind a code by the code's own words: a chat template may quote text."""
    code = _CODE.match(reason)
    return f"[{code[1]}] {CODES[code[1]]}" if code and code[1] in CODES else reason
