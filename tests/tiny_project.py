"""A project that is in order: its data, and the config that trains on them."""

from locreweight.config import load_config
from locreweight.data.loader import StreamDataset
from locreweight.data.mapper import ViewMapper
from locreweight.data.training_sets import load_training_sets, register_datasets
from tests.tiny_data import CLASSES, make_coco, make_folder, make_voc


class Project:
    """Data sets that are in order, and the config that trains on them; tests spoil one thing."""

    def __init__(self, folder):
        self.folder = folder
        self.json, self.images = make_coco(folder / "labeled")
        self.unlabeled = make_folder(folder / "unlabeled", images=3, seed=1)
        self.test_json, self.test_images = make_coco(folder / "test", images=2, seed=2)
        self.settings = {
            "OUTPUT_DIR": str(folder / "output"),
            "MODEL.DEVICE": "cpu",
            "DATALOADER.NUM_WORKERS": 0,
            "MODEL.ROI_HEADS.NUM_CLASSES": len(CLASSES),
            "DATASETS.TRAIN": [f"coco:{self.json}:{self.images}"],
            "DATASETS.UNLABELED": [f"folder:{self.unlabeled}"],
            "DATASETS.TEST": [f"coco:{self.test_json}:{self.test_images}"],
        }

    @property
    def options(self):
        return [str(part) for pair in self.settings.items() for part in pair]

    def set(self, key, value):
        self.settings[key] = value

    def voc(self):
        """Train on Pascal VOC's layout instead; returns its folder."""
        folder = make_voc(self.folder / "voc")
        self.set("DATASETS.TRAIN", [f"voc:{folder}:trainval"])
        self.set("DATASETS.CLASS_NAMES", list(CLASSES))
        return folder

    def config(self):
        cfg = load_config("", self.options)
        register_datasets(cfg)
        return cfg

    def read(self):
        """The training sets, and the samples that are made of them."""
        cfg = self.config()
        sets = load_training_sets(cfg)
        return sets, StreamDataset(sets.labeled, sets.unlabeled, ViewMapper(cfg), seed=0)
