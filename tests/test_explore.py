"""Figures for readers with and without a kernel."""

import base64
import gzip
import itertools
import json
import re
from html.parser import HTMLParser

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib import rc_context, rcParams
from matplotlib.figure import Figure

from detcore.explore import PALETTE, STYLE, choice, explore, is_static, show, slider, source, style
from detcore.explore.look import draw

VOID = {"br", "img", "input", "link", "meta", "hr"}


class Page(HTMLParser):
    """Elements of a fragment: (tag, attributes, text inside); fails where the nesting is broken."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(html)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])
        if tag not in VOID:
            self.open.append((tag, self.elements[-1]))

    def handle_startendtag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self.open, f"closed but never opened: {tag}"
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.open[-1][1][2] += data

    def all(self, tag, **wanted):
        found = [e for e in self.elements if e[0] == tag]
        return [e for e in found if all(e[1].get(k.rstrip("_")) == v for k, v in wanted.items())]

    def one(self, tag, **wanted):
        (element,) = self.all(tag, **wanted)
        return element


def line(height, shape="flat"):
    fig = Figure()
    ax = fig.subplots()
    ax.plot([0, 1], [0, height], label=shape)
    ax.set(title=f"{shape} {height}", ylim=(0, 3))
    ax.legend()
    return fig


def shown(call, *args, **kwargs):
    """What a call displays."""
    displayed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("IPython.display.display", displayed.append)
        call(*args, **kwargs)
    (thing,) = displayed
    return thing


def static(fn=line, **kwargs):
    """The HTML that a page gets."""
    return shown(explore, fn, static=True, **{"alt": "A line.", **kwargs})._repr_html_()


@pytest.fixture(scope="module")
def plain():
    """A slider of three stops over a line."""
    return static(height=slider(0, 2, 3, start=1))


def frames_of(page):
    data = json.loads(page.one("script", type="application/json")[2])
    if "gz" not in data:
        return data["frames"], data
    packed = json.loads(gzip.decompress(base64.b64decode(data["gz"])))
    return ["".join(packed["tags"][i] for i in row) for row in packed["frames"]], data


# --- controls -------------------------------------------------------------------------------------------------


def test_slider_stops_are_what_they_are_shown_as():
    # 0.1 * 3 is 0.30000000000000004 in floating point; a drawing function that compares must get 0.3
    assert slider(0.0, 1.0, 11).values[3] == 0.3
    assert slider(0.0, 1.0, 11).texts[3] == "0.3"


def test_slider_gives_whole_numbers_only_where_all_are():
    assert all(type(v) is int for v in slider(2, 10, 5).values)
    assert slider(0, 1, 3).values == (0.0, 0.5, 1.0)


def test_slider_starts_at_the_nearest_stop():
    assert slider(0.0, 1.0, 5, start=0.6).start == 2
    assert slider(0.0, 1.0, 5, start=0.65).start == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: slider(1, 1), r"slider: hi must be above lo; got lo = 1, hi = 1"),
        (lambda: slider(float("nan"), 1), r"slider: hi must be above lo; got lo = nan"),
        (lambda: slider(0, 1, 1), r"slider: n must be >= 2; got 1"),
        (lambda: slider(0, 1, 3, start=2), r"slider: start must be in \[0, 1\]; got 2"),
        (lambda: choice("a"), r"choice: values must be two or more; got 1"),
        (lambda: choice(1, "1"), r"choice: values must look different from each other; got \['1', '1'\]"),
        (lambda: choice("a", "b", start="c"), r"choice: start must be one of \['a', 'b'\]; got 'c'"),
    ],
)
def test_controls_reject(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- without a kernel -----------------------------------------------------------------------------------------


def test_explore_draws_every_combination_in_the_order_of_the_script():
    seen = []

    def fn(height, shape):
        seen.append((height, shape))
        return line(height, shape)

    page = Page(static(fn, height=slider(0, 2, 3, start=1), shape=choice("flat", "tall")))
    assert seen == list(itertools.product((0, 1, 2), ("flat", "tall")))
    frames, _ = frames_of(page)
    figure = page.one("figure")[1]
    # the script's index: controls as digits, the last one fastest; 1 * 2 + 0
    assert (len(frames), figure["data-frames"], figure["data-frame"]) == (6, "6", "2")
    assert len(set(frames)) == 6


def test_explore_shows_the_start_frame_without_the_script(plain):
    frames, _ = frames_of(Page(plain))
    before_data = plain[: plain.index('<script type="application/json"')]
    assert frames[1] in before_data
    assert frames[0] not in before_data


def test_explore_controls_wait_for_the_script_and_say_their_value():
    page = Page(static(height=slider(0.0, 2.0, 5, start=0.5, label="h < 2"), shape=choice("flat", "tall")))
    knob, menu = page.one("input")[1], page.one("select")[1]
    assert "disabled" in knob
    assert "disabled" in menu
    assert (knob["type"], knob["max"], knob["value"], knob["aria-valuetext"]) == ("range", "4", "1", "0.5")
    assert json.loads(knob["data-texts"]) == ["0", "0.5", "1", "1.5", "2"]
    assert [o[2] for o in page.all("option")] == ["flat", "tall"]
    assert [s[2] for s in page.all("span")] == ["h < 2", "shape"]  # each inside its label
    assert page.one("output")[2] == "0.5"


def test_explore_text_for_each_frame(plain):
    page = Page(static(height=slider(1, 3, 3, start=2), alt=lambda height: f"Rises to {height}."))
    assert page.one("div", role="img")[1]["aria-label"] == "Rises to 2."
    assert frames_of(page)[1]["alt"] == ["Rises to 1.", "Rises to 2.", "Rises to 3."]
    assert frames_of(Page(plain))[1]["alt"] == ["A line."]


def test_explore_cannot_break_out_of_its_element():
    evil = '</script><b id="x">"&<!--'
    html = static(
        lambda height, kind: line(height),
        height=slider(0, 1, 2),
        kind=choice(evil, "b", label=evil),
        alt=evil,
        title=evil,
    )
    page = Page(html)  # fails on broken nesting
    assert not page.all("b")
    assert page.one("figcaption")[2] == evil
    assert page.one("div", role="img")[1]["aria-label"] == evil
    assert page.all("option")[0][2] == evil
    assert frames_of(page)[1]["alt"] == [evil]


def test_explore_is_byte_identical_when_run_again(plain):
    assert static(height=slider(0, 2, 3, start=1)) == plain


def test_explore_ids_differ_between_figures_of_a_page():
    pages = [Page(static(height=slider(0, top, 2))) for top in (1, 2)]
    ids = [{e[1]["id"] for e in page.elements if "id" in e[1]} for page in pages]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_explore_ids_all_lead_somewhere(plain):
    for frame in frames_of(Page(plain))[0]:
        named = set(re.findall(r' id="([^"]+)"', frame))
        used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', frame))
        assert used  # text is drawn from glyphs by reference, so there are some
        assert named == used


def test_explore_ink_follows_the_page(plain):
    frame = frames_of(Page(plain))[0][0]
    assert "currentColor" in frame
    assert "#010203" not in frame
    # no ground of its own, and no rule that reaches beyond the picture
    assert not re.search(r"fill: ?(#fff|white)", frame)
    assert "<style" not in frame
    assert "<metadata" not in frame
    assert not re.search(r"^<svg[^>]* (width|height)=", frame)


def test_explore_svg_keeps_the_shape():
    # a line from (0, 0) to (1, 1): rounding may move its ends by a hundredth of a point, no more
    fig = Figure(figsize=(2, 2), layout=None)
    ax = fig.add_axes((0, 0, 1, 1))
    ax.plot([0, 1], [0, 1], color="#123456")
    ax.set(xlim=(-1 / 7, 8 / 7), ylim=(-1 / 7, 8 / 7))
    svg = draw(fig, "svg")
    path = re.search(r'd="([^"]*)"[^>]*stroke: #123456', svg)[1]
    numbers = [float(n) for n in re.findall(r"-?[\d.]+", path)]
    np.testing.assert_allclose(numbers, [16, 128, 128, 16], atol=0.006)  # 144 points, y downwards


def test_explore_unpacked_holds_the_same_frames(plain):
    loose = frames_of(Page(static(height=slider(0, 2, 3, start=1), pack=False)))
    assert "gz" not in loose[1]
    assert loose[0] == frames_of(Page(plain))[0]


def test_explore_webp_frames_are_lossless_and_on_white():
    page = Page(static(height=slider(0, 2, 2), fmt="webp"))
    frames, data = frames_of(page)
    assert data["fmt"] == "webp"
    files = [base64.b64decode(f) for f in frames]
    # bytes 8 to 16 of the RIFF container name the codec; VP8L is the lossless one
    assert all((f[:4], f[8:12]) == (b"RIFF", b"WEBP") and b"VP8L" in f[12:64] for f in files)
    stage = page.one("div", role="img")
    assert "dcx-webp" in stage[1]["class"]


def test_explore_is_small(plain):
    # the promise of a kilobyte of script, and of two a frame of a plain plot: unpacked they are ten each
    assert len(Page(plain).all("script")[-1][2]) < 1400
    frames, data = frames_of(Page(plain))
    assert len(data["gz"]) / len(frames) < 2500 < len(frames[0]) / 3


def test_explore_keeps_once_what_frames_share():
    few, many = (frames_of(Page(static(height=slider(0, 2, n))))[1]["gz"] for n in (2, 20))
    assert len(many) < 2 * len(few)


def test_explore_closes_what_pyplot_opened():
    def fn(height):
        fig, ax = plt.subplots()
        ax.plot([0, height])
        return fig

    static(fn, height=slider(0, 2, 3))
    assert not plt.get_fignums()


def test_explore_draws_in_the_books_style_and_leaves_none_behind():
    before = dict(rcParams)
    sizes = []

    def fn(height):
        sizes.append(tuple(rcParams["figure.figsize"]))
        return line(height)

    static(fn, height=slider(0, 2, 2))
    assert sizes == [(4.8, 3.0)] * 2
    assert dict(rcParams) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"alt": " "}, ValueError, "explore: alt must say what the figure shows"),
        ({"fmt": "gif"}, ValueError, "explore: fmt must be"),
        ({"height": None}, TypeError, "height must be made by slider or choice; got NoneType|parameter 'controls'"),
        (
            {"fn": lambda height: plt.Figure().subplots()},
            TypeError,
            "explore: what fn returns must be a matplotlib Figure",
        ),
        ({"fn": lambda height: Figure(figsize=(7, 3))}, ValueError, "at most 6.4 inches wide"),
        ({"height": slider(0, 1, 151)}, ValueError, "frames must be at most max_frames = 150; got 151 = 151"),
        ({"shape": choice("a", "b"), "max_frames": 5}, ValueError, r"max_frames = 5; got 3 x 2 = 6"),
    ],
)
@pytest.mark.filterwarnings(
    "ignore::jaxtyping.JaxtypingWarning" if hasattr(__import__("jaxtyping"), "JaxtypingWarning") else "default"
)
def test_explore_rejects(arguments, error, message):
    usual = {"fn": line, "height": slider(0, 2, 3), **arguments}
    with pytest.raises(error, match=message):
        static(**usual)


def test_explore_needs_a_control():
    with pytest.raises(
        ValueError, match=r"explore: controls must be one or more; got none. A still figure is for show"
    ):
        explore(line, alt="x", static=True)


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("", False), (None, False)])
def test_is_static_reads_the_variable(monkeypatch, value, expected):
    monkeypatch.delenv("DETCORE_STATIC", raising=False)
    if value is not None:
        monkeypatch.setenv("DETCORE_STATIC", value)
    assert is_static() is expected


# --- with a kernel --------------------------------------------------------------------------------------------


def test_explore_live_redraws_with_the_values_at_the_widgets(monkeypatch):
    seen = []

    def fn(height, shape):
        seen.append((height, shape))
        return line(height, shape)

    boxes = []
    monkeypatch.setattr("IPython.display.display", boxes.append)
    explore(fn, height=slider(0.0, 2.0, 5, start=1.0, label="h"), shape=choice("flat", "tall"), alt="x", static=False)
    box = next(b for b in boxes if isinstance(b, ipywidgets.VBox))
    knob, menu, _ = box.children
    assert (knob.description, menu.description) == ("h", "shape")
    knob.value = 4
    menu.value = 1
    assert seen == [(1.0, "flat"), (2.0, "flat"), (2.0, "tall")]
    assert not plt.get_fignums()


def test_explore_live_takes_values_that_cannot_be_hashed(monkeypatch):
    seen = []
    boxes = []
    monkeypatch.setattr("IPython.display.display", boxes.append)
    explore(
        lambda corner: seen.append(corner) or line(1),
        corner=choice([0, 1], [2, 3], start=[2, 3]),
        alt="x",
        static=False,
    )
    assert seen == [[2, 3]]


# --- still figures, style, source -----------------------------------------------------------------------------


def test_show_gives_a_named_picture_and_closes_it():
    with rc_context(STYLE):
        fig, ax = plt.subplots()
        ax.plot([0, 1])
    picture = shown(show, fig, alt='Rises from "0" to 1.')
    page = Page(picture._repr_html_())
    assert page.one("div", role="img")[1]["aria-label"] == 'Rises from "0" to 1.'
    assert "currentColor" in picture._repr_html_()
    assert repr(picture) == 'Rises from "0" to 1.'
    assert not page.all("input")
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("fig", "alt", "error", "message"),
    [
        (Figure(), "", ValueError, "show: alt must say"),
        (Figure(figsize=(8, 2)), "x", ValueError, "show: fig must be at most 6.4 inches wide.*got 8"),
    ],
)
def test_show_rejects(fig, alt, error, message):
    with pytest.raises(error, match=message):
        show(fig, alt=alt)


def test_style_sets_every_key():
    with rc_context():
        style()
        assert rcParams["axes.facecolor"] == "none"
        assert rcParams["axes.prop_cycle"].by_key()["color"] == list(PALETTE.values())


def luminance(colour):
    """Relative luminance of #rrggbb, WCAG 2."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(a, b):
    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", PALETTE)
def test_palette_reads_on_white_and_on_the_dark_page(name):
    # 3 is what WCAG 2.1 asks of graphical objects; #121212 and #14181e are the theme's dark grounds
    assert min(contrast(PALETTE[name], ground) for ground in ("#ffffff", "#121212", "#14181e")) >= 3


def seen_by(colour, matrix):
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return lab(np.clip(matrix @ linear, 0, 1))


def lab(linear):
    """CIE L*a*b* of linear sRGB, white D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    t = to_xyz @ linear / [0.9505, 1.0, 1.089]
    f = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Machado, Oliveira and Fernandes (2009), severity 1.0
DEUTAN = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]])
PROTAN = np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]])


@pytest.mark.parametrize("eye", [np.eye(3), DEUTAN, PROTAN], ids=["all cones", "deuteranopia", "protanopia"])
def test_palette_first_three_stay_apart_for_colour_blind_readers(eye):
    seen = [seen_by(PALETTE[name], eye) for name in ("blue", "orange", "green")]
    # 20 in L*a*b* is a difference seen at a glance; 2.3 is just noticeable
    assert min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)) > 20


def documented(x):
    """Say it.

    Twice.
    """
    # why
    return x


class Documented:
    """Of a class."""

    def empty(self):
        """Of a method."""


def test_source_shows_the_code_itself():
    out = shown(source, documented)
    assert out.data.startswith("*documented* in `")
    assert (
        '```python\ndef documented(x):\n    """Say it.\n\n    Twice.\n    """\n    # why\n    return x\n```' in out.data
    )


def test_source_without_docstrings_is_still_code():
    assert (
        "```python\ndef documented(x):\n    # why\n    return x\n```" in shown(source, documented, docstring=False).data
    )
    code = shown(source, Documented, docstring=False).data.split("```")[1].removeprefix("python")
    compile(code, "shown", "exec")  # a method left without a body would not be
    assert '"""' not in code


def test_source_rejects_what_has_none():
    with pytest.raises(TypeError, match="source: obj must be a function or class written in Python; got"):
        source(len)
