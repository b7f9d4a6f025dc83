"""Files from which a training run goes on, and the random state that belongs in them.

A checkpoint holds tensors, numbers, strings, lists, tuples and dicts only, so
``torch.load(path, weights_only=True)`` reads it: opening a stranger's file runs no code.
"""

import json
import os
import pickle
import random
from collections import OrderedDict
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "CheckpointError",
    "find_not_plain",
    "load_checkpoint",
    "model_weights",
    "package_version",
    "random_state",
    "save_checkpoint",
    "set_random_state",
]

FORMAT = "detcore-checkpoint"
"""What ``checkpoint["format"]`` says, so that a foreign file is told from ours."""

FORMAT_VERSION = 1
"""Raised when the meaning of a field changes; older versions are then converted or refused here."""

REPLAY_FORMAT = "detcore-replay"
"""The same for the files that a non-finite loss leaves behind."""


class CheckpointError(RuntimeError):
    """A file that cannot be used as a checkpoint; the message says why and what to do."""


def package_version() -> str:
    """Version of the installed package, or "unknown" in a source tree that was never installed.

    Example:
        >>> package_version() == "unknown" or package_version()[0].isdigit()
        True
    """
    try:
        return version("detcore")
    except PackageNotFoundError:
        return "unknown"


def save_checkpoint(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Write ``checkpoint`` so that ``path`` is at every moment either the old file or the new one.

    The bytes go to a hidden file beside ``path``, reach the disk, and only then take its name.
    A process killed on the way leaves the previous checkpoint as it was.

    Args:
        path: where to; its folder is made if need be.
        checkpoint: tensors and plain Python values; ``format``, ``format_version`` and the versions
            of detcore and torch are added.

    Raises:
        TypeError: if a value is neither a tensor nor plain, as such a file would not load again.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "last.pt"
        >>> save_checkpoint(path, {"step": 3})
        >>> load_checkpoint(path)["step"], [p.name for p in path.parent.iterdir()]
        (3, ['last.pt'])
    """
    path = Path(path)
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "detcore_version": package_version(),
        "torch_version": str(torch.__version__),
        **checkpoint,
    }
    strange = find_not_plain(content, "checkpoint")
    if strange:
        raise TypeError(
            f"save_checkpoint: checkpoint must hold tensors and plain Python values; got {strange}. "
            "Only such files load with weights_only=True."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    if hasattr(os, "O_DIRECTORY"):  # the new name must reach the disk too; Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_checkpoint(path: str | Path, *, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a file written by :func:`save_checkpoint`, running none of its content as code.

    Args:
        path: the file.
        map_location: device that the tensors are put on.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is truncated, is not a checkpoint of this package, or was
            written by a newer version of its format.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "weights.pt"
        >>> torch.save({"weight": torch.zeros(1)}, path)
        >>> load_checkpoint(path)
        Traceback (most recent call last):
        detcore.checkpoint.CheckpointError: load_checkpoint: path must be a checkpoint of detcore; got ...
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_checkpoint: path must be a checkpoint file; got {path}, which does not exist.")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"load_checkpoint: path must be a whole checkpoint of detcore; got {path} "
            f"({path.stat().st_size:,} bytes), which cannot be read: it is truncated, damaged or of another kind. "
            f"torch says: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if not isinstance(content, dict) or content.get("format") not in (FORMAT, REPLAY_FORMAT):
        is_dict = isinstance(content, dict)
        found = f"a dict with the keys {sorted(map(str, content))[:4]}" if is_dict else f"a {type(content).__name__}"
        raise CheckpointError(
            f"load_checkpoint: path must be a checkpoint of detcore; got {path}, which holds {found}. "
            "Bare weights load with model.load_state_dict(torch.load(path, weights_only=True))."
        )
    if content["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"load_checkpoint: path must have format version <= {FORMAT_VERSION}; got {content['format_version']} in "
            f"{path}, written by detcore {content['detcore_version']}. Update detcore."
        )
    return content


def model_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights to detect with: the running average if the run kept one, else the last ones.

    Example:
        >>> model_weights({"model": {"w": torch.zeros(1)}, "ema": {"weights": {"w": torch.ones(1)}}})
        {'w': tensor([1.])}
    """
    ema = checkpoint.get("ema")
    return dict(checkpoint["model"] if ema is None else ema["weights"])


def random_state() -> dict[str, Any]:
    """State of this process's generators (python, numpy, torch, the current CUDA device), as plain values.

    Example:
        >>> sorted(random_state())
        ['cuda', 'numpy', 'python', 'torch']
    """
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the generators back where :func:`random_state` found them.

    Example:
        >>> state = random_state()
        >>> first = torch.rand(2), random.random()
        >>> set_random_state(state)
        >>> bool((torch.rand(2) == first[0]).all()), random.random() == first[1]
        (True, True)
    """
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def find_not_plain(value: Any, where: str = "value") -> str | None:
    """The first part of ``value`` that ``weights_only`` would refuse to load.

    Args:
        value: anything.
        where: what to call it.

    Returns:
        Its place and type in words; ``None`` if all of it is plain.

    Example:
        >>> find_not_plain({"lr": 0.1, "act": torch.relu}, "options")
        'options["act"], a builtin_function_or_method'
    """
    if type(value) in {Tensor, nn.Parameter, str, int, float, bool, type(None)}:
        return None
    if type(value) in {dict, OrderedDict}:
        named = [(item, f"{where}[{json.dumps(key, default=repr)}]") for key, item in value.items()]
        strange = [key for key in value if type(key) not in {str, int}]
        if strange:
            return f"{where}'s key {strange[0]!r}, a {type(strange[0]).__name__}"
    elif type(value) in {list, tuple}:
        named = [(item, f"{where}[{i}]") for i, item in enumerate(value)]
    else:
        return f"{where}, a {type(value).__name__}"
    return next((found for item, name in named if (found := find_not_plain(item, name))), None)
