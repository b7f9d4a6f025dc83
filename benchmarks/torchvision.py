"""RetinaNet, FCOS and SSD300 against torchvision's: same weights, pictures, objects and precision, one thread.

``python -m benchmarks.torchvision`` first makes sure that both compute the same losses, gradients and detections,
then times them and writes ``results/benchmarks/torchvision.json``. Both stand on the same trunk, ResNet-18 with a
pyramid or VGG-16; ours takes its weights and conventions from theirs by the model's ``from_torchvision`` (see
``benchmarks.cases``). SSD's augmentation is compared too, see ``benchmarks.augmentation``.
"""

import argparse
import contextlib
import copy
import functools
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.testing import assert_close

from benchmarks.augmentation import augmentation_row
from benchmarks.cases import CASES, Case, Maps
from benchmarks.matching import matching_rows
from benchmarks.synthetic import Shape, objects, pictures
from benchmarks.timing import ROOT, Row, Timing, time_all
from detcore import kernels
from detcore.boxes import pairwise_iou
from detcore.structures import Priors, pad_targets, to_dicts

OUTPUT = ROOT / "results" / "benchmarks" / "torchvision.json"


@dataclass(frozen=True)
class Setting:
    """What both sides are given.

    Args:
        size: height and width of the pictures in pixels; SSD300's are 300 x 300.
        backbone: trunk under the pyramid; SSD300's is VGG-16.
        num_classes: logits a prior; torchvision's COCO models have 91.
        objects: objects a picture.
        batch: pictures in training.
        detect_batches: pictures in post-processing and inference.
        large: the same of large pictures.
        per_level: background pairs above the score threshold on each level.
        augmented: pictures in augmentation.
        repeats: timed runs of each side.
        budget: processor seconds a row, once it has three repeats.
    """

    size: Shape = (320, 320)
    backbone: str = "resnet18"
    num_classes: int = 91
    objects: int = 7
    batch: int = 4
    detect_batches: tuple[int, ...] = (1, 8)
    large: Shape = (800, 1333)
    per_level: int = 1000
    augmented: int = 16
    repeats: int = 15
    budget: float = 24.0


QUICK = Setting(
    size=(128, 128),
    large=(160, 250),
    num_classes=21,
    batch=2,
    detect_batches=(1, 2),
    per_level=200,
    augmented=4,
    repeats=3,
)


# --- what all rows share


@contextlib.contextmanager
def running(precision: str) -> Iterator[None]:
    """float32, or bfloat16 by autocast."""
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        yield


def prepared(model: nn.Module, precision: str) -> nn.Module:
    """bfloat16 runs in channels_last: without it both lose half of its gain."""
    return model.to(memory_format=torch.channels_last) if precision == "bf16" else model


def beside(precision: str, theirs_in: str) -> str:
    """Says what their precision is where it is not ours."""
    return "" if theirs_in == precision else f" beside {theirs_in}"


# --- assignment and loss


FORMS = {"kernels": contextlib.nullcontext, "compiled kernels": kernels.compiled, "plain": kernels.disable}


def loss_row(case: Case, setting: Setting, *, form: str = "kernels") -> Row:
    """Assignment and loss, forward and back to the head's outputs; decoding is part of it where the loss needs it.

    Args:
        case: the detector.
        setting: of the benchmark.
        form: which of our functions run, one of ``FORMS``.
    """
    shape = case.shape(setting.size)
    theirs, ours = case.both(shape, setting.num_classes, setting.backbone)
    priors = case.priors(ours, shape)
    targets = objects(setting.batch, shape, setting.objects, ours.num_classes)
    padded, their_targets = pad_targets(targets), case.their_targets(targets)
    maps = case.random_maps((setting.batch, sum(priors.counts)), setting.num_classes)
    their_maps = {name: value.detach().requires_grad_() for name, value in case.as_theirs(maps).items()}

    def forget(maps: Maps) -> None:
        for value in maps.values():
            value.grad = None

    def back(losses: list[Tensor], maps: Maps) -> tuple[list[Tensor], Maps]:
        sum(losses).backward()
        return [loss.detach() for loss in losses], {name: value.grad for name, value in maps.items()}

    def by_torchvision(images: slice = slice(None)):
        forget(their_maps)
        own = {name: value[images] for name, value in their_maps.items()}
        return back(case.their_losses(theirs, their_targets[images], own, priors), their_maps)

    def by_detcore():
        forget(maps)
        pred = case.predictions(ours, maps, priors, decode=case.loss_reads_boxes)
        with FORMS[form]():
            match = ours.match(priors, padded)
            return back([ours.losses[name][0] * ours.losses[name][1](pred, match) for name in case.terms], maps)

    def check() -> None:
        wanted, wanted_grads = by_torchvision()
        if case.normalised_by_picture:
            # theirs divides by the positives of each picture, ours by those of the batch: undo the one, do the other
            positives = ours.match(priors, padded).positive.sum(dim=1).clamp(min=1).float()
            singly = [by_torchvision(slice(i, i + 1)) for i in range(setting.batch)]
            share = positives / positives.sum()
            wanted = [share @ torch.stack(values) for values in zip(*(losses for losses, _ in singly), strict=True)]
            wanted_grads = {
                name: sum(w * grads[name] for w, (_, grads) in zip(share, singly, strict=True)) for name in wanted_grads
            }
        losses, grads = by_detcore()
        assert_close(losses, wanted, rtol=1e-5, atol=0.0)
        assert_close(case.as_theirs(grads), wanted_grads, rtol=1e-4, atol=1e-9)

    kind = "assignment + loss, forward and backward" + ("" if form == "kernels" else f", {form}")
    kind += ", large pictures" if setting.size == setting.large else ""
    name = f"{case.title}: {kind}, B={setting.batch}"
    return Row(name, check, by_torchvision, by_detcore)


# --- post-processing


def postprocess_row(case: Case, setting: Setting, batch: int, *, trained: bool = True) -> Row:
    """From the head's outputs to detections; decoding is part of it."""
    shape = case.shape(setting.size)
    theirs, ours = case.both(shape, setting.num_classes, setting.backbone)
    priors = case.priors(ours, shape)
    if trained:
        maps = case.trained_maps(ours, priors, batch, shape, setting.per_level)
    else:
        maps = {
            name: value.detach()
            for name, value in case.random_maps((batch, sum(priors.counts)), setting.num_classes).items()
        }
    sizes = torch.tensor([shape] * batch)
    by_torchvision = torch.no_grad()(case.their_detections(theirs, case.as_theirs(maps), priors, shape))

    @torch.no_grad()
    def by_detcore():
        pred = case.predictions(ours, maps, priors)
        return to_dicts(ours.select(ours.score(pred), pred, sizes))

    def check() -> None:
        assert_same_detections(by_detcore(), case.as_ours(by_torchvision()))

    kind = "post-processing" if trained else "post-processing, untrained"
    kind += ", large pictures" if setting.size == setting.large else ""
    return Row(f"{case.title}: {kind}, B={batch}", check, by_torchvision, by_detcore)


def assert_same_detections(mine: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> None:
    """Same number, order, labels, scores and boxes in every picture, and something to compare.

    The order of exactly equal scores is free.
    """

    def sort(found: dict[str, Tensor]) -> dict[str, Tensor]:
        order = found["labels"].argsort(stable=True)
        order = order[found["scores"][order].argsort(descending=True, stable=True)]
        return {name: found[name][order] for name in ("scores", "labels", "boxes")}

    assert sum(len(d["scores"]) for d in theirs) > 0
    for a, b in zip(map(sort, mine), map(sort, theirs), strict=True):
        assert_close(a["scores"], b["scores"], rtol=0.0, atol=1e-6)
        assert_close(a["labels"], b["labels"])
        assert_close(a["boxes"], b["boxes"], rtol=0.0, atol=1e-3)


def assert_similar_detections(mine: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> None:
    """The same objects: theirs ranks, decodes and suppresses in bfloat16, which ties and moves what ours tells apart.

    Of our 20 best detections in a picture at least 16 are theirs too: same label, IoU above 0.8, score within 0.02.
    Not the other way round: boxes shifted apart by class lie thousands of pixels out, where bfloat16 is coarser than
    they are large, so theirs keeps several of one object.
    """
    for a, b in zip(mine, theirs, strict=True):
        best = {name: value[:20] for name, value in a.items()}
        same = (
            (pairwise_iou(best["boxes"], b["boxes"].float()) > 0.8)
            & (best["labels"][:, None] == b["labels"])
            & ((best["scores"][:, None] - b["scores"]).abs() < 0.02)
        )
        found = int(same.any(dim=1).sum())
        assert found >= 0.8 * len(same) > 0, f"only {found} of our {len(same)} best detections are torchvision's"


# --- whole training step


def step_row(
    case: Case, setting: Setting, precision: str, *, graphed: bool = False, theirs_in: str | None = None
) -> Row:
    """Pictures and objects in, weights updated: what a user's loop does, through the same door on both sides.

    Theirs as torchvision's reference scripts step, ours as :func:`detcore.training.train` does unless told
    otherwise: channels_last, also in float32, and the fused optimiser.

    Args:
        case: the detector.
        setting: of the benchmark.
        precision: of both sides.
        graphed: whether our loss is compiled and replayed as CUDA graphs, as by ``TrainConfig.cuda_graphs``.
        theirs_in: precision of their side, if it is another.
    """
    theirs_in = theirs_in or precision
    shape = case.shape(setting.size)
    theirs, ours = case.both(shape, setting.num_classes, setting.backbone)
    theirs, ours = prepared(theirs, theirs_in).train(), ours.to(memory_format=torch.channels_last).train()
    images = pictures(setting.batch, shape)
    targets = objects(setting.batch, shape, setting.objects, ours.num_classes)

    plain = copy.deepcopy(ours) if graphed else ours  # a copy of what is compiled would train the original

    def ready(model: nn.Module) -> nn.Module:
        if graphed:
            model.loss = torch.compile(model.loss, mode="reduce-overhead")  # torch's name for CUDA graphs
        return model

    def stepper(model: nn.Module, targets: list[Maps], precision: str, *, fused: bool) -> Callable[[], Tensor]:
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, fused=fused)

        def step() -> Tensor:
            with running(precision):
                loss = sum(model(images, targets).values())
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            return loss.detach()

        return step

    def check() -> None:
        alike = objects(setting.batch, shape, setting.objects, ours.num_classes, same_boxes=True)
        # of copies, so that the statistics of batch norm stay as they are
        mine = ready(copy.deepcopy(plain)), case.terms, alike, precision
        sides = (mine, (copy.deepcopy(theirs), case.terms.values(), case.their_targets(alike), theirs_in))
        losses, slopes = [], []
        for model, names, own, own_precision in sides:
            with running(own_precision):
                terms = model(images, own)
            sum(terms.values()).backward()
            losses.append(torch.stack([terms[name].detach().float() for name in names]))
            slopes.append(torch.stack([p.grad.float().norm() for p in model.parameters()]).sort().values)
        # theirs keeps bfloat16 inside its loss, where FCOS's boxes round to pixels; ours works it out in float32
        tolerance, floor = {"fp32": (1e-4, 1e-3), "bf16": (3e-2, 1e-2)}[precision]
        assert_close(losses[0], losses[1], rtol=tolerance, atol=0.0)
        assert_close(slopes[0], slopes[1], rtol=tolerance, atol=floor * float(slopes[1].max()))

    kind = f"training step{', graphs' if graphed else ''}, {precision}{beside(precision, theirs_in)}"
    by_torchvision = stepper(theirs, case.their_targets(targets), theirs_in, fused=False)
    by_detcore = stepper(ready(ours), targets, precision, fused=True)
    return Row(f"{case.title}: {kind}, B={setting.batch}", check, by_torchvision, by_detcore)


# --- inference end to end


def inference_row(
    case: Case,
    setting: Setting,
    batch: int,
    precision: str,
    *,
    compiled: bool = False,
    theirs_in: str | None = None,
) -> Row:
    """Pictures in, detections out: theirs under autocast where it is bfloat16, ours made ready for it.

    Args:
        case: the detector.
        setting: of the benchmark.
        batch: pictures.
        precision: of both sides.
        compiled: whether our network is, and on a GPU replayed as CUDA graphs; theirs never is.
        theirs_in: precision of their side, if it is another.
    """
    theirs_in = theirs_in or precision
    shape = case.shape(setting.size)
    theirs, ours = case.both(shape, setting.num_classes, setting.backbone)
    theirs, ours = prepared(theirs, theirs_in).eval(), ours.optimize_for_inference(precision=precision)
    images = pictures(batch, shape)
    priors = case.priors(ours, shape)
    maps = case.trained_maps(ours, priors, batch, shape, setting.per_level)
    for model, values in ((theirs, case.as_theirs(maps)), (ours, maps)):
        for name, convolutions in () if compiled and model is ours else case.convolutions(model).items():
            answer_with(convolutions, values[name], priors)
    if compiled:
        on_gpu = torch.get_default_device().type == "cuda"  # "reduce-overhead" is torch's name for CUDA graphs
        network = torch.compile(ours.predict, dynamic=False, **({"mode": "reduce-overhead"} if on_gpu else {}))
        with torch.no_grad(), inductor.patch(freezing=not on_gpu):  # as an option of torch.compile it comes too late
            network(torch.stack(pictures(batch, shape)))
        answer = case.predictions(ours, {name: value.bfloat16() for name, value in maps.items()}, priors)
        ours.predict = lambda images: network(images) and answer  # the network works, as if it had been trained

    @torch.no_grad()
    def by_torchvision() -> list[dict[str, Tensor]]:
        with running(theirs_in):
            return theirs(images)

    @torch.no_grad()
    def by_detcore() -> list[dict[str, Tensor]]:
        return ours(images)

    def check() -> None:
        if precision == "fp32":
            assert_same_detections(by_detcore(), case.as_ours(by_torchvision()))
        else:
            assert_similar_detections(by_detcore(), case.as_ours(by_torchvision()))

    kind = "inference, compiled" if compiled else "inference"
    kind += "" if setting.backbone == Setting().backbone else f" on {setting.backbone}"
    kind += f", {precision}{beside(precision, theirs_in)}"
    return Row(f"{case.title}: {kind}, B={batch}", check, by_torchvision, by_detcore)


def answer_with(convolutions: list[nn.Module], values: Tensor, priors: Priors) -> None:
    """Let the last convolutions work as always but answer ``values`` (B, N, n), as if they had been trained."""
    grids, made = {}, {}
    for level, sides in zip(values.split(priors.counts, dim=1), priors.maps, strict=True):
        grids[sides] = level.reshape(len(level), *sides, -1).permute(0, 3, 1, 2)  # B, prior * n + component, y, x

    def answer(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        sides = tuple(output.shape[-2:])
        if sides not in made:  # of the type and in the layout that the convolution gives
            made[sides] = torch.empty_like(output).copy_(grids[sides])
        return made[sides]

    for convolution in convolutions:
        convolution.register_forward_hook(answer)


# --- the command


def rows(setting: Setting) -> dict[str, Callable[[], Row]]:
    """Name of every comparison to what builds it; built one at a time, because each holds two detectors."""
    made: dict[str, Callable[[], Row]] = {}
    last = setting.detect_batches[-1]
    for key, case in CASES.items():
        made[f"{key}-loss"] = functools.partial(loss_row, case, setting)
        for batch in setting.detect_batches:
            made[f"{key}-postprocess-{batch}"] = functools.partial(postprocess_row, case, setting, batch)
        made[f"{key}-postprocess-untrained-{last}"] = functools.partial(
            postprocess_row, case, setting, last, trained=False
        )
    large = replace(setting, size=setting.large)
    made["retinanet-loss-large"] = functools.partial(loss_row, CASES["retinanet"], large)
    made["retinanet-loss-compiled"] = functools.partial(loss_row, CASES["retinanet"], setting, form="compiled kernels")
    made["retinanet-loss-plain"] = functools.partial(loss_row, CASES["retinanet"], setting, form="plain")
    made["retinanet-postprocess-large"] = functools.partial(postprocess_row, CASES["retinanet"], large, 1)
    made |= matching_rows(
        size=setting.size,
        large=setting.large,
        few=setting.objects,
        batch=setting.batch,
        num_classes=setting.num_classes,
    )
    for kind in ("uint8", "pil"):
        for part, colours in (("augmentation", True), ("augmentation-geometry", False)):
            made[f"ssd300-{part}-{kind}"] = functools.partial(
                augmentation_row, setting.augmented, pil=kind == "pil", colours=colours
            )
    for precision in ("fp32", "bf16"):
        for key, case in CASES.items():
            made[f"{key}-step-{precision}"] = functools.partial(step_row, case, setting, precision)
    for precision in ("fp32", "bf16"):
        for key, case in CASES.items():
            for batch in setting.detect_batches:
                name = f"{key}-inference-{precision}-{batch}"
                made[name] = functools.partial(inference_row, case, setting, batch, precision)
    deeper = replace(setting, backbone="resnet50")  # most of its convolutions are 1 x 1
    for precision in ("fp32", "bf16"):
        made[f"retinanet-resnet50-inference-{precision}"] = functools.partial(
            inference_row, CASES["retinanet"], deeper, 1, precision
        )
    made["retinanet-inference-compiled"] = functools.partial(
        inference_row, CASES["retinanet"], setting, 1, "bf16", compiled=True
    )
    return made


def main(arguments: list[str] | None = None) -> list[Timing]:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torchvision", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small pictures and 3 repeats: does it run? not a result")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="rows whose name contains TEXT; written to another --output only"
    )
    parser.add_argument("--repeats", type=int, help="timed runs of each side, at most")
    parser.add_argument("--budget", type=float, help="processor seconds a row, once it has three repeats")
    parser.add_argument(
        "--malloc", choices=["keep", "system"], default="keep", help="keep freed memory, or as it comes"
    )
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, help="JSON file; not written by --quick")
    options = parser.parse_args(arguments)
    setting = QUICK if options.quick else Setting()
    setting = replace(setting, repeats=options.repeats or setting.repeats, budget=options.budget or setting.budget)
    is_whole = not options.only or options.output != OUTPUT
    return time_all(
        functools.partial(rows, setting),
        "torchvision",
        module="torchvision",
        arguments=arguments,
        output=options.output if is_whole and not options.quick else None,
        setting=asdict(setting),
        repeats=setting.repeats,
        budget=setting.budget,
        only=options.only,
        keeps=options.malloc == "keep",
        is_apart=True,
    )


if __name__ == "__main__":
    main()
