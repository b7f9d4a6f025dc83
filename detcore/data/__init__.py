"""Pictures with boxes: PASCAL VOC, MS COCO, files in its format, and synthetic scenes."""

from detcore.data.archives import download
from detcore.data.buckets import Buckets, size_buckets
from detcore.data.coco import CocoDetection
from detcore.data.dataset import DataError, DetectionDataset
from detcore.data.fetch import DownloadError
from detcore.data.loader import (
    Batch,
    CachedDataset,
    CachedLoader,
    EpochSampler,
    Loader,
    collate,
    make_loader,
)
from detcore.data.open import open_dataset
from detcore.data.pictures import AnnotatedPictures
from detcore.data.scenes import SCENE_CLASSES, Scenes
from detcore.data.transforms import (
    drop_empty,
    flip_transform,
    retinanet_transform,
    square_transform,
    ssd_transform,
)
from detcore.data.voc import VOC_CLASSES, VocDetection

__all__ = [
    "SCENE_CLASSES",
    "VOC_CLASSES",
    "AnnotatedPictures",
    "Batch",
    "Buckets",
    "CachedDataset",
    "CachedLoader",
    "CocoDetection",
    "DataError",
    "DetectionDataset",
    "DownloadError",
    "EpochSampler",
    "Loader",
    "Scenes",
    "VocDetection",
    "collate",
    "download",
    "drop_empty",
    "flip_transform",
    "make_loader",
    "open_dataset",
    "retinanet_transform",
    "size_buckets",
    "square_transform",
    "ssd_transform",
]
