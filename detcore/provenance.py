"""Where a number came from: kept beside every result, so that it can be made again."""

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torchvision

from detcore.checkpoint import package_version

__all__ = ["provenance"]


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Command, commit, device, versions and date of this process, as JSON types.

    Args:
        device: what the numbers were made on.

    Returns:
        ``commit`` is that of the checkout the package lies in, with ``+`` behind it if files
        differ from it; ``None`` if it is installed without one.

    Example:
        >>> sorted(provenance())
        ['command', 'commit', 'date', 'detcore', 'device', 'python', 'threads', 'torch', 'torchvision']
    """
    device = torch.device(device)
    return {
        "command": _command(sys.orig_argv[1:]),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detcore": package_version(),
    }


def _command(words: list[str]) -> str:
    script = Path(words[0]) if words else Path()
    if script.is_absolute() and script.parent.name == "bin":  # an installed command: its place is nobody's business
        return shlex.join([script.name, *words[1:]])
    return shlex.join(["python", *words])


def _commit() -> str | None:
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    git = ["git", "-C", str(here)]
    head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=False)
    changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return (head.stdout.strip() + ("+" if changes.stdout.strip() else "")) or None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()
