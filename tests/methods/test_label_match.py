"""LabelMatch: thresholds from ranks, and the losses on reliable and uncertain pseudo-labels."""

import math

import pytest
import torch
from torch.testing import assert_close

from locreweight.errors import UsageError
from locreweight.methods import LabelingInputs, build_method
from locreweight.methods.label_match import score_at_rank
from locreweight.modeling.meta_arch import TeacherOutput
from tests.methods.test_methods import detections_with, expected_box_losses, sample
from tests.modeling.output_layer_cases import (
    K,
    count,
    cross_entropy_of,
    each_labels,
    each_normalizer,
    make_predictions,
    make_predictor,
    rows_of,
)
from tests.modeling.tiny_model import ground_truth, tiny_config


def make_method(**keys):
    return build_method(tiny_config({"SEMI.METHOD": "LabelMatch"} | keys))


def inputs_with(detections, objects=()):
    labeled = [{"instances": ground_truth([[0, 0, 9, 9]] * len(x), x)} for x in objects]
    return LabelingInputs(None, TeacherOutput({}, detections), [], labeled)


def test_score_at_rank_sorts_each_class():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.3])
    classes = torch.tensor([0, 0, 1, 0, 1])
    ranks = torch.tensor([[0, 0, 0], [2, 1, 0], [9, 9, 9]])
    expected = torch.tensor([[0.9, 0.5, 0.0], [0.1, 0.3, 0.0], [0.1, 0.3, 0.0]])
    assert torch.equal(score_at_rank(scores, classes, ranks), expected)
    assert torch.equal(score_at_rank(scores[:0], classes[:0], ranks), torch.zeros(3, 3))


@pytest.mark.parametrize(
    ("iterations", "images"),
    [(30, 4), (1010, 200), (50_000, 10_000), (500_000, 10_000), (10, 4), (-4, 4)],
)
def test_thresholds_are_computed_at_least_twenty_times(iterations, images):
    settings = {
        "SEMI.BURN_IN_ITERS": 5,
        "SOLVER.MAX_ITER": 5 + iterations,
        "SOLVER.IMS_PER_BATCH_UNLABELED": 4,
    }
    assert make_method(**settings).images == images
    iterations_per_update = math.ceil(images / 4)
    assert iterations // iterations_per_update >= min(iterations, 20)
    assert make_method(**settings, **{"SEMI.LABEL_MATCH.IMAGES": 7}).images == 7


def test_thresholds_give_pseudo_labels_the_class_frequencies_of_the_labeled_images():
    """10 unlabeled images; the labeled ones have 1 object of class 0 and 0.5 of class 1."""
    method = make_method(**{"SEMI.LABEL_MATCH.IMAGES": 10})
    generator = torch.Generator().manual_seed(0)
    images = []
    for _ in range(10):
        detections = detections_with([0.0] * 40)
        detections.scores = torch.rand(40, generator=generator)
        detections.pred_classes = torch.arange(40) % 2
        images.append(detections)
    for i in range(5):
        assert method.thresholds.tolist() == [[pytest.approx(0.8)] * K] * 2
        inputs = inputs_with(images[2 * i : 2 * i + 2], objects=([0, 1], [0]))
        method.update_state([method.observe(inputs, [])])
    scores = torch.cat([x.scores for x in images])
    classes = torch.cat([x.pred_classes for x in images])
    for k, expected in ((0, 10), (1, 5)):
        ordered = scores[classes == k].sort(descending=True).values
        assert method.thresholds[0, k] == ordered[expected // 5]  # the best fifth
        assert method.thresholds[1, k] == ordered[expected]
    # A class that is never found has the lowest threshold.
    assert_close(method.thresholds[:, 2], torch.full((2,), 0.05))
    labels = method.select_pseudo_labels(inputs_with(images))
    found = torch.cat([x.gt_classes for x in labels]).bincount(minlength=K)
    assert found.tolist() == [11, 6, 0]  # the detection at the rank itself is included


def test_observations_of_two_processes_equal_those_of_one():
    images = [detections_with(torch.rand(6).tolist()) for _ in range(4)]
    objects = ([0, 1], [2], [0, 0], [1])
    methods = [make_method(**{"SEMI.LABEL_MATCH.IMAGES": 4}) for _ in range(2)]
    parts = [inputs_with(images[i : i + 2], objects[i : i + 2]) for i in (0, 2)]
    methods[0].update_state([methods[0].observe(inputs_with(images, objects), [])])
    methods[1].update_state([methods[1].observe(x, []) for x in parts])
    assert torch.equal(methods[0].thresholds, methods[1].thresholds)
    assert methods[0].thresholds.tolist() != make_method().thresholds.tolist()


def test_state_is_restored_between_two_computations_of_the_thresholds():
    methods = [make_method(**{"SEMI.LABEL_MATCH.IMAGES": 2}) for _ in range(2)]
    observed = [
        methods[0].observe(inputs_with([detections_with([0.9, 0.3, 0.6, 0.2])], ([0, 1],)), [])
        for _ in range(2)
    ]
    methods[0].update_state(observed[:1])
    methods[1].load_state_dict(methods[0].state_dict())
    for method in methods:
        method.update_state(observed[1:])
    assert torch.equal(methods[0].thresholds, methods[1].thresholds)
    assert methods[0].state_dict()["statistics"] == []


def test_pseudo_labels_are_reliable_above_the_higher_threshold():
    method = make_method()
    method.thresholds = torch.tensor([[0.9, 0.6, 0.5], [0.7, 0.4, 0.5]])
    (labels,) = method.select_pseudo_labels(
        inputs_with([detections_with([0.95, 0.65, 0.5, 0.8, 0.45, 0.49, 0.6])])
    )
    assert labels.gt_score.tolist() == pytest.approx([0.95, 0.65, 0.5, 0.8, 0.45])
    assert labels.gt_is_reliable.tolist() == [1, 1, 1, 0, 0]
    assert method.rpn_labels(labels) is labels


@each_normalizer
@each_labels
def test_losses_on_reliable_and_uncertain_pseudo_labels(by_sampled, labels):
    total = count(labels)
    teacher = make_predictions(total)
    reliable = (torch.arange(total) % 2).float()
    predictor = make_predictor(normalize_by_sampled=by_sampled)
    proposals = sample(labels, predictor, teacher=teacher, gt_is_reliable=reliable)
    method = make_method()
    expected = 0.0
    for row, (label, _, _) in enumerate(rows_of(proposals.instances)):
        logits = proposals.predictions.scores[row].tolist()
        if label == K or reliable[row]:
            expected += cross_entropy_of(logits, label)
        else:
            target = (2 * teacher.scores[row]).softmax(dim=0).tolist()
            expected += sum(p * cross_entropy_of(logits, k) for k, p in enumerate(target))
    assert_close(method.classification_loss(proposals), torch.tensor(expected / total))

    boxes = [
        x * reliable[row].item() for row, x in expected_box_losses(proposals, "corners", False, 1.0)
    ]
    expected = sum(boxes) / max(total if by_sampled else len(boxes), 1)
    assert_close(method.box_loss(proposals), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_number_of_images_must_be_positive():
    with pytest.raises(UsageError, match=r"SEMI.LABEL_MATCH.IMAGES is -1"):
        make_method(**{"SEMI.LABEL_MATCH.IMAGES": -1})
