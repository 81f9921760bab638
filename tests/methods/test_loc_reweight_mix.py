"""LocReweightMix: pseudo-labels, mixed labels and losses, compared with loops over numbers."""

import pytest
import torch
from torch.testing import assert_close

from locreweight.methods import LabelingInputs, SampledProposals, StudentImage, build_method
from locreweight.modeling.meta_arch import TeacherOutput
from tests.engine.test_training_step import SHIFT
from tests.engine.test_training_step import make_sample as make_views
from tests.methods.test_certainty import VIEWS, make_detections, make_sample
from tests.methods.test_methods import sample
from tests.modeling.output_layer_cases import (
    K,
    coded,
    each_labels,
    each_normalizer,
    four_of,
    make_predictor,
    rows_of,
    smooth_l1,
)
from tests.modeling.tiny_model import ground_truth, random_image, tiny_config

SIZE = (40, 60)


def make_method(**keys):
    base = {"SEMI.METHOD": "LocReweightMix", "SEMI.PSEUDO_LABEL_THRESHOLD": 0.5}
    return build_method(tiny_config(base | keys))


def select(threshold):
    method = make_method(**{"SEMI.PSEUDO_LABEL_THRESHOLD": threshold})
    detections = make_detections()
    inputs = LabelingInputs(
        None, TeacherOutput({}, [detections]), [make_sample(VIEWS["flipped"][0])]
    )
    (labels,) = method.select_pseudo_labels(inputs)
    return method, detections, labels


def labeled(boxes, classes, scores, certainty):
    fields = {"gt_score": torch.tensor(scores), "gt_certainty": torch.tensor(certainty)}
    return ground_truth(boxes, classes, SIZE, **fields)


# Pseudo-labels


def test_detections_above_the_lower_score_are_pseudo_labels():
    _, detections, labels = select(threshold=0.5)
    assert labels.gt_score.tolist() == detections.scores[[0, 2]].tolist()  # 0.2 is not above 0.2
    expected = torch.sigmoid(-detections.log_variance[[0, 2]][:, [2, 1, 0, 3]])
    assert_close(labels.gt_certainty, expected)


def test_threshold_below_the_lower_score_counts():
    _, _, labels = select(threshold=0.1)
    assert len(labels) == 3


def test_rpn_is_trained_on_labels_above_the_threshold():
    method, _, labels = select(threshold=0.8)
    assert len(labels) == 2
    (score,) = method.rpn_labels(labels).gt_score.tolist()
    assert score == pytest.approx(0.9)


# Mixed images


def test_mixed_labels_keep_their_score_and_the_certainty_of_their_sides():
    """The cached image is flipped, so its left and right sides change places."""
    method = make_method()
    entry = {
        "image": random_image(SIZE),
        "boxes": torch.tensor([[2.0, 3, 20, 30]]),
        "classes": torch.tensor([2]),
        "gt_score": torch.tensor([0.25]),
        "gt_certainty": torch.tensor([[0.1, 0.2, 0.3, 0.4]]),
    }
    method.update_state([[entry] * 8])
    labels = labeled([[8.0, 8, 40, 39]], [1], [0.75], [[0.5, 0.6, 0.7, 0.8]])
    mixed, mosaic = method.compose([StudentImage(random_image(SIZE, 1), labels, "views")], [])
    assert mixed.pseudo_labels.gt_boxes.tensor.tolist() == [[8, 8, 40, 39], [40, 3, 58, 30]]
    assert mixed.pseudo_labels.gt_score.tolist() == [0.75, 0.25]
    flipped = [0.3, 0.2, 0.1, 0.4]
    assert_close(mixed.pseudo_labels.gt_certainty, torch.tensor([[0.5, 0.6, 0.7, 0.8], flipped]))
    assert_close(mosaic.pseudo_labels.gt_certainty, torch.tensor([flipped] * 4))
    assert mosaic.pseudo_labels.gt_score.tolist() == [0.25] * 4


def test_cache_holds_score_and_certainty_of_the_labels_in_the_strong_view():
    """The first label is outside of the strong view."""
    labels = ground_truth(
        [[60.0, 20, 64, 30], [4, 10, 20, 30], [8, 20, 30, 40]],
        [0, 1, 2],
        gt_score=torch.tensor([0.9, 0.3, 0.6]),
        gt_certainty=torch.rand(3, 4),
    )
    (entry,) = make_method().observe(LabelingInputs(None, None, [make_views(SHIFT)]), [labels])
    assert entry["boxes"].tolist() == [[14, 4, 30, 24], [18, 14, 40, 34]]
    assert entry["classes"].tolist() == [1, 2]
    assert torch.equal(entry["gt_score"], labels.gt_score[1:])
    assert torch.equal(entry["gt_certainty"], labels.gt_certainty[1:])
    assert all(x.device.type == "cpu" for x in entry.values())


# Losses


def make_proposals(labels, weights=(1.0, 1.0), **predictor):
    plain = sample(labels, make_predictor(**predictor))
    for x in plain.instances:
        if x.has("gt_boxes"):
            x.gt_score = torch.rand(len(x))
            x.gt_certainty = torch.rand(len(x), 4)
    return SampledProposals(
        plain.instances, plain.predictions, plain.box_predictor, None, list(weights)
    )


LABELS = [[0, K, 2, K], [1, 1, K]]


@each_normalizer
@each_labels
def test_losses_against_loops(by_sampled, labels):
    weights = (0.5, 3.0)
    proposals = make_proposals(labels, weights, normalize_by_sampled=by_sampled)
    row_weights = [weights[i] for i, image in enumerate(labels) for _ in image]
    scores = proposals.matched_gt_field("gt_score").tolist()
    certainties = torch.cat(
        [
            x.gt_certainty if x.has("gt_certainty") else torch.zeros(len(x), 4)
            for x in proposals.instances
        ]
    )
    classification = boxes = 0.0
    for row, (label, proposal, target) in enumerate(rows_of(proposals.instances)):
        log_p = proposals.predictions.scores[row].log_softmax(0).tolist()
        odds = scores[row] ** 2, (1 - scores[row]) ** 2
        p = odds[0] / sum(odds) if label < K else 1.0
        classification -= row_weights[row] * (p * log_p[label] + (1 - p) * log_p[K])
        if label < K and scores[row] > 0.5:
            deltas = four_of(proposals.predictions.deltas, row, label, False)
            for i, value in enumerate(coded("corners", proposal, target)):
                weight = row_weights[row] * certainties[row, i].item()
                boxes += weight * smooth_l1(deltas[i] - value)
    losses = make_method().losses(proposals)
    count = sum(map(len, labels))
    assert_close(losses["loss_cls"], torch.tensor(classification / count))
    foreground = sum(label < K for image in labels for label in image)
    divisor = max(count if by_sampled else foreground, 1)
    assert_close(losses["loss_box_reg"], torch.tensor(boxes / divisor), rtol=1e-4, atol=1e-5)


def test_gradients_reach_scores_and_offsets_but_no_variance():
    proposals = make_proposals(LABELS)
    for x in proposals.instances:
        x.gt_score = torch.full((len(x),), 0.9)
    sum(make_method().losses(proposals).values()).backward()
    predictions = proposals.predictions
    assert predictions.scores.grad.abs().sum() > 0 and predictions.deltas.grad.abs().sum() > 0
    assert predictions.log_variance.grad is None


def test_labels_below_the_threshold_have_no_box_loss():
    proposals = make_proposals(LABELS)
    for x in proposals.instances:
        x.gt_score = torch.full((len(x),), 0.5)
    loss = make_method().box_loss(proposals)
    loss.backward()
    assert loss.item() == 0 and proposals.predictions.deltas.grad is not None


def test_metrics():
    proposals = make_proposals(LABELS)
    make_method().losses(proposals)
    probabilities, certainties, confident = [], [], []
    for x in proposals.instances:
        for label, score, values in zip(
            x.gt_classes.tolist(), x.gt_score.tolist(), x.gt_certainty, strict=True
        ):
            if label == K:
                continue
            probabilities.append(score**2 / (score**2 + (1 - score) ** 2))
            confident.append(float(score > 0.5))
            certainties += [values.mean().item()] if score > 0.5 else []
    expected = {
        "proposals/label_probability": probabilities,
        "proposals/above_threshold": confident,
        "proposals/certainty": certainties,
    }
    for name, values in expected.items():
        mean = sum(values) / len(values) if values else float("nan")
        assert proposals.metrics[name].item() == pytest.approx(mean, nan_ok=True), name
