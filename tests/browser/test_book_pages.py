"""The built book, opened in headless Chromium with the network closed: every page loads, every figure moves.

Needs a book (``make book``; another folder through DETCORE_BOOK) and a Chromium.
"""

import functools
import http.server
import json
import os
import re
import shutil
import threading
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install detcore[test]")

pytestmark = pytest.mark.browser

BOOK = Path(os.environ.get("DETCORE_BOOK") or Path(__file__).parents[2] / "_build/html")
MAX_PAGE_BYTES = 1_500_000
PATIENCE_MS = 20_000  # a frame takes 20 ms; a machine busy with other jobs takes seconds
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Sphinx's own pages: lists made by a machine, without figures and not for reading on a phone
MADE = re.compile(r"^(_modules/|genindex|py-modindex|search\.html|index\.html)")


def pages() -> list[str]:
    """Every HTML page, as a path below the book's root."""
    if not BOOK.is_dir():
        return []
    found = (path.relative_to(BOOK).as_posix() for path in BOOK.rglob("*.html"))
    return sorted(name for name in found if not name.startswith("_static/"))


PAGES = pages()
WRITTEN = [name for name in PAGES if not MADE.match(name)]
MOVING = [name for name in WRITTEN if 'class="dcx" id=' in (BOOK / name).read_text(encoding="utf-8")]


@pytest.fixture(autouse=True)
def book():
    """Skip where there is nothing to test."""
    if not PAGES:
        pytest.skip(f"needs a built book in {BOOK.name}: make book, or set DETCORE_BOOK")


def each_page(names):
    # without a book there must still be one test that says so by skipping
    return pytest.mark.parametrize("name", names or ["index.html"])


# --- what the files say ---------------------------------------------------------------------------------------


class Links(HTMLParser):
    """What a page points to, what can be pointed at in it, and the texts of its pictures."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.assets: list[str] = []
        self.pictures: list[tuple[str, str | None]] = []
        self.stages: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("script", "iframe", "source", "video") and given.get("src"):
            self.assets.append(given["src"])
        if tag == "link" and given.get("href") and given.get("rel") != "canonical":
            self.assets.append(given["href"])
        if tag == "img":
            self.assets.append(given.get("src") or "")
            # the logo stands beside the book's name: to read it out would say the name twice
            if "logo__image" not in (given.get("class") or ""):
                self.pictures.append((given.get("src") or "", given.get("alt")))
        if given.get("role") == "img":
            self.stages.append(given.get("aria-label"))


@functools.cache
def read(name: str) -> tuple[str, Links]:
    text = (BOOK / name).read_text(encoding="utf-8")
    return text, Links(text)


def outside(address: str) -> bool:
    return re.match(r"([a-z]+:)?//", address, re.IGNORECASE) is not None


@each_page(PAGES)
def test_page_loads_nothing_from_outside(name):
    assert [a for a in read(name)[1].assets if outside(a)] == []


@each_page(WRITTEN)
def test_page_holds_no_dead_widget(name):
    # an ipywidget without a kernel looks alive and is not; the build does not warn of it
    text, links = read(name)
    assert "application/vnd.jupyter.widget" not in text
    assert [a for a in links.assets if "require" in a.lower() or "thebe" in a.lower()] == []


@each_page(WRITTEN)
def test_page_is_small(name):
    assert (BOOK / name).stat().st_size < MAX_PAGE_BYTES


@each_page(WRITTEN)
def test_tables_that_cells_print_are_tables(name):
    assert re.findall(r"<p>\|[^<]{0,60}", read(name)[0]) == []


@each_page(WRITTEN)
def test_every_picture_has_a_text(name):
    _, links = read(name)
    # matplotlib's and MyST-NB's own default texts name a file, not what is to be seen
    bare = [
        src[:80] for src, alt in links.pictures if not (alt or "").strip() or re.search(r"\.(png|svg)$|_images", alt)
    ]
    # the frames of a figure have an empty alt: their text is the aria-label of the element around them
    assert [src for src in bare if not src.startswith("data:image/webp")] == []
    assert [label for label in links.stages if not (label or "").strip()] == []


@each_page(PAGES)
def test_links_inside_the_book_lead_somewhere(name):
    broken = []
    for link in read(name)[1].links + read(name)[1].assets:
        if not link or outside(link) or re.match(r"(data|mailto|javascript):", link):
            continue
        parts = urllib.parse.urlsplit(link)
        target = (BOOK / name).parent / urllib.parse.unquote(parts.path) if parts.path else BOOK / name
        if not target.exists():
            broken.append(link)
        elif parts.fragment and target.suffix == ".html":
            anchors = read(target.resolve().relative_to(BOOK.resolve()).as_posix())[1].anchors
            broken += [link] if urllib.parse.unquote(parts.fragment) not in anchors else []
    assert broken == []


# --- what a reader sees ---------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line on the terminal for each."""

    def log_message(self, format, *args):
        """Say nothing."""


@pytest.fixture(scope="module")
def address():
    """The book over HTTP, as a reader gets it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(BOOK)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def chromium():
    """A browser: the system's if there is one, else playwright's."""
    system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=system, args=list(FLAGS))
        except sync_api.Error as error:
            pytest.skip(f"needs Chromium: apt install chromium, or playwright install chromium ({str(error)[:80]})")
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, address):
    """Open pages in a window that reaches nothing but the book; what it tried, and its errors, are kept."""
    contexts = []

    def open_page(name, *, width=1280, dark=False, script=True):
        context = chromium.new_context(
            viewport={"width": width, "height": 844},
            color_scheme="dark" if dark else "light",
            java_script_enabled=script,
        )
        contexts.append(context)
        page = context.new_page()
        page.refused, page.errors = [], []

        def only_the_book(route):
            if route.request.url.startswith(address):
                route.continue_()
            else:
                page.refused.append(route.request.url)
                route.abort()

        context.route("**/*", only_the_book)
        page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(address + name, wait_until="load")
        return page

    yield open_page
    for context in contexts:
        context.close()


def frame_wanted(figure) -> int:
    """The index that the controls' positions spell, the last control fastest."""
    index = 0
    for i in range(figure.locator("[data-texts]").count()):
        control = figure.locator("[data-texts]").nth(i)
        index = index * len(json.loads(control.get_attribute("data-texts"))) + int(control.input_value())
    return index


def figures(page):
    return [
        page.locator("figure.dcx[data-frames]").nth(i) for i in range(page.locator("figure.dcx[data-frames]").count())
    ]


def test_the_landing_page_moves():
    assert "book/intro.html" in MOVING


@each_page(PAGES)
def test_page_opens_without_error_or_request_outside(visit, name):
    page = visit(name)
    assert page.refused == []
    assert page.errors == []


@each_page(MOVING)
def test_figures_move_by_keyboard(visit, name):
    page = visit(name)
    for figure in figures(page):
        assert int(figure.get_attribute("data-frames")) > 1
        for i in range(figure.locator("input[type=range]").count()):
            knob = figure.locator("input[type=range]").nth(i)
            before, at = figure.locator(".dcx-stage").inner_html(), int(figure.get_attribute("data-frame"))
            last = int(knob.input_value()) == int(knob.get_attribute("max"))
            shown = knob.get_attribute("aria-valuetext")
            knob.press("ArrowLeft" if last else "ArrowRight")
            page.wait_for_function(
                "([figure, at]) => figure.dataset.frame !== String(at)",
                arg=[figure.element_handle(), at],
                timeout=PATIENCE_MS,
            )
            assert figure.locator(".dcx-stage").inner_html() != before
            assert int(figure.get_attribute("data-frame")) == frame_wanted(figure)
            assert knob.get_attribute("aria-valuetext") != shown
            assert knob.locator("xpath=following-sibling::output").inner_text() == knob.get_attribute("aria-valuetext")
    assert page.errors == []


@each_page(MOVING)
def test_figures_move_by_drag_and_by_list(visit, name):
    page = visit(name, width=390)
    for figure in figures(page):
        before = figure.locator(".dcx-stage").inner_html()
        if figure.locator("input[type=range]").count():
            knob = figure.locator("input[type=range]").first
            knob.scroll_into_view_if_needed()
            box = knob.bounding_box()
            # from the thumb to the far end, as a finger would
            share = int(knob.input_value()) / int(knob.get_attribute("max"))
            y = box["y"] + box["height"] / 2
            page.mouse.move(box["x"] + 8 + share * (box["width"] - 16), y)
            page.mouse.down()
            page.mouse.move(box["x"] + (box["width"] - 2 if share < 0.5 else 2), y, steps=8)
            page.mouse.up()
            assert knob.input_value() == (knob.get_attribute("max") if share < 0.5 else "0")
        else:
            menu = figure.locator("select").first
            menu.select_option(index=0 if menu.input_value() != "0" else 1)
        page.wait_for_function(
            "([stage, before]) => stage.innerHTML !== before",
            arg=[figure.locator(".dcx-stage").element_handle(), before],
            timeout=PATIENCE_MS,
        )


@each_page(MOVING)
def test_figures_show_their_start_without_script(visit, name):
    page = visit(name, script=False)
    for figure in figures(page):
        assert figure.locator(".dcx-stage svg, .dcx-stage img").count() == 1
        assert figure.locator("input:enabled, select:enabled").count() == 0


@each_page(WRITTEN)
def test_page_fits_a_phone(visit, name):
    page = visit(name, width=390)
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0


@each_page(MOVING)
def test_figures_follow_the_dark_page(visit, name):
    page = visit(name, dark=True)
    assert page.locator("html").get_attribute("data-theme") == "dark"
    for figure in figures(page):
        if not figure.locator(".dcx-svg").count():
            continue
        ink = figure.locator(".dcx-stage").evaluate("e => getComputedStyle(e).color")
        grounds = figure.evaluate(
            "e => { const seen = []; for (; e; e = e.parentElement) seen.push(getComputedStyle(e).backgroundColor);"
            " return seen.filter(c => !/, 0\\)$/.test(c) && c !== 'transparent'); }"
        )
        ink, ground = (sum(map(float, re.findall(r"[\d.]+", c)[:3])) / 3 for c in (ink, grounds[0]))
        assert ink - ground > 100  # light on dark
