"""Files in deploy/ are valid; the Slurm script runs with programs in place of those of a Slurm cluster."""

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages import runtime
from tests.namespace import wait_until

DEPLOY = Path(__file__).parents[2] / "deploy"
SBATCH = DEPLOY / "slurm" / "vqvae2.sbatch"
PROGRAMS = {  # in place of those of a Slurm cluster
    "scontrol": 'if [ "$1" = show ]; then printf "node1\\nnode2\\n"; else echo "scontrol $*" >> "$CALLS"; fi',
    "srun": 'echo "srun $*" >> "$CALLS"; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "hostname": "echo 10.0.0.1 fe80::1",
    "ray": 'echo "ray $*" >> "$CALLS"; echo $$ >> "$CALLS.pids"; exec sleep 60',
    "python": 'cat > /dev/null; until [[ $(cat "$CALLS.pids" 2> /dev/null | wc -l) == 2 ]]; do sleep 0.05; done; '
    'sleep "${JOIN_S:-0}"; exit "${JOIN_STATUS:-0}"',
    "vqvae2": 'echo "vqvae2 $* on $RAY_ADDRESS" >> "$CALLS"; '
    'echo "$RAY_AUTH_TOKEN_PATH" >> "$CALLS.token"; stat -c %a "$RAY_AUTH_TOKEN_PATH" >> "$CALLS"; '
    "$COMMAND & trap 'kill $!; sleep 0.2; exit 143' TERM; wait $!",
}


def load(path: Path) -> dict:
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))


@pytest.fixture
def job(tmp_path: Path):
    """Return a function that starts the Slurm script on two nodes, with a command in place of training."""
    for name, body in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)

    def start(command: str, **environment: str) -> subprocess.Popen[bytes]:
        variables = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(tmp_path / "calls"),
            "COMMAND": command,
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "4",
            **environment,
        }
        return subprocess.Popen(["bash", SBATCH, "-S", "cluster=gpus8"], cwd=tmp_path, env=variables)

    return start


def calls(folder: Path) -> str:
    return (folder / "calls").read_text() if (folder / "calls").exists() else ""


def assert_clean(folder: Path) -> None:
    """Fail if the token or a process of Ray is left."""
    assert not list(folder.rglob(".ray-token-*"))
    for pid in (folder / "calls.pids").read_text().split():
        assert not Path("/proc", pid).exists()


def test_slurm_runs_the_command_on_a_cluster_of_all_nodes(job, tmp_path):
    """The first node is the head, the others join it; only the user can read the token."""
    assert job("true").wait(60) == 0
    text = calls(tmp_path)
    assert "--nodelist=node1 ray start --block --disable-usage-stats --num-cpus=4 --head" in text
    assert "--nodes=1 --ntasks=1 --exclude=node1 ray start --block" in text and "--address=10.0.0.1:6379" in text
    assert "vqvae2 run -S cluster=gpus8 on 10.0.0.1:6379\n600\n" in text and "requeue" not in text
    assert_clean(tmp_path)


def test_git_ignores_the_token_of_slurm(job, tmp_path):
    """A token in a commit lets its readers run code on the cluster; the folder is that of all nodes."""
    assert job("true").wait(60) == 0
    token = Path((tmp_path / "calls.token").read_text().strip()).relative_to(tmp_path)
    assert f"/{token.parts[0]}/" in (DEPLOY.parent / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_slurm_removes_the_token_if_it_is_stopped_early(job, tmp_path):
    """Before the command runs, nothing catches the signal."""
    process = job("true", JOIN_S="5")
    wait_until(lambda: (tmp_path / "calls.pids").exists() and list(tmp_path.rglob(".ray-token-*")), 60)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0 and "vqvae2" not in calls(tmp_path)
    assert_clean(tmp_path)


def test_slurm_queues_the_job_again_after_its_signal(job, tmp_path):
    """The command gets SIGTERM while Ray runs, and may take its time to save."""
    process = job("sleep 60")
    wait_until(lambda: "600" in calls(tmp_path), 60)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert calls(tmp_path).endswith("scontrol requeue 7\n")
    assert_clean(tmp_path)


def test_slurm_does_not_queue_a_failed_command_again(job, tmp_path):
    """It would fail again."""
    assert job("false").wait(60) == 1
    assert "requeue" not in calls(tmp_path)
    assert_clean(tmp_path)


def test_slurm_ends_if_nodes_do_not_join(job, tmp_path):
    """The command is not started on fewer nodes than asked for."""
    assert job("true", JOIN_STATUS="124").wait(60) == 3
    assert "vqvae2" not in calls(tmp_path)
    assert_clean(tmp_path)


def test_slurm_sends_its_signal_in_time_and_to_the_script_alone():
    """A signal to all processes would end Ray before the checkpoint is saved."""
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", SBATCH.read_text(encoding="utf-8"), re.MULTILINE))
    assert (
        re.fullmatch(r"B:TERM@\d{3}", options["signal"]) and "requeue" in options and options["open-mode"] == "append"
    )


def test_ray_accepts_the_file_of_the_cluster():
    """`ray up` validates it by the same functions. All nodes require the token."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = load(DEPLOY / "ray" / "cluster.yaml")
    validate_config(prepare_config(dict(config)))
    for role in ("head", "worker"):
        assert "RAY_AUTH_MODE=token" in config[f"{role}_start_ray_commands"][-1]
    assert len(config["provider"]["worker_ips"]) == config["min_workers"] == config["max_workers"]


def test_pods_of_kuberay_are_safe_and_have_shared_memory():
    """Every pod needs a token, is not root, has time to save, and has more than Docker's 64 MB of /dev/shm."""
    job = load(DEPLOY / "kuberay" / "rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"} and job["spec"]["shutdownAfterJobFinishes"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["terminationGracePeriodSeconds"] >= 60 and pod["securityContext"]["runAsNonRoot"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory" and set(mounts.values()) == set(volumes)


def test_versions_in_deploy_are_those_of_the_constraints():
    """The operator, the image and this package must agree on the version of Ray."""
    constraints = (DEPLOY.parent / "constraints.txt").read_text(encoding="utf-8")
    ray_version = load(DEPLOY / "kuberay" / "rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"ray=={ray_version}" in constraints.splitlines()


def test_the_image_runs_as_a_user_under_an_init_process():
    """Instructions are known, commands are valid shell, and what the wheel needs is sent to the build."""
    folder = DEPLOY / "docker"
    text = (folder / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    names = [name for name, _ in lines]
    assert set(names) <= {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    arguments = dict(lines)  # the last of each
    assert arguments["USER"] == "vqvae2" and names.index("USER") > max(
        i for i, name in enumerate(names) if name == "RUN"
    )
    assert arguments["ENTRYPOINT"] == '["tini", "--"]' and ["ARG", "TORCH_BACKEND=cpu"] in lines
    for _, command in (line for line in lines if line[0] == "RUN"):
        subprocess.run(["sh", "-n", "-c", command], check=True)
        assert shlex.split(command)
    sent = [line[1:] for line in (folder / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    assert not [name for name in sent if not (DEPLOY.parent / name).exists()]
    packages = Path(runtime.__file__).parents[2]
    assert {path.name for path in packages.iterdir() if (path / "__init__.py").exists()} - {"tests"} <= set(sent)
