"""What training would stop at is an error of the look at the data, which goes on to its end."""

import pytest

from locreweight.data.datasets.splits import split_indices
from locreweight.data.inspection.findings import Severity
from tests.checked_data import Project
from tests.tiny_data import edit_json


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"DATASETS.UNLABELED": ()}, "there are no unlabeled images to learn from"),
        ({"SOLVER.IMS_PER_BATCH_UNLABELED": 0}, "there are no unlabeled images to learn from"),
        ({"DATASETS.UNLABELED_TRUTH": ["coco:/no.json:/tmp"]}, "the file '/no.json' of the data"),
        ({"MODEL.WEIGHTS": "/no.pth"}, "MODEL.WEIGHTS '/no.pth' does not exist"),
        ({"DATASETS.SPLIT_FILE": "/no.json"}, "cannot read DATASETS.SPLIT_FILE '/no.json'"),
        ({"DATASETS.LABELED_PERCENT": 0.0}, "DATASETS.LABELED_PERCENT"),
        (
            {"DATASETS.CHECKS.MAX_UNREADABLE_SHARE": 2.0},
            "DATASETS.CHECKS.MAX_UNREADABLE_SHARE must be in",
        ),
        ({"SEMI.METHOD": "Nobody"}, "unknown SEMI.METHOD 'Nobody'"),
        ({"INPUT.AUGMENTATION_POLICY": "Nobody"}, "unknown INPUT.AUGMENTATION_POLICY 'Nobody'"),
        ({"SOLVER.REFERENCE_WORLD_SIZE": 3}, "SOLVER.IMS_PER_BATCH = 4 cannot be shared equally"),
    ],
    ids=str,
)
def test_what_training_would_refuse_is_an_error_and_the_report_goes_on(
    project, capsys, settings, words
):
    project.settings |= settings
    (error,) = project.findings()
    assert error.severity is Severity.ERROR and words in error.text
    assert "to train:\n  python train_net.py" in capsys.readouterr().out


def test_a_split_of_images_without_a_box_is_an_error(project):
    def leave_one(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 1]

    edit_json(project.json, leave_one)
    drawn = split_indices(5, 20.0, 1)[0]
    assert drawn != [0]
    project.settings["DATASETS.LABELED_PERCENT"] = 20.0
    (error,) = project.texts(Severity.ERROR)
    assert "has a box to train on" in error and "DATASETS.LABELED_PERCENT" in error


@pytest.mark.parametrize(
    ("broken", "settings", "stops"),
    [
        (2, {}, True),
        (2, {"DATASETS.CHECKS.MAX_UNREADABLE_SHARE": 0.5}, False),
        (1, {}, False),  # one file alone never ends a run
        (1, {"DATASETS.CHECKS.MAX_UNREADABLE_SHARE": 0.0}, True),
        (2, {"SEMI.BURN_IN_ITERS": 10**6}, False),  # none is ever drawn
    ],
)
def test_more_unreadable_unlabeled_images_than_training_tolerates_are_an_error(
    project, broken, settings, stops
):
    project.settings |= settings
    for i in range(broken):
        (project.unlabeled / f"000{i}.png").write_bytes(b"no image")
    errors = project.texts(Severity.ERROR)
    assert len(errors) == stops
    if stops:
        assert f"{broken} of 4 unlabeled images cannot be read, which is more" in errors[0]
