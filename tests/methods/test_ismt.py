"""ISMT: fusion of detections, the memory in the frame of the original image, and shared modules."""

import pytest
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch.testing import assert_close

from locreweight.data.transforms.views import UnlabeledSample, View
from locreweight.errors import UsageError
from locreweight.methods import LabelingInputs, build_members, build_method
from locreweight.methods.ismt import fuse, pack, to_original, unpack
from locreweight.modeling.meta_arch import TeacherOutput
from tests.modeling.tiny_model import random_image, tiny_config

SCALED = [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 1]]
FLIPPED = [[-2, 0, 128], [0, 2, 0], [0, 0, 1]]


def make_method(**keys):
    return build_method(
        tiny_config({"SEMI.METHOD": "ISMT", "SEMI.PSEUDO_LABEL_THRESHOLD": 0.5} | keys)
    )


def make_labels(boxes, classes, scores):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Instances(
        (128, 128),
        gt_boxes=Boxes(boxes),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
        gt_score=torch.tensor(scores),
        gt_localization_quality=torch.tensor(scores) / 2,
    )


def random_labels(count=30, seed=0):
    torch.manual_seed(seed)
    corner = torch.rand(count, 2) * 60
    boxes = torch.cat([corner, corner + 10 + torch.rand(count, 2) * 30], dim=1)
    return make_labels(
        boxes.tolist(), torch.randint(3, (count,)).tolist(), torch.rand(count).tolist()
    )


def nms_by_loop(labels, iou):
    """Rows that stay, by descending score."""
    overlap = pairwise_iou(labels.gt_boxes, labels.gt_boxes)
    kept = []
    for i in labels.gt_score.argsort(descending=True).tolist():
        same_class = [j for j in kept if labels.gt_classes[j] == labels.gt_classes[i]]
        if all(overlap[i, j] <= iou for j in same_class):
            kept.append(i)
    return kept


@pytest.mark.parametrize("iou", [0.1, 0.5, 0.9])
def test_fusion_equals_nms_in_a_loop(iou):
    labels = random_labels()
    fused = fuse(labels, iou)
    kept = nms_by_loop(labels, iou)
    assert torch.equal(fused.gt_boxes.tensor, labels.gt_boxes.tensor[kept])
    assert torch.equal(fused.gt_localization_quality, labels.gt_localization_quality[kept])
    assert len(kept) < len(labels) or iou == 0.9


def test_fusing_labels_with_themselves_changes_nothing():
    labels = fuse(random_labels(), 0.5)
    fused = fuse(Instances.cat([labels, labels]), 0.5)
    assert torch.equal(fused.gt_boxes.tensor, labels.gt_boxes.tensor)
    assert torch.equal(fused.gt_score, labels.gt_score)


def test_fusion_of_nothing_is_empty():
    assert len(fuse(make_labels([], [], []), 0.5)) == 0


def make_sample(matrix, name="a.png"):
    view = View(random_image((128, 128)), torch.tensor(matrix, dtype=torch.float64))
    return UnlabeledSample(name, view, view)


def as_inputs(labels, sample, member=0):
    detections = Instances(
        labels.image_size,
        pred_boxes=labels.gt_boxes,
        scores=labels.gt_score,
        pred_classes=labels.gt_classes,
        localization_quality=labels.gt_localization_quality,
    )
    return LabelingInputs(None, TeacherOutput({}, [detections]), [sample], member=member)


def test_stored_boxes_are_in_the_frame_of_the_original_image():
    labels = make_labels([[10, 20, 50, 60]], [1], [0.9])
    entry = to_original(labels, make_sample(SCALED))
    assert entry["boxes"].tolist() == [[20, 40, 100, 120]]
    entry = to_original(labels, make_sample(FLIPPED))
    assert entry["boxes"].tolist() == [[39, 10, 59, 30]]


def test_each_student_learns_from_the_other_teacher_and_its_memory():
    method = make_method()
    first = make_labels([[10, 10, 30, 30]], [0], [0.9])
    second = make_labels([[50, 50, 90, 90], [0, 0, 9, 9]], [1, 1], [0.8, 0.4])
    sample = make_sample(SCALED)
    selected = method.select_for_members(
        [as_inputs(first, sample, 0), as_inputs(second, sample, 1)]
    )
    assert [x.gt_boxes.tensor.tolist() for (x,) in selected] == [
        [[50, 50, 90, 90]],
        [[10, 10, 30, 30]],
    ]


def test_memory_unites_the_detections_of_different_views():
    """The same object is found again in a flipped view; another one is found only there."""
    method = make_method()
    scaled, flipped = make_sample(SCALED), make_sample(FLIPPED)
    # (40, 40)-(60, 60) in the original image
    inputs = as_inputs(make_labels([[20, 20, 30, 30]], [0], [0.7]), scaled)
    labels = method.select_pseudo_labels(inputs)
    method.update_state([method.observe(inputs, labels)])
    assert method.memory[1] == {}

    found = make_labels([[8, 80, 48, 120], [60, 10, 100, 50]], [0, 2], [0.6, 0.9])
    (labels,) = method.select_pseudo_labels(as_inputs(found, flipped))
    # The stored score is higher than the new one.
    assert_close(labels.gt_score, torch.tensor([0.9, 0.7]))
    assert labels.gt_boxes.tensor.tolist() == [[60, 10, 100, 50], [8, 80, 48, 120]]
    other = as_inputs(found, make_sample(FLIPPED, "b.png"))
    assert method.select_pseudo_labels(other)[0].gt_score.tolist() == pytest.approx([0.9, 0.6])


def test_labels_make_a_round_trip_through_the_memory():
    method, sample = make_method(), make_sample(FLIPPED)
    inputs = as_inputs(fuse(random_labels(), 0.5), sample)
    first = method.select_pseudo_labels(inputs)
    method.update_state([method.observe(inputs, first)])
    nothing = as_inputs(make_labels([], [], []), sample)
    (again,) = method.select_pseudo_labels(nothing)
    assert len(again) > 3
    assert_close(again.gt_boxes.tensor, first[0].gt_boxes.tensor)
    assert torch.equal(again.gt_score, first[0].gt_score)


def same_memory(first, second):
    return all(
        a.keys() == b.keys() and all(torch.equal(a[k][n], b[k][n]) for k in a for n in a[k])
        for a, b in zip(first.memory, second.memory, strict=True)
    )


def test_the_order_of_processes_decides_which_labels_of_an_image_are_stored():
    """Both processes have the same image in a step; the second one's labels are kept."""
    sample = make_sample(SCALED, "shared.png")
    observations = []
    for seed, names in ((0, ["a.png", "shared.png"]), (1, ["shared.png", "b.png"])):
        method = make_method()
        inputs = LabelingInputs(
            None, TeacherOutput({}, []), [make_sample(SCALED, name) for name in names], member=1
        )
        labels = [random_labels(seed=seed) for _ in names]
        observations.append(method.observe(inputs, labels))
    method.update_state(observations)
    assert method.memory[0] == {} and set(method.memory[1]) == {"a.png", "shared.png", "b.png"}
    stored = method.memory[1]["shared.png"]["boxes"]
    assert torch.equal(stored, to_original(random_labels(seed=1), sample)["boxes"])
    restored = make_method()
    restored.load_state_dict(method.state_dict())
    assert same_memory(restored, method)


def test_memory_is_saved_as_a_few_tensors():
    """Also without files, and with a file without pseudo-labels."""
    assert unpack(pack({})) == {}
    sample = make_sample(SCALED)
    entries = {f"{i}.png": to_original(random_labels(count=i), sample) for i in (3, 0, 5)}
    packed = pack(entries)
    tensors = [x for x in packed.values() if isinstance(x, torch.Tensor)]
    assert [len(x) for x in tensors] == [8] * 4
    restored = unpack(packed)
    assert list(restored) == list(entries)
    for name, entry in entries.items():
        assert all(torch.equal(entry[key], restored[name][key]) for key in entry)


@pytest.fixture(scope="module")
def students():
    cfg = tiny_config({"SEMI.METHOD": "ISMT", "SEMI.ISMT.DROP_BLOCK_SHARE": 0.5})
    torch.manual_seed(0)
    return build_members(cfg, build_method(cfg))


def test_members_share_backbone_and_rpn_but_not_the_roi_head(students):
    first, second = students.members
    assert first.backbone is second.backbone
    assert first.proposal_generator is second.proposal_generator
    weights = [x.roi_heads.box_predictor.cls_score.weight for x in (first, second)]
    assert not torch.equal(*weights)
    names = {name for name, _ in students.named_parameters()}
    assert not any(name.startswith(("members.1.backbone", "members.1.prop")) for name in names)


def test_drop_block_acts_in_training_only(students):
    head = students.members[0].roi_heads.box_head
    features = torch.rand(2, 32, 7, 7)
    assert torch.equal(head.eval()(features), head(features))
    head.train()
    assert not torch.equal(head(features), head(features))


def test_drop_block_keeps_the_scale_of_many_features_in_float16(students):
    """CPU autocast sums in float16, where the number of features would be infinite."""
    head = students.members[0].roi_heads.box_head.train()
    features = torch.ones(64, 32, 7, 7, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.float16):
        dropped = make_method()._drop_blocks(head, (features,))
    assert dropped.dtype == torch.float16
    assert_close(dropped.float().mean(), torch.tensor(1.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("key", "value"), [("SHARE", 1.0), ("SHARE", -0.1), ("SIZE", 0), ("SIZE", 8), ("SIZE", 2)]
)
def test_bad_settings_name_the_key(key, value):
    with pytest.raises(UsageError, match=rf"SEMI.ISMT.DROP_BLOCK_{key} is {value}"):
        make_method(**{f"SEMI.ISMT.DROP_BLOCK_{key}": value})
