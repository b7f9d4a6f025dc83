import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from PIL import Image

from detcore.evaluation.misalignment import diagnose
from detcore.evaluation.ranking import suppress
from detcore.structures import BACKGROUND, IGNORE, Assignment, Priors, pad_targets
from detcore.viz import (
    COLOURS,
    draw_assignment,
    draw_boxes,
    draw_priors,
    plot_best_iou,
    plot_curves,
    plot_misalignment,
    plot_score_bins,
    plot_score_iou,
)
from tests.pictures import pictures


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    """Nothing is ever shown; every figure can be drawn; all are closed."""
    monkeypatch.setattr(plt, "show", lambda *_, **__: pytest.fail("plt.show() was called"))
    yield
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")


def outlines(ax):
    """Corners of all boxes drawn, artist by artist."""
    return [
        [[*path.vertices[:4].min(0), *path.vertices[:4].max(0)] for path in artist.get_paths()]
        for artist in ax.collections
        if isinstance(artist, PolyCollection)
    ]


def luminance(colour):
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_stand_out_on_light_and_on_dark(colour):
    for ground in ("#ffffff", "#121212"):
        low, high = sorted([luminance(colour), luminance(ground)])
        assert (high + 0.05) / (low + 0.05) >= 3


def test_draw_boxes_puts_boxes_where_they_are():
    boxes = torch.tensor([[5.0, 6.0, 30.0, 20.0], [1.0, 2.0, 8.0, 9.0]])
    ax = draw_boxes(torch.zeros(3, 40, 60), boxes, [0, 1], [0.2, 0.9], classes=["cat", "dog"])
    assert outlines(ax) == [boxes.tolist()]  # worst first, so that the best lies on top
    assert [t.get_text() for t in ax.texts] == ["cat 0.20", "dog 0.90"]
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 60), (40, 0))


def test_best_box_is_drawn_last():
    ax = draw_boxes(torch.zeros(3, 40, 60), [[0, 0, 4, 4], [9, 9, 12, 12]], scores=[0.9, 0.2])
    assert [t.get_text() for t in ax.texts] == ["0.20", "0.90"]
    assert outlines(ax) == [[[9, 9, 12, 12], [0, 0, 4, 4]]]


@pytest.mark.parametrize(
    "image",
    [
        torch.full((3, 8, 10), 255, dtype=torch.uint8),
        torch.ones(3, 8, 10),
        torch.full((3, 8, 10), 1.5),
        torch.ones(1, 8, 10),
        np.full((8, 10, 3), 255, dtype=np.uint8),
        Image.new("RGB", (10, 8), "white"),
    ],
)
def test_pictures_of_any_kind_are_shown(image):
    ax = draw_boxes(image, [])
    assert ax.images[0].get_array().shape[:2] == (8, 10)
    assert ax.images[0].get_extent() == [0, 10, 8, 0]  # a pixel's corner, not its middle, is at 0
    shown = ax.images[0].to_rgba(ax.images[0].get_array(), bytes=True)
    assert shown[..., :3].min() == 255


def test_boxes_can_be_laid_over_a_picture_shown_before():
    ax = draw_boxes(torch.zeros(3, 40, 60), [[0, 0, 4, 4]])
    assert draw_boxes(None, [[8, 8, 9, 90]], ax=ax, dashed=True, colour="#ffffff") is ax
    assert len(outlines(ax)) == 2
    assert ax.get_ylim() == (40, 0)  # the picture decides what is seen


def test_boxes_alone_are_framed_with_y_downwards():
    ax = draw_boxes(None, [[10, 20, 30, 60]])
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    assert (left < 10, right > 30) == (True, True)
    assert (top < 20, bottom > 60) == (True, True)


def test_draw_boxes_names_what_is_wrong():
    image = torch.zeros(3, 8, 8)
    with pytest.raises(ValueError, match=r"boxes must have shape \(n, 4\); got \(4,\)"):
        draw_boxes(image, [0, 0, 4, 4])
    with pytest.raises(ValueError, match=r"labels must have shape \(1,\), one a box"):
        draw_boxes(image, [[0, 0, 4, 4]], [0, 1])
    with pytest.raises(ValueError, match="scores must have shape"):
        draw_boxes(image, [[0, 0, 4, 4]], scores=0.5)
    with pytest.raises(ValueError, match="classes must name every label; got 1 for 1"):
        draw_boxes(image, [[0, 0, 4, 4]], [1], classes=["cat"])


def priors():
    boxes = torch.tensor(
        [[[0.0, 0.0, 8.0, 8.0], [8.0, 0.0, 16.0, 8.0], [0.0, 0.0, 16.0, 16.0], [4.0, 4.0, 20.0, 20.0]]]
    )
    return Priors(boxes, counts=(2, 0, 2))


def test_draw_priors_has_one_artist_a_level():
    ax = draw_priors(priors(), torch.zeros(3, 32, 32))
    boxes = priors().boxes[0].tolist()
    assert outlines(ax) == [boxes[:2], boxes[2:]]
    first, second = ax.collections
    assert first.get_linestyle() != second.get_linestyle()
    assert not np.array_equal(first.get_edgecolor(), second.get_edgecolor())


@pytest.mark.parametrize("chosen", [[0, 3], torch.tensor([True, False, False, True]), np.array([0, 3])])
def test_draw_priors_draws_those_chosen(chosen):
    boxes = priors().boxes[0].tolist()
    assert outlines(draw_priors(priors(), chosen=chosen)) == [[boxes[0]], [boxes[3]]]


def test_draw_priors_takes_plain_boxes():
    ax = draw_priors(priors().boxes[0])
    assert outlines(ax) == [priors().boxes[0].tolist()]
    assert ax.get_legend() is None


def test_draw_assignment_shows_who_owns_what():
    objects = {"boxes": torch.tensor([[4.0, 4.0, 20.0, 22.0], [0.0, 0.0, 8.0, 7.0]]), "labels": torch.tensor([1, 0])}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    labels = torch.tensor([[BACKGROUND] * 4, [0, BACKGROUND, IGNORE, 1]])
    index = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0]])
    boxes = priors().boxes.expand(2, -1, -1)
    match = Assignment(labels, index, boxes, torch.zeros(2, 4), pad_targets([empty, objects]))
    ax = draw_assignment(torch.zeros(3, 32, 32), priors(), match, batch_index=1, classes=["cat", "dog"])
    assert ax.get_title() == "2 positive, 1 ignored, 1 negative"
    assert [t.get_text() for t in ax.texts] == ["dog: 1", "cat: 1"]
    ignored, positives, owners = outlines(ax)
    assert ignored == boxes[1, 2:3].tolist()
    assert positives == boxes[1, [0, 3]].tolist()
    assert owners == objects["boxes"].tolist()
    colours = [artist.get_edgecolor() for artist in ax.collections]
    np.testing.assert_array_equal(colours[1][::-1], colours[2])  # a positive has its object's colour
    without = draw_assignment(None, priors(), match, batch_index=1, show_ignored=False)
    assert len(outlines(without)) == 2
    nothing = draw_assignment(torch.zeros(3, 32, 32), priors(), match, batch_index=0)
    assert nothing.get_title() == "0 positive, 0 ignored, 4 negative"
    assert outlines(nothing) == []


def test_plot_score_iou_thins_and_says_so():
    values = np.linspace(0, 1, 50)
    few = plot_score_iou(values, values**2, title="dots")
    assert len(few.collections[0].get_offsets()) == 50
    assert (few.get_xlabel(), few.get_title()) == ("score", "dots")
    many = plot_score_iou(values, values**2, max_dots=20)
    assert len(many.collections[0].get_offsets()) == 20
    assert many.get_xlabel() == "score (20 of 50 boxes)"
    assert set(map(tuple, many.collections[0].get_offsets())) <= set(zip(values, values**2, strict=True))
    assert len(plot_score_iou(np.zeros(0), np.zeros(0)).collections[0].get_offsets()) == 0


def test_plot_curves_tells_curves_apart_without_colour():
    x = [0.1, 0.2, 0.3]
    ax = plot_curves(
        x, {str(k): [k, k, k] for k in range(6)}, bands={"2": ([1, 1, 1], [3, 3, 3])}, title="t", ylabel="AP"
    )
    assert len({(line.get_linestyle(), line.get_marker()) for line in ax.lines}) == 6
    assert len({line.get_color() for line in ax.lines}) == 6
    assert len(ax.collections) == 1
    with pytest.raises(ValueError, match=r"curves\['a'\] must have 3 values, one for each x; got 2"):
        plot_curves(x, {"a": [1, 2]})


def test_plot_best_iou_is_the_share_of_objects_at_each_iou():
    ax = plot_best_iou({"before NMS": np.array([0.9, 0.5, 0.0]), "nothing": np.zeros(0)})
    before, nothing = (np.asarray(line.get_ydata()) for line in ax.lines)
    assert before[0] == 1
    assert before[50] == pytest.approx(2 / 3)  # 0.5 reaches 0.5
    assert before[51] == pytest.approx(1 / 3)
    assert before[91] == 0
    assert np.isnan(nothing).all()


def test_plot_score_bins_leaves_empty_bins_out():
    ax = plot_score_bins(np.array([0.0, 0.5, 1.0]), np.array([0.4, np.nan]), title="bins")
    assert [bar.get_height() for bar in ax.patches] == [0.4, 0]


def test_plot_misalignment_draws_a_report():
    detections, targets = pictures()
    report = diagnose(suppress(detections), targets, 3, candidates=detections, bootstrap=0)
    axes = plot_misalignment(report)
    curve = axes[2].lines[0]
    assert curve.get_label() == "as scored"
    assert curve.get_xdata()[0] == pytest.approx(0.5)
    assert curve.get_ydata()[0] == report.average_precision["as scored"]["AP50"]
    assert len(curve.get_xdata()) == 10
    assert [line.get_label() for line in axes[3].lines] == ["before NMS", "after NMS"]
    given = plt.subplots(1, 4)[1]
    assert list(plot_misalignment(report, given)) == list(given)
    with pytest.raises(ValueError, match="axes must be four; got 3"):
        plot_misalignment(report, given[:3])


def test_text_takes_the_current_colours():
    with plt.rc_context({"axes.labelcolor": "#aabbcc", "axes.facecolor": "none"}):
        ax = plot_curves([0, 1], {"a": [0, 1]})
    assert ax.xaxis.label.get_color() == "#aabbcc"
    assert ax.get_facecolor()[3] == 0
