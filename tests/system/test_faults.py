"""Tests of faults in a run: the same command resumes and gives the bytes of an undisturbed run."""

import os
import re
import resource
import signal
from pathlib import Path

import pytest

from pipeline import params
from stages import vqvae
from stages.formats import artifact
from stages.runtime.context import StageContext
from tests.command_line_project import SMOKE, CommandLineProject
from tests.mini_pipeline import without_ray
from tests.namespace import Job, Namespace, wait_until

STEPS, CHECKPOINT_EVERY = 100, 10
LONG = (
    *(*SMOKE, "--stage", "vqvae"),
    *("-S", f"train_vqvae.steps={STEPS}", "-S", f"train_vqvae.checkpoint_every={CHECKPOINT_EVERY}"),
    *("-S", "train_vqvae.log_every=5", "-S", f"train_vqvae.evaluate_every={STEPS}"),
)
# Steps take milliseconds: these are slowed on their first execution, so that a test can stop the run inside them.
SLOW = {"VQVAE2_FAULT": ",".join(f"slow@vqvae:0:{step}" for step in (17, 38, 59))}


def test_a_run_that_is_killed_and_stopped_ends_in_the_same_bytes(
    project: CommandLineProject, tmp_path: Path, namespace: Namespace
):
    """SIGKILL of the command leaves no process, SIGTERM saves the step, and the final bytes are the same."""
    project = CommandLineProject(project.folder, project.environment | SLOW)
    job = namespace.start(project, "vqvae2", "run", *LONG, log="first")
    _wait_for_checkpoint(project, job, CHECKPOINT_EVERY)
    _check_second_command_is_rejected(project, namespace)
    job.send(signal.SIGKILL, "run")
    _check_no_process_is_left(namespace)

    job = _resume(project, namespace, at_least=CHECKPOINT_EVERY, log="second")
    slow_step = _wait_for_slow_step(project, job, 38)
    job.send(signal.SIGTERM, "run")
    stopped = job.wait(20)
    assert stopped.status == 128 + signal.SIGTERM
    assert stopped.output.splitlines()[-1] == "Stopped by SIGTERM. Run the same command again to resume."
    assert "Traceback" not in stopped.output
    assert project.newest_step("vqvae") >= slow_step
    _check_no_process_is_left(namespace)

    result = _resume(project, namespace, at_least=slow_step, log="third").wait()
    assert result.status == 0
    assert project.digests("vqvae") == {"vqvae": _undisturbed_digest(project, tmp_path)}


@pytest.mark.slow
def test_a_run_whose_dvc_is_killed_ends_in_the_same_bytes(
    project: CommandLineProject, tmp_path: Path, namespace: Namespace
):
    """SIGKILL of DVC ends the command with an error and a fix, and leaves no process."""
    project = CommandLineProject(project.folder, project.environment | SLOW)
    job = namespace.start(project, "vqvae2", "run", *LONG, log="first")
    _wait_for_checkpoint(project, job, CHECKPOINT_EVERY)
    job.send(signal.SIGKILL, "dvc")
    killed = job.wait(20)
    assert killed.status == 1
    assert "error: DVC was killed by SIGKILL.\n" in killed.output
    assert "fix: Run the same command again" in killed.output
    _check_no_process_is_left(namespace)

    result = _resume(project, namespace, at_least=CHECKPOINT_EVERY, log="second").wait()
    assert result.status == 0
    assert project.digests("vqvae") == {"vqvae": _undisturbed_digest(project, tmp_path)}


@pytest.mark.slow
def test_ctrl_c_saves_the_step_and_prints_one_line(project: CommandLineProject, namespace: Namespace):
    """The terminal sends SIGINT to every process of the foreground group at once."""
    project = CommandLineProject(project.folder, project.environment | SLOW)
    job = namespace.start(project, "vqvae2", "run", *LONG, log="first")
    slow_step = _wait_for_slow_step(project, job, 17)
    (command,) = namespace.find("run")
    os.killpg(os.getpgid(command.pid), signal.SIGINT)
    stopped = job.wait(20)
    assert stopped.status == 128 + signal.SIGINT
    assert stopped.output.splitlines()[-1] == "Stopped by SIGINT. Run the same command again to resume."
    assert "Traceback" not in stopped.output and "KeyboardInterrupt" not in stopped.output
    _check_no_process_is_left(namespace)
    _resume(project, namespace, at_least=slow_step, log="second")


@pytest.mark.slow
def test_a_full_disk_of_the_cache_loses_no_artifact(project: CommandLineProject, namespace: Namespace):
    """DVC ends with status 0 although it cannot cache the artifact; with free space, `dvc commit` completes the run."""
    cache = project.folder / ".dvc" / "cache"
    namespace.shell_line(f"mount -t tmpfs -o size={4 * resource.getpagesize()} none {cache}")
    settings = ("-S", "train_vqvae.steps=12", "--only", "--stage", "vqvae")
    full = namespace.start(project, "vqvae2", "run", *SMOKE, *settings, log="full").wait()
    assert full.status == 3 and "vqvae: 12/12 step" in full.output and "Traceback" not in full.output
    assert f"No space left on device: '{project.folder}/artifacts/vqvae/model.safetensors'" in full.output
    assert full.output.endswith("then run: dvc commit -f vqvae\n")
    digests = project.digests("vqvae")
    namespace.shell_line(f"umount {cache}")
    assert namespace.start(project, "dvc", "commit", "-f", "vqvae", log="commit").wait().status == 0
    again = namespace.start(project, "vqvae2", "run", "--only", "--stage", "vqvae", log="again").wait()
    assert (again.status, again.output) == (0, "Everything is up to date.\n")
    assert project.digests("vqvae") == digests


@pytest.mark.slow
def test_a_killed_worker_resumes_from_the_newest_checkpoint(
    project: CommandLineProject, tmp_path: Path, namespace: Namespace
):
    """The worker dies at step 13 with a checkpoint every 5 steps: the same command continues from step 10."""
    settings = ("steps=30", "checkpoint_every=5", "log_every=5", "evaluate_every=30")
    overrides = [argument for setting in settings for argument in ("-S", f"train_vqvae.{setting}")]
    faulty = CommandLineProject(project.folder, {**project.environment, "VQVAE2_FAULT": "kill@vqvae:0:13"})
    result = namespace.start(faulty, "vqvae2", "run", *SMOKE, *overrides, "--stage", "vqvae", log="faulty").wait()
    assert result.status == 0
    assert "Resuming at step 10 of 30." in result.output


def _undisturbed_digest(project: CommandLineProject, folder: Path) -> str:
    """Train with the project's settings in this process, without Ray; return the digest of the artifact."""
    settings = params.load(project.folder / "params.yaml")
    work, out = folder / "work", folder / "vqvae"
    work.mkdir()
    with without_ray():
        vqvae.run(
            project.folder / "artifacts" / "shards", out, folder / "vqvae.json", folder / "plots",
            vqvae=settings.vqvae, augment=settings.augment, train_vqvae=settings.train_vqvae, seed=settings.seed,
            context=StageContext("vqvae", "f", work, settings.cluster),
        )  # fmt: skip
    return artifact.sha256(out / artifact.MANIFEST)


def _check_second_command_is_rejected(project: CommandLineProject, namespace: Namespace) -> None:
    second = namespace.start(project, "vqvae2", "run", log="refused").wait(10)
    assert second.status == 3
    assert re.search(r"Another vqvae2 or dvc process uses this project: PID \d+", second.output)
    assert "fix: Wait until it ends, or stop it" in second.output


def _wait_for_checkpoint(project: CommandLineProject, job: Job, step: int) -> None:
    wait_until(lambda: job.ended or project.newest_step("vqvae") >= step, 200, lambda: job.output)
    assert not job.ended, job.output


def _check_no_process_is_left(namespace: Namespace) -> None:
    wait_until(lambda: not namespace.processes(), 10, lambda: f"alive: {namespace.processes()}")


def _resume(project: CommandLineProject, namespace: Namespace, *, at_least: int, log: str) -> Job:
    newest = project.newest_step("vqvae")
    assert newest >= at_least
    job = namespace.start(project, "vqvae2", "run", *LONG, log=log)
    wait_until(lambda: job.ended or f"Resuming at step {newest} of {STEPS}." in job.output, 200, lambda: job.output)
    assert not job.ended, job.wait()
    return job


def _wait_for_slow_step(project: CommandLineProject, job: Job, step: int) -> int:
    """Wait until a slow step has begun; return its number, which is the number of completed steps."""
    marker = f"vqvae/*/fault-slow-0-{step}"
    wait_until(lambda: job.ended or list((project.folder / "runs").glob(marker)), 200, lambda: job.output)
    assert not job.ended, job.output
    return step
