"""SemiSupervisedRCNN: equal to Detectron2 without unlabeled images, and its mixed forward pass."""

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

from tests.export.decisive_model import decisive_model
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

# Settings with which the detector computes the same as Detectron2's. With frozen batch norm, the
# features of an image do not depend on the other images in the batch.
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
    """A detector shared by the module. Tests must not change its weights."""
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


def train_forward(model, *inputs, seed=3, **arguments):
    """Run a forward pass in training mode. The seed determines the sampled proposals."""
    model.train()
    torch.manual_seed(seed)
    return model(*inputs, **arguments)


# Training on labeled images


@pytest.mark.parametrize("unlabeled", [(), ([],), (None,)], ids=str)
def test_training_without_unlabeled_images_equals_generalized_rcnn(model, storage, unlabeled):
    losses = train_forward(model, labeled_inputs(), *unlabeled)
    model.train()
    torch.manual_seed(3)
    reference = GeneralizedRCNN.forward(model, labeled_inputs())
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    assert_close(losses, reference, rtol=0, atol=0)


def test_losses_equal_detectron2_with_its_coding_and_normalizer(storage):
    model = tiny_model(AS_DETECTRON2)
    torch.nn.init.zeros_(model.roi_heads.box_predictor.log_variance.weight)
    original = build_model(plain_config(tiny_config(AS_DETECTRON2)))
    missing = original.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    losses = train_forward(model, labeled_inputs())
    assert_close(losses, train_forward(original, labeled_inputs()))


def test_labeled_image_without_objects_gives_losses_and_gradients(model, storage):
    empty = {"image": random_image(), "instances": ground_truth([], [])}
    losses = train_forward(model, [empty])
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_box_reg"] == losses["loss_rpn_loc"] == 0
    assert losses["loss_cls"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# Training on labeled and unlabeled images


def test_backbone_runs_once_on_all_images(model, storage):
    sizes = []
    hook = model.backbone.register_forward_hook(lambda _, x, out: sizes.append(len(x[0])))
    train_forward(model, labeled_inputs(2), unlabeled_inputs())
    hook.remove()
    assert sizes == [5]


def test_supervised_losses_do_not_depend_on_unlabeled_images(storage):
    model = tiny_model(AS_DETECTRON2)
    alone = train_forward(model, labeled_inputs())
    together, _ = train_forward(model, labeled_inputs(), unlabeled_inputs())
    assert_close(together, alone)


def test_unlabeled_predictions_equal_those_of_the_unlabeled_images_alone(storage):
    model = tiny_model(AS_DETECTRON2)
    inputs = unlabeled_inputs()
    _, output = train_forward(model, labeled_inputs(), inputs)
    assert len(output.proposals) == len(inputs)
    model.eval()
    features = model.backbone(model.preprocess_image(inputs).tensor)
    expected = model.roi_heads.predict(features, [p.proposal_boxes for p in output.proposals])
    assert len(output.predictions.scores) == sum(len(p) for p in output.proposals)
    assert_close(output.predictions, expected)


def test_images_of_different_sizes_share_a_batch(model, storage):
    labeled = labeled_inputs(1)
    wide = {"image": random_image((40, 90)), "instances": ground_truth([[5, 5, 80, 35]], [1])}
    losses, output = train_forward(model, labeled, [wide])
    assert all(loss.isfinite() for loss in losses.values())
    (proposals,) = output.proposals
    assert proposals.image_size == (40, 90)
    assert proposals.proposal_boxes.tensor[:, 2].max() <= 90
    assert proposals.proposal_boxes.tensor[:, 3].max() <= 40


def test_proposals_get_the_fields_of_their_matched_pseudo_label(model, storage):
    inputs = unlabeled_inputs()
    _, output = train_forward(model, labeled_inputs(), inputs)
    for proposals, x in zip(output.proposals[:2], inputs[:2], strict=True):
        overlap = pairwise_iou(x["instances"].gt_boxes, proposals.proposal_boxes)
        best = overlap.argmax(dim=0)
        foreground = proposals.gt_classes < NUM_CLASSES
        assert foreground.any()
        matched = x["instances"][best]
        for field in ("gt_localization_quality", "gt_classes"):
            values = proposals.get(field)
            assert torch.equal(values[foreground], matched.get(field)[foreground])
        assert torch.equal(
            proposals.gt_boxes.tensor[foreground], matched.gt_boxes.tensor[foreground]
        )
    without = output.proposals[2]
    assert (without.gt_classes == NUM_CLASSES).all()
    assert not without.has("gt_localization_quality")


def test_events_of_unlabeled_images_have_a_prefix(model, storage):
    train_forward(model, labeled_inputs(), unlabeled_inputs())
    names = set(storage.latest())
    for name in ("roi_head/num_fg_samples", "roi_head/num_bg_samples", "rpn/num_pos_anchors"):
        assert name in names
        assert f"unlabeled/{name}" in names
    assert "fast_rcnn/cls_accuracy" in names


def test_events_of_labeled_images_do_not_count_unlabeled_images(model, storage):
    """The labeled image has no objects and so no foreground proposals."""
    empty = {"image": random_image(), "instances": ground_truth([], [])}
    train_forward(model, [empty], unlabeled_inputs())
    latest = storage.latest()
    assert latest["roi_head/num_fg_samples"][0] == 0
    assert latest["unlabeled/roi_head/num_fg_samples"][0] > 0


class Reversed:
    """Reverses the order of the unlabeled images before the backbone, and of their features."""

    def __init__(self, size_divisibility=1):
        self.size_divisibility = size_divisibility
        self.shapes = []

    def mix(self, images):
        self.shapes.append(tuple(images.shape))
        return images.flip(0)

    def unmix(self, features):
        self.shapes.append(tuple(features.shape))
        return features.flip(0)


def test_mixing_that_is_undone_changes_nothing(storage):
    """It sees the unlabeled images only, and their features of every level."""
    model = tiny_model(AS_DETECTRON2)
    mixing = Reversed()
    plain = train_forward(model, labeled_inputs(), unlabeled_inputs())
    mixed = train_forward(model, labeled_inputs(), unlabeled_inputs(), mixing=mixing)
    assert mixing.shapes[0] == (3, 3, SIZE, SIZE)
    assert [shape[0] for shape in mixing.shapes[1:]] == [3] * 5
    assert_close(mixed[0], plain[0])
    assert_close(mixed[1].rpn_losses, plain[1].rpn_losses)
    assert_close(mixed[1].predictions, plain[1].predictions)


def test_batch_is_padded_for_mixing(storage):
    """The larger feature maps get no proposals outside of the images."""
    mixing = Reversed(size_divisibility=48)
    _, output = train_forward(tiny_model(), labeled_inputs(), unlabeled_inputs(), mixing=mixing)
    assert mixing.shapes[0] == (3, 3, 96, 96)
    assert mixing.shapes[1][2:] == (24, 24)
    assert all(p.image_size == (SIZE, SIZE) for p in output.proposals)
    assert max(p.proposal_boxes.tensor.max() for p in output.proposals) <= SIZE


def weighted_inputs(weights):
    inputs = unlabeled_inputs()
    return [x | {"loss_weight": weight} for x, weight in zip(inputs, weights, strict=True)]


def test_rpn_losses_are_linear_in_the_weights_of_the_images(storage):
    model = tiny_model(AS_DETECTRON2)

    def losses(*weights):
        return train_forward(model, labeled_inputs(), weighted_inputs(weights))[1].rpn_losses

    unweighted = train_forward(model, labeled_inputs(), unlabeled_inputs())[1].rpn_losses
    assert_close(losses(1.0, 1.0, 1.0), unweighted, rtol=0, atol=0)
    assert_close(losses(3.0, 3.0, 3.0), {n: 3 * loss for n, loss in unweighted.items()})
    parts = [losses(1.0, 0.0, 0.0), losses(0.0, 1.0, 0.0), losses(0.0, 0.0, 1.0)]
    total = losses(1.0, 2.0, 0.5)
    for name, loss in total.items():
        first, second, third = (part[name] for part in parts)
        assert first > 0
        assert_close(first + second + third, unweighted[name])
        assert_close(first + 2 * second + 0.5 * third, loss)


def test_image_with_a_weight_of_zero_has_no_part_in_the_rpn_losses(storage):
    model = tiny_model(AS_DETECTRON2)
    inputs = weighted_inputs([1.0, 0.0, 1.0])
    images = [x["image"].float().requires_grad_() for x in inputs]
    inputs = [x | {"image": image} for x, image in zip(inputs, images, strict=True)]
    _, output = train_forward(model, labeled_inputs(), inputs)
    assert len(output.proposals) == 3
    sum(output.rpn_losses.values()).backward()
    assert [bool(image.grad.any()) for image in images] == [True, False, True]


# Teacher


def test_detect_returns_the_detections_of_inference_without_postprocessing(model):
    inputs = [{"image": random_image(seed=i)} for i in range(2)]
    detections = model.detect(inputs).detections
    for x, expected in zip(detections, model.inference(inputs, do_postprocess=False), strict=True):
        assert len(x) > 0
        assert_close(x.scores, expected.scores)
        assert_close(x.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert not x.localization_quality.requires_grad


def test_detect_does_not_average_boxes():
    plain, voting = (
        decisive_model(
            {
                "MODEL.ROI_BOX_HEAD.VOTING_SIGMA": sigma,
                "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.05,
            }
        )
        for sigma in (0.0, 0.05)
    )
    voting.load_state_dict(plain.state_dict())
    views = [{"image": random_image((64, 96))}]
    (expected,) = plain.inference(views, do_postprocess=False)
    (labels,) = voting.detect(views).detections
    (averaged,) = voting.inference(views, do_postprocess=False)
    assert len(labels) > 5
    assert torch.equal(labels.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(labels.scores, averaged.scores)
    assert not torch.allclose(labels.pred_boxes.tensor, averaged.pred_boxes.tensor)


def test_detect_does_not_depend_on_the_score_threshold_of_results():
    usual, strict = (
        decisive_model({"MODEL.ROI_HEADS.SCORE_THRESH_TEST": score}) for score in (0.05, 0.9)
    )
    strict.load_state_dict(usual.state_dict())
    views = [{"image": random_image((64, 96))}]
    (expected,), (detected,) = usual.detect(views).detections, strict.detect(views).detections
    (results,) = strict.inference(views, do_postprocess=False)
    assert torch.equal(detected.scores, expected.scores)
    assert detected.scores.min() < 0.9 < results.scores.min()


def test_detect_requires_eval_mode(model):
    with pytest.raises(AssertionError, match="eval mode"):
        model.train().detect([{"image": random_image()}])


def test_predict_rois_reuses_the_features_of_detect(model):
    inputs = [{"image": random_image(seed=i)} for i in range(2)]
    output = model.detect(inputs)
    boxes = [torch.tensor([[4.0, 4, 30, 40], [10, 10, 60, 60]]), torch.tensor([[0.0, 0, 64, 64]])]
    calls = []
    hook = model.backbone.register_forward_hook(lambda *_: calls.append(1))
    predictions = model.predict_rois(output, boxes)
    hook.remove()
    assert not calls
    assert predictions.scores.shape == (3, NUM_CLASSES + 1)
    assert not any(values.requires_grad for values in predictions)
    # The same, image by image: each box is pooled from its own image.
    first = model.predict_rois(model.detect(inputs[:1]), boxes[:1])
    second = model.predict_rois(model.detect(inputs[1:]), boxes[1:])
    for values, one, two in zip(predictions, first, second, strict=True):
        assert_close(values, torch.cat([one, two]))


def test_rpn_is_trained_on_rpn_instances(model):
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


# Inference with Detectron2's tools


@pytest.fixture(scope="module")
def predictor(tmp_path_factory, _shared_model):
    folder = tmp_path_factory.mktemp("weights")
    DetectionCheckpointer(_shared_model, str(folder)).save("model")
    return DefaultPredictor(tiny_config({"MODEL.WEIGHTS": str(folder / "model.pth")}))


PHOTO = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)


def test_default_predictor_returns_detections_in_pixels_of_the_input_image(predictor):
    detections = predictor(PHOTO)["instances"]
    assert detections.image_size == PHOTO.shape[:2]
    assert set(detections.get_fields()) == {
        "pred_boxes",
        "scores",
        "pred_classes",
        "localization_quality",
        "log_variance",
    }
    assert len(detections) > 0
    assert detections.localization_quality.shape == detections.scores.shape
    assert ((detections.localization_quality > 0) & (detections.localization_quality < 0.5)).all()
    assert detections.pred_boxes.tensor[:, 2].max() > SIZE  # the model's input is 64 pixels wide


def test_default_predictor_matches_the_model(predictor, model):
    image = torch.as_tensor(np.ascontiguousarray(PHOTO[:48, :64].transpose(2, 0, 1)))
    with torch.no_grad():
        (expected,) = model([{"image": image, "height": 48, "width": 64}])
    detections = predictor(np.ascontiguousarray(PHOTO[:48, :64]))["instances"]
    assert_close(detections.scores, expected["instances"].scores)
    assert_close(detections.localization_quality, expected["instances"].localization_quality)


def test_postprocessing_keeps_the_quality_of_each_box(model):
    (detections,) = model.detect([{"image": random_image()}]).detections
    detections.pred_boxes.tensor[1] = 5.0  # no area, so postprocessing removes it
    kept = detector_postprocess(copy.deepcopy(detections), 2 * SIZE, 2 * SIZE)
    rest = torch.arange(len(detections)) != 1
    assert torch.equal(kept.localization_quality, detections.localization_quality[rest])
    assert_close(kept.pred_boxes.tensor, 2 * detections.pred_boxes.tensor[rest])


def test_coco_evaluator_reads_the_detections(predictor, tmp_path):
    """The ground truth is made of the detections, so the AP is 100."""
    detections = predictor(PHOTO)["instances"]
    name = f"photo_{tmp_path.name}"
    record = {"file_name": "photo.png", "image_id": 1, "height": 96, "width": 128}
    boxes, classes = detections.pred_boxes.tensor.tolist(), detections.pred_classes.tolist()
    record["annotations"] = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, "iscrowd": 0}
        for box, label in zip(boxes, classes, strict=True)
    ]
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(thing_classes=["a", "b", "c"])
    evaluator = COCOEvaluator(name, tasks=("bbox",), output_dir=str(tmp_path))
    evaluator.reset()
    evaluator.process([record], [{"instances": detections}])
    assert evaluator.evaluate()["bbox"]["AP50"] == pytest.approx(100)


def test_detections_can_be_drawn(predictor):
    detections = predictor(PHOTO)["instances"]
    drawn = Visualizer(PHOTO).draw_instance_predictions(detections).get_image()
    assert drawn.shape == PHOTO.shape
    assert (drawn != PHOTO).any()
