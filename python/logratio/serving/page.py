"""The page at `/`: a form that shows the ranking of candidates and the values of their tokens."""

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import FastAPI, Response

PAGE = "/"
_BLOCK = re.compile(r"<(script|style)>(.*?)</\1>", re.S)


def add_page(app: FastAPI) -> None:
    """Add the page to the application. Its requests need an API key; the page itself does not."""
    content = files("logratio.serving").joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": policy_of(content),
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    @app.get(PAGE, include_in_schema=False)
    async def page() -> Response:
        return Response(content, media_type="text/html", headers=headers)


def policy_of(content: str) -> str:
    """Return the Content-Security-Policy of a page.

    It allows the page's one script and style, by their hashes, and requests to this server. Text
    cannot become markup, and other pages cannot show this one in a frame.
    """
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, block in _BLOCK.findall(content):
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    return "; ".join(
        (
            "default-src 'none'",
            *(f"{kind}-src {' '.join(found)}" for kind, found in hashes.items()),
            *("connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"),
            *(
                "frame-ancestors 'none'",
                "require-trusted-types-for 'script'",
                "trusted-types 'none'",
            ),
        )
    )
