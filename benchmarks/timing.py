"""Two ways of doing one thing, timed side by side so that other users of the machine disturb both alike."""

import ctypes
import functools
import gc
import json
import math
import multiprocessing
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One comparison.

    Args:
        name: what is compared.
        check: raises AssertionError unless both sides compute the same; run before any timing.
        theirs: the other package's way.
        ours: detcore's way.
    """

    name: str
    check: Callable[[], None]
    theirs: Callable[[], object]
    ours: Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """What a comparison measured.

    Args:
        name: of the row.
        theirs_ms: median processor time of their way in milliseconds.
        ours_ms: the same of ours.
        ratio: median over the repeats of their time over our time in the same repeat: how many times faster ours is.
        ratio_low: lower quartile of those.
        ratio_high: upper quartile.
        repeats: timed runs of each side.
    """

    name: str
    theirs_ms: float
    ours_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    repeats: int


def measure(
    row: Row, *, repeats: int, budget: float = math.inf, clock: Callable[[], float] = time.process_time
) -> Timing:
    """Time both sides in turns, each first in every other repeat, after two runs of each that do not count.

    Where the first of these two uses the budget up there is no second: a minute hides what memory costs at first.
    On a processor the clock is the process's own time: on shared cores wall time measures the neighbours.

    Args:
        row: what to time.
        repeats: timed runs of each side, >= 2.
        budget: seconds of the clock after which no further repeat starts, once there were three.
        clock: what tells the time, in seconds.
    """
    if repeats < 2:
        raise ValueError(f"measure: repeats must be >= 2; got {repeats}.")
    sides = [row.theirs, row.ours]
    begin = clock()
    for _ in range(2):  # until then they take memory from the system
        for side in sides:
            side()
        if clock() - begin > budget:
            break
    gc.collect()
    seconds: list[list[float]] = [[], []]
    for repeat in range(repeats):
        for which in (0, 1) if repeat % 2 == 0 else (1, 0):
            start = clock()
            sides[which]()
            seconds[which].append(clock() - start)
        if repeat >= 2 and sum(map(sum, seconds)) > budget:
            break
    ratios = [theirs / ours for theirs, ours in zip(*seconds, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    theirs_ms, ours_ms = (1000 * statistics.median(s) for s in seconds)
    return Timing(row.name, theirs_ms, ours_ms, statistics.median(ratios), low, high, len(ratios))


def time_all(
    rows: Callable[[], Mapping[str, Callable[[], Row]]],
    theirs: str,
    *,
    module: str,
    arguments: Sequence[str] | None,
    output: pathlib.Path | None,
    setting: dict[str, object],
    repeats: int,
    budget: float,
    only: str = "",
    keeps: bool = True,
    is_apart: bool = False,
) -> list[Timing]:
    """Check, time, print and write rows on one thread, each before the next is built.

    Args:
        rows: makes the name of every row to what builds it; of a module, if each has its process.
        theirs: the other side's name, for the table.
        module: what is run, without ``benchmarks.``.
        arguments: it was given; ``None`` for those of the command line.
        output: the file to write after each row, so that a run that is cut short keeps what it has; ``None`` for none.
        setting: to be kept with the results.
        repeats: see :func:`measure`.
        budget: see :func:`measure`.
        only: part of the names of the rows to run.
        keeps: whether the allocator is asked to keep memory.
        is_apart: each row in a process of its own. Else a row that took gigabytes leaves its memory to those after it,
            scattered, and theirs and ours do not suffer alike.
    """
    command = " ".join([f"python -m benchmarks.{module}", *(sys.argv[1:] if arguments is None else arguments)])
    torch.set_num_threads(1)  # here too, since write() says how many there were
    names = [name for name in rows() if only in name]
    if not names:
        raise SystemExit(
            f"benchmarks.{module}: --only must be part of a row's name; got {only!r}, of {', '.join(rows())}."
        )
    timings = []
    for name in names:
        work = functools.partial(_time, rows, name, repeats=repeats, budget=budget, keeps=keeps)
        if is_apart:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                timing, is_kept = pool.submit(work).result()
        else:
            timing, is_kept = work()
        timings.append(timing)
        print(f"{name}: {timing.ratio:.3f}", file=sys.stderr, flush=True)
        if output:
            allocator = ("keeps freed memory" if is_kept else "system's default") + ", a process a row" * is_apart
            write(output, timings, command=command, allocator=allocator, setting=setting)
    print(table(timings, theirs))
    return timings


def _time(
    rows: Callable[[], Mapping[str, Callable[[], Row]]], name: str, *, repeats: int, budget: float, keeps: bool
) -> tuple[Timing, bool]:
    torch.set_num_threads(1)
    is_kept = keeps and keep_memory()
    row = rows()[name]()
    row.check()
    return measure(row, repeats=repeats, budget=budget), is_kept


def keep_memory() -> bool:
    """Let the allocator keep what it once took from the system; false where it cannot be asked (not glibc).

    Left alone, glibc gives large tensors back and takes fresh pages for the next ones. The kernel must clear those,
    which is up to half of the time of a pass over 50 MB and varies with the load of the machine.
    """
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    return mallopt is not None and bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, -1))


def peak_memory() -> float:
    """The most memory that this process has held so far, in megabytes.

    Linux says it per program; ``getrusage`` would count what the parent held when it started this one.
    """
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        [line] = [line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1024)


def table(timings: Sequence[Timing], theirs: str) -> str:
    """Lines to print: milliseconds of both and how many times faster ours is."""
    wide = max(len(t.name) for t in timings)
    lines = [f"{'':{wide}}  {theirs + ' ms':>16}  {'detcore ms':>11}  {'x over ' + theirs:>18}  (quartiles)"]
    lines += [
        f"{t.name:{wide}}  {t.theirs_ms:16.1f}  {t.ours_ms:11.1f}  {t.ratio:18.2f}  "
        f"({t.ratio_low:.2f} to {t.ratio_high:.2f})"
        for t in timings
    ]
    return "\n".join(lines)


def write(
    path: pathlib.Path,
    timings: Sequence[Timing] | Sequence[dict[str, object]],
    *,
    command: str,
    allocator: str,
    setting: dict[str, object],
    clock: str = "process CPU time, one thread, sides interleaved; ratio is the median of paired ratios",
    device: str | None = None,
    packages: Sequence[str] = ("torch", "torchvision", "numpy"),
) -> None:
    """Keep the measurements with what is needed to repeat them; ``device`` is a GPU's name."""
    record = {
        "command": command,
        **_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": ({"gpu": device} if device else {})
        | {"processor": processor(), "threads": torch.get_num_threads(), "system": platform.platform()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "clock": clock,
        "allocator": allocator,
        "setting": setting,
        "rows": [t if isinstance(t, dict) else asdict(t) for t in timings],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _commit() -> dict[str, object]:
    """The commit, and whether the measured code differs from it; no commit outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("diff", "HEAD", "--name-only", "--", "*.py"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "modified": None}


def processor() -> str:
    """The processor's name and the instruction sets that decide bfloat16's speed."""
    info = pathlib.Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    has = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.machine())} ({', '.join(has)})"
