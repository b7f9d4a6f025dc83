"""What all verbs share: common flags, KEY=VALUE words, what is printed and what is written."""

import ast
import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

__all__: list[str] = []

Flag = tyro.conf.FlagCreatePairsOff[bool]
"""A switch that is off: ``--name``, without ``--no-name``."""

Pairs = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[KEY=VALUE ...]")]


@dataclass(frozen=True, kw_only=True)
class Common:
    """Flags of every verb.

    Args:
        threads: processor threads that torch computes with; default: torch's choice, or OMP_NUM_THREADS.
        debug: on an error, show where in the code it came from.
        words: the command line, for the record.
    """

    threads: int | None = None
    debug: Flag = False
    words: tyro.conf.Suppress[str] = ""

    def begin(self) -> None:
        """Set what holds for the whole process."""
        if self.threads is not None:
            if self.threads < 1:
                raise ValueError(f"detcore: --threads must be >= 1; got {self.threads}.")
            torch.set_num_threads(self.threads)


Device = Literal["auto", "cpu"]


def pick_device(device: Device) -> torch.device:
    """A GPU if there is one and it is not ruled out."""
    return torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")


def is_shown() -> bool:
    """Whether progress bars have somebody to look at them."""
    return sys.stderr.isatty()


def split_pairs(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell KEY=VALUE words from the others: a list such as ``--classes cat dog`` must not swallow them.

    Example:
        >>> split_pairs(["--classes", "cat", "dog", "anchor_base=2"])
        (['--classes', 'cat', 'dog'], ['anchor_base=2'])
    """
    is_pair = [re.match(r"[A-Za-z_]\w*=", word) is not None for word in words]
    pairs = [word for word, pair in zip(words, is_pair, strict=True) if pair]
    return [word for word, pair in zip(words, is_pair, strict=True) if not pair], pairs


def read_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE words as options; values are Python literals, and texts where they are none.

    Raises:
        ValueError: if a word has no ``=``.

    Example:
        >>> read_pairs(["anchor_base=2", "detach_iou_target=False", "box_loss=giou", "nms_iou=None"])
        {'anchor_base': 2, 'detach_iou_target': False, 'box_loss': 'giou', 'nms_iou': None}
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"detcore: words without -- must be KEY=VALUE, such as anchor_base=2; got {pair!r}.")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text
    return options


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people and programs; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_json_ready(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _json_ready(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    if isinstance(value, Path):
        return value.as_posix()
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def told_to_the_terminal() -> Iterator[None]:
    """What the package logs goes to the terminal for as long as a command runs."""
    logger, handler = logging.getLogger("detcore"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
