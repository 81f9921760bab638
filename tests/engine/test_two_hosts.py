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


def torchrun(hosts, number, *flags, nodes="2"):
    is_first = hosts[number] is hosts[0]
    rendezvous = {
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": f"{hosts[0].address}:{PORT}",
        # The own name of a host does not lead to its address here.
        "--rdzv-conf": f"is_host={int(is_first)}",
        "--local-addr": hosts[number].address,
    }
    options = {"--nnodes": nodes, "--nproc-per-node": "1", "--max-restarts": "3", **rendezvous}
    return (
        ["-m", "torch.distributed.run", *(x for pair in options.items() for x in pair), *flags],
    )


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
            "TP_SOCKET_IFNAME": host.interface,
        }
        program = soak.command(tmp_path, datasets, SETTINGS | settings, *launcher, *flags)
        return host.start(program, tmp_path / f"{host.name}.txt", env=environment)

    return begin


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
