"""Kill random processes of full runs at random times, then compare every artifact with that of an undisturbed run.

    python benchmarks/chaos.py --kills 20

Each kill sends SIGKILL or SIGTERM to the command, DVC, a stage, the process that holds the cluster, or a Ray worker. If
the command ends, the same command runs again. When a run finishes, another starts from an empty project, until all
kills are done. The script fails if a process of ours outlives its run by 10 s, or if one byte of an artifact differs.
Needs Linux and root, for private namespaces.
"""

import argparse
import random
import re
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.command_line_project import SMOKE, CommandLineProject
from tests.namespace import Job, Namespace, missing_namespace_support, process_role, wait_until

TARGETS = ("run", "dvc", "stage", "cluster", "worker")
STEPS, CHECKPOINT_EVERY, LOG_EVERY = 120, 20, 5
SETTINGS = tuple(
    f"{section}.{key}={value}"
    for section in ("train_vqvae", "priors.top.train", "priors.bottom.train")
    for key, value in (
        ("steps", STEPS),
        ("checkpoint_every", CHECKPOINT_EVERY),
        ("evaluate_every", STEPS),
        ("log_every", LOG_EVERY),
    )
)
# Steps of these networks take milliseconds. Slowing some of them gives time for kills between steps and between parts.
SLOW_FAULTS = ",".join(
    f"slow@{stage}:0:{step}"
    for stages, steps in (
        (("vqvae", "prior_top", "prior_bottom"), range(7, STEPS, 16)),
        (("shard", "codes", "sample", "evaluate"), range(1)),
    )
    for stage in stages
    for step in steps
)
PROGRESS = r"^[\w@]+: \d+/|^report "  # pattern of a stage's progress line, or of the run's last line
NEVER = r"(?!)"  # pattern that matches nothing
RUN_TIMEOUT_S = 900.0  # for a run without kills
MIN_KILL_DELAY_S, MAX_KILL_DELAY_S = 5, 40  # a full run takes minutes
RESUME_TIMEOUT_S = 180  # until a stage makes progress, with the start of a cluster
END_TIMEOUT_S = 60  # until the command ends after a kill
COMMAND = ("vqvae2", "run", *SMOKE, *(argument for setting in SETTINGS for argument in ("-S", setting)))


@dataclass
class Kill:
    """Row of the table: one kill and its effect."""

    number: int
    target: str  # signal and process
    progress: str  # running stage and its step
    effect: str = "continues"  # or the exit status of the command
    steps_lost: str = ""
    seconds: float = 0.0  # from the kill, or from the restart, until a stage makes progress


class Chaos:
    """Full runs of one project after another, with random kills."""

    def __init__(self, namespace: Namespace, empty_project: CommandLineProject, folder: Path, kills: int, seed: int):
        self.namespace, self.empty_project, self.folder, self.kill_count = namespace, empty_project, folder, kills
        self.random = random.Random(seed)
        self.kills: list[Kill] = []
        self.starts = 0
        self.kill_may_explain_failure = False  # the last kill may still end the command

    def full_run(self, number: int) -> CommandLineProject:
        """Run an empty project to the end, with kills on the way while some are left; return the project."""
        environment = {"DVC_SITE_CACHE_DIR": str(self.folder / f"dvc-{number}"), "VQVAE2_FAULT": SLOW_FAULTS}
        project = self.empty_project.copy(self.folder / f"killed-{number}", **environment)
        job = self._start(project)
        while True:
            kills_left = len(self.kills) < self.kill_count
            delay = self.random.uniform(MIN_KILL_DELAY_S, MAX_KILL_DELAY_S) if kills_left else RUN_TIMEOUT_S
            end = time.monotonic() + delay
            while time.monotonic() < end and not job.ended:
                time.sleep(0.05)
            if not job.ended and kills_left:
                if (target := self._choose_target()) is not None:
                    job = self._kill(project, job, *target)
                continue
            if job.wait(1).status == 0:
                return project
            if not self.kill_may_explain_failure:
                raise SystemExit(f"the command failed without a kill:\n{job.output}")
            self.kill_may_explain_failure = False  # the last kill took effect late
            job = self._start(project)

    def _targets(self) -> dict[str, list[psutil.Process]]:
        """Return the processes that may be killed, by kind."""
        targets: dict[str, list[psutil.Process]] = {}
        for process in self.namespace.processes():
            if (kind := process_role(process)) in TARGETS:
                targets.setdefault(kind, []).append(process)
        return targets

    def _choose_target(self) -> tuple[str, psutil.Process] | None:
        """Return the kind of a random process and the process; None if there is none."""
        targets = self._targets()
        if not targets:
            return None
        kind = self.random.choice(sorted(targets))
        return kind, self.random.choice(targets[kind])

    def _kill(self, project: CommandLineProject, job: Job, kind: str, process: psutil.Process) -> Job:
        """Kill a process and wait until a stage makes progress; return the running job."""
        number = self.random.choice((signal.SIGKILL, signal.SIGTERM))
        stage, output_length = running_stage(job), len(job.output)
        step = project.reported_step(stage)
        kill = Kill(len(self.kills) + 1, f"{number.name} {kind}", f"{stage} {step}".removesuffix(" 0"))
        self.kills.append(kill)
        self.kill_may_explain_failure = True
        start = time.monotonic()
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            kill.effect = "it had just ended"
            return job
        # The command ends with the process it depends on, unless the stage had just finished. A worker is replaced.
        next_stage = r"^\w+ +runs:|^report "
        pattern = PROGRESS if kind == "worker" else next_stage if kind in ("stage", "cluster") else NEVER
        wait_until(
            lambda: job.ended or re.search(pattern, job.output[output_length:], re.MULTILINE),
            RESUME_TIMEOUT_S if kind in ("worker", "cluster") else END_TIMEOUT_S,
            lambda: f"neither end nor progress after {kill}:\n{job.output}",
        )
        if job.ended:
            self.kill_may_explain_failure = False
            kill.effect = f"status {job.wait().status}"
            saved_step = project.newest_step(stage)
            wait_until(lambda: not self._targets(), 10, lambda: f"{kill} left {self._targets()}")
            # Two agents of Ray take longer to notice that their node is gone. They hold no files and no data.
            wait_until(lambda: not self.namespace.processes(), 90, lambda: f"{kill} left {self.namespace.processes()}")
            start, output_length = time.monotonic(), 0
            job = self._start(project)
            wait_until(
                lambda: job.ended or re.search(PROGRESS, job.output, re.MULTILINE),
                RESUME_TIMEOUT_S,
                lambda: f"no progress after {kill}:\n{job.output}",
            )
            if step:
                kill.steps_lost = str(max(0, step - saved_step))
        elif resumed := re.search(r"Resuming at step (\d+)", job.output[output_length:]):
            kill.steps_lost = str(max(0, step - int(resumed[1])))
        kill.seconds = time.monotonic() - start
        print(row(kill), flush=True)
        return job

    def _start(self, project: CommandLineProject) -> Job:
        self.starts += 1
        return self.namespace.start(project, *COMMAND, log=f"start-{self.starts}")


def running_stage(job: Job) -> str:
    """Return the stage that runs."""
    return (re.findall(r"^(\w+) +runs:", job.output, re.MULTILINE) or ["-"])[-1]


def row(kill: Kill) -> str:
    """Return a row of the table."""
    cells = (str(kill.number), kill.target, kill.progress, kill.effect, kill.steps_lost, f"{kill.seconds:.1f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="total number of kills")
    parser.add_argument("--seed", type=int, default=0, help="random seed of times, processes and signals")
    parser.add_argument("--folder", type=Path, help="folder of the project copies; by default a temporary one")
    options = parser.parse_args()
    if reason := missing_namespace_support():
        raise SystemExit(f"private namespaces are not available: {reason}")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="vqvae2-chaos-"))
    empty_project = CommandLineProject.of_working_tree(folder / "empty")
    with Namespace() as namespace:
        undisturbed = empty_project.copy(folder / "undisturbed", DVC_SITE_CACHE_DIR=str(folder / "dvc"))
        start = time.monotonic()
        if (ended := namespace.start(undisturbed, *COMMAND, log="undisturbed").wait(RUN_TIMEOUT_S)).status:
            raise SystemExit(ended.output)
        print(f"An undisturbed run takes {time.monotonic() - start:.0f} s.\n")
        print(
            "| kill | target | progress | the command | steps lost | s until progress |\n|---|---|---|---|---|---|",
            flush=True,
        )
        chaos, runs = Chaos(namespace, empty_project, folder, options.kills, options.seed), 0
        expected = undisturbed.digests()
        while len(chaos.kills) < options.kills:
            runs += 1
            actual = chaos.full_run(runs).digests()
            different = sorted(name for name in expected | actual if expected.get(name) != actual.get(name))
            if different:
                raise SystemExit(f"\nDifferent after run {runs}: {', '.join(different)}. Kept in {folder}")
    print(f"\n{len(chaos.kills)} kills over {runs} full runs: all {len(expected)} artifacts equal in each.")


if __name__ == "__main__":
    main()
