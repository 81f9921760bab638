"""What a checkpoint of ours holds, and what is made of those of others."""

import logging
import pickle

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torch.testing import assert_close

import train_net
from locreweight.checkpoint.checkpointer import CheckpointContents, TeacherCheckpointer
from locreweight.checkpoint.conversion import corners_from_centers
from locreweight.checkpoint.loading import check_weights_exist
from locreweight.engine import load_for_evaluation
from locreweight.errors import UsageError
from locreweight.modeling import CornerBoxTransform
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


def assert_same_detections(found, expected):
    assert len(found) == len(expected) > 0
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_classes, expected.pred_classes)


# --- ours -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(datasets, tmp_path_factory):
    """A finished training whose teacher is not its student."""
    trainer = build_trainer(training_config(datasets, tmp_path_factory.mktemp("trained")))
    trainer.train()
    assert not same(copy_of(trainer.teacher), copy_of(trainer.student))
    return trainer


@pytest.fixture(scope="module")
def file(trained):
    return trained.checkpointer.get_checkpoint_file()


def test_a_checkpoint_holds_the_teacher_as_model_and_student_and_trainer_beside_it(trained, file):
    content = torch.load(file, weights_only=True)
    described = {"corner_coding", "config", "class_names"}
    assert set(content) == {"model", "student", "trainer", "iteration"} | described
    assert same(content["model"], copy_of(trained.teacher))
    assert same(content["student"], copy_of(trained.student))
    assert content["trainer"]["iteration"] == trained.max_iter - 1
    assert "optimizer" in content["trainer"]


def test_detectron2s_checkpointer_reads_the_teacher(trained, file):
    model = build_model(trained.cfg)
    DetectionCheckpointer(model).load(file)
    assert same(copy_of(model), copy_of(trained.teacher))


def test_detectron2s_predictor_runs_the_teacher(trained, file, datasets):
    cfg = trained.cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = file
    photo = next(iter(trained.sets.labeled))["file_name"]
    found = DefaultPredictor(cfg)(read_image(photo, format="BGR"))["instances"]
    assert_same_detections(found, detections(trained.teacher, image_tensor(photo)))


def test_evaluation_loads_the_teacher_and_says_so(trained, file):
    model = tiny_model({"MODEL.RESNETS.NORM": "BN"})
    cfg = tiny_config({"MODEL.WEIGHTS": file, "MODEL.RESNETS.NORM": "BN"})
    assert load_for_evaluation(cfg, model) is CheckpointContents.TEACHER
    assert same(copy_of(model), copy_of(trained.teacher))
    assert isinstance(model.roi_heads.box_predictor.box2box_transform, CornerBoxTransform)


@pytest.mark.parametrize("swapped", [False, True])
def test_eval_only_scores_the_teacher_of_the_file(trained, file, datasets, tmp_path, swapped):
    """What the teacher finds is taken for the truth: it scores 100, and no other model does."""
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
    assert "evaluating the teacher" in (tmp_path / "log.txt").read_text()


# --- plain Detectron2 detectors -------------------------------------------------------------------


def as_pth(model, folder):
    DetectionCheckpointer(model, str(folder)).save("plain")
    return str(folder / "plain.pth")


def as_zoo_pkl(model, folder):
    """The format of Detectron2's model zoo: a pickle of numpy arrays."""
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    with open(folder / "plain.pkl", "wb") as f:
        pickle.dump({"model": weights, "__author__": "somebody"}, f)
    return str(folder / "plain.pkl")


def as_wrapped_pth(model, folder):
    """Saved from within DistributedDataParallel."""
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": weights}, folder / "wrapped.pth")
    return str(folder / "wrapped.pth")


each_format = pytest.mark.parametrize("save", [as_pth, as_zoo_pkl, as_wrapped_pth])


@pytest.fixture(scope="module")
def plain():
    """Detectron2's own detector, one that moves its boxes by a pixel or so."""
    torch.manual_seed(1)
    model = build_model(plain_config(tiny_config()))
    torch.nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.01)
    return model


@each_format
@each_coding
def test_a_plain_detector_is_evaluated_as_detectron2_does(plain, tmp_path, caplog, save, corners):
    """Bit by bit, whatever coding is configured for training."""
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


def random_boxes(count=20):
    corner = torch.rand(count, 2) * 30
    return torch.cat([corner, corner + 10 + torch.rand(count, 2) * 20], dim=1)


def decoded(deltas, boxes):
    """By corners from the translated offsets, and by Detectron2 from its own."""
    translated = corners_from_centers(deltas.T).T
    mine = CornerBoxTransform((10.0, 10.0)).apply_deltas(translated, boxes)
    return mine, Box2BoxTransform((10.0, 10.0, 5.0, 5.0)).apply_deltas(deltas, boxes)


def test_translated_offsets_are_exact_for_shifts():
    deltas, boxes = torch.randn(20, 8), random_boxes()
    deltas.unflatten(1, (2, 4))[..., 2:] = 0
    mine, theirs = decoded(deltas, boxes)
    assert_close(mine, theirs, rtol=1e-5, atol=1e-4)
    assert (theirs - boxes.repeat(1, 2)).abs().max() > 1


def test_translated_offsets_are_right_to_first_order_for_changes_of_size():
    """Half the change leaves a quarter of the error."""
    deltas, boxes = torch.randn(20, 4).double(), random_boxes()
    deltas[:, :2] = 0

    def error_and_change(scale):
        mine, theirs = decoded(scale * deltas, boxes)
        return (mine - theirs).abs().max().item(), (theirs - boxes).abs().max().item()

    whole, _ = error_and_change(1.0)
    half, change = error_and_change(0.5)
    assert half / whole == pytest.approx(1 / 4, rel=0.15)
    assert 0 < half < change / 5


def test_translation_of_a_layer_is_translation_of_what_it_predicts():
    layer, x = torch.nn.Linear(16, 12).double(), torch.randn(5, 16).double()
    translated = torch.nn.Linear(16, 12).double()
    with torch.no_grad():
        translated.weight.copy_(corners_from_centers(layer.weight))
        translated.bias.copy_(corners_from_centers(layer.bias))
    dx, dy, dw, dh = layer(x).unflatten(1, (3, 4)).unbind(2)
    expected = torch.stack([dx - dw, dy - dh, dx + dw, dy + dh], dim=2).flatten(1)
    assert_close(translated(x), expected)


def predicted_boxes(model, boxes, features):
    """What a predictor makes of given features of given proposals."""
    predictor = model.roi_heads.box_predictor
    proposals = [Instances((64, 64), proposal_boxes=Boxes(boxes))]
    return predictor.predict_boxes(predictor(features), proposals)[0]


@each_format
def test_training_starts_with_the_boxes_of_the_plain_detector(plain, tmp_path, save):
    model = tiny_model()
    TeacherCheckpointer(model).load(save(plain, tmp_path))
    boxes, features = random_boxes(), torch.randn(20, 64)
    mine, theirs = (predicted_boxes(m, boxes, features) for m in (model, plain))
    moved = (theirs - boxes.repeat(1, NUM_CLASSES)).abs().mean()
    assert moved > 0.1
    assert (mine - theirs).abs().mean() < 0.02 * moved


def test_with_centre_coding_the_plain_box_branch_is_taken_as_it_is(plain, tmp_path):
    model = tiny_model({"MODEL.ROI_BOX_HEAD.CORNER_CODING": False})
    TeacherCheckpointer(model).load(as_pth(plain, tmp_path))
    weights = model.state_dict()
    assert all(torch.equal(weights[n], value) for n, value in plain.state_dict().items())


def test_a_trainer_starts_both_models_from_a_plain_detector(plain, tmp_path, make_trainer):
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


def test_a_checkpoint_of_ours_is_not_translated(trained, file):
    model = tiny_model({"MODEL.RESNETS.NORM": "BN"})
    TeacherCheckpointer(model).load(file)
    assert torch.equal(
        model.state_dict()[BOX + "weight"], trained.teacher.state_dict()[BOX + "weight"]
    )


# --- weights that cannot be had -------------------------------------------------------------------


def test_a_backbone_cannot_be_evaluated(plain, tmp_path):
    weights = {n: v for n, v in plain.state_dict().items() if n.startswith("backbone.")}
    torch.save({"model": weights}, tmp_path / "backbone.pth")
    cfg = tiny_config({"MODEL.WEIGHTS": str(tmp_path / "backbone.pth")})
    with pytest.raises(UsageError, match="backbone"):
        load_for_evaluation(cfg, tiny_model())


def test_evaluation_needs_weights():
    with pytest.raises(UsageError, match=r"MODEL\.WEIGHTS"):
        load_for_evaluation(tiny_config(), tiny_model())


@pytest.mark.parametrize("path", ["nowhere/model.pth", "strange://model"])
def test_missing_weights_are_named(path):
    with pytest.raises(UsageError, match=r"MODEL\.WEIGHTS") as error:
        check_weights_exist(path)
    assert path in str(error.value)


def test_a_trainer_says_which_weights_are_missing(make_trainer):
    with pytest.raises(UsageError, match=r"nowhere/model\.pth"):
        make_trainer({"MODEL.WEIGHTS": "nowhere/model.pth"})


def test_random_weights_need_no_file():
    check_weights_exist("")
