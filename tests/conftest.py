"""What every test starts from: one thread, fixed seeds, no display, and the real pictures where there are some.

Nothing of detcore is imported here: the shape hook (``--jaxtyping-packages``) must come before the package.
"""

import os
import pathlib
import random
import sys

# Before torch starts its pools. Two test processes with a pool each would fight over two cores, and sums that
# are split over threads differ in their last bits from machine to machine.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ["MPLBACKEND"] = "Agg"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_configure(config):
    """Threads are set for the whole session, doctests included."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds():
    """Every test, alone or in any order, draws the same random numbers."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # libraries under test may use the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def figures():
    """Figures that a test leaves open are not the next one's business."""
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


@pytest.fixture(scope="session")
def data_root() -> pathlib.Path:
    """The folder of real pictures named by DETCORE_DATA: voc20/, VOCdevkit/, coco/, samples_original/."""
    named = os.environ.get("DETCORE_DATA")
    if not named:
        pytest.skip("needs real pictures: set DETCORE_DATA to the folder that holds voc20, VOCdevkit and coco")
    root = pathlib.Path(named)
    if not root.is_dir():
        pytest.fail(f"DETCORE_DATA must name a folder; got {named}")
    return root


@pytest.fixture
def gpu() -> torch.device:
    """The accelerator, for tests marked ``gpu``."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda")
