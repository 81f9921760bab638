"""Soft class labels: the teacher's score of a pseudo-label as its probability (not in the paper).

Shapes:

    N: number of proposals
    K: number of foreground classes; class ``K`` is the background
"""

from __future__ import annotations

import torch
from torch import Tensor

from .localization import at_least_float32


def sharpen(score: Tensor, temperature: float) -> Tensor:
    """Compute ``sigmoid(logit(score) / temperature)``.

    A temperature below 1 moves probabilities above 0.5 toward 1, and those below 0.5 toward 0.

    Args:
        score: of any shape, in [0, 1].
        temperature: above 0.

    Returns:
        values in [0, 1] of the same shape.
    """
    return torch.sigmoid(torch.logit(at_least_float32(score)) / temperature)


def soft_cross_entropy(logits: Tensor, labels: Tensor, probability: Tensor) -> Tensor:
    """Compute the cross-entropy to labels that may be wrong.

    The target of a proposal is its class with the given probability, and background otherwise.

    Args:
        logits: ``(N, K+1)`` the student's class scores before softmax.
        labels: ``(N,)`` classes assigned to the proposals, in ``[0, K]``.
        probability: ``(N,)`` in [0, 1], without gradient. It has no effect on background proposals.

    Returns:
        ``(N,)`` unreduced losses, at least 0.
    """
    log_probabilities = at_least_float32(logits).log_softmax(dim=1)
    assigned = log_probabilities.gather(1, labels[:, None])[:, 0]
    probability = probability.detach()
    return -(probability * assigned + (1 - probability) * log_probabilities[:, -1])
