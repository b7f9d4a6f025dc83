"""Measures on lists of dicts, for the boxes of any detector: average precision, recall and misalignment."""

from detcore.evaluation.coco import CocoEvaluator, threshold_grid
from detcore.evaluation.correlation import Correlation, correlate
from detcore.evaluation.match_counts import count_matches, match_histogram, match_table
from detcore.evaluation.matching import best_matches
from detcore.evaluation.misalignment import Misalignment, diagnose
from detcore.evaluation.pooling import pool_detections, pool_targets
from detcore.evaluation.ranking import count_above, score_bins, suppress, with_true_iou
from detcore.evaluation.recall import SIZES, RecallCounts, RecallEvaluator, size_classes
from detcore.evaluation.results import from_coco_results, load_coco_results, to_coco_results
from detcore.evaluation.run import collect, evaluate
from detcore.evaluation.voc import VocEvaluator

__all__ = [
    "SIZES",
    "CocoEvaluator",
    "Correlation",
    "Misalignment",
    "RecallCounts",
    "RecallEvaluator",
    "VocEvaluator",
    "best_matches",
    "collect",
    "correlate",
    "count_above",
    "count_matches",
    "diagnose",
    "evaluate",
    "from_coco_results",
    "load_coco_results",
    "match_histogram",
    "match_table",
    "pool_detections",
    "pool_targets",
    "score_bins",
    "size_classes",
    "suppress",
    "threshold_grid",
    "to_coco_results",
    "with_true_iou",
]
