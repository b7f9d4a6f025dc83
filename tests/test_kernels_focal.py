"""The swept focal losses against the plain sums: equal values, equal gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from detcore import kernels
from detcore.kernels import focal
from detcore.losses.dense import focal_sum, quality_focal_sum
from detcore.structures import BACKGROUND, IGNORE
from tests.counting import LaunchCounter

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EVERY_TYPE = pytest.mark.parametrize("dtype", TYPES, ids=str)
EVERY_LOSS = pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("focal", {"alpha": alpha, "gamma": gamma}) for alpha in (0.25, None) for gamma in (2.0, 0.0, 0.5, 1.0, 3.5)),
        *(("focal", {"alpha": alpha}) for alpha in (0.0, 1.0)),
        *(("quality", {"beta": beta}) for beta in (2.0, 0.0, 0.5, 1.0, 2.5)),
    ],
    ids=str,
)
# of every entry: float32 rounds it in another order, the short types round its gradient to their own numbers
CLOSE = {
    torch.float32: {"rtol": 2e-5, "atol": 1e-8},
    torch.float64: {"rtol": 1e-11, "atol": 1e-14},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-8},
    torch.float16: {"rtol": 2e-3, "atol": 2e-7},
}


def labels_of(batch, count, classes):
    """Nearly a third of each kind."""
    labels = torch.randint(-classes - 2, classes, (batch, count))
    return torch.where(labels < -2, labels % 2 - 2, labels)


def a_batch(batch=3, count=50, classes=7, *, dtype=torch.float64, spread=4.0):
    logits = (spread * torch.randn(batch, count, classes, dtype=torch.float64) - 1).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    labels = labels_of(batch, count, classes)
    quality, weights = torch.rand(2, batch, count, dtype=wide)
    quality[:, ::5], quality[:, 1::7] = 0.0, 1.0
    return logits, labels, quality, weights


def loss_of(name, options, logits, labels, quality, weights):
    if name == "focal":
        return focal_sum(logits, labels, weights, **options)
    return quality_focal_sum(logits, labels, quality, weights, **options)


def both(name, options, logits, *others, by=1.0):
    """Value and gradient of the fast and of the plain form."""
    found = []
    for way in (None, kernels.disable()):
        x = logits.detach().requires_grad_()
        if way is None:
            value = loss_of(name, options, x, *others)
            assert type(value.grad_fn).__name__ == "_SweepBackward"
        else:
            with way:
                value = loss_of(name, options, x, *others)
        (by * value).backward()
        found.append((value.detach(), x.grad))
    return found


def assert_twins(name, options, logits, *others, by=1.0):
    (value, gradient), (wanted, slopes) = both(name, options, logits, *others, by=by)
    assert value.dtype == wanted.dtype
    assert gradient.dtype == slopes.dtype == logits.dtype
    wide = torch.float32 if logits.dtype != torch.float64 else torch.float64
    assert_close(value, wanted, **CLOSE[wide])
    assert_close(gradient, slopes, **CLOSE[logits.dtype])


@EVERY_TYPE
@EVERY_LOSS
def test_swept_sum_and_gradient_equal_the_plain_ones(name, options, dtype):
    assert_twins(name, options, *a_batch(dtype=dtype))


@EVERY_TYPE
@pytest.mark.parametrize("name", ["focal", "quality"])
def test_any_factor_reaches_the_gradient(name, dtype):
    assert_twins(name, {}, *a_batch(dtype=dtype), by=0.375)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("name", ["focal", "quality"])
def test_pieces_of_any_size_give_the_same(name, rows, monkeypatch):
    monkeypatch.setattr(focal, "PIECE", rows * 7)
    assert_twins(name, {}, *a_batch())


@given(seed=st.integers(0, 10_000), power=st.sampled_from([0.0, 0.3, 1.0, 2.0, 4.0]), classes=st.integers(1, 9))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_batch_gives_the_same(seed, power, classes):
    torch.manual_seed(seed)
    batch = a_batch(2, 9, classes, spread=20.0)
    assert_twins("focal", {"gamma": power}, *batch)
    assert_twins("quality", {"beta": power}, *batch)


@pytest.mark.parametrize("label", [BACKGROUND, IGNORE, 2])
@pytest.mark.parametrize("name", ["focal", "quality"])
def test_all_priors_of_one_kind(name, label):
    logits, labels, *others = a_batch()
    assert_twins(name, {}, logits, torch.full_like(labels, label), *others)


@pytest.mark.parametrize("name", ["focal", "quality"])
def test_one_empty_image_beside_a_full_one(name):
    logits, labels, *others = a_batch()
    labels[0], labels[1], labels[2] = BACKGROUND, IGNORE, 1
    assert_twins(name, {}, logits, labels, *others)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (1, 1, 1)])
@pytest.mark.parametrize("name", ["focal", "quality"])
def test_batches_of_nothing_and_of_one_number(name, shape):
    assert_twins(name, {}, *a_batch(*shape))


@pytest.mark.parametrize("name", ["focal", "quality"])
def test_labels_that_are_no_class_own_nothing(name):
    logits, labels, *others = a_batch()
    labels[0, :4] = 7
    assert_twins(name, {}, logits, labels, *others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [30.0, 87.0, 89.0, 200.0, 1000.0])
@pytest.mark.parametrize("name", ["focal", "quality"])
def test_sure_logits_of_either_sign(name, size, dtype):
    _, labels, *others = a_batch(dtype=dtype)
    signs = torch.randint(0, 2, (3, 50, 7)) * 2 - 1
    assert_twins(name, {}, (size * signs).to(dtype), labels, *others)


@pytest.mark.parametrize("name", ["focal", "quality"])
def test_right_and_sure_costs_nothing_to_the_last_bit(name):
    # what is not subtracted cannot leave a rest
    _, labels, quality, weights = a_batch(dtype=torch.float32)
    logits = torch.where(labels[..., None] == torch.arange(7), 200.0, -200.0)
    assert loss_of(name, {}, logits, labels, torch.ones_like(quality), weights) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["focal", "quality"])
def test_broken_logits_break_the_loss(name, bad):
    logits, labels, *others = a_batch()
    labels[0, 0], logits[0, 0, 0] = BACKGROUND, bad
    assert not loss_of(name, {}, logits, labels, *others).isfinite()


@pytest.mark.parametrize("name", ["focal", "quality"])
def test_logits_need_not_be_contiguous(name):
    logits, *others = a_batch()
    turned = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not turned.is_contiguous()
    assert_twins(name, {}, turned, *others)


@pytest.mark.parametrize("name", ["focal", "quality"])
def test_value_alone_is_the_same_and_keeps_nothing(name):
    batch = a_batch()
    value = loss_of(name, {}, *batch)
    assert not value.requires_grad
    with torch.no_grad(), LaunchCounter() as counter:
        again = loss_of(name, {}, batch[0].requires_grad_(), *batch[1:])
    assert "addcmul_" not in counter.launches
    with_gradient = loss_of(name, {}, *batch)
    assert value.equal(again)
    assert value.equal(with_gradient.detach())


@pytest.mark.parametrize("name", ["focal", "quality"])
def test_swept_sum_passes_gradcheck(name):
    logits, *others = a_batch(2, 6, 3, spread=2.0)
    assert torch.autograd.gradcheck(lambda x: loss_of(name, {}, x, *others), [logits.requires_grad_()])


def test_gradient_can_be_asked_for_twice_but_not_differentiated():
    logits, labels, _, weights = a_batch()
    loss = focal_sum(logits.requires_grad_(), labels, weights)
    [first] = torch.autograd.grad(2 * loss, logits, retain_graph=True)
    [second] = torch.autograd.grad(loss, logits, retain_graph=True)
    assert_close(first, 2 * second, rtol=1e-15, atol=0)
    with pytest.raises(RuntimeError, match=r"once only; got create_graph=True"):
        torch.autograd.grad(loss, logits, create_graph=True)
    with kernels.disable():
        [slope] = torch.autograd.grad(focal_sum(logits, labels, weights), logits, create_graph=True)
    assert slope.requires_grad


def test_nothing_is_written_on():
    batch = a_batch()
    before = [x.clone() for x in batch]
    loss_of("quality", {}, batch[0].requires_grad_(), *batch[1:]).backward()
    assert all(x.detach().equal(y) for x, y in zip(batch, before, strict=True))


def test_gradient_is_all_that_is_kept():
    logits, labels, _, weights = a_batch()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        focal_sum(logits.requires_grad_(), labels, weights)
    assert [x.shape for x in kept] == [logits.shape]


def test_backward_launches_nothing_as_wide_as_the_logits():
    logits, labels, _, weights = a_batch()
    loss = focal_sum(logits.requires_grad_(), labels, weights)
    with LaunchCounter() as counter:
        torch.autograd.grad(loss, logits)
    assert "mul" not in counter.launches


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_bit_of_the_gradient(threads):
    logits, labels, _, weights = a_batch(2, 3000, 20, dtype=torch.float32)
    torch.set_num_threads(threads)
    try:
        assert_twins("focal", {}, logits, labels, _, weights)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hundred_thousand_easy_negatives_add_up(dtype):
    logits = torch.full((1, 100_000, 20), -4.6, dtype=dtype)
    labels, weights = torch.full((1, 100_000), BACKGROUND), torch.ones(1, 100_000)
    one = focal_sum(logits[:, :1].double(), labels[:, :1], weights[:, :1].double())
    assert_close(focal_sum(logits, labels, weights).double(), one * 100_000, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("alpha", "gamma"), [(1.5, 2.0), (-0.1, 2.0), (0.25, -1.0)])
def test_wrong_options_are_refused_by_the_plain_form(alpha, gamma):
    logits, labels, _, weights = a_batch()
    with pytest.raises(ValueError, match=r"sigmoid_focal_loss: (alpha|gamma) must be"):
        focal_sum(logits, labels, weights, alpha=alpha, gamma=gamma)
    with pytest.raises(ValueError, match="quality_focal_loss: beta must be >= 0"):
        quality_focal_sum(logits, labels, weights, weights, beta=-1.0)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch.*")
@pytest.mark.parametrize("dtype", TYPES[:3], ids=str)
@pytest.mark.parametrize(("name", "options"), [("focal", {}), ("quality", {"beta": 1.5})])
def test_compiled_sweep_is_a_twin_too(name, options, dtype):
    batch = a_batch(dtype=dtype)
    with kernels.compiled():
        assert_twins(name, options, *batch)
        sure = (batch[0] * 1000).clamp(-1000, 1000)
        assert_twins(name, options, sure, *batch[1:])
