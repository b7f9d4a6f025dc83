"""A step's launches do not grow with batch or objects, and it never waits: what makes a GPU fast, counted on a CPU."""

import contextlib

import pytest
import torch

import detcore.postprocess
from detcore.kernels import disable
from detcore.models import get_model
from detcore.structures import Targets
from tests.counting import LaunchCounter
from tests.zoo import EVERY_NETWORK, ZOO

SIZE = 64


@pytest.fixture(autouse=True)
def as_on_a_gpu():
    """Counted is what a GPU runs: the plain functions. The fast forms for a CPU may wait, which there costs nothing."""
    with disable():
        yield


def pictures(batch: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, SIZE, SIZE), dtype=torch.uint8)


def some_targets(batch: int, slots: int = 8) -> Targets:
    """As many objects as slots, less one in the last image; images of different sizes."""
    corner, side = torch.rand(batch, slots, 2) * SIZE / 2, 4 + torch.rand(batch, slots, 2) * SIZE / 3
    boxes = torch.cat([corner, corner + side], dim=-1)
    valid = torch.ones(batch, slots, dtype=torch.bool)
    valid[-1, -1] = False
    labels = torch.randint(0, 5, (batch, slots)).masked_fill(~valid, -1)
    sizes = torch.tensor([[SIZE, SIZE - 7 * (i % 3)] for i in range(batch)])
    return Targets(boxes * valid[..., None], labels, valid, sizes)


def model(name: str):
    return get_model(name, num_classes=5, backbone="tiny")


def trained_like(detector) -> None:
    """Scores on both sides of the threshold, as after training; a fresh detector answers 0.01 everywhere."""
    for convolution in detector.head.outputs["logits"].modules():
        if isinstance(convolution, torch.nn.Conv2d):
            torch.nn.init.normal_(convolution.weight, std=0.5)
            torch.nn.init.constant_(convolution.bias, -1.0)


def step_counts(name: str, batch: int, slots: int = 8) -> dict[str, LaunchCounter]:
    """Counts of predict, loss (predict, assign, terms) and backward."""
    detector, images, targets = model(name).train(), pictures(batch), some_targets(batch, slots)
    counts = {stage: LaunchCounter() for stage in ("predict", "loss", "backward")}
    with counts["predict"]:
        detector.predict(images)
    with counts["loss"]:
        loss = sum(detector.loss(images, targets).values())
    with counts["backward"]:
        loss.backward()
    return counts


@EVERY_NETWORK
def test_step_launches_do_not_grow_with_the_batch(name):
    one = step_counts(name, 1)
    for batch in (4, 8):
        many = step_counts(name, batch)
        for stage, counted in one.items():
            assert many[stage].launches == counted.launches, f"{stage} at B={batch}"


@EVERY_NETWORK
def test_step_launches_do_not_grow_with_the_objects(name):
    few = step_counts(name, 2, slots=8)
    many = step_counts(name, 2, slots=64)
    for stage, counted in few.items():
        assert many[stage].launches == counted.launches, stage


@EVERY_NETWORK
def test_step_never_waits_for_the_device(name):
    for stage, counted in step_counts(name, 4).items():
        assert counted.total > 0
        assert not counted.syncs, f"{stage}: {dict(counted.syncs)}"


@pytest.mark.gpu
@EVERY_NETWORK
def test_step_never_waits_for_a_real_gpu(name, gpu):
    detector = model(name).to(gpu).train()
    images, targets = pictures(4).to(gpu), some_targets(4).to(gpu)
    sum(detector.loss(images, targets).values()).backward()  # the first step may load libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(detector.loss(images, targets).values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())


def select_counts(name: str, batch: int, monkeypatch, **options) -> tuple[LaunchCounter, int]:
    """Counts of score and select without suppression itself, and how many detections there were."""
    detector = get_model(name, num_classes=5, backbone="tiny", **options).eval()
    trained_like(detector)
    counter = LaunchCounter()

    def suppressed(*args, _nms=detcore.postprocess._nms_in_groups):
        with counter.paused():
            return _nms(*args)

    monkeypatch.setattr(detcore.postprocess, "_nms_in_groups", suppressed)
    sizes = torch.full((batch, 2), SIZE)
    with torch.no_grad(), disable():
        pred = detector.predict(pictures(batch))
        with counter:
            found = detector.select(detector.score(pred), pred, sizes)
    monkeypatch.undo()
    return counter, int(found.valid.sum())


EVERY_SELECT = pytest.mark.parametrize(
    ("name", "options", "waits"),
    [
        pytest.param(name, options, waits, id="-".join([name, *options.values()]))
        for name, row in ZOO.items()
        for options, waits in row.selects
        if not row.like
    ],
)


@EVERY_SELECT
def test_select_launches_do_not_grow_with_the_batch(name, options, waits, monkeypatch):
    one, found = select_counts(name, 1, monkeypatch, **options)
    assert found > 0
    for batch in (4, 8):
        many, found_by_many = select_counts(name, batch, monkeypatch, **options)
        assert found_by_many > found
        assert many.launches == one.launches, f"B={batch}"


@EVERY_SELECT
def test_select_waits_as_often_as_recorded(name, options, waits, monkeypatch):
    counted, _ = select_counts(name, 4, monkeypatch, **options)
    assert counted.syncs == waits


@pytest.mark.parametrize(
    ("what", "work", "launches", "syncs"),
    [
        ("a view", lambda x: x.view(2, 3).t()[0], 0, {}),
        ("an allocation", torch.empty_like, 0, {}),
        ("arithmetic", lambda x: (x + 1).sum(), 2, {}),
        ("in place", lambda x: x.clone().add_(1), 2, {}),
        ("a number", lambda x: x.sum().item(), 2, {"_local_scalar_dense": 1}),
        ("a branch", lambda x: bool(x.sum() > 0), 3, {"_local_scalar_dense": 1}),
        ("a mask", lambda x: x[torch.ones_like(x, dtype=torch.bool)], 2, {"index by mask": 1}),
        ("an index", lambda x: x[x.argsort()], 2, {}),
        ("an upload", lambda x: x + torch.tensor([1.0]), 1, {"upload": 1}),
        ("where", lambda x: torch.where(x > 0)[0], 2, {"nonzero": 1}),
        ("unique", lambda x: x.unique(), 1, {"_unique2": 1}),
    ],
)
def test_counter_tells_kernels_views_and_waits_apart(what, work, launches, syncs):
    x = torch.arange(6.0)
    counter = LaunchCounter()
    with counter:
        work(x)
    assert (counter.total, dict(counter.syncs)) == (launches, syncs), f"{what}: {dict(counter.launches)}"


def test_counter_counts_the_backward_pass():
    x = torch.arange(6.0, requires_grad=True)
    loss = (x * x).sum()
    with LaunchCounter() as counter:
        loss.backward()
    assert counter.launches["mul"] == 2  # d(x * x) = x dx + x dx


def test_counter_pauses():
    with LaunchCounter() as counter, contextlib.ExitStack() as stack:
        stack.enter_context(counter.paused())
        torch.ones(2).sum()
    assert counter.total == 0
