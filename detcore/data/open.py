"""One text names a data set, on the command line as in a notebook."""

from collections.abc import Callable, Sequence
from pathlib import Path

from detcore.data.coco import CocoDetection
from detcore.data.dataset import DataError, DetectionDataset
from detcore.data.scenes import Scenes
from detcore.data.voc import VocDetection

__all__ = ["open_dataset"]

NUM_SCENES = {"train": 1000, "test": 200}
"""Pictures in ``scenes`` where the text does not say."""


def open_dataset(
    spec: str,
    split: str = "train",
    skip_bad: bool = False,
    classes: Sequence[str] | None = None,
    *,
    only_with_objects: bool = False,
) -> DetectionDataset:
    """Opens the data set that a text names.

    ========================= ====================================================================================
    ``voc:DIR``               VOC. Trains on trainval of 2007 and 2012, whichever are there, and tests on test of
                              2007; without that list, trains on train and tests on val.
    ``coco:DIR``              COCO. Trains on ``annotations/instances_train2017.json``, tests on ``...val2017``.
    ``coco-json:FILE``        A file in COCO's format; pictures are found relative to it or to the folder above. To test
                              where FILE is called ``...train...``, the file called ``...test...`` or ``...val...``
                              beside it is opened if there is one.
    ``coco-json:DIR``         ``DIR/instances_train.json`` and ``DIR/instances_test.json``.
    ``scenes``                The synthetic set; ``scenes:size=96,images=500,test_images=100,seed=1,noise=0.1``.
    ========================= ====================================================================================

    Both splits can be chosen: ``voc:DIR,train=2007/trainval+2012/trainval,test=2007/test``,
    ``coco:DIR,train=minitrain,test=minitest`` (names after ``instances_``), ``coco-json:FILE,test=OTHER``.

    Args:
        spec: the text. ``~`` is the home folder.
        split: ``"train"`` or ``"test"``.
        skip_bad: leave bad objects and pictures out, and say so in ``skipped``.
        classes: names of the classes to keep, relabelled 0.. in this order; ``None`` keeps all.
        only_with_objects: keep only pictures with at least one object that is not ignored.

    Raises:
        ValueError: if the text or the split cannot be understood, or ``classes`` is given for ``scenes``.
        DataError: if files are missing or wrong.

    Example:
        >>> train = open_dataset("scenes:images=20,size=64")
        >>> len(train), train.classes[:2]
        (20, ('disc', 'ring'))
    """
    if split not in ("train", "test"):
        raise ValueError(f'open_dataset: split must be "train" or "test"; got {split!r}.')
    kind, _, rest = spec.partition(":")
    if kind == "scenes":
        if classes is not None or only_with_objects:
            raise ValueError("open_dataset: classes and only_with_objects must be left out for scenes.")
        return _open_scenes(spec, rest, split)
    openers: dict[str, Callable[..., DetectionDataset]] = {
        "voc": _open_voc,
        "coco": _open_coco,
        "coco-json": _open_coco_json,
    }
    if kind not in openers or not rest:
        raise ValueError(
            f"open_dataset: spec must be voc:DIR, coco:DIR, coco-json:FILE or scenes; got {spec!r}. "
            "See help(detcore.data.open_dataset)."
        )
    path, options = _split_options(rest)
    return openers[kind](
        path,
        split,
        options.get(split),
        skip_bad=skip_bad,
        classes=classes,
        only_with_objects=only_with_objects,
    )


def _split_options(rest: str) -> tuple[Path, dict[str, str]]:
    """``DIR,train=a,test=b`` -> ``DIR`` and the options; other commas belong to the path."""
    options: dict[str, str] = {}
    while True:
        head, comma, tail = rest.rpartition(",")
        key, equals, value = tail.partition("=")
        if not (comma and equals and key in ("train", "test")):
            return Path(rest).expanduser(), options
        options[key] = value
        rest = head


def _open_voc(root: Path, split: str, chosen: str | None, **options) -> VocDetection:
    if chosen is None:
        pairs = _usual_voc(root, split)
    else:
        pairs = [(year, image_set) for year, _, image_set in (item.partition("/") for item in chosen.split("+"))]
        if not all(year and image_set for year, image_set in pairs):
            raise ValueError(f"open_dataset: {split} must be YEAR/LIST, or several joined by +; got {chosen!r}.")
    return VocDetection(root, [year for year, _ in pairs], [image_set for _, image_set in pairs], **options)


def _usual_voc(root: Path, split: str) -> list[tuple[str, str]]:
    def has(year: str, image_set: str) -> bool:
        places = (root / "VOCdevkit" / f"VOC{year}", root / f"VOC{year}", root if root.name == f"VOC{year}" else None)
        return any(p is not None and (p / "ImageSets" / "Main" / f"{image_set}.txt").is_file() for p in places)

    years = ("2007", "2012")
    if has("2007", "test"):
        wanted = [("2007", "test")] if split == "test" else [(year, "trainval") for year in years]
    else:
        wanted = [(year, "val" if split == "test" else "train") for year in years]
    pairs = [pair for pair in wanted if has(*pair)]
    if not pairs:
        lists = " or ".join(f"VOC{year}/ImageSets/Main/{image_set}.txt" for year, image_set in wanted)
        raise DataError(
            f"open_dataset: {root} must hold {lists} to {split}; none found. Fetch them: detcore data download voc. "
            f"Or choose lists: voc:DIR,{split}=YEAR/LIST."
        )
    return pairs


def _open_coco(root: Path, split: str, chosen: str | None, **options) -> CocoDetection:
    name = chosen if chosen is not None else {"train": "train2017", "test": "val2017"}[split]
    pictures = root / name
    # None: the names in the file have folders of their own, or lie somewhere else near it
    return CocoDetection(
        pictures if pictures.is_dir() else None, root / "annotations" / f"instances_{name}.json", **options
    )


def _open_coco_json(path: Path, split: str, chosen: str | None, **options) -> CocoDetection:
    if chosen is not None:
        return CocoDetection(None, Path(chosen).expanduser(), **options)
    if path.is_dir():
        return CocoDetection(None, path / f"instances_{split}.json", **options)
    if split == "test" and "train" in path.name:
        siblings = [path.with_name(path.name.replace("train", name)) for name in ("test", "val")]
        path = next((file for file in siblings if file.is_file()), path)
    return CocoDetection(None, path, **options)


def _open_scenes(spec: str, rest: str, split: str) -> Scenes:
    numbers = {
        "images": float(NUM_SCENES["train"]),
        "test_images": float(NUM_SCENES["test"]),
        "size": 128.0,
        "seed": 0.0,
        "noise": 0.0,
    }
    for item in filter(None, rest.split(",")):
        key, _, text = item.partition("=")
        try:
            numbers[key] = {**dict.fromkeys(numbers, int), "noise": float}[key](text)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"open_dataset: scenes takes key=number out of {', '.join(numbers)}; got {item!r} in {spec!r}."
            ) from error
    return Scenes(
        int(numbers["images" if split == "train" else "test_images"]),
        size=int(numbers["size"]),
        seed=int(numbers["seed"]),
        noise=numbers["noise"] if split == "train" else 0.0,  # sloppy boxes are to learn from; the truth stays true
        split=split,
    )
