"""Pictures with boxes: PASCAL VOC, MS COCO, files in its format, and synthetic scenes."""

from detcore.data.coco import CocoDetection
from detcore.data.dataset import DataError, DetectionDataset
from detcore.data.download import download
from detcore.data.fetch import DownloadError
from detcore.data.open import open_dataset
from detcore.data.pictures import AnnotatedPictures
from detcore.data.scenes import SCENE_CLASSES, Scenes
from detcore.data.voc import VOC_CLASSES, VocDetection

__all__ = [
    "SCENE_CLASSES",
    "VOC_CLASSES",
    "AnnotatedPictures",
    "CocoDetection",
    "DataError",
    "DetectionDataset",
    "DownloadError",
    "Scenes",
    "VocDetection",
    "download",
    "open_dataset",
]
