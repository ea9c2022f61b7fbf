"""The pages at `/` and `/docs`: a form that shows rankings, and the reference of the API."""

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import FastAPI, Response

from logratio.serving.api_reference import reference_page

PAGE, REFERENCE = "/", "/docs"
PAGES = frozenset((PAGE, REFERENCE))
_BLOCK = re.compile(r"<(script|style)>(.*?)</\1>", re.S)


def add_pages(app: FastAPI, *, has_keys: bool) -> None:
    """Add the pages to the application, after its other routes.

    The requests of the form need an API key if the server has keys; the pages do not.

    Args:
        app: The application.
        has_keys: Whether requests need an API key.
    """
    form = files("logratio.serving").joinpath("page.html").read_text(encoding="utf-8")
    style = next(block for kind, block in _BLOCK.findall(form) if kind == "style")
    _add(app, PAGE, form)
    _add(app, REFERENCE, reference_page(app.openapi(), style, has_keys=has_keys))


def _add(app: FastAPI, path: str, content: str) -> None:
    headers = {
        "Content-Security-Policy": policy_of(content),
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    @app.get(path, include_in_schema=False)
    async def page() -> Response:
        return Response(content, media_type="text/html", headers=headers)


def policy_of(content: str) -> str:
    """Return the Content-Security-Policy of a page.

    It allows the page's own scripts and styles, by their hashes, and requests to this server if
    there is a script. Text cannot become markup, and other pages cannot show this one in a frame.
    """
    hashes: dict[str, list[str]] = {}
    for kind, block in _BLOCK.findall(content):
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        hashes.setdefault(kind, []).append(f"'sha256-{digest}'")
    return "; ".join(
        (
            "default-src 'none'",
            *(f"{kind}-src {' '.join(found)}" for kind, found in hashes.items()),
            *(("connect-src 'self'",) if "script" in hashes else ()),
            *("img-src data:", "base-uri 'none'", "form-action 'none'"),
            *(
                "frame-ancestors 'none'",
                "require-trusted-types-for 'script'",
                "trusted-types 'none'",
            ),
        )
    )
