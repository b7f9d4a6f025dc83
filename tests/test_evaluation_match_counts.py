from functools import partial

import numpy as np
import pytest
import torch

from detcore.evaluation import match_counts
from detcore.evaluation.match_counts import count_matches, match_histogram, match_table
from detcore.ssd_assigner import ssd_assign
from detcore.structures import Priors
from tests import reference

CORNERS = [[6.0 * x, 6 * y, 6 * x + side, 6 * y + side] for y in range(8) for x in range(8) for side in (16, 30)]
PRIORS = Priors(torch.tensor([CORNERS]), (128,))


def objects(per_image):
    """Boxes of pictures with so many objects each, and the picture of each."""
    rng = np.random.default_rng(3)
    image = np.repeat(np.arange(len(per_image)) * 2, per_image)  # numbers with gaps: empty pictures between
    corner = rng.uniform(0, 50, (len(image), 2))
    return np.concatenate([corner, corner + rng.uniform(6, 40, (len(image), 2))], 1), image


@pytest.mark.parametrize("rule", ["override", "bipartite"])
def test_count_matches_equals_the_loop(rule):
    boxes, image = objects([1, 3, 0, 2, 3, 1, 7])
    counts = count_matches(boxes, image, PRIORS, partial(ssd_assign, rule=rule))
    expected = []
    for picture in np.unique(image):
        own = boxes[image == picture].astype(np.float32).tolist()
        labels, index, *_ = reference.ssd_assign(PRIORS.boxes[0].tolist(), own, [0] * len(own), rule=rule)
        owners = [i for label, i in zip(labels, index, strict=True) if label >= 0]
        expected += [owners.count(j) for j in range(len(own))]
    assert counts.tolist() == expected
    assert max(expected) > 2


def test_counts_do_not_depend_on_how_pictures_are_grouped(monkeypatch):
    boxes, image = objects([2, 3, 2, 1, 2, 2])
    whole = count_matches(boxes, image, PRIORS, ssd_assign)
    monkeypatch.setattr(match_counts, "OVERLAPS_AT_ONCE", 1)  # one picture at a time
    assert count_matches(boxes, image, PRIORS, ssd_assign).tolist() == whole.tolist()
    last = image == image[-1]
    assert count_matches(boxes[last], image[last], PRIORS, ssd_assign).tolist() == whole[last].tolist()


def test_counts_sum_to_the_positives():
    boxes, image = objects([4, 2])
    seen = []

    def spy(priors, targets):
        seen.append(ssd_assign(priors, targets))
        return seen[-1]

    counts = count_matches(boxes, image, PRIORS, spy)
    assert counts.sum() == sum(int(match.positive.sum()) for match in seen)
    assert [tuple(match.targets.boxes.shape) for match in seen] == [(1, 2, 4), (1, 4, 4)]  # no slot is padding


def test_no_objects_have_no_counts():
    assert count_matches(np.zeros((0, 4)), np.zeros(0, dtype=np.int64), PRIORS, ssd_assign).tolist() == []


def test_histogram_holds_every_object():
    counts = np.array([0, 1, 1, 25, 26, 90])
    bars = match_histogram(counts)
    assert len(bars) == 27
    assert (bars[[0, 1, 25, 26]].tolist(), int(bars.sum())) == ([1, 2, 1, 2], 6)


def test_match_table_by_hand():
    counts, groups = np.array([0, 5, 6, 10, 11, 3]), np.array([0, 0, 0, 0, 0, 2])
    table = match_table(counts, groups, ["small", "medium", "large"])
    assert table == {
        "small": {"objects": 5, "mean": pytest.approx(32 / 5), "objects_by_m": [2, 2, 1]},
        "medium": {"objects": 0, "mean": None, "objects_by_m": [0, 0, 0]},
        "large": {"objects": 1, "mean": 3.0, "objects_by_m": [1, 0, 0]},
    }
    assert match_table(counts, groups * 0, ["all"], edges=[0])["all"]["objects_by_m"] == [1, 5]


def test_match_counts_name_what_is_wrong():
    boxes, image = objects([1, 1])
    with pytest.raises(ValueError, match="count_matches: image must ascend"):
        count_matches(boxes, image[::-1].copy(), PRIORS, ssd_assign)
    with pytest.raises(ValueError, match=r"count_matches: boxes must have x1 < x2 and y1 < y2; .* in row 1"):
        count_matches(boxes * [[1], [0]], image, PRIORS, ssd_assign)
    with pytest.raises(ValueError, match="match_histogram: last must be >= 0; got -1"):
        match_histogram(np.array([1]), last=-1)
    with pytest.raises(ValueError, match=r"match_table: groups must be in 0..0, one a name; got 0..1"):
        match_table(np.array([1, 2]), np.array([0, 1]), ["all"])
    with pytest.raises(ValueError, match="match_table: edges must ascend"):
        match_table(np.array([1]), np.array([0]), ["all"], edges=(5, 5))
