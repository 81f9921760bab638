"""How well a box is localized: Gaussian boxes, their quality score and the loss that fits them.

Shapes:

    N: number of boxes
    4: the coordinates of a box in the *scaled units of its box coding* (offsets over the proposal's
       width and height, times 10), never pixels: with pixels Eq. 5 would saturate

The network predicts ``log(variance)`` for each coordinate (Fig. 4). Every function here bounds it
to ``[-limit, limit]`` before it takes the exponential: unbounded, one outlier turns the loss into
infinity, and its gradient into NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LOG_VARIANCE_LIMIT = 7.0


def at_least_float32(tensor: Tensor) -> Tensor:
    """Raise half precision to float32; leave float32 and float64 as they are.

    Under autocast the network's outputs arrive in half precision, where ``exp`` overflows at 11.
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def localization_quality(
    log_variance: Tensor, *, limit: float = LOG_VARIANCE_LIMIT, scale: float = 1.0
) -> Tensor:
    """Localization quality score of a box (Eq. 5): ``1 - sigmoid(mean of the four variances)``.

    Args:
        log_variance: ``(..., 4)`` predicted log-variances.
        limit: bound of the log-variance.
        scale: factor for studies of the score's range; 1 is the paper's.

    Returns:
        ``(...)`` scores, strictly between 0 and ``0.5 * scale``; more variance in any coordinate
        never raises it.
    """
    variance = at_least_float32(log_variance).clamp(-limit, limit).exp()
    # 1 - sigmoid(x) = sigmoid(-x), without the cancellation. float32 underflows to zero beyond
    # x = 104, so the smallest positive number keeps the score positive.
    quality = torch.sigmoid(-variance.mean(dim=-1))
    return scale * quality.clamp(min=torch.finfo(quality.dtype).tiny)


def kl_regression_loss(
    prediction: Tensor, target: Tensor, log_variance: Tensor, *, limit: float = LOG_VARIANCE_LIMIT
) -> Tensor:
    """KL divergence of the predicted Gaussian box from the true one (Eq. 8, beyond 1 Eq. 9).

    Both are smooth L1 with its switch at an error of 1, divided by the variance, plus half the
    log-variance; with variance 1 the loss *is* smooth L1. It can be negative.

    Args:
        prediction, target: ``(N, 4)`` coordinates in the scaled units of the box coding.
        log_variance: ``(N, 4)`` predicted log-variances of ``prediction``.
        limit: bound of the log-variance.

    Returns:
        ``(N, 4)`` losses, unreduced.

    Raises:
        ValueError: if the three shapes differ.
    """
    if not prediction.shape == target.shape == log_variance.shape:
        raise ValueError(
            "prediction, target and log_variance must have one shape, got "
            f"{tuple(prediction.shape)}, {tuple(target.shape)} and {tuple(log_variance.shape)}"
        )
    log_variance = at_least_float32(log_variance).clamp(-limit, limit)
    distance = F.smooth_l1_loss(
        at_least_float32(prediction), at_least_float32(target), reduction="none", beta=1.0
    )
    return torch.exp(-log_variance) * distance + 0.5 * log_variance
