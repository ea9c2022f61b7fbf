"""The elements and texts of an HTML page."""

from html.parser import HTMLParser

_VOID = {"br", "hr", "img", "input", "link", "meta", "wbr"}


class ParsedPage(HTMLParser):
    """A page's elements in their order, each with its attributes.

    An element that is not closed, or closed in another order, is an error.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._contents: list[list[str]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        content: list[str] = []
        self.elements.append((tag, dict(attrs)))
        self._contents.append(content)
        if tag not in _VOID:
            self._open.append((tag, content))

    def handle_endtag(self, tag: str) -> None:
        opened, _ = self._open.pop()
        assert opened == tag

    def handle_data(self, data: str) -> None:
        for _, content in self._open:
            content.append(data)

    def texts(self, tag: str, **attributes: str) -> list[str]:
        """Return all text in each element of a kind that has these attributes."""
        return [
            "".join(content)
            for (name, given), content in zip(self.elements, self._contents, strict=True)
            if name == tag and attributes.items() <= given.items()
        ]
