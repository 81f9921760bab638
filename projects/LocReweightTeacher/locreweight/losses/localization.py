"""Gaussian boxes: the localization quality score and the KL regression loss.

Shapes:

    N: number of boxes
    4: box coordinates in the *scaled units of the box coding* (offsets divided by the proposal's
       width or height, times 10). In pixels, Eq. 5 would saturate.

The network predicts ``log(variance)`` for each coordinate (Fig. 4). The functions clamp it to
``[-limit, limit]`` before taking the exponential. Otherwise a single outlier would make the loss
infinite and its gradient NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LOG_VARIANCE_LIMIT = 7.0


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32. Return float32 and float64 unchanged.

    Under autocast the network's outputs have half precision, in which ``exp`` overflows at 11.
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def localization_quality(
    log_variance: Tensor, *, limit: float = LOG_VARIANCE_LIMIT, scale: float = 1.0
) -> Tensor:
    """Compute the localization quality score (Eq. 5): ``1 - sigmoid(mean of the four variances)``.

    Args:
        log_variance: ``(..., 4)`` predicted log-variances.
        limit: the log-variance is clamped to ``[-limit, limit]``.
        scale: factor on the score, for studies of its range; 1 in the paper.

    Returns:
        ``(...)`` scores, strictly between 0 and ``0.5 * scale``. The score never increases with the
        variance of a coordinate.
    """
    variance = at_least_float32(log_variance).clamp(-limit, limit).exp()
    # sigmoid(-x) is 1 - sigmoid(x) without cancellation. It underflows to 0 in float32 for x > 104;
    # the clamp keeps the score positive.
    quality = torch.sigmoid(-variance.mean(dim=-1))
    return scale * quality.clamp(min=torch.finfo(quality.dtype).tiny)


def kl_regression_loss(
    prediction: Tensor, target: Tensor, log_variance: Tensor, *, limit: float = LOG_VARIANCE_LIMIT
) -> Tensor:
    """Compute the KL divergence between predicted and target box (Eq. 8; Eq. 9 for errors > 1).

    Both equations are smooth L1 with beta 1, divided by the variance, plus half the log-variance.
    With variance 1 the loss equals smooth L1. The loss can be negative.

    Args:
        prediction, target: ``(N, 4)`` coordinates in the scaled units of the box coding.
        log_variance: ``(N, 4)`` predicted log-variances of ``prediction``.
        limit: the log-variance is clamped to ``[-limit, limit]``.

    Returns:
        ``(N, 4)`` unreduced losses.

    Raises:
        ValueError: if the three shapes differ.
    """
    if not prediction.shape == target.shape == log_variance.shape:
        raise ValueError(
            "prediction, target and log_variance must have the same shape, got "
            f"{tuple(prediction.shape)}, {tuple(target.shape)} and {tuple(log_variance.shape)}"
        )
    log_variance = at_least_float32(log_variance).clamp(-limit, limit)
    distance = F.smooth_l1_loss(
        at_least_float32(prediction), at_least_float32(target), reduction="none", beta=1.0
    )
    return torch.exp(-log_variance) * distance + 0.5 * log_variance
