"""COCO's twelve numbers from pycocotools, faster-coco-eval and detcore: time, memory, and the same numbers.

``python -m benchmarks.evaluation`` lets each evaluate the same seeded detections of 500 to 5000 pictures, 80 classes,
about 7.5 objects, crowds among them, and 100 detections a picture. Every measurement has a process of its own, for its
peak of memory; the engines take turns. Two spans are timed, both in processor time: from results to a ready engine, and
evaluate with accumulate. All start from what each is usually handed: theirs from lists of JSON records, ours from one
dict of arrays a picture. faster-coco-eval is left out where it is not installed: ``pip install detcore[benchmark]``.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.timing import ROOT, Timing, peak_memory, table, write
from detcore.evaluation import CocoEvaluator

OUTPUT = ROOT / "results" / "benchmarks" / "evaluation.json"
CLASSES = 80
WIDTH, HEIGHT = 640, 480
NUMBERS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
NUMBERS += ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")
TOLERANCE = {"pycocotools": 0.0, "faster-coco-eval": 1e-12}
"""By how much the twelve numbers may differ from ours; faster-coco-eval divides in another order than pycocotools."""

Samples = list[dict[str, np.ndarray]]


@dataclass(frozen=True)
class EngineTiming(Timing):
    """A timing with peaks of memory, each above that of the process with its imports alone.

    Args:
        theirs_peak_mb: megabytes, with their inputs.
        ours_peak_mb: the same of ours.
        pictures: evaluated.
    """

    theirs_peak_mb: float
    ours_peak_mb: float
    pictures: int


# --- what is evaluated


def made_up(pictures: int) -> tuple[Samples, Samples]:
    """Detections and objects; classes have a long tail, and a picture few of them.

    Coordinates are quarters of pixels, so that corners and sides are the same numbers to the last bit.
    """
    rng = np.random.default_rng(0)
    frequency = 1 / (np.arange(CLASSES) + 2.0)
    frequency /= frequency.sum()
    detections, targets = [], []
    for _ in range(pictures):
        count = int(min(60, rng.negative_binomial(1.0, 1 / 8.5)))
        present = rng.choice(CLASSES, rng.integers(1, 5), replace=False, p=frequency)
        size, ratio = np.exp(rng.uniform(np.log(12), np.log(400), count)), np.exp(rng.uniform(-0.6, 0.6, count))
        boxes = _placed(rng, np.stack([size * ratio, size / ratio], 1))
        labels = rng.choice(present, count)
        side = boxes[:, 2:] - boxes[:, :2]
        crowd = rng.random(count) < 0.012
        area = 0.6 * side.prod(1)
        targets.append({"boxes": boxes, "labels": labels, "area": area, "iscrowd": crowd.astype(int), "ignore": crowd})
        # One to three detections around an object, then background of lower scores
        owner = np.repeat(np.arange(count), rng.integers(1, 4, count))[:100]
        moved = rng.normal(0, 0.12, (len(owner), 4)) * rng.random((len(owner), 1)) * np.tile(side[owner], 2)
        near = _on_grid(boxes[owner] + moved)
        far = _placed(rng, np.exp(rng.uniform(2.5, 5.5, (100 - len(owner), 2))))
        wrong = rng.integers(0, CLASSES, 100)
        guess = np.concatenate([labels[owner], rng.choice(present, len(far))])
        sure = rng.random(100) < np.where(np.arange(100) < len(owner), 0.8, 0.6)
        scores = np.concatenate([rng.beta(3, 2, len(owner)), 0.9 * rng.beta(1, 8, len(far)) + 0.01])
        detections.append(
            {
                "boxes": np.concatenate([near, far]),
                "labels": np.where(sure, guess, wrong),
                "scores": scores.clip(0.01, 1).round(4),
            }
        )
    return detections, targets


def _on_grid(boxes: np.ndarray) -> np.ndarray:
    boxes = (4 * boxes).round() / 4
    return np.concatenate([boxes[:, :2], np.maximum(boxes[:, 2:], boxes[:, :2] + 0.25)], 1)


def _placed(rng: np.random.Generator, side: np.ndarray) -> np.ndarray:
    side = np.minimum(side, [0.95 * WIDTH, 0.95 * HEIGHT])
    corner = rng.random(side.shape) * ([WIDTH, HEIGHT] - side)
    return _on_grid(np.concatenate([corner, corner + side], 1))


# --- the three engines: each is given its inputs, made ready, and evaluates


def _records(samples: Samples, keys: dict[str, str]) -> list[dict[str, Any]]:
    """As in COCO's JSON files; ``keys`` are our names of what is written besides, to theirs."""
    records = []
    for i, sample in enumerate(samples, 1):
        x1, y1, x2, y2 = sample["boxes"].T
        boxes = np.stack([x1, y1, x2 - x1, y2 - y1], 1).tolist()
        columns = {"bbox": boxes, "category_id": (sample["labels"] + 1).tolist()}
        columns |= {theirs: sample[ours].tolist() for ours, theirs in keys.items()}
        records += [
            {"image_id": i, **dict(zip(columns, row, strict=True))} for row in zip(*columns.values(), strict=True)
        ]
    return records


def coco_inputs(detections: Samples, targets: Samples) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The two files of COCO as Python objects."""
    annotations = _records(targets, {"area": "area", "iscrowd": "iscrowd"})
    truth = {
        "info": {},
        "images": [{"id": i, "width": WIDTH, "height": HEIGHT} for i in range(1, len(targets) + 1)],
        "categories": [{"id": c, "name": f"class {c}"} for c in range(1, CLASSES + 1)],
        "annotations": [{"id": i, **record} for i, record in enumerate(annotations, 1)],
    }
    return truth, _records(detections, {"scores": "score"})


def _coco_engine(truth_class: Any, engine_class: Any, truth: dict[str, Any], results: list[dict[str, Any]]) -> Any:
    known = truth_class()
    known.dataset = truth
    known.createIndex()
    return engine_class(known, known.loadRes(results), "bbox")


def _coco_numbers(engine: Any) -> Callable[[], list[float]]:
    engine.evaluate()
    engine.accumulate()

    def numbers() -> list[float]:
        engine.summarize()
        return [float(value) for value in engine.stats[:12]]

    return numbers


def pycocotools_engine(truth: dict[str, Any], results: list[dict[str, Any]]) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return _coco_engine(COCO, COCOeval, truth, results)


def faster_engine(truth: dict[str, Any], results: list[dict[str, Any]]) -> Any:
    from faster_coco_eval import COCO, COCOeval_faster

    return _coco_engine(COCO, COCOeval_faster, truth, results)


def detcore_engine(detections: Samples, targets: Samples) -> CocoEvaluator:
    evaluator = CocoEvaluator(CLASSES)
    evaluator.update(detections, targets)
    return evaluator


def _detcore_numbers(evaluator: CocoEvaluator) -> Callable[[], list[float]]:
    values = evaluator.compute()
    return lambda: [values[name] for name in NUMBERS]


ENGINES: dict[str, tuple[Callable, Callable, Callable]] = {
    "pycocotools": (coco_inputs, pycocotools_engine, _coco_numbers),
    "faster-coco-eval": (coco_inputs, faster_engine, _coco_numbers),
    "detcore": (lambda detections, targets: (detections, targets), detcore_engine, _detcore_numbers),
}


def run_engine(name: str, pictures: int) -> dict[str, Any]:
    """Seconds of both spans, the peak of memory and the twelve numbers; meant for a process of its own."""
    inputs, ready, evaluate = ENGINES[name]
    before = peak_memory()
    given = inputs(*made_up(pictures))
    with contextlib.redirect_stdout(io.StringIO()):  # theirs print their progress
        start = time.process_time()
        engine = ready(*given)
        between = time.process_time()
        numbers = evaluate(engine)
        end = time.process_time()
        peak = peak_memory() - before
        return {"ready": between - start, "evaluate": end - between, "peak_mb": peak, "numbers": numbers()}


def in_a_process(name: str, pictures: int) -> dict[str, Any]:
    """:func:`run_engine` in a process of its own, on one thread."""
    command = [sys.executable, "-m", "benchmarks.evaluation", "--engine", name, "--pictures", str(pictures)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"benchmarks.evaluation: {name} must evaluate {pictures} pictures; got {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# --- the command


def compare(
    pictures: int, rounds: int, engines: list[str], run: Callable[[str, int], dict[str, Any]] = in_a_process
) -> list[EngineTiming]:
    """Both spans of every other engine beside ours, after making sure that all give the same twelve numbers."""
    got: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    for turn in range(rounds):
        for name in engines if turn % 2 == 0 else engines[::-1]:
            got[name].append(run(name, pictures))
    wanted = got["detcore"][0]["numbers"]
    for name, runs in got.items():
        for each in runs:
            if max(abs(a - b) for a, b in zip(each["numbers"], wanted, strict=True)) > TOLERANCE.get(name, 0.0):
                raise AssertionError(f"{name} must give the numbers of detcore, {wanted}; got {each['numbers']}")
    return [
        _timing(f"{pictures} pictures: {title}, {name}", span, got[name], got["detcore"], pictures)
        for name in engines
        if name != "detcore"
        for span, title in (("evaluate", "evaluate + accumulate"), ("ready", "results to engine"))
    ]


def _timing(title: str, span: str, theirs: list[dict], ours: list[dict], pictures: int) -> EngineTiming:
    ratios = [a[span] / b[span] for a, b in zip(theirs, ours, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    theirs_ms, ours_ms = (1000 * statistics.median(each[span] for each in runs) for runs in (theirs, ours))
    peaks = [statistics.median(each["peak_mb"] for each in runs) for runs in (theirs, ours)]
    return EngineTiming(title, theirs_ms, ours_ms, statistics.median(ratios), low, high, len(ratios), *peaks, pictures)


def available() -> tuple[list[str], dict[str, str]]:
    """Engines that can run, and the reason why another one cannot."""
    if importlib.util.find_spec("faster_coco_eval"):
        return list(ENGINES), {}
    reason = "not installed; pip install detcore[benchmark]"
    return [name for name in ENGINES if name != "faster-coco-eval"], {"faster-coco-eval": reason}


def main(arguments: list[str] | None = None) -> list[EngineTiming]:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="50 pictures, 2 rounds: does it run? not a result")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each engine and number of pictures, >= 2")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, help="JSON file; not written by --quick")
    parser.add_argument("--engine", choices=list(ENGINES), help="run this one here and print what it measured as JSON")
    parser.add_argument("--pictures", type=int, nargs="+", help="how many; 500, 1500 and 5000 if not given")
    options = parser.parse_args(arguments)
    sizes = options.pictures or ([50] if options.quick else [500, 1500, 5000])
    if options.engine:
        print(json.dumps(run_engine(options.engine, sizes[0])))
        return []
    engines, left_out = available()
    for name, reason in left_out.items():
        print(f"{name}: left out, {reason}")
    setting = {"classes": CLASSES, "detections": 100, "pictures": sizes, "left_out": left_out}
    command = " ".join(["python -m benchmarks.evaluation", *(sys.argv[1:] if arguments is None else arguments)])
    packages = ("numpy", "pycocotools", *(["faster-coco-eval"] if "faster-coco-eval" in engines else []))
    timings: list[EngineTiming] = []
    for pictures in sizes:
        timings += compare(pictures, 2 if options.quick else options.rounds, engines)
        if not options.quick:
            write(
                options.output,
                timings,
                command=command,
                allocator="system's default",
                setting=setting,
                packages=packages,
                clock="process CPU time, a process each, engines by turns; ratio is the median of paired ratios",
            )
    print(table(timings, "other"))
    for timing in timings:
        if "evaluate" in timing.name:
            print(f"{timing.name}: peak {timing.theirs_peak_mb:.0f} MB, ours {timing.ours_peak_mb:.0f} MB")
    print("the twelve numbers of pycocotools and detcore are equal to the last bit")
    return timings


if __name__ == "__main__":
    main()
