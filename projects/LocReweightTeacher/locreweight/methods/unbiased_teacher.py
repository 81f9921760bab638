"""Unbiased Teacher: no box loss on pseudo-labels, because scores do not measure localization.

Liu et al., "Unbiased Teacher for Semi-Supervised Object Detection" (2021). Set
``SEMI.RPN_BOX_LOSS False`` as well: the RPN has no box loss on pseudo-labels either. The focal
loss, which also applies to labeled images, is ``MODEL.ROI_BOX_HEAD.FOCAL_GAMMA``. The augmentations
are ``INPUT.AUGMENTATION_POLICY UnbiasedTeacherPolicy``.

Differences from the paper. All but the last keep the comparison with the other methods fair:

- The EMA keep rate starts with a ramp. In the paper it is constant.
- Up to half of the RPN's sampled anchors are positive. In the paper it is a quarter.
- The box loss on labeled images is smooth L1. In the paper it is L1
  (``MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA 0.0``).
- Image sizes are those of the config, not 640 to 800 pixels in training and 600 in testing on VOC.
- Erased patches are filled with the mean color, not with noise.
"""

from __future__ import annotations

from .base import METHOD_REGISTRY, SampledProposals, SemiSupervisedMethod


@METHOD_REGISTRY.register()
class UnbiasedTeacher(SemiSupervisedMethod):
    """The base class without a box loss on pseudo-labels."""

    def box_loss(self, proposals: SampledProposals) -> None:
        return None
