"""Tests of loading a predictor or a student from a checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image

import locreweight
from locreweight.checkpoint.checkpointer import CheckpointDescription, TeacherCheckpointer
from locreweight.checkpoint.loading import read_description
from locreweight.config import load_config
from locreweight.data.image_io import read_rgb
from locreweight.engine import load_for_evaluation
from locreweight.engine.predictor import Predictor, load_student
from locreweight.errors import UsageError
from tests.engine.tiny_training import build_trainer, copy_of, same, training_config
from tests.modeling.tiny_model import BACKBONES, plain_config, tiny_config, write_plain_run
from tests.odd_images import VALID
from tests.tiny_data import CLASSES, make_folder


@pytest.fixture(scope="module", params=["resnet", "timm_efficientnet", "timm_vit"])
def backbone(request):
    """Settings of a backbone."""
    return BACKBONES[request.param]


@pytest.fixture(scope="module")
def folder(backbone, tmp_path_factory):
    """Output folder of a finished training."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def trained(datasets, folder, backbone):
    """Trainer of the finished training."""
    trainer = build_trainer(training_config(datasets, folder, backbone))
    trainer.train()
    return trainer


@pytest.fixture
def images(tmp_path):
    """RGB images of different sizes."""
    folders = [make_folder(tmp_path / str(size), images=1, size=size) for size in (64, (48, 80))]
    return [read_image(str(folder / "0000.png"), format="RGB") for folder in folders]


def test_predictor_uses_config_and_class_names_of_the_checkpoint(trained, folder):
    detector = Predictor(str(folder / "model_final.pth"), device="cpu")
    assert detector.class_names == list(CLASSES)
    expected = trained.cfg.clone()
    expected.defrost()
    expected.MODEL.WEIGHTS = str(folder / "model_final.pth")
    # Compared as YAML, which stores tuples as lists.
    assert yaml.safe_load(detector.cfg.dump()) == yaml.safe_load(expected.dump())
    assert same(copy_of(detector.model), copy_of(trained.teacher))
    assert not detector.model.training and detector.has_localization_quality


def test_description_in_the_checkpoint_is_plain_text(trained, folder):
    content = torch.load(folder / "model_final.pth", weights_only=True)
    assert isinstance(content["config"], str)
    assert all(type(name) is str for name in content["class_names"])
    assert read_description(str(folder / "model_final.pth")).config == content["config"]


def test_checkpoint_with_a_description_can_be_resumed(trained, datasets, folder, backbone):
    cfg = training_config(datasets, folder, backbone | {"SOLVER.MAX_ITER": 5})
    assert build_trainer(cfg, resume=True).start_iter == 4


def test_predictor_takes_the_best_or_the_last_checkpoint_of_a_folder(trained, folder, tmp_path):
    for name in ("model_final.pth", "last_checkpoint"):
        (tmp_path / name).symlink_to(folder / name)
    only_last = Predictor(tmp_path, device="cpu")
    (tmp_path / "model_best.pth").symlink_to(folder / "model_final.pth")
    best, last = Predictor(tmp_path, device="cpu"), Predictor(tmp_path, device="cpu", last=True)
    names = [Path(detector.cfg.MODEL.WEIGHTS).name for detector in (only_last, best, last)]
    assert names == ["model_final.pth", "model_best.pth", "model_final.pth"]


def test_options_override_the_config_of_the_checkpoint(trained, folder):
    detector = Predictor(str(folder), options=["TEST.DETECTIONS_PER_IMAGE", "3"])
    assert detector.model.roi_heads.box_predictor.test_topk_per_image == 3
    with pytest.raises(UsageError, match=r"unknown config key TEST\.NO"):
        Predictor(str(folder), options=["TEST.NO", "3"])


def test_detect_gives_the_same_as_default_predictor(trained, folder, images):
    detector = Predictor(str(folder), device="cpu")
    cfg = trained.cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = ""
    predictor = DefaultPredictor(cfg)
    predictor.model.load_state_dict(trained.teacher.state_dict())
    for image in images:
        (actual,) = detector.detect([image])
        expected = predictor(np.ascontiguousarray(image[:, :, ::-1]))["instances"]
        assert len(actual) and actual.image_size == image.shape[:2]
        assert torch.equal(actual.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(actual.localization_quality, expected.localization_quality)


def test_detect_takes_images_of_different_sizes(trained, folder, images):
    detector = Predictor(str(folder), device="cpu")
    detections = detector.detect(images)
    assert [d.image_size for d in detections] == [image.shape[:2] for image in images]


# --- calling it -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector(trained, folder):
    return Predictor(folder, device="cpu", threshold=0.1)


def test_package_has_the_predictor_as_an_attribute():
    assert locreweight.Predictor is Predictor
    with pytest.raises(AttributeError, match="no attribute 'predictor_of_nothing'"):
        locreweight.predictor_of_nothing  # noqa: B018


def test_paths_pillow_images_and_arrays_give_the_same(detector, tmp_path):
    file = make_folder(tmp_path / "one", images=1) / "0000.png"
    array = read_image(str(file), format="RGB")
    results = [detector(x) for x in (file, str(file), Image.open(file), array)]
    assert [result.file for result in results] == [str(file), str(file), "", ""]
    for result in results:
        assert len(result) and (result.scores > 0.1).all()
        assert np.array_equal(result.boxes, results[0].boxes)
        assert np.array_equal(result.image, array)


@pytest.mark.parametrize(
    "case",
    [
        *("EXIF orientation 6", "EXIF orientation 7", "16-bit png", "16-bit tiff, big endian"),
        *("16-bit pgm called png", "one bit", "palette", "gray with opacity", "CMYK jpeg"),
    ],
)
def test_pillow_images_are_treated_like_their_files(detector, tmp_path, case):
    name, make, _ = VALID[case]
    make(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert np.array_equal(detector(image).image, read_rgb(str(tmp_path / name)))


def test_several_images_give_a_list_in_their_order(detector, images):
    first, second = detector(images)
    assert [first.image.shape[:2], second.image.shape[:2]] == [(64, 64), (48, 80)]
    for result, image in zip((first, second), images, strict=True):
        assert np.array_equal(result.boxes, detector(image).boxes)
    assert detector([]) == []
    assert len(detector(image for image in images)) == 2


def test_stream_reads_one_batch_at_a_time(detector, images):
    read = []

    def reading():
        for image in images * 2:
            read.append(1)
            yield image

    stream = detector.stream(reading(), batch=2)
    assert not read
    first = next(stream)
    assert len(read) == 2
    assert first.boxes == pytest.approx(detector(images[0]).boxes, abs=0.05)
    assert len(list(stream)) == 3


def test_call_gives_the_detections_above_the_threshold(detector, images, monkeypatch):
    (instances,) = detector.detect([images[0]])
    monkeypatch.setattr(detector, "threshold", float(instances.scores.median()))
    result = detector(images[0])
    expected = instances[instances.scores > detector.threshold]
    assert 0 < len(result) < len(instances)
    assert np.array_equal(result.boxes, expected.pred_boxes.tensor)
    assert result.localization_quality.max() < 0.5
    assert set(result.names) <= set(CLASSES)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((8, 8), np.uint8), r"\(8, 8\) uint8"),
        (np.zeros((8, 8, 3)), r"\(8, 8, 3\) float64"),
        (np.zeros((0, 8, 3), np.uint8), r"\(0, 8, 3\)"),
        ([3], "not <class 'int'>"),
        ("none.jpg", "none.jpg"),
        (Image.new("F", (8, 8)), "Pillow image of mode F.* 32 bits per channel"),
        (Image.new("RGB", (8, 0)), r"\(0, 8, 3\)"),
    ],
)
def test_other_images_are_an_error(detector, image, words):
    with pytest.raises(UsageError, match=words):
        detector(image)


@pytest.mark.parametrize(
    ("stored", "given", "expected"), [(0.3, None, 0.3), (None, None, 0.5), (0.3, 0, 0)]
)
def test_threshold_with_the_best_f1_is_the_default(older, stored, given, expected):
    content = torch.load(older, weights_only=True)
    description = CheckpointDescription(tiny_config().dump(), list(CLASSES), stored)
    torch.save(content | description.to_fields(), older)
    detector = Predictor(older, device="cpu", threshold=given)
    assert (detector.score_threshold, detector.threshold) == (stored, expected)


def test_note_on_the_threshold_of_the_model(detector, folder):
    assert detector.threshold_note == ""
    low = Predictor(folder, device="cpu", threshold=0.01)
    assert "below 0.05" in low.threshold_note
    assert "MODEL.ROI_HEADS.SCORE_THRESH_TEST to 0.01" in low.threshold_note


# --- checkpoints of earlier versions and other projects -------------------------------------------


@pytest.fixture
def older(tmp_path):
    """A checkpoint without config and class names, in a separate folder."""
    folder = tmp_path / "older"
    folder.mkdir()
    TeacherCheckpointer(build_model(tiny_config()), str(folder)).save("model")
    return folder / "model.pth"


def test_predictor_uses_the_config_beside_an_older_checkpoint(older, datasets):
    settings = {"DATASETS.TEST": datasets["DATASETS.TEST"]}
    older.with_name("config.yaml").write_text(tiny_config(settings).dump())
    assert Predictor(str(older), device="cpu").class_names == list(CLASSES)


def test_classes_are_numbered_if_their_names_are_not_known(older):
    settings = {"DATASETS.TEST": ["coco:gone.json:gone"]}
    older.with_name("config.yaml").write_text(tiny_config(settings).dump())
    names = Predictor(str(older), device="cpu").class_names
    assert names == ["class 0", "class 1", "class 2"]


def test_config_file_has_precedence_over_the_config_beside_the_checkpoint(older, tmp_path):
    older.with_name("config.yaml").write_text("not: a config")
    file = tmp_path / "given.yaml"
    file.write_text(tiny_config({"SEMI.PSEUDO_LABEL_THRESHOLD": 0.42}).dump())
    detector = Predictor(str(older), config_file=str(file), device="cpu")
    assert detector.cfg == load_config(
        str(file), ["MODEL.WEIGHTS", str(older), "MODEL.DEVICE", "cpu"]
    )


def test_predictor_without_a_config_names_the_option(older):
    with pytest.raises(UsageError, match="--config-file"):
        Predictor(str(older))


def test_plain_detector_has_no_localization_quality(tmp_path):
    plain = build_model(plain_config(tiny_config()))
    torch.save({"model": plain.state_dict()}, tmp_path / "plain.pth")
    (tmp_path / "config.yaml").write_text(tiny_config().dump())
    assert not Predictor(str(tmp_path / "plain.pth"), device="cpu").has_localization_quality


@pytest.fixture
def plain_run(tmp_path):
    """Output folder of a plain Detectron2 training, and its config."""
    cfg = write_plain_run(tmp_path / "plain")
    cfg.MODEL.WEIGHTS = str(tmp_path / "plain/model_final.pth")
    return tmp_path / "plain", cfg


@pytest.mark.parametrize("has_config_beside", [True, False])
def test_plain_run_gives_the_same_as_detectron2(plain_run, images, tmp_path, has_config_beside):
    folder, cfg = plain_run
    config_file = ""
    if not has_config_beside:
        config_file = str((folder / "config.yaml").rename(tmp_path / "given.yaml"))
    detector = Predictor(folder, config_file, device="cpu")
    assert detector.is_plain_detector and not detector.has_localization_quality
    predictor = DefaultPredictor(cfg)
    for image in images:
        (actual,) = detector.detect([image])
        expected = predictor(np.ascontiguousarray(image[:, :, ::-1]))["instances"]
        assert len(actual)
        assert torch.equal(actual.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(actual.scores, expected.scores)
        assert torch.equal(actual.pred_classes, expected.pred_classes)
        assert actual.has("localization_quality")  # drawing and ranking read it


def test_masks_of_a_plain_detector_are_left_out(plain_run, images):
    folder, cfg = plain_run
    expected = Predictor(folder, device="cpu").detect(images)
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV, cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 1, 8
    weights = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    torch.save({"model": build_model(cfg).state_dict() | weights}, folder / "model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    for actual, plain in zip(Predictor(folder, device="cpu").detect(images), expected, strict=True):
        assert torch.equal(actual.pred_boxes.tensor, plain.pred_boxes.tensor)
        assert not actual.has("pred_masks")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.META_ARCHITECTURE", "RetinaNet"),
        ("MODEL.META_ARCHITECTURE", "PanopticFPN"),
        ("MODEL.ROI_HEADS.NAME", "Res5ROIHeads"),
        ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"),
    ],
)
@pytest.mark.parametrize("has_config_beside", [True, False])
def test_other_detectors_of_detectron2_are_an_error(
    plain_run, tmp_path, key, value, has_config_beside
):
    folder, cfg = plain_run
    cfg.merge_from_list([key, value])
    file = folder / "config.yaml" if has_config_beside else tmp_path / "other.yaml"
    file.write_text(cfg.dump())
    message = f"{file}: {key} {value} is not supported.* use Detectron2's own tools"
    with pytest.raises(UsageError, match=message):
        Predictor(folder, "" if has_config_beside else str(file), device="cpu")


def test_detector_without_trained_variances_has_no_localization_quality(older):
    settings = {"MODEL.ROI_BOX_HEAD.GAUSSIAN_BOXES": False}
    older.with_name("config.yaml").write_text(tiny_config(settings).dump())
    detector = Predictor(older, device="cpu")
    assert not detector.has_localization_quality and not detector.is_plain_detector


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 broken"])
def test_predictor_rejects_files_that_are_not_checkpoints(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.pth is not a checkpoint") as caught:
        Predictor(str(tmp_path / "a.pth"))
    assert "\n" not in str(caught.value)


def test_predictor_rejects_missing_files(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        Predictor(str(tmp_path / "none.pth"))
    with pytest.raises(UsageError, match="has no checkpoint"):
        Predictor(str(tmp_path))


# --- the student ----------------------------------------------------------------------------------


def test_load_student_returns_the_student(trained, folder):
    student = load_student(trained.cfg, str(folder))
    assert same(copy_of(student), copy_of(trained.student))
    assert not same(copy_of(student), copy_of(trained.teacher))


def test_load_student_returns_the_only_model_of_a_file(older):
    cfg = tiny_config()
    student, model = load_student(cfg, str(older)), build_model(cfg)
    cfg.MODEL.WEIGHTS = str(older)
    load_for_evaluation(cfg, model)
    assert same(copy_of(student), copy_of(model))
