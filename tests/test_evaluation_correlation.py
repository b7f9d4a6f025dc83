import math

import numpy as np
import pytest
from scipy import stats

from detcore.evaluation.correlation import correlate


def tau_b(a, b):
    """Every pair of boxes, one by one."""
    agree = differ_a = differ_b = 0
    for i in range(len(a)):
        for j in range(i):
            x, y = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
            agree += x * y
            differ_a += abs(x)
            differ_b += abs(y)
    return agree / math.sqrt(differ_a * differ_b)


def boxes(count=60, seed=3):
    """Scores with ties, and IoUs of which a third are 0."""
    generator = np.random.default_rng(seed)
    a = generator.integers(0, 20, count) / 20
    b = np.where(generator.random(count) < 1 / 3, 0.0, 0.5 * a + 0.5 * generator.random(count))
    return a, b, np.sort(generator.integers(0, 8, count))


def test_coefficients_equal_scipy_and_the_pairs():
    a, b, image = boxes()
    ours = correlate(a, b, image, bootstrap=0)
    assert ours.pearson == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-12)
    assert ours.spearman == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
    assert ours.kendall == pytest.approx(tau_b(a, b), abs=1e-12)
    assert ours.count == 60
    # The three differ, and tau-b differs from the form that overlooks ties.
    assert abs(ours.pearson - ours.spearman) > 1e-3
    assert abs(ours.kendall - stats.kendalltau(a, b, variant="c").statistic) > 1e-3


def test_coefficients_by_hand():
    # Ranks 1 2 3 4 against 2 1 4 3: Spearman 1 - 6 * 4 / 60; of six pairs two are in opposite order.
    ours = correlate(np.array([1.0, 2, 3, 4]), np.array([2.0, 1, 4, 3]), np.arange(4), bootstrap=0)
    assert ours.spearman == pytest.approx(0.6)
    assert ours.pearson == pytest.approx(0.6)
    assert ours.kendall == pytest.approx((4 - 2) / 6)


def test_a_rising_curve_has_perfect_ranks():
    a = np.linspace(0, 1, 30)
    ours = correlate(a, a**5, np.arange(30), bootstrap=0)
    assert (ours.spearman, ours.kendall) == (pytest.approx(1), pytest.approx(1))
    assert ours.pearson < 0.95
    falling = correlate(a, -a, np.arange(30), bootstrap=0)
    assert falling.pearson == falling.spearman == pytest.approx(-1)


def test_intervals_equal_an_explicit_bootstrap_over_images():
    a, b, image = boxes()
    ours = correlate(a, b, image, bootstrap=25, seed=5, level=0.9)
    images = np.unique(image)
    generator = np.random.default_rng(5)
    draws = []
    for times in generator.multinomial(len(images), np.full(len(images), 1 / len(images)), size=25):
        rows = np.concatenate(
            [np.flatnonzero(image == k) for k, n in zip(images, times, strict=True) for _ in range(n)]
        )
        x, y = a[rows], b[rows]
        draws.append(
            [stats.pearsonr(x, y).statistic, stats.spearmanr(x, y).statistic, stats.kendalltau(x, y).statistic]
        )
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    for k, name in enumerate(("pearson", "spearman", "kendall")):
        assert ours.intervals[name] == pytest.approx((low[k], high[k]), abs=1e-10)
    assert ours.level == 0.9


def test_intervals_over_images_are_wider_than_over_boxes():
    # Copies of one box in an image bring no news: the interval must not shrink with them.
    a, b, _ = boxes(40)
    image = np.arange(40)
    once = correlate(a, b, image, seed=1)
    copies = correlate(np.repeat(a, 9), np.repeat(b, 9), np.repeat(image, 9), seed=1)
    as_if_independent = correlate(np.repeat(a, 9), np.repeat(b, 9), np.arange(360), seed=1)
    width = [np.ptp(c.intervals["pearson"]) for c in (once, copies, as_if_independent)]
    assert width[1] == pytest.approx(width[0])
    assert width[2] < 0.6 * width[1]
    assert copies.kendall == pytest.approx(once.kendall)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(30):
        a = generator.normal(size=50)
        b = 0.6 * a + 0.8 * generator.normal(size=50)  # correlation 0.6
        low, high = correlate(a, b, np.arange(50), bootstrap=60, seed=trial, level=0.9).intervals["pearson"]
        hits += low < 0.6 < high
    assert 22 <= hits <= 30


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_boxes_give_nan(count):
    ours = correlate(np.zeros(count), np.zeros(count), np.zeros(count, dtype=int))
    assert math.isnan(ours.pearson)
    assert math.isnan(ours.kendall)
    assert math.isnan(ours.intervals["spearman"][0])


def test_a_value_that_never_varies_gives_nan():
    ours = correlate(np.array([0.1, 0.5, 0.9]), np.zeros(3), np.arange(3))
    assert math.isnan(ours.pearson)
    assert math.isnan(ours.spearman)
    assert math.isnan(ours.kendall)


def test_two_boxes_agree_or_not():
    assert correlate(np.array([0.1, 0.5]), np.array([0.3, 0.4]), np.arange(2), bootstrap=0).kendall == 1
    assert correlate(np.array([0.1, 0.5]), np.array([0.4, 0.3]), np.arange(2), bootstrap=0).kendall == -1


def test_one_image_has_no_interval():
    a, b, _ = boxes()
    ours = correlate(a, b, np.zeros(60, dtype=int))
    assert math.isnan(ours.intervals["pearson"][0])
    assert not math.isnan(ours.pearson)


def test_the_seed_decides_the_draws():
    a, b, image = boxes()
    assert correlate(a, b, image, bootstrap=20, seed=1) == correlate(a, b, image, bootstrap=20, seed=1)
    assert (
        correlate(a, b, image, bootstrap=20, seed=1).intervals != correlate(a, b, image, bootstrap=20, seed=2).intervals
    )


def test_correlate_names_what_is_wrong():
    a, b, image = boxes()
    with pytest.raises(ValueError, match="bootstrap must be >= 0; got -1"):
        correlate(a, b, image, bootstrap=-1)
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\)"):
        correlate(a, b, image, level=1.0)
