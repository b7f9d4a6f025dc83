"""RetinaNet against torchvision's: same weights, pictures, objects and precision, one thread.

``python -m benchmarks.torchvision`` first makes sure that both compute the same losses, gradients and detections,
then times them and writes ``results/benchmarks/torchvision.json``. Both are ResNet-18 with a pyramid; ours takes
its weights and conventions from theirs by ``detcore.models.retinanet.from_torchvision``.
"""

import argparse
import contextlib
import copy
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from benchmarks.synthetic import objects, pictures, trained_outputs
from benchmarks.timing import ROOT, Row, Timing, keep_memory, measure, table, write
from detcore.boxes import pairwise_iou
from detcore.detector import DenseDetector
from detcore.models.retinanet import from_torchvision
from detcore.structures import Predictions, Priors, pad_targets, to_dicts

OUTPUT = ROOT / "results" / "benchmarks" / "torchvision.json"


@dataclass(frozen=True)
class Setting:
    """What both sides are given.

    Args:
        size: side of the pictures in pixels, a multiple of 32.
        num_classes: logits a prior; torchvision's COCO models have 91.
        objects: objects a picture.
        batch: pictures in training.
        detect_batches: pictures in post-processing and inference.
        per_level: background pairs above the score threshold on each level.
        repeats: timed runs of each side.
        budget: processor seconds a row, once it has five repeats.
    """

    size: int = 320
    num_classes: int = 91
    objects: int = 7
    batch: int = 4
    detect_batches: tuple[int, ...] = (1, 8)
    per_level: int = 1000
    repeats: int = 15
    budget: float = 60.0


QUICK = Setting(size=128, num_classes=21, batch=2, detect_batches=(1, 2), per_level=200, repeats=3)


# --- both detectors


def both_detectors(setting: Setting) -> tuple[RetinaNet, DenseDetector]:
    """Theirs with random weights, and ours with the same."""
    torch.manual_seed(0)
    trunk = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    theirs = RetinaNet(trunk, setting.num_classes, min_size=setting.size, max_size=setting.size)
    return theirs, from_torchvision(theirs)


def priors_of(ours: DenseDetector, size: int) -> Priors:
    """The anchors of one batch of pictures; both sides have the same."""
    features = [torch.empty(1, 1, size // stride, size // stride) for stride in (8, 16, 32)]
    for _ in range(2):  # P6 and P7 are halved, rounding up
        side = -(-features[-1].shape[-1] // 2)
        features.append(torch.empty(1, 1, side, side))
    return ours.priors(features, (size, size))


@contextlib.contextmanager
def running(precision: str) -> Iterator[None]:
    """float32, or bfloat16 by autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        yield


def prepared(model: nn.Module, precision: str) -> nn.Module:
    """bfloat16 runs in channels_last: without it both lose half of its gain."""
    return model.to(memory_format=torch.channels_last) if precision == "bf16" else model


# --- assignment and loss


def loss_row(setting: Setting) -> Row:
    """Assignment and loss, forward and back to the head's outputs."""
    theirs, ours = both_detectors(setting)
    priors = priors_of(ours, setting.size)
    targets = objects(setting.batch, setting.size, setting.objects, setting.num_classes)
    padded = pad_targets(targets)
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, sum(priors.counts))
    logits = (torch.randn(*shape, setting.num_classes, generator=generator) - 4.6).requires_grad_()
    deltas = (0.2 * torch.randn(*shape, 4, generator=generator)).requires_grad_()

    def back(losses: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits.grad = deltas.grad = None
        sum(losses.values()).backward()
        return [loss.detach() for loss in losses.values()], [logits.grad, deltas.grad]

    def by_torchvision(images: slice = slice(None)):
        outputs = {"cls_logits": logits[images], "bbox_regression": deltas[images]}
        return back(theirs.compute_loss(targets[images], outputs, [priors.boxes[0]] * len(targets[images])))

    def by_detcore():
        pred = Predictions(logits, deltas, deltas, priors)  # this loss reads no decoded boxes
        match = ours.match(priors, padded)
        return back({name: weight * term(pred, match) for name, (weight, term) in ours.losses.items()})

    def check() -> None:
        # theirs divides each picture's loss by its own positives, ours the batch's by all: undo the one, do the other
        positives = ours.match(priors, padded).positive.sum(dim=1).clamp(min=1).float()
        singly = [by_torchvision(slice(i, i + 1)) for i in range(setting.batch)]
        losses, grads = by_detcore()
        for k, (loss, grad) in enumerate(zip(losses, grads, strict=True)):
            wanted = sum(n * single[0][k] for n, single in zip(positives, singly, strict=True)) / positives.sum()
            wanted_grad = sum(n * single[1][k] for n, single in zip(positives, singly, strict=True)) / positives.sum()
            assert_close(loss, wanted, rtol=1e-5, atol=0.0)
            assert_close(grad, wanted_grad, rtol=1e-4, atol=1e-9)

    return Row(f"assignment + loss, forward and backward, B={setting.batch}", check, by_torchvision, by_detcore)


# --- post-processing


def postprocess_row(setting: Setting, batch: int) -> Row:
    """From logits and deltas to detections; decoding is part of it."""
    theirs, ours = both_detectors(setting)
    priors, logits, deltas = _trained(ours, setting, batch)
    sizes = torch.full((batch, 2), setting.size)
    outputs = {
        "cls_logits": list(logits.split(priors.counts, 1)),
        "bbox_regression": list(deltas.split(priors.counts, 1)),
    }
    anchors = [list(priors.boxes[0].split(priors.counts))] * batch

    @torch.no_grad()
    def by_torchvision():
        return theirs.postprocess_detections(outputs, anchors, [(setting.size, setting.size)] * batch)

    @torch.no_grad()
    def by_detcore():
        boxes = ours.head.coder.decode(deltas, priors.boxes.expand(batch, -1, -1))
        pred = Predictions(logits, deltas, boxes, priors)
        return to_dicts(ours.select(ours.score(pred), pred, sizes))

    def check() -> None:
        assert_same_detections(by_detcore(), by_torchvision())

    return Row(f"post-processing, B={batch}", check, by_torchvision, by_detcore)


def _trained(ours: DenseDetector, setting: Setting, batch: int) -> tuple[Priors, Tensor, Tensor]:
    priors = priors_of(ours, setting.size)
    targets = objects(batch, setting.size, 10, setting.num_classes)
    logits, deltas = trained_outputs(priors, targets, setting.num_classes, threshold=0.05, per_level=setting.per_level)
    return priors, logits, deltas


def assert_same_detections(mine: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> None:
    """Same number, order, labels, scores and boxes in every picture, and something to compare."""
    assert sum(len(d["scores"]) for d in theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        assert_close(a["scores"], b["scores"], rtol=0.0, atol=1e-6)
        assert_close(a["labels"], b["labels"])
        assert_close(a["boxes"], b["boxes"], rtol=0.0, atol=1e-3)


def assert_similar_detections(mine: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> None:
    """The same objects: torchvision ranks and decodes in bfloat16, which ties and moves what ours tells apart.

    Of their 20 best detections in a picture at least 16 are ours too: same label, IoU above 0.8, score within 0.02.
    """
    for a, b in zip(mine, theirs, strict=True):
        best = {name: value[:20].float() for name, value in b.items()}
        same = (
            (pairwise_iou(best["boxes"], a["boxes"]) > 0.8)
            & (best["labels"][:, None] == a["labels"])
            & ((best["scores"][:, None] - a["scores"]).abs() < 0.02)
        )
        found = int(same.any(dim=1).sum())
        assert found >= 0.8 * len(same) > 0, f"only {found} of torchvision's {len(same)} best detections are ours"


# --- whole training step


def step_row(setting: Setting, precision: str) -> Row:
    """Pictures and objects in, weights updated: what a user's loop does, through the same door on both sides."""
    theirs, ours = (prepared(model, precision).train() for model in both_detectors(setting))
    images = pictures(setting.batch, setting.size)
    targets = objects(setting.batch, setting.size, setting.objects, setting.num_classes)

    def stepper(model: nn.Module) -> Callable[[], Tensor]:
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)

        def step() -> Tensor:
            with running(precision):
                loss = sum(model(images, targets).values())
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            return loss.detach()

        return step

    def check() -> None:
        alike = objects(setting.batch, setting.size, setting.objects, setting.num_classes, same_boxes=True)
        losses, slopes = [], []
        for model, names in ((ours, ("cls", "box")), (theirs, ("classification", "bbox_regression"))):
            model = copy.deepcopy(model)  # noqa: PLW2901  # the statistics of batch norm stay as they are
            with running(precision):
                terms = model(images, alike)
            sum(terms.values()).backward()
            losses.append(torch.stack([terms[name].detach().float() for name in names]))
            slopes.append(torch.stack([p.grad.float().norm() for p in model.parameters()]).sort().values)
        # theirs keeps bfloat16 inside its loss, ours works it out in float32
        tolerance = {"fp32": 1e-4, "bf16": 3e-2}[precision]
        assert_close(losses[0], losses[1], rtol=tolerance, atol=0.0)
        assert_close(slopes[0], slopes[1], rtol=tolerance, atol=1e-3 * float(slopes[1].max()))

    return Row(f"training step, {precision}, B={setting.batch}", check, stepper(theirs), stepper(ours))


# --- inference end to end


def inference_row(setting: Setting, batch: int, precision: str) -> Row:
    """Pictures in, detections out."""
    theirs, ours = (prepared(model, precision).eval() for model in both_detectors(setting))
    images = pictures(batch, setting.size)
    priors, logits, deltas = _trained(ours, setting, batch)
    answer_with(theirs.head.classification_head.cls_logits, logits, priors, precision)
    answer_with(theirs.head.regression_head.bbox_reg, deltas, priors, precision)
    answer_with(ours.head.outputs["logits"], logits, priors, precision)
    answer_with(ours.head.outputs["deltas"], deltas, priors, precision)

    def runner(model: nn.Module) -> Callable[[], list[dict[str, Tensor]]]:
        @torch.inference_mode()
        def run() -> list[dict[str, Tensor]]:
            with running(precision):
                return model(images)

        return run

    by_torchvision, by_detcore = runner(theirs), runner(ours)

    def check() -> None:
        if precision == "fp32":
            assert_same_detections(by_detcore(), by_torchvision())
        else:
            assert_similar_detections(by_detcore(), by_torchvision())

    return Row(f"inference, {precision}, B={batch}", check, by_torchvision, by_detcore)


def answer_with(convolution: nn.Module, values: Tensor, priors: Priors, precision: str) -> None:
    """Let the last convolution work as always but answer ``values`` (B, N, n), as if it had been trained."""
    maps = {}
    for level in values.split(priors.counts, dim=1):
        side = round((level.shape[1] / 9) ** 0.5)  # pictures are square; 9 anchors a cell
        grid = level.reshape(len(level), side, side, -1).permute(0, 3, 1, 2)  # B, anchor * n + component, y, x
        if precision == "bf16":
            maps[side] = grid.bfloat16().contiguous(memory_format=torch.channels_last)
        else:
            maps[side] = grid.contiguous()
    convolution.register_forward_hook(lambda module, inputs, output: maps[output.shape[-1]])


# --- the command


def rows(setting: Setting) -> dict[str, Callable[[], Row]]:
    """Name of every comparison to what builds it; built one at a time, because each holds two detectors."""
    made: dict[str, Callable[[], Row]] = {"loss": functools.partial(loss_row, setting)}
    for batch in setting.detect_batches:
        made[f"postprocess-{batch}"] = functools.partial(postprocess_row, setting, batch)
    for precision in ("fp32", "bf16"):
        made[f"step-{precision}"] = functools.partial(step_row, setting, precision)
    for precision in ("fp32", "bf16"):
        for batch in setting.detect_batches:
            made[f"inference-{precision}-{batch}"] = functools.partial(inference_row, setting, batch, precision)
    return made


def main(arguments: list[str] | None = None) -> list[Timing]:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torchvision", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small pictures and 3 repeats: does it run? not a result")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains TEXT; nothing is written")
    parser.add_argument("--repeats", type=int, help="timed runs of each side, at most")
    parser.add_argument(
        "--malloc", choices=["keep", "system"], default="keep", help="keep freed memory, or as it comes"
    )
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, help="JSON file; not written by --quick")
    options = parser.parse_args(arguments)
    setting = QUICK if options.quick else Setting()
    setting = replace(setting, repeats=options.repeats or setting.repeats)

    torch.set_num_threads(1)
    keeps = options.malloc == "keep" and keep_memory()
    timings = []
    for name, build in rows(setting).items():
        if options.only in name:
            row = build()
            row.check()
            timings.append(measure(row, repeats=setting.repeats, budget=setting.budget))
            print(f"{name}: {timings[-1].ratio:.2f}", file=sys.stderr, flush=True)
    print(table(timings, "torchvision"))
    if not options.quick and not options.only:
        command = " ".join(["python -m benchmarks.torchvision", *(sys.argv[1:] if arguments is None else arguments)])
        allocator = "keeps freed memory" if keeps else "system's default"
        write(options.output, timings, command=command, allocator=allocator, setting=asdict(setting))
    return timings


if __name__ == "__main__":
    main()
