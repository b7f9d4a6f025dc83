"""The command ``detcore``: one verb a module, each a dataclass that tyro turns into flags.

``detcore --help`` lists the verbs, ``detcore VERB --help`` explains one. A user's mistake is one
message and exit code 2; ``--debug`` shows where it came from.
"""

import importlib
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from detcore.checkpoint import CheckpointError, package_version

__all__ = ["main"]

VERBS = {
    "train": "train a detector, evaluate it, and write checkpoints and result.json",
    "eval": "average precision of a checkpoint on a data set",
    "predict": "boxes on pictures or on a data set: COCO results, and the pictures with boxes",
    "diagnose": "how far scores and the quality of boxes are apart, for any framework's output",
    "data": "list, download and check data sets",
    "show": "draw data, priors, and which priors own which object",
}
"""Verb to one line. The module is :mod:`detcore.cli.VERB`, with ``COMMAND`` and ``EXAMPLES``."""

_MODULES = {"eval": "evaluate"}

USAGE = """usage: detcore VERB [OPTIONS]

One-stage object detectors: train them, measure them, and see why they rank and localise badly.

{verbs}

Every verb has a --help. Start without any data at hand:

  detcore train --model retinanet --backbone tiny --data scenes:size=64,images=200 --epochs 10 --warmup-steps 50
  detcore predict --checkpoint runs/retinanet --data scenes:size=64
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        args: the words behind ``detcore``; ``None`` takes those of this process.

    Returns:
        The exit code: 0, 1 if ``data check`` found faults, 2 for a mistake of the user, 130 after Ctrl-C.

    Example:
        >>> main(["trane"])  # says on stderr which verbs there are
        2
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE.format(verbs="\n".join(f"  {verb:<10}{line}" for verb, line in VERBS.items())))
        return 0 if words else 2
    if words[0] == "--version":
        print(f"detcore {package_version()}")
        return 0
    if words[0] not in VERBS:
        return _complain(f"VERB must be one of {', '.join(VERBS)}; got {words[0]!r}. See detcore --help")
    try:
        return _run(words[0], words[1:])
    except KeyboardInterrupt:
        print("detcore: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `detcore ... | head` has seen enough; what was to be written is written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains on its way out
        return 1
    except (ValueError, LookupError, TypeError, OSError, CheckpointError, ArithmeticError) as error:
        if "--debug" in words:
            traceback.print_exc()
        return _complain(_message(error))


def _run(verb: str, words: list[str]) -> int:
    from detcore.cli.options import told_to_the_terminal  # torch's seconds are not for `detcore --help`

    try:
        command = parse(verb, words)
    except SystemExit as done:  # --help, or a flag that does not exist: tyro has said so
        if not done.code:
            print(_module(verb).EXAMPLES)
        return int(done.code or 0)
    with told_to_the_terminal():
        return command.run()


def parse(verb: str, words: Sequence[str]) -> Any:
    """The command that a verb and its words mean; ``run()`` runs it.

    Raises:
        SystemExit: after --help, or with code 2 for words that mean nothing.
    """
    import tyro

    from detcore.cli.options import split_pairs

    rest, pairs = split_pairs(words)
    command: Any = tyro.cli(_module(verb).COMMAND, prog=f"detcore {verb}", args=rest)
    typed = shlex.join(["detcore", verb, *words])
    return replace(command, options=(*command.options, *pairs), words=typed)


def _module(verb: str) -> Any:
    return importlib.import_module(f"detcore.cli.{_MODULES.get(verb, verb)}")


def _message(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    # Ours begin with the function they come from; of others the type says more than the text.
    return text if re.match(r"[\w.]+( \([\w -]+\))?: ", text) else f"{type(error).__name__}: {text}"


def _complain(message: str) -> int:
    print(f"detcore: error: {message}", file=sys.stderr)
    return 2
