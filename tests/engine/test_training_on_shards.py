"""Training on unlabeled images in shards."""

from locreweight.data.datasets.shard_writer import write_shards
from tests.engine.tiny_training import build_trainer, copy_of, same, training_config
from tests.tiny_data import make_folder


def test_resumed_training_is_the_same_as_one_without_a_stop(datasets, tmp_path):
    images = make_folder(tmp_path / "images", images=30, seed=3)
    index = write_shards(images, tmp_path / "shards", images_per_shard=1)

    def train(output, iterations, resume=False):
        settings = {"DATASETS.UNLABELED": [f"shards:{index}"], "SOLVER.MAX_ITER": iterations}
        trainer = build_trainer(training_config(datasets, tmp_path / output, settings), resume)
        trainer.train()
        return copy_of(trainer.student), copy_of(trainer.teacher)

    expected = train("straight", 8)
    stopped = train("stopped", 5)
    assert not same(stopped[0], expected[0])
    resumed = train("stopped", 8, resume=True)
    assert same(resumed[0], expected[0])
    assert same(resumed[1], expected[1])
