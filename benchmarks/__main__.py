"""All benchmarks that need no GPU, one after the other: ``python -m benchmarks``.

Side by side with torchvision, pycocotools, faster-coco-eval and the network alone, each checked before it is timed;
each part prints its table and writes its file in ``results/benchmarks``. At the end the goals and what they reached.
"""

import argparse
import os
import subprocess
import sys

from benchmarks.goals import report
from benchmarks.timing import ROOT, processor

MALLOC_OUTPUT = "results/benchmarks/torchvision_malloc.json"
PARTS = {
    "torchvision": ["torchvision"],
    "malloc": ["torchvision", "--malloc", "system", "--only", "large", "--output", MALLOC_OUTPUT],
    "mixed": ["mixed"],
    "limits": ["limits"],
    "growth": ["growth"],
    "evaluation": ["evaluation"],
    "convolutions": ["convolutions"],
}


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for, then say what the stored results reach."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--report", action="store_true", help="measure nothing, only say what the stored results reach")
    options = parser.parse_args(arguments)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"parts must be of {', '.join(PARTS)}; got {', '.join(unknown)}")
    for part in [] if options.report else options.parts or PARTS:
        module, *rest = PARTS[part]
        print(f"== {part}", flush=True)
        subprocess.run(
            [sys.executable, "-m", f"benchmarks.{module}", *rest],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
        )
    print(f"== goals; this machine: {processor()}")
    print(report())


if __name__ == "__main__":
    main()
