"""An HTTP/1.1 parser that refuses what a proxy in front could understand differently."""

import re
from typing import Any

import h11

_END = re.compile(rb"\n\r?\n")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_FOLDED = re.compile(rb"\n[ \t]")
_LENGTH = re.compile(rb"\ncontent-length[ \t]*:", re.IGNORECASE)
_ENCODING = re.compile(rb"\ntransfer-encoding[ \t]*:", re.IGNORECASE)


class StrictConnection(h11.Connection):
    """A server's connection, which checks the bytes of each request's head before h11 parses them.

    h11 accepts folded header lines, lines that end without CR, and a Content-Length next to a
    Transfer-Encoding. A proxy that reads them differently sees other requests on the same
    connection, and can be made to pass on one that it has not checked (request smuggling, RFC 9112
    section 11.2). h11 also limits a head only while it is incomplete.
    """

    def __init__(self, head_bytes: int) -> None:
        """Begin a connection.

        Args:
            head_bytes: Most bytes of a request line with its headers.
        """
        super().__init__(h11.SERVER, head_bytes)
        self._head_bytes = head_bytes

    def next_event(self) -> Any:
        """Return the next event, as h11 does.

        Raises:
            h11.RemoteProtocolError: The client breaks the protocol, or its head is refused.
        """
        if self.their_state is h11.IDLE:
            received = self.trailing_data[0]
            if end := _END.search(received):
                self._check(received[: end.end()])
        return super().next_event()

    def _check(self, head: bytes) -> None:
        if len(head) > self._head_bytes:
            raise h11.RemoteProtocolError("the headers are too long", error_status_hint=431)
        if _BARE_LF.search(head):
            raise h11.RemoteProtocolError("a line ends without CR")
        if _FOLDED.search(head):
            raise h11.RemoteProtocolError("a header is continued on another line")
        if _LENGTH.search(head) and _ENCODING.search(head):
            raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding")
