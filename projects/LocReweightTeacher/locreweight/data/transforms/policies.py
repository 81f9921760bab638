"""How the views of an image are augmented. ``INPUT.AUGMENTATION_POLICY`` names one of these, or your own:

    @AUGMENTATION_POLICY_REGISTRY.register()
    def MyRecipe(cfg) -> AugmentationPolicy: ...

Sizes and flips follow Detectron2's ``INPUT.MIN_SIZE_TRAIN``, ``INPUT.MAX_SIZE_TRAIN`` and
``INPUT.RANDOM_FLIP``. Images are RGB while they are augmented. Views share what they begin with: an
augmentation returns a new image, and does not write into the one that it is given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.utils.registry import Registry

from ...errors import get_registered
from .augmentations import (
    ColorJitter,
    Fill,
    GaussianBlur,
    Grayscale,
    OneColorOperation,
    RandomErasing,
    RandomGeometry,
    resize_and_flip,
)

AUGMENTATION_POLICY_REGISTRY = Registry("AUGMENTATION_POLICY")
AUGMENTATION_POLICY_REGISTRY.__doc__ = "Functions from a config to a :class:`AugmentationPolicy`."


@dataclass(frozen=True)
class AugmentationPolicy:
    """The augmentations of one training run.

    Attributes:
        labeled: for each view that a labeled image is shown in, its augmentations.
        weak: of the view of an unlabeled image that the teacher labels.
        strong: of the view that the student learns from.
        strong_on_weak: the strong augmentations act on the weak view, whose geometry they share,
            and not on the original image.
    """

    labeled: list[list[T.Augmentation]]
    weak: list[T.Augmentation]
    strong: list[T.Augmentation]
    strong_on_weak: bool = False


def build_augmentation_policy(cfg: CfgNode) -> AugmentationPolicy:
    """The recipe that ``INPUT.AUGMENTATION_POLICY`` names.

    Raises:
        UsageError: for an unknown name.
    """
    key, name = "INPUT.AUGMENTATION_POLICY", cfg.INPUT.AUGMENTATION_POLICY
    return get_registered(AUGMENTATION_POLICY_REGISTRY, key, name)(cfg)


@AUGMENTATION_POLICY_REGISTRY.register()
def SoftTeacherPolicy(cfg: CfgNode) -> AugmentationPolicy:
    """Each view has its own size and flip; the strong one color, geometry and erasing as well."""
    fill = _mean_rgb(cfg)
    return AugmentationPolicy(
        labeled=[[*resize_and_flip(cfg, is_train=True), OneColorOperation()]],
        weak=resize_and_flip(cfg, is_train=True),
        strong=[
            *resize_and_flip(cfg, is_train=True),
            OneColorOperation(),
            RandomGeometry(fill),
            RandomErasing(fill),
        ],
    )


@AUGMENTATION_POLICY_REGISTRY.register()
def StacPolicy(cfg: CfgNode) -> AugmentationPolicy:
    """As SoftTeacherPolicy, but the weak view is always the same: the image as in testing."""
    return replace(SoftTeacherPolicy(cfg), weak=resize_and_flip(cfg, is_train=False))


@AUGMENTATION_POLICY_REGISTRY.register()
def UnbiasedTeacherPolicy(cfg: CfgNode) -> AugmentationPolicy:
    """The strong view has the geometry of the weak one; labeled images are shown in both ways."""
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


def _mean_rgb(cfg: CfgNode) -> Fill:
    """The model's mean color: after normalization it is zero, as the padding is."""
    mean = [float(value) for value in cfg.MODEL.PIXEL_MEAN]
    first, second, third = mean if cfg.INPUT.FORMAT == "RGB" else mean[::-1]
    return first, second, third
