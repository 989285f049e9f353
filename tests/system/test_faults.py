"""Kill anything, run the same command again, and get the same bytes as if nothing had happened."""

import os
import re
import resource
import signal
from pathlib import Path

import pytest
from projects import SMOKE, Job, Namespace, Project, until

STEPS, CHECKPOINT_EVERY = 100, 10
LONG = (
    *(*SMOKE, "--stage", "vqvae"),
    *("-S", f"train_vqvae.steps={STEPS}", "-S", f"train_vqvae.checkpoint_every={CHECKPOINT_EVERY}"),
    *("-S", "train_vqvae.log_every=5", "-S", f"train_vqvae.evaluate_every={STEPS}"),
)
# Steps take milliseconds: where a test strikes, one takes long enough to be struck, the first time that it comes.
SLOW = {"VQVAE2_FAULT": ",".join(f"slow@vqvae:0:{step}" for step in (17, 38, 59))}


def test_a_run_killed_twice_and_stopped_once_ends_in_the_same_bytes(
    project: Project, tmp_path: Path, namespace: Namespace
):
    """`kill -9` of the command, then of DVC: nothing is left alive; SIGTERM saves the step; the rest is the same."""
    unbroken = project.copy(tmp_path / "unbroken", DVC_SITE_CACHE_DIR=str(tmp_path / "dvc-of-unbroken"))
    unbroken.call("vqvae2", "run", *LONG)

    project = Project(project.folder, project.environment | SLOW)
    job = namespace.start(project, "vqvae2", "run", *LONG, log="first")
    _reach(project, job, CHECKPOINT_EVERY)
    _second_is_refused(project, namespace)
    job.send(signal.SIGKILL, "run")
    _nothing_is_left(namespace)

    job = _resumed(project, namespace, at_least=CHECKPOINT_EVERY, log="second")
    _reach(project, job, 3 * CHECKPOINT_EVERY)
    job.send(signal.SIGKILL, "dvc")
    killed = job.wait(20)
    assert killed.status == 1
    assert "error: DVC was ended by SIGKILL.\n" in killed.output
    assert "fix: Run the same command again" in killed.output
    _nothing_is_left(namespace)

    job = _resumed(project, namespace, at_least=3 * CHECKPOINT_EVERY, log="third")
    seen = _strike(project, job, 59)
    job.send(signal.SIGTERM, "run")
    stopped = job.wait(20)
    assert stopped.status == 128 + signal.SIGTERM
    assert stopped.output.splitlines()[-1] == "Stopped by SIGTERM. The same command resumes."
    assert "Traceback" not in stopped.output
    assert project.newest_step("vqvae") >= seen
    _nothing_is_left(namespace)

    done = _resumed(project, namespace, at_least=seen, log="fourth").wait()
    assert done.status == 0
    assert project.digests("vqvae") == unbroken.digests("vqvae")


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_is_one_line_and_loses_no_step(project: Project, namespace: Namespace):
    """It reaches every process of the terminal's foreground group at a time."""
    project = Project(project.folder, project.environment | SLOW)
    job = namespace.start(project, "vqvae2", "run", *LONG, log="first")
    seen = _strike(project, job, 17)
    (command,) = namespace.find("run")
    os.killpg(os.getpgid(command.pid), signal.SIGINT)
    stopped = job.wait(20)
    assert stopped.status == 128 + signal.SIGINT
    assert stopped.output.splitlines()[-1] == "Stopped by SIGINT. The same command resumes."
    assert "Traceback" not in stopped.output and "KeyboardInterrupt" not in stopped.output
    _nothing_is_left(namespace)
    _resumed(project, namespace, at_least=seen, log="second")


@pytest.mark.slow
def test_a_cache_whose_disk_is_full_keeps_what_was_made(project: Project, namespace: Namespace):
    """DVC says what it could not put there, and ends with status 0; with room again, nothing has to run again."""
    cache = project.folder / ".dvc" / "cache"
    namespace.say(f"mount -t tmpfs -o size={4 * resource.getpagesize()} none {cache}")
    settings = ("-S", "train_vqvae.steps=12", "--only", "--stage", "vqvae")
    full = namespace.start(project, "vqvae2", "run", *SMOKE, *settings, log="full").wait()
    assert full.status == 3 and "vqvae: 12/12 step" in full.output and "Traceback" not in full.output
    assert f"No space left on device: '{project.folder}/artifacts/vqvae/model.safetensors'" in full.output
    assert full.output.endswith("then run: dvc commit -f vqvae\n")
    made = project.digests("vqvae")
    namespace.say(f"umount {cache}")
    assert namespace.start(project, "dvc", "commit", "-f", "vqvae", log="commit").wait().status == 0
    again = namespace.start(project, "vqvae2", "run", "--only", "--stage", "vqvae", log="again").wait()
    assert (again.status, again.output) == (0, "Everything is up to date.\n")
    assert project.digests("vqvae") == made


@pytest.mark.slow
def test_a_worker_killed_on_demand_costs_the_steps_since_the_newest_checkpoint(
    project: Project, tmp_path: Path, namespace: Namespace
):
    """Asked for at step 13, with checkpoints every 5: the same command goes on from 10 to its end, by itself."""
    settings = ("steps=30", "checkpoint_every=5", "log_every=5", "evaluate_every=30")
    words = [word for setting in settings for word in ("-S", f"train_vqvae.{setting}")]
    falling = Project(project.folder, {**project.environment, "VQVAE2_FAULT": "kill@vqvae:0:13"})
    done = namespace.start(falling, "vqvae2", "run", *SMOKE, *words, "--stage", "vqvae", log="falling").wait()
    assert done.status == 0
    assert "Resuming at step 10 of 30." in done.output


def _second_is_refused(project: Project, namespace: Namespace) -> None:
    second = namespace.start(project, "vqvae2", "run", log="refused").wait(10)
    assert second.status == 3
    assert re.search(r"Another vqvae2 or dvc is at work here: PID \d+", second.output)
    assert "fix: Wait for it or stop it" in second.output


def _reach(project: Project, job: Job, step: int) -> None:
    until(lambda: job.ended or project.newest_step("vqvae") >= step, 200, lambda: job.output)
    assert not job.ended, job.output


def _nothing_is_left(namespace: Namespace) -> None:
    until(lambda: not namespace.processes(), 10, lambda: f"alive: {namespace.processes()}")


def _resumed(project: Project, namespace: Namespace, *, at_least: int, log: str) -> Job:
    newest = project.newest_step("vqvae")
    assert newest >= at_least
    job = namespace.start(project, "vqvae2", "run", *LONG, log=log)
    until(lambda: job.ended or f"Resuming at step {newest} of {STEPS}." in job.output, 200, lambda: job.output)
    assert not job.ended, job.wait()
    return job


def _strike(project: Project, job: Job, step: int) -> int:
    """Wait until a slow step has begun, before which so many have been made."""
    mark = f"vqvae/*/fault-slow-0-{step}"
    until(lambda: job.ended or list((project.folder / "runs").glob(mark)), 200, lambda: job.output)
    assert not job.ended, job.output
    return step
