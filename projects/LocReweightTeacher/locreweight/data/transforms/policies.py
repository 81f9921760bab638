"""Augmentation policies: how the views of labeled and unlabeled images are augmented.

``INPUT.AUGMENTATION_POLICY`` is the name of a function in ``AUGMENTATION_POLICY_REGISTRY``. To add
your own::

    @AUGMENTATION_POLICY_REGISTRY.register()
    def MyPolicy(cfg) -> AugmentationPolicy: ...

The policies here take sizes and flips from Detectron2's ``INPUT.MIN_SIZE_TRAIN``,
``INPUT.MAX_SIZE_TRAIN`` and ``INPUT.RANDOM_FLIP``. Augmentations receive RGB images. They must
return a new image instead of modifying the one they receive, since the views of an image share
memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.utils.registry import Registry

from ...errors import get_registered
from .augmentations import (
    Color,
    ColorJitter,
    Cutout,
    GaussianBlur,
    Grayscale,
    PhotometricOperations,
    RandomColorOperation,
    RandomErasing,
    RandomGeometricOperation,
    resize_and_flip,
)

AUGMENTATION_POLICY_REGISTRY = Registry("AUGMENTATION_POLICY")
AUGMENTATION_POLICY_REGISTRY.__doc__ = """
Registry of augmentation policies: functions ``f(cfg: CfgNode) -> AugmentationPolicy``.
"""


@dataclass(frozen=True)
class AugmentationPolicy:
    """The augmentations of a training run.

    Attributes:
        labeled: one list of augmentations for each view of a labeled image.
        weak: augmentations of the view that the teacher labels.
        strong: augmentations of the view that the student learns from.
        strong_on_weak: apply ``strong`` to the weak view, so that both views have the same geometry
            (unless ``strong`` changes it). Otherwise it is applied to the original image.
    """

    labeled: list[list[T.Augmentation]]
    weak: list[T.Augmentation]
    strong: list[T.Augmentation]
    strong_on_weak: bool = False


def build_augmentation_policy(cfg: CfgNode) -> AugmentationPolicy:
    """Build the policy ``INPUT.AUGMENTATION_POLICY``.

    Raises:
        UsageError: if no policy of that name is registered.
    """
    key, name = "INPUT.AUGMENTATION_POLICY", cfg.INPUT.AUGMENTATION_POLICY
    return get_registered(AUGMENTATION_POLICY_REGISTRY, key, name)(cfg)


@AUGMENTATION_POLICY_REGISTRY.register()
def SoftTeacherPolicy(cfg: CfgNode) -> AugmentationPolicy:
    """The augmentations of Soft Teacher (Xu et al., 2021).

    Weak and strong view have their own random size and flip. The strong view also has one color
    operation, one geometric operation and erased patches; a labeled view has one color operation.
    """
    fill = _mean_rgb(cfg)
    return AugmentationPolicy(
        labeled=[[*resize_and_flip(cfg, is_train=True), RandomColorOperation()]],
        weak=resize_and_flip(cfg, is_train=True),
        strong=[
            *resize_and_flip(cfg, is_train=True),
            RandomColorOperation(),
            RandomGeometricOperation(fill),
            RandomErasing(fill),
        ],
    )


@AUGMENTATION_POLICY_REGISTRY.register()
def STACPolicy(cfg: CfgNode) -> AugmentationPolicy:
    """``SoftTeacherPolicy`` with a fixed weak view: the image as it is resized for testing."""
    return replace(SoftTeacherPolicy(cfg), weak=resize_and_flip(cfg, is_train=False))


@AUGMENTATION_POLICY_REGISTRY.register()
def UnbiasedTeacherPolicy(cfg: CfgNode) -> AugmentationPolicy:
    """The augmentations of Unbiased Teacher (Liu et al., 2021).

    The strong view changes only the appearance of the weak view. A labeled image has both a weak
    and a strong view.
    """
    fill = _mean_rgb(cfg)
    appearance = [
        T.RandomApply(ColorJitter(strength=0.4, hue=0.1), prob=0.8),
        T.RandomApply(Grayscale(), prob=0.2),
        T.RandomApply(GaussianBlur(0.1, 2.0), prob=0.5),
        T.RandomApply(RandomErasing(fill, (1, 1), (0.05, 0.2), (0.3, 3.3)), prob=0.7),
        T.RandomApply(RandomErasing(fill, (1, 1), (0.02, 0.2), (0.1, 6.0)), prob=0.5),
        T.RandomApply(RandomErasing(fill, (1, 1), (0.02, 0.2), (0.05, 8.0)), prob=0.3),
    ]
    weak = resize_and_flip(cfg, is_train=True)
    return AugmentationPolicy(
        labeled=[weak, [*weak, *appearance]], weak=weak, strong=appearance, strong_on_weak=True
    )


@AUGMENTATION_POLICY_REGISTRY.register()
def InstantTeachingPolicy(cfg: CfgNode) -> AugmentationPolicy:
    """The augmentations of Instant-Teaching (Zhou et al., 2021).

    All views have their own random size and flip. The strong view also has erased squares and color
    operations. Labeled images have nothing more.
    """
    plain = resize_and_flip(cfg, is_train=True)
    appearance = [T.RandomApply(Cutout(), prob=0.5), PhotometricOperations()]
    return AugmentationPolicy(labeled=[plain], weak=plain, strong=[*plain, *appearance])


def _mean_rgb(cfg: CfgNode) -> Color:
    """Return ``MODEL.PIXEL_MEAN`` as RGB. Normalization maps it to zero, the value of padding."""
    mean = [float(value) for value in cfg.MODEL.PIXEL_MEAN]
    first, second, third = mean if cfg.INPUT.FORMAT == "RGB" else mean[::-1]
    return first, second, third
