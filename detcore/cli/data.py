"""``detcore data``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from detcore.cli.options import Common, is_shown
from detcore.data import DataError, download, open_dataset
from detcore.data.archives import ARCHIVES, COLLECTIONS

__all__: list[str] = []

EXAMPLES = """
examples:
  detcore data list
  detcore data download voc --root ~/data        # VOC 2007 + 2012; train with --data voc:~/data/VOCdevkit
  detcore data check coco-json:instances.json    # every bad box and picture, by file and id
"""


@dataclass(frozen=True, kw_only=True)
class List(Common):
    """Data sets that can be downloaded, and how any data set is named."""

    options: tyro.conf.Suppress[tuple[str, ...]] = ()

    def run(self) -> int:
        """Print."""
        for name in (*COLLECTIONS, *ARCHIVES):
            parts = COLLECTIONS.get(name, (name,))
            size = sum(ARCHIVES[part].size for part in parts) / 1e9
            print(f"{name:<22}{size:>6.1f} GB  {' + '.join(parts) if name in COLLECTIONS else ARCHIVES[name].filename}")
        print("\n--data voc:DIR | coco:DIR | coco-json:FILE | coco-json:DIR | scenes, for instance:")
        print("  voc:VOCdevkit,train=2007/trainval+2012/trainval,test=2007/test")
        print("  coco-json:annotations.json,test=other.json")
        print("  scenes:size=96,images=500,test_images=100,seed=1,noise=0.1")
        return 0


@dataclass(frozen=True, kw_only=True)
class Download(Common):
    """Fetch and unpack a data set; what is there already is not fetched again.

    Args:
        name: as detcore data list shows it.
        root: folder to put it in; default: the user's cache folder.
        keep_archive: keep the archives after unpacking them.
    """

    options: tyro.conf.Suppress[tuple[str, ...]] = ()
    name: tyro.conf.Positional[str]
    root: Path | None = None
    keep_archive: tyro.conf.FlagCreatePairsOff[bool] = False

    def run(self) -> int:
        """Fetch, and say what --data it is."""
        root = None if self.root is None else self.root.expanduser()
        folder = download(self.name, root, keep_archive=self.keep_archive, progress=is_shown())
        print(f"--data {'coco' if self.name.startswith('coco') else 'voc'}:{folder}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Check(Common):
    """Read all annotations and decode all pictures; report every bad one, and exit with 1 if there is any.

    Args:
        data: as for detcore train.
        split: which part; default: both.
    """

    options: tyro.conf.Suppress[tuple[str, ...]] = ()
    data: Annotated[str, tyro.conf.Positional]
    split: Literal["both", "train", "test"] = "both"

    def run(self) -> int:
        """Look at everything."""
        faults = 0
        for split in ("train", "test") if self.split == "both" else (self.split,):
            dataset, messages = _examine(self.data, split)
            for message in messages:
                print(message)
            print(f"{split}: {dataset.name}, {len(dataset)} sound pictures, {len(messages)} faults")
            faults += len(messages)
        return int(faults > 0)


def _examine(data: str, split: str) -> tuple[Any, list[str]]:
    """The data set without what is bad, and what is bad."""
    try:
        dataset: Any = open_dataset(data, split)
        messages = []
        for note in dataset.skipped:  # slips of the official files, left out on their own
            print(f"note: {note}")
    except DataError:
        dataset = open_dataset(data, split, skip_bad=True)
        messages = list(dataset.skipped)
    if hasattr(dataset, "verify"):
        messages += dataset.verify(progress=is_shown())
    return dataset, messages


COMMAND = (
    Annotated[List, tyro.conf.subcommand("list", prefix_name=False)]
    | Annotated[Download, tyro.conf.subcommand("download", prefix_name=False)]
    | Annotated[Check, tyro.conf.subcommand("check", prefix_name=False)]
)
