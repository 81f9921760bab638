"""Tests of the contents of checkpoints, and of loading plain Detectron2 detectors."""

import logging
import pickle

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

import train_net
from locreweight.checkpoint.checkpointer import CheckpointContents, TeacherCheckpointer
from locreweight.checkpoint.conversion import corners_from_centers
from locreweight.checkpoint.loading import check_weights_exist
from locreweight.engine import load_for_evaluation
from locreweight.errors import UsageError
from locreweight.modeling import CornerBoxTransform
from locreweight.run_files import EVALUATION_FOLDER
from tests.engine.tiny_training import (
    build_trainer,
    copy_of,
    detections_as_ground_truth,
    image_tensor,
    restored_loggers_and_signals,
    same,
    training_config,
)
from tests.modeling.tiny_model import (
    NUM_CLASSES,
    as_options,
    plain_config,
    random_image,
    tiny_config,
    tiny_model,
)

VARIANCE = "roi_heads.box_predictor.log_variance."
BOX = "roi_heads.box_predictor.bbox_pred."

each_coding = pytest.mark.parametrize("corners", [True, False], ids=["corners", "xywh"])


def detections(model, image=None):
    with torch.no_grad():
        image = random_image() if image is None else image
        return model.eval()([{"image": image}])[0]["instances"]


def assert_same_detections(actual, expected):
    assert len(actual) == len(expected) > 0
    assert torch.equal(actual.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(actual.scores, expected.scores)
    assert torch.equal(actual.pred_classes, expected.pred_classes)


# --- checkpoints of this project ------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(datasets, tmp_path_factory):
    """Trainer of a finished training, whose teacher and student differ."""
    trainer = build_trainer(training_config(datasets, tmp_path_factory.mktemp("trained")))
    trainer.train()
    assert not same(copy_of(trainer.teacher), copy_of(trainer.student))
    return trainer


@pytest.fixture(scope="module")
def file(trained):
    return trained.checkpointer.get_checkpoint_file()


def test_checkpoint_contains_teacher_student_and_trainer(trained, file):
    content = torch.load(file, weights_only=True)
    description = {"corner_coding", "config", "class_names"}
    assert set(content) == {"model", "student", "trainer", "iteration"} | description
    assert same(content["model"], copy_of(trained.teacher))
    assert same(content["student"], copy_of(trained.student))
    assert content["trainer"]["iteration"] == trained.max_iter - 1
    assert "optimizer" in content["trainer"]


def test_detection_checkpointer_loads_the_teacher(trained, file):
    model = build_model(trained.cfg)
    DetectionCheckpointer(model).load(file)
    assert same(copy_of(model), copy_of(trained.teacher))


def test_default_predictor_runs_the_teacher(trained, file, datasets):
    cfg = trained.cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = file
    photo = next(iter(trained.sets.labeled))["file_name"]
    actual = DefaultPredictor(cfg)(read_image(photo, format="BGR"))["instances"]
    assert_same_detections(actual, detections(trained.teacher, image_tensor(photo)))


def test_load_for_evaluation_loads_the_teacher(trained, file):
    model = tiny_model({"MODEL.RESNETS.NORM": "BN"})
    cfg = tiny_config({"MODEL.WEIGHTS": file, "MODEL.RESNETS.NORM": "BN"})
    assert load_for_evaluation(cfg, model) is CheckpointContents.TEACHER
    assert same(copy_of(model), copy_of(trained.teacher))
    assert isinstance(model.roi_heads.box_predictor.box2box_transform, CornerBoxTransform)


@pytest.mark.parametrize("swapped", [False, True])
def test_eval_only_evaluates_the_teacher_of_the_file(trained, file, datasets, tmp_path, swapped):
    """With its own detections as ground truth the teacher has an AP of 100, and no other model."""
    weights = torch.load(file, weights_only=True)
    other = tiny_model({"MODEL.RESNETS.NORM": "BN"})
    torch.nn.init.normal_(other.roi_heads.box_predictor.bbox_pred.weight)
    weights["model" if swapped else "student"] = other.state_dict()
    torch.save(weights, tmp_path / "model.pth")

    settings = {
        "MODEL.WEIGHTS": tmp_path / "model.pth",
        "OUTPUT_DIR": tmp_path,
        "DATASETS.TEST": [
            detections_as_ground_truth(
                trained.teacher, datasets["DATASETS.TEST"][0], tmp_path / "found.json"
            )
        ],
    }
    (tmp_path / "config.yaml").write_text(trained.cfg.dump())
    args = train_net.argument_parser().parse_args(
        ["--config-file", str(tmp_path / "config.yaml"), "--eval-only", *as_options(settings)]
    )
    with restored_loggers_and_signals():
        average_precision = train_net.main(args)["bbox"]["AP"]
    assert average_precision < 50 if swapped else average_precision == pytest.approx(100)
    assert "evaluating the teacher" in (tmp_path / EVALUATION_FOLDER / "log.txt").read_text()


# --- plain Detectron2 detectors -------------------------------------------------------------------


def as_pth(model, folder):
    DetectionCheckpointer(model, str(folder)).save("plain")
    return str(folder / "plain.pth")


def as_zoo_pkl(model, folder):
    """Write the format of Detectron2's model zoo: a pickle of numpy arrays."""
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    with open(folder / "plain.pkl", "wb") as f:
        pickle.dump({"model": weights, "__author__": "somebody"}, f)
    return str(folder / "plain.pkl")


def as_wrapped_pth(model, folder):
    """Write weights with the prefix of DistributedDataParallel."""
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": weights}, folder / "wrapped.pth")
    return str(folder / "wrapped.pth")


each_format = pytest.mark.parametrize("save", [as_pth, as_zoo_pkl, as_wrapped_pth])


@pytest.fixture(scope="module")
def plain():
    """A plain Detectron2 detector, which moves boxes by about a pixel."""
    torch.manual_seed(1)
    model = build_model(plain_config(tiny_config()))
    torch.nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.01)
    return model


@each_format
@each_coding
def test_plain_detector_is_evaluated_as_in_detectron2(plain, tmp_path, caplog, save, corners):
    """Results are bitwise equal with each box coding in the config."""
    cfg = tiny_config(
        {"MODEL.WEIGHTS": save(plain, tmp_path), "MODEL.ROI_BOX_HEAD.CORNER_CODING": corners}
    )
    model = build_model(cfg)
    with caplog.at_level(logging.WARNING, logger="fvcore.common.checkpoint"):
        assert load_for_evaluation(cfg, model) is CheckpointContents.PLAIN_DETECTOR
    for seed in range(2):
        assert_same_detections(
            detections(model, random_image(seed=seed)), detections(plain, random_image(seed=seed))
        )
    text = caplog.text
    assert "log_variance" in text
    assert not any(part in text for part in ("bbox_pred", "cls_score", "backbone", "proposal_"))


def test_plain_detector_has_no_variances_to_vote_with(plain, tmp_path):
    file = as_pth(plain, tmp_path)
    cfg = tiny_config({"MODEL.WEIGHTS": file, "MODEL.ROI_BOX_HEAD.VOTING_SIGMA": 0.05})
    with pytest.raises(UsageError, match="VOTING_SIGMA to 0"):
        load_for_evaluation(cfg, build_model(cfg))


def random_boxes(count=20):
    corner = torch.rand(count, 2) * 30
    return torch.cat([corner, corner + 10 + torch.rand(count, 2) * 20], dim=1)


def predicted_boxes(model, boxes, features):
    """Boxes that a model predicts from features of proposals."""
    predictor = model.roi_heads.box_predictor
    proposals = [Instances((64, 64), proposal_boxes=Boxes(boxes))]
    return predictor.predict_boxes(predictor(features), proposals)[0]


@each_format
def test_training_starts_with_the_boxes_of_a_plain_detector(plain, tmp_path, save):
    model = tiny_model()
    TeacherCheckpointer(model).load(save(plain, tmp_path))
    boxes, features = random_boxes(), torch.randn(20, 64)
    converted, expected = (predicted_boxes(m, boxes, features) for m in (model, plain))
    movement = (expected - boxes.repeat(1, NUM_CLASSES)).abs().mean()
    assert movement > 0.1
    assert (converted - expected).abs().mean() < 0.02 * movement


def test_plain_box_branch_is_not_converted_without_corner_coding(plain, tmp_path):
    model = tiny_model({"MODEL.ROI_BOX_HEAD.CORNER_CODING": False})
    TeacherCheckpointer(model).load(as_pth(plain, tmp_path))
    weights = model.state_dict()
    assert all(torch.equal(weights[n], value) for n, value in plain.state_dict().items())


def test_trainer_starts_both_models_from_a_plain_detector(plain, tmp_path, make_trainer):
    trainer = make_trainer(
        {"MODEL.WEIGHTS": as_pth(plain, tmp_path), "MODEL.RESNETS.NORM": "FrozenBN"}
    )
    student, reference = copy_of(trainer.student), plain.state_dict()
    assert same(student, copy_of(trainer.teacher))
    for name, value in reference.items():
        expected = corners_from_centers(value) if name.startswith(BOX) else value
        assert torch.equal(student[name], expected), name
    assert not student[VARIANCE + "bias"].any()
    assert student[VARIANCE + "weight"].std() < 2e-4


def test_checkpoint_of_this_project_is_not_converted(trained, file):
    model = tiny_model({"MODEL.RESNETS.NORM": "BN"})
    TeacherCheckpointer(model).load(file)
    assert torch.equal(
        model.state_dict()[BOX + "weight"], trained.teacher.state_dict()[BOX + "weight"]
    )


# --- missing weights ------------------------------------------------------------------------------


def test_load_for_evaluation_rejects_a_backbone(plain, tmp_path):
    weights = {n: v for n, v in plain.state_dict().items() if n.startswith("backbone.")}
    torch.save({"model": weights}, tmp_path / "backbone.pth")
    cfg = tiny_config({"MODEL.WEIGHTS": str(tmp_path / "backbone.pth")})
    with pytest.raises(UsageError, match="backbone"):
        load_for_evaluation(cfg, tiny_model())


def test_load_for_evaluation_requires_weights():
    with pytest.raises(UsageError, match=r"MODEL\.WEIGHTS"):
        load_for_evaluation(tiny_config(), tiny_model())


@pytest.mark.parametrize("path", ["nowhere/model.pth", "strange://model"])
def test_check_weights_exist_names_missing_weights(path):
    with pytest.raises(UsageError, match=r"MODEL\.WEIGHTS") as error:
        check_weights_exist(path)
    assert path in str(error.value)


def test_trainer_names_missing_weights(make_trainer):
    with pytest.raises(UsageError, match=r"nowhere/model\.pth"):
        make_trainer({"MODEL.WEIGHTS": "nowhere/model.pth"})


def test_check_weights_exist_accepts_random_weights():
    check_weights_exist("")
