"""Make the virtual environment that the Makefile works in: ``python3 tools/make_venv.py .venv``.

A file of its own because what goes wrong here, an old Python or Debian's Python without ``ensurepip``, would
otherwise end in a traceback. It must run on Pythons older than the package needs, so its syntax is plain.
"""

import os
import subprocess
import sys

OLDEST = (3, 11)


def complaint(version, has_ensurepip, executable=sys.executable):
    """What stands in the way of a virtual environment, with the cure; an empty string if nothing does."""
    if tuple(version[:2]) < OLDEST:
        return (
            f"make: Python must be {OLDEST[0]}.{OLDEST[1]} or newer; got {version[0]}.{version[1]} ({executable}). "
            "Name another one, for example: make test PYTHON=python3.12"
        )
    if not has_ensurepip:
        return (
            f"make: {executable} must be able to make virtual environments; it has no ensurepip. "
            "On Debian and Ubuntu: sudo apt install python3-venv"
        )
    return ""


def main(folder):
    """Make the environment in ``folder`` unless a working one is there."""
    try:
        import ensurepip
    except ImportError:
        ensurepip = None
    problem = complaint(sys.version_info, ensurepip is not None)
    if problem:
        sys.exit(problem)

    python = os.path.join(folder, "bin", "python")
    if os.path.exists(python) and subprocess.call([python, "-m", "pip", "--version"], stdout=subprocess.DEVNULL) == 0:
        return
    is_environment = os.path.exists(os.path.join(folder, "pyvenv.cfg"))
    if os.path.isdir(folder) and os.listdir(folder) and not is_environment:
        sys.exit(f"make: VENV must be a new folder or a virtual environment; got {folder}, which holds other files.")
    print(f"making a virtual environment in {folder} with {sys.executable}", flush=True)
    # What an interrupted run or a removed Python left of an environment is of no use: --clear.
    subprocess.check_call([sys.executable, "-m", "venv", "--clear", folder])


if __name__ == "__main__":
    main(sys.argv[1])
