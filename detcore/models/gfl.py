"""RetinaNet with the class loss of Generalized Focal Loss: score and quality are one number.

Li et al., Generalized Focal Loss, NeurIPS 2020. arXiv:2006.04388
The fourth head of RetinaNet-Conf's Fig. 3: where the others predict quality beside the class, here
the class score of the object is trained to be the IoU (quality focal loss, Eq. 2). Of that paper
only the classification side; the distribution of box sides is not part of this comparison.
"""

from functools import partial
from typing import Any

import torch

from detcore.detector import DenseDetector
from detcore.losses.functional import quality_focal_loss
from detcore.losses.terms import quality_focal_term
from detcore.models.retinanet import retinanet

__all__ = ["retinanet_gfl"]


def retinanet_gfl(*, num_classes: int, beta: float = 2.0, **options: Any) -> DenseDetector:
    r"""RetinaNet trained with :math:`|y - p|^{\beta}\,\mathrm{BCE}(p, y)`, :math:`y` = reached IoU.

    Args:
        num_classes: C, >= 1.
        beta: focusing exponent, >= 0; 2 in the paper.
        **options: of :func:`detcore.models.retinanet.retinanet`; ``alpha`` and ``gamma`` of the
            focal loss have no meaning here.

    Raises:
        ValueError: if an option is out of range.
        TypeError: if ``alpha`` or ``gamma`` is given.

    Example:
        >>> retinanet_gfl(num_classes=20, backbone="tiny").losses["cls"][1].keywords
        {'beta': 2.0}
    """
    meaningless = sorted({"alpha", "gamma"} & set(options))
    if meaningless:
        raise TypeError(f"retinanet_gfl: {', '.join(meaningless)} belong to the focal loss; this one has beta.")
    quality_focal_loss(torch.zeros(0), torch.zeros(0), beta=beta)  # refuses a wrong beta
    detector = retinanet(num_classes=num_classes, **options)
    detector.losses["cls"] = (1.0, partial(quality_focal_term, beta=beta))
    return detector
