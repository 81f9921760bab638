"""Training on two hosts, which are network namespaces on this machine."""

import pytest

from tests import soak
from tests.two_hosts import reason_to_skip, two_hosts

pytestmark = pytest.mark.slow

PORT = 29500
SETTINGS = {
    "SOLVER.MAX_ITER": 40,
    "SOLVER.STEPS": (25,),
    "SOLVER.CHECKPOINT_PERIOD": 5,
    "SEMI.BURN_IN_ITERS": 10,
    "TEST.EVAL_PERIOD": 0,
}


def detectron2_launcher(hosts, number):
    """Arguments of ``python`` before the script, and of the script."""
    url = f"tcp://{hosts[0].address}:{PORT}"
    return [], "--num-machines", "2", "--machine-rank", str(number), "--dist-url", url


def torchrun(hosts, number, nodes="2"):
    """The same of torchrun."""
    is_first = hosts[number] is hosts[0]
    rendezvous = {
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": f"{hosts[0].address}:{PORT}",
        # The own name of a host does not lead to its address here.
        "--rdzv-conf": f"is_host={int(is_first)}",
        "--local-addr": hosts[number].address,
    }
    options = {"--nnodes": nodes, "--nproc-per-node": "1", "--max-restarts": "3", **rendezvous}
    launcher = ["-m", "torch.distributed.run", *(x for pair in options.items() for x in pair)]
    return launcher, "--num-machines", nodes[0]


@pytest.fixture(scope="module")
def namespaces_work():
    if reason := reason_to_skip():
        pytest.skip(reason)


@pytest.fixture
def hosts(namespaces_work):
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def one_host(namespaces_work, datasets, tmp_path_factory):
    """Output folder of the same training in two processes of one host."""
    folder = tmp_path_factory.mktemp("one_host")
    run = soak.start(folder, datasets, SETTINGS, [], "--num-gpus", "2", "--dist-url", "auto")
    assert run.wait(timeout=300) == 0, (folder / "output.txt").read_text()[-2000:]
    return folder


@pytest.fixture
def start(hosts, datasets, tmp_path):
    """Starts or resumes the run of a test on one of the hosts."""

    def begin(number, launcher, *flags, **settings):
        host = hosts[number]
        environment = soak.environment() | {
            "GLOO_SOCKET_IFNAME": host.interface,
            # Otherwise the first host's torchrun does not tell a host that joins it later, such as
            # one that was restarted, where to connect to.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        program = soak.command(tmp_path, datasets, SETTINGS | settings, *launcher, *flags)
        return host.start(program, tmp_path / f"{host.name}.txt", env=environment)

    return begin


@pytest.fixture
def saves(tmp_path):
    """Waits until the first host saves a checkpoint after the iteration that it starts at."""

    def wait(run, text="saved"):
        file = tmp_path / "host-1.txt"
        assert soak.wait_for(run, lambda: text in file.read_text()), outputs(tmp_path)

    return wait


def outputs(folder):
    """What the two hosts have printed."""
    return [(folder / f"host-{number}.txt").read_text() for number in (1, 2)]


@pytest.mark.parametrize("launcher", [detectron2_launcher, torchrun])
def test_two_hosts_train_like_two_processes_of_one(launcher, hosts, start, one_host, tmp_path):
    """Weights, optimizer, metrics and evaluations are the same, bit for bit."""
    runs = [start(number, launcher(hosts, number)) for number in (0, 1)]
    assert [run.wait(timeout=300) for run in runs] == [0, 0], outputs(tmp_path)
    assert soak.differences(soak.result_of(one_host), soak.result_of(tmp_path)) == []
    (results,) = [line for line in soak.metrics_of(tmp_path) if "bbox/AP" in line]
    assert "student/bbox/AP" in results
    first, second = outputs(tmp_path)
    assert "the trained model is" in first and "the trained model is" not in second


def test_killed_host_is_restarted_and_nothing_is_lost(hosts, start, saves, one_host, tmp_path):
    """The other host waits for it, and both continue from the last checkpoint."""
    first, second = (start(number, torchrun(hosts, number)) for number in (0, 1))
    saves(first)
    hosts[1].kill()
    assert second.wait(timeout=60) != 0
    second = start(1, torchrun(hosts, 1))
    assert [run.wait(timeout=300) for run in (first, second)] == [0, 0], outputs(tmp_path)
    text = outputs(tmp_path)[0]
    assert "error: process 0 on host-1: lost another process (" in text
    assert "resumed after iteration" in text
    assert soak.differences(soak.result_of(one_host), soak.result_of(tmp_path)) == []


def test_cut_network_ends_both_hosts_and_the_run_is_resumed(
    hosts, start, saves, one_host, tmp_path
):
    runs = [start(n, detectron2_launcher(hosts, n), "--timeout", "20") for n in (0, 1)]
    saves(runs[0])
    hosts[1].set_link("down")
    assert [run.wait(timeout=120) for run in runs] == [1, 1], outputs(tmp_path)
    for number, text in enumerate(outputs(tmp_path)):
        line = text.splitlines()[-1]
        assert line.startswith(
            f"error: process {number} on host-{number + 1}: lost another process"
        ), text
    hosts[1].set_link("up")
    runs = [start(n, detectron2_launcher(hosts, n)) for n in (0, 1)]
    assert [run.wait(timeout=300) for run in runs] == [0, 0], outputs(tmp_path)
    assert soak.differences(soak.result_of(one_host), soak.result_of(tmp_path)) == []


def test_output_folder_that_is_not_shared_is_found_before_training(hosts, start, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    hosts[1].hide(folder)
    runs = [start(n, detectron2_launcher(hosts, n), OUTPUT_DIR=folder) for n in (0, 1)]
    assert [run.wait(timeout=300) for run in runs] == [1, 1], outputs(tmp_path)
    for text in outputs(tmp_path):
        assert "is another folder for process 1 on host-2 than for the main process" in text
        assert "Traceback" not in text
    assert not list(folder.glob("*.pth"))


def test_training_goes_on_without_the_other_host(hosts, start, saves, tmp_path):
    """Each iteration then has half of the images, and twice as many of them remain."""
    how = {"SOLVER.REFERENCE_WORLD_SIZE": 2}
    first, second = (start(n, torchrun(hosts, n, nodes="1:2"), **how) for n in (0, 1))
    saves(first)
    hosts[1].kill()
    second.wait(timeout=60)
    assert first.wait(timeout=300) == 0, outputs(tmp_path)
    text = outputs(tmp_path)[0]
    assert (
        "resumed with 1 process(es) instead of 2: 1 labeled + 1 unlabeled images per iteration "
        "instead of 2 + 2, learning rate 0.0005 instead of 0.001" in text
    )
    assert "of 80 iterations done instead of" in text
    assert soak.metrics_of(tmp_path)[-1]["iteration"] == 79
