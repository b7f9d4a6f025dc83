"""Mining without sorting and entropy without a full gradient, against the plain forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from detcore import kernels
from detcore.kernels import mining
from detcore.losses.mining import hard_negative_mask, mined_entropy_sum
from detcore.structures import BACKGROUND, IGNORE
from tests.counting import LaunchCounter
from tests.test_kernels_focal import CLOSE, TYPES, labels_of

EVERY_TYPE = pytest.mark.parametrize("dtype", TYPES, ids=str)
RATIOS = [0.0, 0.5, 3.0, 100.0]


def a_batch(batch=3, count=60, classes=5, *, dtype=torch.float64):
    """Logits of classes and background; few positives."""
    logits = (3 * torch.randn(batch, count, classes, dtype=torch.float64)).to(dtype)
    labels = torch.where(torch.rand(batch, count) < 0.7, BACKGROUND, labels_of(batch, count, classes - 1))
    return logits, labels, torch.rand(batch, count, dtype=torch.promote_types(dtype, torch.float32))


def assert_twins(logits, labels, weights, *, ratio=3.0, by=1.0):
    found = []
    for plain in (False, True):
        x = logits.detach().requires_grad_()
        if plain:
            with kernels.disable():
                value = mined_entropy_sum(x, labels, weights, ratio=ratio)
        else:
            value = mined_entropy_sum(x, labels, weights, ratio=ratio)
            assert type(value.grad_fn).__name__ == "_ChosenBackward"
        (by * value).backward()
        found.append((value.detach(), x.grad))
    (value, gradient), (wanted, slopes) = found
    assert gradient.dtype == slopes.dtype == logits.dtype
    wide = torch.promote_types(logits.dtype, torch.float32)
    assert value.dtype == wanted.dtype == wide
    assert_close(value, wanted, **CLOSE[wide])
    assert_close(gradient, slopes, **CLOSE[logits.dtype])
    assert gradient.ne(0).any(-1).equal(slopes.ne(0).any(-1))


@EVERY_TYPE
@pytest.mark.parametrize("ratio", RATIOS)
def test_chosen_rows_and_their_gradient_equal_the_plain_ones(dtype, ratio):
    assert_twins(*a_batch(dtype=dtype), ratio=ratio)


@EVERY_TYPE
def test_any_factor_reaches_the_gradient(dtype):
    assert_twins(*a_batch(dtype=dtype), by=0.375)


@pytest.mark.parametrize("rows", [1, 7])
def test_pieces_of_any_size_give_the_same(rows, monkeypatch):
    monkeypatch.setattr(mining, "PIECE", rows * 5)
    assert_twins(*a_batch())


@pytest.mark.parametrize("label", [BACKGROUND, IGNORE, 2])
def test_all_priors_of_one_kind(label):
    logits, labels, weights = a_batch()
    assert_twins(logits, torch.full_like(labels, label), weights)


def test_an_empty_an_ignored_and_a_full_image():
    logits, labels, weights = a_batch()
    labels[0], labels[1], labels[2] = BACKGROUND, IGNORE, 1
    assert_twins(logits, labels, weights)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (1, 1, 2)])
def test_batches_of_nothing_and_of_one_row(shape):
    assert_twins(*a_batch(*shape))


def test_equal_rows_go_first_come_first_served():
    logits, labels, weights = a_batch(dtype=torch.float32)
    assert_twins(torch.zeros_like(logits), labels, weights)
    assert_twins(logits.round(), labels, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_sure_logits(size, dtype):
    logits, labels, weights = a_batch(dtype=dtype)
    assert_twins(logits.sign() * size, labels, weights)


def test_a_broken_logit_breaks_the_loss():
    logits, labels, weights = a_batch()
    labels[0, :3] = torch.tensor([1, BACKGROUND, BACKGROUND])
    logits[0, 1, 0] = float("nan")
    for ratio in (0.5, 3.0):
        assert mined_entropy_sum(logits, labels, weights, ratio=ratio).isnan()


def test_logits_need_not_be_contiguous():
    logits, *others = a_batch()
    turned = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert_twins(turned, *others)


def test_value_alone_is_the_same():
    logits, labels, weights = a_batch()
    value = mined_entropy_sum(logits, labels, weights)
    assert not value.requires_grad
    with torch.no_grad(), LaunchCounter() as counter:
        again = mined_entropy_sum(logits.requires_grad_(), labels, weights)
    assert "_softmax" not in counter.launches
    assert value.equal(again)
    assert value.equal(mined_entropy_sum(logits, labels, weights).detach())


def test_only_the_chosen_rows_are_kept():
    logits, labels, weights = a_batch()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        mined_entropy_sum(logits.requires_grad_(), labels, weights, ratio=1.0)
    positives = int((labels >= 0).sum())
    assert sorted(x.numel() for x in kept) == [2 * positives, 2 * positives * 5]


def test_gradient_can_be_asked_for_twice_but_not_differentiated():
    logits, labels, weights = a_batch()
    loss = mined_entropy_sum(logits.requires_grad_(), labels, weights)
    [first] = torch.autograd.grad(2 * loss, logits, retain_graph=True)
    [second] = torch.autograd.grad(loss, logits, retain_graph=True)
    assert_close(first, 2 * second, rtol=1e-15, atol=0)
    with pytest.raises(RuntimeError, match=r"once only; got create_graph=True"):
        torch.autograd.grad(loss, logits, create_graph=True)


def masks(losses, positive, negative, ratio):
    with kernels.disable():
        plain = hard_negative_mask(losses, positive, negative, ratio=ratio)
    return hard_negative_mask(losses, positive, negative, ratio=ratio), plain


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    levels=st.sampled_from([1, 2, 5, 1000]),
    ratio=st.sampled_from([0.0, 0.3, 1.0, 2.5, 3.0, 50.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_mask_equals_the_sorted_one_with_any_number_of_ties(seed, levels, ratio, dtype):
    torch.manual_seed(seed)
    losses = torch.randint(-levels, levels + 1, (4, 40)).to(dtype)
    labels = torch.where(torch.rand(4, 40) < 0.6, BACKGROUND, labels_of(4, 40, 3))
    labels[0] = BACKGROUND
    fast, plain = masks(losses, labels >= 0, labels == BACKGROUND, ratio)
    assert fast.equal(plain)


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_mask_takes_infinite_losses_as_the_sorted_one_does(value):
    losses = torch.randn(2, 30)
    losses[:, ::4] = value
    positive = torch.zeros(2, 30, dtype=torch.bool)
    positive[:, 1:5] = True
    for ratio in RATIOS:
        fast, plain = masks(losses, positive, ~positive, ratio)
        assert fast.equal(plain)
