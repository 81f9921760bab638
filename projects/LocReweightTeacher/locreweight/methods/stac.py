"""STAC: pseudo-labels made once, by a teacher that stays as it is.

Sohn et al., "A Simple Semi-Supervised Learning Framework for Object Detection" (2020). All
pseudo-labels above a high threshold count alike. To be used with ``INPUT.AUGMENTATION_POLICY StacPolicy``, in
which the pseudo_labeler sees an image in one way only: the labels that it gives at each visit are then the
same, as if they had been made once and stored; and with ``SEMI.EMA_KEEP_RATE 0.0``, which makes the
student itself the result.

Differences:

- STAC trains its teacher to the end of a schedule of its own; here burn-in is that training, and as
  long as ``SEMI.BURN_IN_ITERS`` says: a short one makes a poor pseudo_labeler for good.
- The student goes on from burn-in, where STAC starts it from ImageNet weights again.
- Boxes are not augmented one by one; the strong view has Soft Teacher's operations.
- Labeled images have one color operation, as for all methods here, where STAC's are only resized
  and flipped; sizes of images are the config's, and not 500 to 800 pixels.
- The threshold is the same for all images; the authors' program lowers it for an image whose best
  score is below it.
"""

from __future__ import annotations

from detectron2.config import CfgNode

from .base import (
    METHOD_REGISTRY,
    AboveThreshold,
    SemiSupervisedMethod,
    unweighted_box_loss,
    unweighted_classification_loss,
)


@METHOD_REGISTRY.register()
def Stac(cfg: CfgNode) -> SemiSupervisedMethod:
    return SemiSupervisedMethod(
        choose_pseudo_labels=AboveThreshold(cfg.SEMI.PSEUDO_LABEL_THRESHOLD),
        classify=unweighted_classification_loss,
        regress_boxes=unweighted_box_loss,
        frozen_pseudo_labeler=True,
    )
