"""Every model's ``loss`` and ``predict`` as one compiled graph. Run without the shape hook: ``make compile``."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from detcore.detector import DenseDetector
from detcore.models import MODELS
from detcore.structures import pad_targets
from tests.test_models import calm, redraw
from tests.zoo import ZOO, thin

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(hasattr(DenseDetector.loss, "__wrapped__"), reason="the shape hook breaks the graph"),
    # torch's own compiler warns about its own code
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]

EVERY_MODEL = pytest.mark.parametrize("name", sorted(MODELS))
EVERY_NETWORK = pytest.mark.parametrize("name", [name for name, row in ZOO.items() if not row.like])
# aot_eager traces and differentiates as the default does and needs no C++ compiler: the claim is one graph with the
# eager values, not the code that comes of it
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def little(name):
    return redraw(calm(thin(name, (4, 8, 8, 8, 8), channels=8)))


def batch_of(*objects):
    """A picture each with that many objects; padded to eight slots."""
    own = [
        {"boxes": torch.rand(n, 4) * 20 + torch.tensor([0.0, 0, 30, 30]), "labels": torch.arange(n) % 3}
        for n in objects
    ]
    return torch.rand(len(objects), 3, 64, 64), pad_targets(own, sizes=torch.tensor([[64, 64], [33, 50]]))


def gradients(detector):
    found = {name: p.grad.clone() for name, p in detector.named_parameters()}
    detector.zero_grad()
    return found


@EVERY_MODEL
def test_loss_is_one_graph_with_the_eager_values_and_gradients(name):
    detector = little(name)
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(detector.loss, fullgraph=True, backend=counter)
    for objects in ((2, 5), (0, 3), (0, 0)):
        images, targets = batch_of(*objects)
        eager = detector.loss(images, targets)
        sum(eager.values()).backward()
        expected = gradients(detector)
        found = compiled(images, targets)
        sum(found.values()).backward()
        assert list(found) == list(eager)
        for term, value in eager.items():
            assert_close(found[term], value, rtol=1e-5, atol=1e-6)
        for parameter, gradient in gradients(detector).items():
            assert_close(gradient, expected[parameter], rtol=1e-4, atol=ZOO[name].slopes)
    assert counter.frame_count == 1  # other objects need no other graph


@EVERY_NETWORK
def test_predict_is_one_graph_with_the_eager_values(name):
    detector = little(name).eval()
    compiled = torch.compile(detector.predict, fullgraph=True, backend=BACKEND)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected, found = detector.predict(images), compiled(images)
    assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert_close(found.boxes, expected.boxes, rtol=1e-5, atol=1e-4)
    assert found.priors.boxes.equal(expected.priors.boxes)
    assert found.priors.counts == expected.priors.counts
    for extra, value in expected.extras.items():
        assert_close(found.extras[extra], value, rtol=1e-5, atol=1e-5)


@EVERY_NETWORK
def test_loss_is_one_graph_under_autocast_and_from_bytes(name):
    detector = little(name)
    images, targets = batch_of(2, 5)
    pixels = (images * 255).to(torch.uint8)
    compiled = torch.compile(detector.loss, fullgraph=True, backend=BACKEND)
    with torch.autocast("cpu", torch.bfloat16):
        eager, found = detector.loss(pixels, targets), compiled(pixels, targets)
    for term, value in eager.items():
        assert found[term].dtype == torch.float32
        assert_close(found[term], value, rtol=1e-2, atol=1e-3)
