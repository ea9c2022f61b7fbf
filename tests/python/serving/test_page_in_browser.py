"""The pages at `/` and `/docs` in Chromium: `make page` runs this."""

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from byte_bundle import byte_bundle
from running_server import running

from logratio.serving import Reranker

pytestmark = pytest.mark.browser

KEY = "a-key-of-these-tests"
PROMPT = "how are you"
TEXTS = [" today? I am fine", " bad 🙂 日本", "", " good\nthank you, and you?"]
HOSTILE = [
    "<script>window.hacked = 1</script>",
    '<img src="x" onerror="window.hacked = 1">',
    "\"'><svg onload=window.hacked=1><iframe src='javascript:parent.hacked=1'></iframe>",
    "</textarea></style></script><b onmouseover=hacked=1>{{1+1}}${1+1}</b>",
]
SHELL = [
    "it's \"$HOME\" `id` $(id) \\ \\' ! # & | ; <<END\nEND\n",
    " \u202etxt.exe \u200b \u009b31m 🙂 \u2028",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_bundle(tmp_path_factory)


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Reranker:
    return Reranker.load(folder / "bundle", truncate_completions=True)


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with running(folder / "bundle", LOGRATIO_API_KEYS=KEY) as (_, port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright  # only `make page` installs it

    path = shutil.which(os.environ.get("CHROMIUM", "chromium"))
    assert path, "Chromium is not installed"
    with sync_playwright() as playwright:
        # Its sandbox needs rights that containers do not give.
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Open]:
    """Open the page; at the end, there was no error, no dialog and no request elsewhere."""
    faults: list[str] = []
    contexts = []

    def open_page(at: str = address, **settings: Any) -> Any:
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
        page.on(
            "request",
            lambda sent: None if sent.url.startswith((at, "data:")) else faults.append(sent.url),
        )
        page.goto(f"{at}/")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def fill(page: Any, texts: Sequence[str], prompt: str = PROMPT, key: str = KEY) -> None:
    page.fill("#prompt", prompt)
    for number, text in enumerate(texts, 1):
        if number > page.locator("#candidates textarea").count():
            page.click("#add")
        page.get_by_label(f"Candidate {number}", exact=True).fill(text)
    page.get_by_label("API key").fill(key)


def answered(page: Any) -> None:
    page.locator("body:not(.pending) #answer:not([hidden])").wait_for()


def submit(page: Any, texts: Sequence[str], prompt: str = PROMPT) -> None:
    fill(page, texts, prompt)
    page.get_by_role("button", name="Score").click()
    answered(page)


def shown_order(page: Any) -> list[int]:
    names = page.locator("#ranking h3").all_inner_texts()
    return [int(name.removeprefix("Candidate ")) - 1 for name in names]


def value_of(text: str) -> float:
    return float(text.replace("\u2212", "-"))


def test_the_ranking_is_that_of_the_reranker(opened: Open, reranker: Reranker) -> None:
    page = opened()
    submit(page, TEXTS)
    expected = reranker.rank(PROMPT, TEXTS)
    assert shown_order(page) == [score.index for score in expected]
    rewards = page.locator(".reward").all_inner_texts()
    found = [value_of(re.findall(r"[+\u2212][\d.]+", text)[0]) for text in rewards]
    assert found == pytest.approx([score.reward for score in expected[:3]], abs=6e-4)
    assert page.locator(".card.wrong .message").inner_text() == "[R301] an empty completion"
    status = page.locator("#status").text_content()
    assert re.fullmatch(r"3 scored, 1 not in [\d.]+ ms\. The best is candidate \d\.", status)


def test_each_token_has_its_text_colour_and_number(opened: Open, reranker: Reranker) -> None:
    page = opened()
    submit(page, TEXTS)
    for card, score in zip(page.locator(".card").all(), reranker.rank(PROMPT, TEXTS), strict=True):
        if score.error is not None:
            continue
        tokens = card.locator(".token").all()
        pieces = [token.locator(".piece").text_content() for token in tokens]
        assert "".join(pieces).replace("\u21b5", "") == f"{TEXTS[score.index]}</s>"
        numbers = [value_of(token.locator(".value").text_content()) for token in tokens]
        assert reranker.manifest.beta * sum(numbers) == pytest.approx(score.reward, abs=0.05)
        for token, number in zip(tokens, numbers, strict=True):
            kind = token.get_attribute("class")
            assert number == 0 or kind == f"token {'less' if number < 0 else 'more'}"
    token = page.locator(".token").nth(2)
    token.hover()
    number = value_of(token.locator(".value").text_content())
    tip = page.locator("#tip").inner_text()
    assert value_of(re.findall(r"([+\u2212]?[\d.]+) nats", tip)[0]) == pytest.approx(
        number, abs=0.006
    )
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_everything_works_with_the_keyboard_alone(opened: Open, reranker: Reranker) -> None:
    page = opened()
    keyboard = page.keyboard

    def focused() -> str:
        return str(page.evaluate("document.activeElement.id || document.activeElement.textContent"))

    def tab_to(wanted: str) -> None:
        for _ in range(12):
            keyboard.press("Tab")
            if focused() == wanted:
                style = "getComputedStyle(document.activeElement)"
                assert page.evaluate(f"{style}.outlineStyle") == "solid"
                assert page.evaluate(f"parseFloat({style}.outlineWidth)") >= 2
                return
        raise AssertionError(wanted)

    assert focused() == "prompt"
    keyboard.type(PROMPT)
    for name, text in (("candidate-1", " good"), ("candidate-2", " bad")):
        tab_to(name)
        keyboard.type(text)
    tab_to("add")
    keyboard.press("Enter")
    assert focused() == "candidate-3"
    keyboard.type(" never")
    tab_to("add")
    keyboard.press("Enter")
    page.keyboard.press("Shift+Tab")
    assert focused() == "Remove"
    keyboard.press("Space")
    assert focused() == "candidate-3"
    tab_to("key")
    keyboard.type(KEY)
    keyboard.press("Control+Enter")
    answered(page)
    order = [score.index for score in reranker.rank(PROMPT, [" good", " bad", " never"])]
    assert shown_order(page) == order
    assert focused() == "key"
    tab_to("show-values")
    assert page.locator(".value").first.bounding_box()["width"] < 2
    keyboard.press("Space")
    assert page.locator(".value").first.bounding_box()["width"] > 15
    tab_to("curl")


def test_removing_a_candidate_moves_the_focus_to_the_next(opened: Open) -> None:
    page = opened()
    fill(page, [" good", " bad", " never"])
    remove = page.get_by_role("button", name="Remove candidate 1")
    for place in ("candidate-1", "candidate-1", "add"):
        texts = [box.input_value() for box in page.locator("#candidates textarea").all()]
        assert texts == [" good", " bad", " never"][-len(texts) :]
        remove.press("Enter")
        assert page.evaluate("document.activeElement.id") == place
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "candidate-1"


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_it_without_scrolling_sideways(opened: Open, width: int) -> None:
    page = opened(viewport={"width": width, "height": 844}, is_mobile=True, has_touch=True)
    for values in (False, True):
        submit(page, [*TEXTS, "x" * 200, "1" * 80])
        page.locator("#show-values").set_checked(values)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        shown = page.locator("button, select, textarea").filter(visible=True).all()
        boxes = [one.bounding_box() for one in shown]
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
        assert all(box["height"] >= 24 for box in boxes)
    assert page.locator("#results").bounding_box()["y"] < 700  # scrolled to the answer


LUMINANCE = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  return [...document.querySelectorAll("body *")].filter((element) => {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const box = element.getBoundingClientRect();
    return (own || element.value) && box.width > 1 && box.height > 1 && element.checkVisibility()
      && !["SCRIPT", "STYLE", "OPTION"].includes(element.tagName);
  }).map((element) => ({
    name: `${element.tagName} ${element.className} ${element.textContent.slice(0, 20)}`,
    ink: rgba(getComputedStyle(element).color), behind: behind(element),
  }));
}"""


def linear(colour: Sequence[int]) -> list[float]:
    """Linear red, green and blue of an sRGB colour."""
    parts = [part / 255 for part in colour[:3]]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def luminance(colour: Sequence[int]) -> float:
    red, green, blue = linear(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: Sequence[int], other: Sequence[int]) -> float:
    """The contrast ratio of WCAG 2.2."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast(opened: Open, scheme: str) -> None:
    page = opened(color_scheme=scheme)
    before = page.evaluate(LUMINANCE)
    submit(page, TEXTS)
    page.check("#show-values")
    page.locator(".token").nth(1).hover()
    found = [*before, *page.evaluate(LUMINANCE)]
    assert len(found) > 80
    assert any("token less" in one["name"] or "piece" in one["name"] for one in found)
    low = [one for one in found if contrast(one["ink"], one["behind"]) < 4.5]
    assert not low
    page_colour = next(one["behind"] for one in found if one["name"].startswith("H1"))
    assert (luminance(page_colour) < 0.05) == (scheme == "dark")


# Machado, Oliveira & Fernandes 2009, severity 1, for linear red, green and blue.
DEFICIENCIES = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def seen(colour: Sequence[int], matrix: list[list[float]]) -> list[float]:
    """CIE Lab of a colour as seen with a deficiency."""
    rgb = [sum(m * part for m, part in zip(row, linear(colour), strict=True)) for row in matrix]
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    white = (0.9505, 1.0, 1.089)
    x, y, z = (
        math.cbrt(max(0.0, sum(m * part for m, part in zip(row, rgb, strict=True))) / limit)
        for row, limit in zip(to_xyz, white, strict=True)
    )
    return [116 * y - 16, 500 * (x - y), 200 * (y - z)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_both_ends_of_the_scale_differ_for_colour_blind_people(
    opened: Open, scheme: str, deficiency: str
) -> None:
    page = opened(color_scheme=scheme)
    names = ("more", "less", "surface")
    style = "getComputedStyle(document.documentElement).getPropertyValue('--{}')"
    colours = []
    for name in names:
        shown = page.evaluate(style.format(name)).strip().removeprefix("#")
        shown = "".join(part * 2 for part in shown) if len(shown) == 3 else shown
        colours.append(list(bytes.fromhex(shown)))
    more, less, none = (seen(colour, DEFICIENCIES[deficiency]) for colour in colours)
    assert min(math.dist(more, less), math.dist(more, none), math.dist(less, none)) > 15


def test_hostile_text_is_shown_and_never_executed(opened: Open) -> None:
    page = opened()
    submit(page, HOSTILE, prompt=HOSTILE[0])
    page.wait_for_timeout(200)
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.locator("main").locator("script, img, svg, iframe, b[onmouseover]").count() == 0
    strips = page.locator(".tokens").all()
    shown = {"".join(one.locator(".piece").all_text_contents()) for one in strips}
    assert shown == {f"{text}</s>" for text in HOSTILE}


def test_the_policy_refuses_markup_and_scripts(browser: Any, address: str) -> None:
    page = browser.new_page()
    page.goto(f"{address}/")
    attempts = {
        "document.body.innerHTML = '<b>x</b>'": "TypeError",
        "document.createElement('script').text = 'hacked = 1'": "TypeError",
        "setTimeout('window.hacked = 1')": "TypeError",
    }
    for code, error in attempts.items():
        run = f"() => {{ try {{ {code}; return 'done' }} catch (error) {{ return error.name }} }}"
        assert page.evaluate(run) == error, code
    page.close()


def run_in_shell(command: str, folder: Path) -> Any:
    done = subprocess.run(
        ["sh", "-c", command],
        env=os.environ | {"LOGRATIO_API_KEY": KEY},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("texts", [SHELL, [*SHELL, "good " * 8000]], ids=["short", "long"])
def test_the_command_repeats_the_request(
    opened: Open, reranker: Reranker, tmp_path: Path, texts: list[str]
) -> None:
    page = opened()
    page.check("#truncate")
    submit(page, texts, prompt='don\'t "ask" $PATH')
    command = page.locator("#curl").inner_text()
    assert ("<<'END'" in command) == (len(texts) > 2)
    assert KEY not in command
    assert not re.search("[\u007f-\u009f\u200b-\u200f\u2028-\u202e]", command)
    (group,) = run_in_shell(command, tmp_path)["groups"]
    expected = reranker.score('don\'t "ask" $PATH', texts)
    assert [one["reward"] for one in group["results"]] == [one.reward for one in expected]
    assert [one["tokens"] for one in group["results"]] == [one.tokens for one in expected]
    assert not [*tmp_path.iterdir()]


@contextmanager
def plain(browser: Any, address: str) -> Iterator[Any]:
    """The page, where the browser may report that requests failed."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{address}/")
    yield page
    context.close()


def test_errors_of_requests_are_shown(browser: Any, address: str) -> None:
    with plain(browser, address) as page:
        fill(page, TEXTS, key="wrong")
        page.keyboard.press("Control+Enter")
        page.locator("#fault:not([hidden])").wait_for()
        assert page.locator("#fault").inner_text() == "401: a valid API key is needed"
        assert page.evaluate("document.activeElement.id") == "key"
        assert page.locator("#repeat").is_hidden()
        submit(page, TEXTS)
        assert page.locator("#fault").is_hidden()
        page.select_option("#kind", "chat")
        page.keyboard.press("Control+Enter")
        page.locator("#fault:not([hidden])").wait_for()
        assert "E401" in page.locator("#fault").inner_text()


def test_a_server_that_is_gone_is_reported(browser: Any, folder: Path) -> None:
    with (
        running(folder / "bundle") as (process, port),
        plain(browser, f"http://127.0.0.1:{port}") as page,
    ):
        process.kill()
        process.wait()
        fill(page, TEXTS)
        page.keyboard.press("Control+Enter")
        page.locator("#fault:not([hidden])").wait_for()
        assert page.locator("#fault").inner_text() == "The server does not answer."


def test_a_bundle_without_a_reference_shows_log_probs(opened: Open, folder: Path) -> None:
    with running(folder / "free") as (_, port):
        page = opened(f"http://127.0.0.1:{port}")
        submit(page, TEXTS)
        assert page.locator("#most").inner_text() == "0: certain"
        assert page.locator(".token.more").count() == 0
        page.context.close()


def test_a_bundle_without_values_per_token_shows_the_texts(
    opened: Open, reranker: Reranker
) -> None:
    page = opened()

    def without_values(route: Any) -> None:
        answer = route.fetch()
        models = answer.json()
        models["data"][0]["token_scores"] = None
        route.fulfill(response=answer, json=models)

    page.route("**/v1/models", without_values)
    submit(page, TEXTS)
    assert '"return_tokens":false' in page.locator("#curl").inner_text()
    expected = [score.index for score in reranker.rank(PROMPT, TEXTS)]
    assert page.locator(".card .text").all_text_contents() == [TEXTS[at] for at in expected]
    assert page.locator("#legend").is_hidden()


def test_one_of_several_bundles_can_be_chosen(opened: Open, folder: Path) -> None:
    first, second = f"first={folder / 'bundle'}", f"second={folder / 'free'}"
    with running(second, "--bundle", first) as (_, port):
        page = opened(f"http://127.0.0.1:{port}")
        submit(page, TEXTS)
        assert page.locator("#bundle option").all_text_contents() == ["first", "second"]
        assert page.locator("#model").inner_text().startswith("first:")
        page.get_by_label("Bundle").select_option("second")
        page.get_by_role("button", name="Score").click()
        answered(page)
        assert page.locator("#model").inner_text().startswith("second:")
        assert '"model":"second"' in page.locator("#curl").inner_text()
        assert page.get_by_label("Bundle").input_value() == "second"
        page.context.close()


NAMES = """() => [...document.querySelectorAll("a, button, input, select, textarea, [tabindex]")]
  .filter((element) => element.checkVisibility())
  .map((element) => ({
    tag: element.outerHTML.slice(0, 80),
    name: element.getAttribute("aria-label") || [...(element.labels ?? [])].map(
      (label) => label.textContent).join(" ")
      || document.getElementById(element.getAttribute("aria-labelledby"))?.textContent
      || element.textContent,
  }))"""


def test_every_control_has_a_name_and_every_id_is_used_once(opened: Open) -> None:
    page = opened()
    submit(page, TEXTS)
    controls = page.evaluate(NAMES)
    assert len(controls) > 14
    assert not [one for one in controls if not one["name"].strip()]
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert len(ids) == len(set(ids))
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((it) => it.tagName)")
    assert levels[:2] == ["H1", "H2"] and levels.count("H1") == 1
    assert page.title() and page.evaluate("document.documentElement.lang") == "en"


def test_the_key_and_the_texts_are_gone_after_a_reload(opened: Open) -> None:
    page = opened()
    submit(page, TEXTS)
    page.reload()
    assert page.get_by_label("API key").input_value() == ""
    assert page.locator("#prompt").input_value() == ""
    stores = "[localStorage.length, sessionStorage.length, document.cookie]"
    assert page.evaluate(stores) == [0, 0, ""]


def reference(opened: Open, **settings: Any) -> Any:
    page = opened(**settings)
    page.get_by_role("link", name="Reference of the API").click()
    page.get_by_role("heading", name="Reference of the API").wait_for()
    return page


def test_the_reference_opens_a_route_from_its_contents(opened: Open) -> None:
    page = reference(opened)
    fields = page.locator("[id^=route-]").get_by_text("max_tokens_per_doc").first
    assert fields.is_hidden()
    page.get_by_role("navigation").get_by_role("link", name="/v2/rerank").click()
    assert fields.is_visible()
    heading = page.get_by_role("heading", name="Order documents", exact=True)
    assert 0 <= heading.bounding_box()["y"] < 100
    page.get_by_role("table", name="RerankRequest").get_by_role("link", name="Turn").first.click()
    assert page.locator("#object-Turn").bounding_box()["y"] < 100
    page.go_back()
    page.get_by_role("link", name="Compare candidates").click()
    page.get_by_role("button", name="Score").wait_for()


def test_the_reference_works_with_the_keyboard(opened: Open) -> None:
    page = reference(opened)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    style = "getComputedStyle(document.activeElement)"
    assert page.evaluate(f"{style}.outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.get_by_role("table", name="RerankRequest").first.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_whole_reference_is_readable_in_both_schemes_and_on_a_phone(
    opened: Open, scheme: str
) -> None:
    page = reference(opened, color_scheme=scheme, viewport={"width": 1280, "height": 900})
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    found = page.evaluate(LUMINANCE)
    assert len(found) > 1000
    assert not [one for one in found if contrast(one["ink"], one["behind"]) < 4.5]
    for width in (1280, 720, 390, 320):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.locator("td, pre, summary").evaluate_all(
            "(all) => all.every((it) => it.scrollWidth <= it.clientWidth || it.clientWidth === 0)"
        )
