"""STAC: pseudo-labels from a frozen teacher, unweighted losses.

Sohn et al., "A Simple Semi-Supervised Learning Framework for Object Detection" (2020). Use it with
``INPUT.AUGMENTATION_POLICY STACPolicy``, in which the weak view of an image is always the same. The
pseudo-labels of an image are then the same in each iteration, as if they had been computed once
and stored. Also use ``SEMI.EMA_KEEP_RATE 0.0``, which makes the student itself the result.

Differences from the paper:

- STAC trains its teacher to the end of a separate schedule. Here burn-in trains the teacher, so
  ``SEMI.BURN_IN_ITERS`` has to be long enough.
- The student continues from the weights at the end of burn-in. STAC starts it from ImageNet
  weights.
- Boxes are not augmented one by one. The strong view uses Soft Teacher's operations.
- Labeled images get one color operation. STAC only resizes and flips them.
  Image sizes are those of the config, not 500 to 800 pixels.
- The threshold is the same for all images. The authors' code lowers it for an image whose best
  score is below it.
"""

from __future__ import annotations

from .base import METHOD_REGISTRY, SemiSupervisedMethod


@METHOD_REGISTRY.register()
class STAC(SemiSupervisedMethod):
    """The base class with a frozen pseudo-labeler."""

    frozen_pseudo_labeler = True
