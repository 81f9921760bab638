"""Environment variables in the names of data sets."""

import pytest
from tiny_data import make_folder, make_voc

from locreweight.data.datasets.catalog import expand_path, register
from locreweight.errors import UsageError


@pytest.mark.parametrize("written", ["$DETECTRON2_DATASETS/coco", "${DETECTRON2_DATASETS}/coco"])
def test_default_of_detectron2_datasets(written, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert expand_path(written) == "datasets/coco"
    monkeypatch.setenv("DETECTRON2_DATASETS", "/disk/sets")
    assert expand_path(written) == "/disk/sets/coco"


def test_other_variables_and_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DISK", "/disk")
    monkeypatch.delenv("NO_SUCH_DISK", raising=False)
    assert expand_path("~/images") == "/home/me/images"
    assert expand_path("$DISK/images") == "/disk/images"
    assert expand_path("$NO_SUCH_DISK/images") == "$NO_SUCH_DISK/images"
    assert expand_path("a$b/c") == "a$b/c"
    assert expand_path("$DETECTRON2_DATASETS_OLD/x") == "$DETECTRON2_DATASETS_OLD/x"


def test_data_sets_below_detectron2_datasets(tmp_path, monkeypatch):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    make_voc(tmp_path / "VOC2007", images=2)
    make_folder(tmp_path / "coco/unlabeled2017", images=3)
    voc, folder = (
        "voc:$DETECTRON2_DATASETS/VOC2007:trainval",
        "folder:$DETECTRON2_DATASETS/coco/unlabeled2017",
    )
    register([voc, folder], ["cat", "dog", "owl"])
    try:
        assert len(DatasetCatalog.get(voc)) == 2
        assert len(DatasetCatalog.get(folder)) == 3
        assert MetadataCatalog.get(voc).dirname == str(tmp_path / "VOC2007")
    finally:
        DatasetCatalog.remove(voc)
        MetadataCatalog.remove(voc)
        DatasetCatalog.remove(folder)


def test_error_names_the_expanded_path(monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/no/such/disk")
    with pytest.raises(UsageError, match="/no/such/disk/coco"):
        register(["folder:$DETECTRON2_DATASETS/coco"])
