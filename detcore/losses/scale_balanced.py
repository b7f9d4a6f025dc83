r"""Scale-balanced loss: an object's weight grows with the logarithm of how many priors it owns, not with their number.

Scale-balanced loss for object detection, Pattern Recognition 117, 2021. Large objects match more
priors than small ones and thereby weigh more; the paper weighs each positive prior by
:math:`\beta(\ln M + \alpha)/M`, so that all :math:`M` together weigh :math:`\beta(\ln M + \alpha)`.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Num
from torch import Tensor

from detcore.ssd_assigner import num_matched
from detcore.structures import Assignment, joint_total

__all__ = ["Normalise", "ScaleForm", "scale_balance", "scale_balanced_weight"]

ScaleForm = Literal["scb", "const", "inv", "inv_sqrt", "inv_log"]
Normalise = Literal["mean"]


def scale_balanced_weight(
    num_matched: Num[Tensor, "*shape"],
    *,
    alpha: float = 1.0,
    beta: float = 3.0,
    form: ScaleForm = "scb",
    normalise: Normalise | None = None,
) -> Float[Tensor, "*shape"]:
    r"""Weight of each positive prior of an object that owns :math:`M` of them.

    ========= ==================================== =====================================
    form      weight of a prior                    of an object
    ========= ==================================== =====================================
    scb       :math:`\beta(\ln M + \alpha)/M`      :math:`\beta(\ln M + \alpha)`
    const     :math:`\beta`                        :math:`\beta M`
    inv       :math:`\beta/M`                      :math:`\beta`
    inv_sqrt  :math:`\beta/\sqrt M`                :math:`\beta\sqrt M`
    inv_log   :math:`\beta/(\ln M + 1)`            :math:`\beta M/(\ln M + 1)`
    ========= ==================================== =====================================

    At the defaults an object gains up to M = 9 and loses from 10 on. The weight of a prior falls
    from M = 1 to 2 only if :math:`\alpha \ge \ln 2`.

    Args:
        num_matched: :math:`M` of each object, >= 0.
        alpha: of ``"scb"``, >= 0.
        beta: a factor of every form, > 0. Only where the mean weight is 1 do positives and negatives
            keep their balance; on SSD300's matches of VOC07+12 that takes about 2.8 (scb), 1 (const),
            8 (inv), 3 (inv_sqrt), 3.1 (inv_log).
        form: a row of the table.
        normalise: ``"mean"`` gives all priors of these objects the mean weight 1, so that form is compared with
            form; ``beta`` then does not matter. Under data parallelism it is the joint batch's mean.

    Returns:
        Weights, >= 0, in float32 or wider; 0 where M = 0: no prior carries that object.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> matched = torch.tensor([0, 1, 2, 10])
        >>> scale_balanced_weight(matched)
        tensor([0.0000, 3.0000, 2.5397, 0.9908])
        >>> matched * scale_balanced_weight(matched)  # three times 1, 1 + ln 2, 1 + ln 10
        tensor([0.0000, 3.0000, 5.0794, 9.9078])

    Reference: Scale-balanced loss for object detection, 2021, Eq. (3), Table 1.
    Deviation: natural logarithm, as in the released code; Table 1 does not say which :math:`\beta` each
    form had.
    """
    if form not in get_args(ScaleForm):
        raise ValueError(f"scale_balanced_weight: form must be one of {get_args(ScaleForm)}; got {form!r}.")
    if alpha < 0 or beta <= 0:
        raise ValueError(f"scale_balanced_weight: alpha must be >= 0 and beta > 0; got {alpha} and {beta}.")
    if normalise not in (None, "mean"):
        raise ValueError(f'scale_balanced_weight: normalise must be None or "mean"; got {normalise!r}.')
    matched = num_matched if num_matched.dtype == torch.float64 else num_matched.float()
    count = matched.clamp(min=1)
    share = {
        "scb": lambda: (count.log() + alpha) / count,
        "const": lambda: torch.ones_like(count),
        "inv": lambda: 1 / count,
        "inv_sqrt": count.rsqrt,
        "inv_log": lambda: 1 / (count.log() + 1),
    }[form]()
    share = torch.where(matched > 0, share, 0.0)
    if normalise is None:
        return beta * share
    # means over the joint batch of all workers; of nothing, any number will do
    return share * joint_total(matched.sum(), least=1.0) / joint_total((share * matched).sum(), least=1e-12)


def scale_balance(
    match: Assignment,
    *,
    alpha: float = 1.0,
    beta: float = 3.0,
    form: ScaleForm = "scb",
    normalise: Normalise | None = None,
) -> Float[Tensor, "B N"]:
    """:func:`scale_balanced_weight` of each positive prior's object: the ``weight`` of a term.

    Any term that has a ``weight`` takes it, and any assigner will do:

    Args:
        match: whose objects' priors are counted.
        alpha: as in :func:`scale_balanced_weight`.
        beta: as there.
        form: as there.
        normalise: as there, over the batch.

    Returns:
        Weights; meaningless where a prior is not positive.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> from functools import partial
        >>> from detcore.losses.mining import softmax_mining_term
        >>> term = partial(softmax_mining_term, weight=partial(scale_balance, form="inv_sqrt", normalise="mean"))

    Reference: Scale-balanced loss for object detection, 2021, Eq. (2), (3).
    """
    weight = scale_balanced_weight(num_matched(match), alpha=alpha, beta=beta, form=form, normalise=normalise)
    return weight.gather(1, match.index)
