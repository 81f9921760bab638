"""The detector: Detectron2's own in training on labels and at inference, and its mixed forward."""

import copy

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import BoxMode, pairwise_iou
from detectron2.utils.events import EventStorage
from detectron2.utils.visualizer import Visualizer
from torch.testing import assert_close

from tests.modeling.tiny_model import (
    NUM_CLASSES,
    SIZE,
    ground_truth,
    labeled_inputs,
    plain_config,
    random_image,
    tiny_config,
    tiny_model,
)

# With these a forward pass of the whole detector differs from Detectron2's in nothing: its coding,
# its normalizer, its smooth L1; frozen statistics, so that a batch does not mix its images.
AS_DETECTRON2 = {
    "MODEL.ROI_BOX_HEAD.CORNER_CODING": False,
    "SEMI.NORMALIZE_BY_SAMPLED": True,
    "MODEL.RESNETS.NORM": "FrozenBN",
}


@pytest.fixture(scope="module")
def _shared_model():
    return tiny_model()


@pytest.fixture
def model(_shared_model):
    """The shared detector; its weights are for reading only."""
    yield _shared_model.eval()
    _shared_model.zero_grad()


@pytest.fixture
def storage():
    with EventStorage() as storage:
        yield storage


def unlabeled_inputs():
    """Strong views with two, one and no pseudo-labels."""
    targets = [
        ground_truth([[4, 4, 30, 30], [26, 22, 58, 56]], [1, 2]),
        ground_truth([[10, 12, 50, 44]], [0]),
        ground_truth([], []),
    ]
    for i, target in enumerate(targets):
        target.gt_localization_quality = torch.arange(len(target)) / 10 + (i + 1) / 100
    return [
        {"image": random_image(seed=10 + i), "instances": target}
        for i, target in enumerate(targets)
    ]


def train_forward(model, *inputs, seed=3):
    """A forward pass in training mode; the seed decides which anchors and proposals are drawn."""
    model.train()
    torch.manual_seed(seed)
    return model(*inputs)


# --- training on labeled images alone -------------------------------------------------------------


@pytest.mark.parametrize("further", [(), ([],), (None,)])
def test_on_labeled_images_alone_training_is_detectron2s(model, storage, further):
    losses = train_forward(model, labeled_inputs(), *further)
    model.train()
    torch.manual_seed(3)
    reference = GeneralizedRCNN.forward(model, labeled_inputs())
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    assert_close(losses, reference, rtol=0, atol=0)


def test_losses_are_those_of_a_plain_detector_with_its_coding_and_normalizer(storage):
    ours = tiny_model(AS_DETECTRON2)
    torch.nn.init.zeros_(ours.roi_heads.box_predictor.log_variance.weight)
    theirs = build_model(plain_config(tiny_config(AS_DETECTRON2)))
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing.missing_keys
    losses = train_forward(ours, labeled_inputs())
    assert_close(losses, train_forward(theirs, labeled_inputs()))


def test_a_labeled_image_without_objects_is_learned_from(model, storage):
    empty = {"image": random_image(), "instances": ground_truth([], [])}
    losses = train_forward(model, [empty])
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_box_reg"] == losses["loss_rpn_loc"] == 0
    assert losses["loss_cls"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# --- labeled and unlabeled images together --------------------------------------------------------


def test_the_backbone_runs_once_on_all_images(model, storage):
    sizes = []
    hook = model.backbone.register_forward_hook(lambda _, x, out: sizes.append(len(x[0])))
    train_forward(model, labeled_inputs(2), unlabeled_inputs())
    hook.remove()
    assert sizes == [5]


def test_supervised_losses_are_those_without_unlabeled_images(storage):
    model = tiny_model(AS_DETECTRON2)
    alone = train_forward(model, labeled_inputs())
    together, _ = train_forward(model, labeled_inputs(), unlabeled_inputs())
    assert_close(together, alone)


def test_unlabeled_output_is_that_of_the_unlabeled_images(storage):
    """The same sampled proposals and predictions as if they were the labeled ones."""
    model = tiny_model(AS_DETECTRON2)
    inputs = unlabeled_inputs()
    _, output = train_forward(model, labeled_inputs(), inputs)
    assert len(output.proposals) == len(inputs)
    model.eval()
    features = model.backbone(model.preprocess_image(inputs).tensor)
    expected = model.roi_heads.predict(features, [p.proposal_boxes for p in output.proposals])
    for found, wanted in zip(output.predictions, expected, strict=True):
        assert len(found) == sum(len(p) for p in output.proposals)
        assert_close(found, wanted)


def test_images_of_different_sizes_share_a_batch(model, storage):
    labeled = labeled_inputs(1)
    wide = {"image": random_image((40, 90)), "instances": ground_truth([[5, 5, 80, 35]], [1])}
    losses, output = train_forward(model, labeled, [wide])
    assert all(loss.isfinite() for loss in losses.values())
    (proposals,) = output.proposals
    assert proposals.image_size == (40, 90)
    assert proposals.proposal_boxes.tensor[:, 2].max() <= 90
    assert proposals.proposal_boxes.tensor[:, 3].max() <= 40


def test_proposals_carry_the_quality_of_the_pseudo_label_that_they_match(model, storage):
    inputs = unlabeled_inputs()
    _, output = train_forward(model, labeled_inputs(), inputs)
    for proposals, x in zip(output.proposals[:2], inputs[:2], strict=True):
        overlap = pairwise_iou(x["instances"].gt_boxes, proposals.proposal_boxes)
        best = overlap.argmax(dim=0)
        foreground = proposals.gt_classes < NUM_CLASSES
        assert foreground.any()
        wanted = x["instances"][best]
        for field in ("gt_localization_quality", "gt_classes"):
            found = proposals.get(field)
            assert torch.equal(found[foreground], wanted.get(field)[foreground])
        assert torch.equal(
            proposals.gt_boxes.tensor[foreground], wanted.gt_boxes.tensor[foreground]
        )
    without = output.proposals[2]
    assert (without.gt_classes == NUM_CLASSES).all()
    assert not without.has("gt_localization_quality")


def test_events_of_unlabeled_images_have_names_of_their_own(model, storage):
    train_forward(model, labeled_inputs(), unlabeled_inputs())
    names = set(storage.latest())
    for name in ("roi_head/num_fg_samples", "roi_head/num_bg_samples", "rpn/num_pos_anchors"):
        assert name in names
        assert f"unlabeled/{name}" in names
    assert "fast_rcnn/cls_accuracy" in names


def test_events_of_labeled_images_do_not_count_the_unlabeled_ones(model, storage):
    """Of images without objects no proposal is foreground, whatever the pseudo-labels say."""
    empty = {"image": random_image(), "instances": ground_truth([], [])}
    train_forward(model, [empty], unlabeled_inputs())
    latest = storage.latest()
    assert latest["roi_head/num_fg_samples"][0] == 0
    assert latest["unlabeled/roi_head/num_fg_samples"][0] > 0


# --- the teacher's looks --------------------------------------------------------------------------


def test_a_look_gives_the_detections_of_inference_before_rescaling(model):
    inputs = [{"image": random_image(seed=i)} for i in range(2)]
    seen = model.detect(inputs)
    for found, expected in zip(
        seen.detections, model.inference(inputs, do_postprocess=False), strict=True
    ):
        assert len(found) > 0
        assert_close(found.get_fields()["scores"], expected.scores)
        assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert not found.localization_quality.requires_grad


def test_a_look_is_not_for_training_mode(model):
    with pytest.raises(AssertionError, match="eval mode"):
        model.train().detect([{"image": random_image()}])


def test_the_second_look_takes_the_features_of_the_first(model):
    inputs = [{"image": random_image(seed=i)} for i in range(2)]
    seen = model.detect(inputs)
    boxes = [torch.tensor([[4.0, 4, 30, 40], [10, 10, 60, 60]]), torch.tensor([[0.0, 0, 64, 64]])]
    calls = []
    hook = model.backbone.register_forward_hook(lambda *_: calls.append(1))
    found = model.predict_rois(seen, boxes)
    hook.remove()
    assert not calls
    assert found.scores.shape == (3, NUM_CLASSES + 1)
    assert not any(values.requires_grad for values in found)
    # Image by image it is the same: each box is looked at in its own image.
    first = model.predict_rois(model.detect(inputs[:1]), boxes[:1])
    second = model.predict_rois(model.detect(inputs[1:]), boxes[1:])
    for values, one, two in zip(found, first, second, strict=True):
        assert_close(values, torch.cat([one, two]))


def test_the_rpn_can_learn_from_other_pseudo_labels_than_the_roi_head(model):
    view = {"image": random_image(), "instances": ground_truth([[8, 8, 40, 40]], [1])}
    targets = {}
    model.train()
    with EventStorage():
        for name, rpn in (("all", view["instances"]), ("none", ground_truth([], []))):
            torch.manual_seed(0)
            _, targets[name] = model(labeled_inputs(), [view | {"rpn_instances": rpn}])
    model.eval()
    assert targets["all"].rpn_losses["loss_rpn_loc"] > 0
    assert targets["none"].rpn_losses["loss_rpn_loc"] == 0
    assert all((t.proposals[0].gt_classes == 1).any() for t in targets.values())


# --- inference as any Detectron2 model ------------------------------------------------------------


@pytest.fixture(scope="module")
def predictor(tmp_path_factory, _shared_model):
    folder = tmp_path_factory.mktemp("weights")
    DetectionCheckpointer(_shared_model, str(folder)).save("model")
    return DefaultPredictor(tiny_config({"MODEL.WEIGHTS": str(folder / "model.pth")}))


PHOTO = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)


def test_default_predictor_gives_detections_in_pixels_of_the_given_image(predictor):
    found = predictor(PHOTO)["instances"]
    assert found.image_size == PHOTO.shape[:2]
    assert set(found.get_fields()) == {
        "pred_boxes",
        "scores",
        "pred_classes",
        "localization_quality",
        "log_variance",
    }
    assert len(found) > 0
    assert found.localization_quality.shape == found.scores.shape
    assert ((found.localization_quality > 0) & (found.localization_quality < 0.5)).all()
    assert found.pred_boxes.tensor[:, 2].max() > SIZE  # the model saw 64 pixels of width


def test_default_predictor_agrees_with_the_model(predictor, model):
    image = torch.as_tensor(np.ascontiguousarray(PHOTO[:48, :64].transpose(2, 0, 1)))
    with torch.no_grad():
        (expected,) = model([{"image": image, "height": 48, "width": 64}])
    found = predictor(np.ascontiguousarray(PHOTO[:48, :64]))["instances"]
    assert_close(found.scores, expected["instances"].scores)
    assert_close(found.localization_quality, expected["instances"].localization_quality)


def test_postprocessing_keeps_each_box_its_quality(model):
    (found,) = model.detect([{"image": random_image()}]).detections
    found.pred_boxes.tensor[1] = 5.0  # no area: it falls out
    kept = detector_postprocess(copy.deepcopy(found), 2 * SIZE, 2 * SIZE)
    rest = torch.arange(len(found)) != 1
    assert torch.equal(kept.localization_quality, found.localization_quality[rest])
    assert_close(kept.pred_boxes.tensor, 2 * found.pred_boxes.tensor[rest])


def test_coco_evaluation_reads_its_detections(predictor, tmp_path):
    """The detections, taken as the ground truth, are found again."""
    found = predictor(PHOTO)["instances"]
    name = f"photo_{tmp_path.name}"
    record = {"file_name": "photo.png", "image_id": 1, "height": 96, "width": 128}
    boxes, classes = found.pred_boxes.tensor.tolist(), found.pred_classes.tolist()
    record["annotations"] = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, "iscrowd": 0}
        for box, label in zip(boxes, classes, strict=True)
    ]
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(thing_classes=["a", "b", "c"])
    evaluator = COCOEvaluator(name, tasks=("bbox",), output_dir=str(tmp_path))
    evaluator.reset()
    evaluator.process([record], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP50"] == pytest.approx(100)


def test_detections_can_be_drawn(predictor):
    found = predictor(PHOTO)["instances"]
    drawn = Visualizer(PHOTO).draw_instance_predictions(found).get_image()
    assert drawn.shape == PHOTO.shape
    assert (drawn != PHOTO).any()
