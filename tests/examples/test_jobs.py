"""The job files: shell syntax, agreeing names and options, and a training by ssh.sh."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from locreweight.engine import argument_parser
from tests import soak
from tests.engine.tiny_training import make_datasets
from tests.two_hosts import reason_to_skip, two_hosts

JOBS = Path(__file__).parents[2] / "examples/jobs"
SCRIPTS = pytest.mark.parametrize("name", ["ssh.sh", "slurm.sbatch"])


@SCRIPTS
def test_shell_finds_no_error(name):
    subprocess.run(["bash", "-n", JOBS / name], check=True)


@SCRIPTS
def test_linter_finds_nothing(name):
    linter = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([linter, JOBS / name], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_slurm_job_trains_on_all_nodes(tmp_path):
    """With stand-ins for srun and scontrol. The job is queued again when it was stopped."""
    (tmp_path / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        "if [ $1 = show ]; then printf 'node7\\nnode9\\n'; fi\n"
    )
    (tmp_path / "srun").write_text('#!/bin/sh\nSLURM_NODEID=1 "$@"\n')
    (tmp_path / "python").write_text(
        f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {tmp_path}/args\nexit 75\n"
    )
    for name in ("scontrol", "srun", "python"):
        (tmp_path / name).chmod(0o755)
    variables = {
        "SLURM_JOB_NODELIST": "node[7,9]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "12",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    command = ["bash", JOBS / "slurm.sbatch", "OUTPUT_DIR", "with space"]
    assert subprocess.run(command, env=os.environ | variables).returncode == 75
    script, *arguments = (tmp_path / "args").read_text().splitlines()
    args = argument_parser().parse_args(arguments)
    assert script == "train_net.py" and args.resume and args.opts == ["OUTPUT_DIR", "with space"]
    assert (args.num_gpus, args.num_machines, args.machine_rank) == (2, 2, 1)
    assert args.dist_url == "tcp://node7:29500"
    assert (tmp_path / "calls").read_text().splitlines() == [
        "show hostnames node[7,9]",
        "requeue 12",
    ]


def test_slurm_asks_for_what_is_used():
    text = (JOBS / "slurm.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert asked["ntasks-per-node"] == "1"
    assert f"--num-gpus {asked['gpus-per-node']} " in text


def test_kubernetes_resources_fit_together():
    service, job = yaml.safe_load_all((JOBS / "kubernetes.yaml").read_text())
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert spec["completions"] == spec["parallelism"] and spec["completionMode"] == "Indexed"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    (command,) = container["args"]
    _, python, script, *arguments = shlex.split(command.replace("$JOB_COMPLETION_INDEX", "1"))
    args = argument_parser().parse_args(arguments)
    assert (python, script) == ("python", "train_net.py") and args.resume
    assert args.num_machines == spec["completions"]
    assert args.num_gpus == container["resources"]["limits"]["nvidia.com/gpu"]
    assert args.dist_url == f"tcp://{name}-0.{pod['subdomain']}:29500"


SETTINGS = {"SOLVER.MAX_ITER": 6, "SOLVER.STEPS": (), "SEMI.BURN_IN_ITERS": 2}


@pytest.mark.slow
def test_ssh_job_trains_on_two_hosts(tmp_path):
    """With a stand-in for ssh that enters the host."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    with two_hosts() as hosts:
        ssh = tmp_path / "ssh"
        cases = [
            f'{host.address}) exec {shlex.join(host.command(["sh", "-c"]))} "$3" ;;'
            for host in hosts
        ]
        ssh.write_text("#!/bin/sh\ncase $2 in\n" + "\n".join(cases) + "\nesac\n")
        ssh.chmod(0o755)
        _, script, *arguments = soak.command(tmp_path, make_datasets(tmp_path / "data"), SETTINGS)
        assert script == "train_net.py"
        environment = soak.environment() | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "GLOO_SOCKET_IFNAME": hosts[0].interface,
        }
        done = subprocess.run(
            [JOBS / "ssh.sh", " ".join(host.address for host in hosts), *arguments],
            env=environment,
            cwd=soak.ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Effective values on 2 process(es)" in done.stdout
    assert (tmp_path / "model_final.pth").is_file()
