"""A detector small enough for tests on one core."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

import locreweight.modeling  # noqa: F401  (registers the model)
from locreweight.config import load_config
from locreweight.export.stock import stock_config

ROOT = Path(__file__).parents[2]
NUM_CLASSES = 3
SIZE = 64  # height and width of images, in pixels

# No stage is frozen, because most tests use random weights. A random detector gives each class a
# score of about 0.25.
TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.PIXEL_STD": [57.0, 57.0, 57.0],
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [48], [64]],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 60,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 40,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 40,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
    "INPUT.MIN_SIZE_TRAIN": [48, 64],
    "INPUT.MAX_SIZE_TRAIN": 64,
    "INPUT.MIN_SIZE_TEST": SIZE,
    "INPUT.MAX_SIZE_TEST": SIZE,
    "TEST.DETECTIONS_PER_IMAGE": 10,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.REFERENCE_WORLD_SIZE": 0,
    "SOLVER.AMP.ENABLED": False,
}

# Tiny models of timm by kind, as settings.
TIMM_BACKBONES = {
    kind: {
        "MODEL.BACKBONE.NAME": f"build_timm_{pyramid}_backbone",
        "MODEL.TIMM.NAME": name,
        "MODEL.TIMM.NORM": "BN",
        # Instead of the standard deviation above; the mean is Detectron2's default.
        "MODEL.PIXEL_STD": [255 * x for x in std],
    }
    for kind, pyramid, name, std in (
        ("timm_efficientnet", "fpn", "test_efficientnet", (0.229, 0.224, 0.225)),
        ("timm_convnext", "fpn", "test_convnext", (0.5, 0.5, 0.5)),
        ("timm_vit", "simple_pyramid", "test_vit", (0.5, 0.5, 0.5)),
    )
}
# The same with Detectron2's ResNet, for parametrized tests.
BACKBONES = {"resnet": {}, **TIMM_BACKBONES}


def as_options(settings: dict) -> list[str]:
    """Convert to ``KEY VALUE`` pairs, as on the command line."""
    return [str(part) for pair in settings.items() for part in pair]


def tiny_config(settings: dict | None = None) -> CfgNode:
    """The base config with the tiny detector. Settings are config keys and values."""
    base = str(ROOT / "configs/Base-LocReweight.yaml")
    return load_config(base, as_options(TINY | (settings or {})))


def tiny_model(settings: dict | None = None):
    torch.manual_seed(0)
    return build_model(tiny_config(settings))


def plain_config(cfg: CfgNode) -> CfgNode:
    """The config of the same architecture with Detectron2's classes."""
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    plain.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    return plain


def write_plain_run(folder: Path) -> CfgNode:
    """Write checkpoint and config of a plain Detectron2 training to a new folder.

    Returns:
        the config, for Detectron2.
    """
    cfg = stock_config(tiny_config())
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    model = build_model(cfg)
    # Larger weights than at the start of training, so that boxes differ from their proposals.
    torch.nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.2)
    folder.mkdir()
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    (folder / "last_checkpoint").write_text("model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return cfg


def ground_truth(boxes, classes, size=(SIZE, SIZE), **fields) -> Instances:
    return Instances(
        size,
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
        **fields,
    )


def random_image(size=(SIZE, SIZE), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)


def labeled_inputs(count=2) -> list[dict]:
    """Images in Detectron2's format. The first has two objects, the others have one."""
    targets = [ground_truth([[4, 6, 40, 44], [30, 20, 60, 60]], [0, 2])]
    targets += [ground_truth([[8, 8, 36 + i, 50]], [i % NUM_CLASSES]) for i in range(1, count)]
    return [
        {"image": random_image(seed=i), "instances": target, "file_name": f"labeled_{i}.png"}
        for i, target in enumerate(targets)
    ]
