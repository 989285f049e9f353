"""Kill random processes of whole runs at random moments, then hold every artifact against an unbroken run's.

    python benchmarks/chaos.py --kills 20

Each kill sends SIGKILL or SIGTERM to the command, DVC, a stage, the process that holds the cluster, or a Ray worker;
whatever ends by it is started again by the same command. When a run gets to its end, another begins from nothing, until
all kills are spent. Fails if anything of ours outlives its run by ten seconds, or if one byte of one artifact differs.
Needs Linux and root, for private namespaces.
"""

import argparse
import random
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.append(str(Path(__file__).parents[1] / "tests" / "system"))  # the copies and namespaces of the tests

from projects import SMOKE, Job, Namespace, Project, kind_of, namespaces_refused, until

KINDS = ("run", "dvc", "stage", "cluster", "worker")
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
# These networks' steps take milliseconds: a stop at some of them makes room for kills between steps and between parts.
SLOW = ",".join(
    f"slow@{stage}:0:{step}"
    for stages, steps in (
        (("vqvae", "prior_top", "prior_bottom"), range(7, STEPS, 16)),
        (("shard", "codes", "sample", "evaluate"), range(1)),
    )
    for stage in stages
    for step in steps
)
AT_WORK = r"^[\w@]+: \d+/|^report "  # a stage tells of its progress, or the end is reached
NEVER = r"(?!)"
LONGEST_SECONDS = 900.0  # of a run that is left alone
COMMAND = ("vqvae2", "run", *SMOKE, *(word for setting in SETTINGS for word in ("-S", setting)))


@dataclass
class Kill:
    """One kill, and what came of it."""

    number: int
    what: str  # signal and process
    where: str  # the stage at work, and its step
    ended: str = "goes on"  # or the exit status of the command
    lost: str = ""  # steps
    seconds: float = 0.0  # from the kill, or from the new start, until the stage is at work again


class Chaos:
    """Whole runs of one project after another, under fire."""

    def __init__(self, namespace: Namespace, fresh: Project, folder: Path, kills: int, seed: int):
        self.namespace, self.fresh, self.folder, self.kills = namespace, fresh, folder, kills
        self.random = random.Random(seed)
        self.done: list[Kill] = []
        self.starts = 0
        self.excused = False  # whether a failure can still be the last kill's doing

    def whole_run(self, number: int) -> Project:
        """Run to the end from nothing, killing on the way while kills are left."""
        environment = {"DVC_SITE_CACHE_DIR": str(self.folder / f"dvc-{number}"), "VQVAE2_FAULT": SLOW}
        project = self.fresh.copy(self.folder / f"broken-{number}", **environment)
        job = self._start(project)
        while True:
            kills_left = len(self.done) < self.kills
            moment = time.monotonic() + (self.random.uniform(5, 40) if kills_left else LONGEST_SECONDS)
            while time.monotonic() < moment and not job.ended:
                time.sleep(0.05)
            if not job.ended and kills_left:
                if (victim := self._victim()) is not None:
                    job = self._kill(project, job, *victim)
                continue
            if job.wait(1).status == 0:
                return project
            if not self.excused:
                raise SystemExit(f"it ended although nothing was killed:\n{job.output}")
            self.excused = False  # the last kill took effect late
            job = self._start(project)

    def _ours(self) -> dict[str, list[psutil.Process]]:
        found: dict[str, list[psutil.Process]] = {}
        for process in self.namespace.processes():
            if (kind := kind_of(process)) in KINDS:
                found.setdefault(kind, []).append(process)
        return found

    def _victim(self) -> tuple[str, psutil.Process] | None:
        found = self._ours()
        if not found:
            return None
        kind = self.random.choice(sorted(found))
        return kind, self.random.choice(found[kind])

    def _kill(self, project: Project, job: Job, kind: str, process: psutil.Process) -> Job:
        number = self.random.choice((signal.SIGKILL, signal.SIGTERM))
        stage, before = at_work(job), len(job.output)
        step = project.reported_step(stage)
        kill = Kill(len(self.done) + 1, f"{number.name} {kind}", f"{stage} {step}".removesuffix(" 0"))
        self.done.append(kill)
        self.excused = True
        clock = time.monotonic()
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            kill.ended = "it had just ended"
            return job
        # The command ends with what it stands on, unless a stage had just done its work; a worker is replaced.
        sign = AT_WORK if kind == "worker" else r"^\w+ +runs:|^report " if kind in ("stage", "cluster") else NEVER
        until(
            lambda: job.ended or re.search(sign, job.output[before:], re.MULTILINE),
            180 if kind in ("worker", "cluster") else 60,
            lambda: f"neither ended nor at work after {kill}:\n{job.output}",
        )
        if job.ended:
            self.excused = False
            kill.ended = f"status {job.wait().status}"
            saved = project.newest_step(stage)
            until(lambda: not self._ours(), 10, lambda: f"{kill} left {self._ours()}")
            # Two agents of Ray's own notice only later that their node is gone; they hold nothing.
            until(lambda: not self.namespace.processes(), 90, lambda: f"{kill} left {self.namespace.processes()}")
            clock, before = time.monotonic(), 0
            job = self._start(project)
            until(
                lambda: job.ended or re.search(AT_WORK, job.output, re.MULTILINE),
                180,
                lambda: f"stuck after {kill}:\n{job.output}",
            )
            if step:
                kill.lost = str(max(0, step - saved))
        elif resumed := re.search(r"Resuming at step (\d+)", job.output[before:]):
            kill.lost = str(max(0, step - int(resumed[1])))
        kill.seconds = time.monotonic() - clock
        print(row(kill), flush=True)
        return job

    def _start(self, project: Project) -> Job:
        self.starts += 1
        return self.namespace.start(project, *COMMAND, log=f"start-{self.starts}")


def at_work(job: Job) -> str:
    """Name the stage that runs."""
    return (re.findall(r"^(\w+) +runs:", job.output, re.MULTILINE) or ["-"])[-1]


def row(kill: Kill) -> str:
    cells = (str(kill.number), kill.what, kill.where, kill.ended, kill.lost, f"{kill.seconds:.1f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills in all")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of moments, processes and signals")
    parser.add_argument("--folder", type=Path, help="where the copies go; a temporary folder unless given")
    given = parser.parse_args()
    if reason := namespaces_refused():
        raise SystemExit(f"private namespaces cannot be had here: {reason}")
    folder = given.folder or Path(tempfile.mkdtemp(prefix="vqvae2-chaos-"))
    fresh = Project.of_working_tree(folder / "fresh")
    with Namespace() as namespace:
        unbroken = fresh.copy(folder / "unbroken", DVC_SITE_CACHE_DIR=str(folder / "dvc"))
        clock = time.monotonic()
        if (done := namespace.start(unbroken, *COMMAND, log="unbroken").wait(900)).status:
            raise SystemExit(done.output)
        print(f"An unbroken run takes {time.monotonic() - clock:.0f} s.\n")
        print(
            "| kill | what | at | the command | steps lost | s until at work |\n|---|---|---|---|---|---|", flush=True
        )
        chaos, runs = Chaos(namespace, fresh, folder, given.kills, given.seed), 0
        expected = unbroken.digests()
        while len(chaos.done) < given.kills:
            runs += 1
            found = chaos.whole_run(runs).digests()
            if different := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
                raise SystemExit(f"\nDifferent after run {runs}: {', '.join(different)}. Kept in {folder}")
    print(f"\n{len(chaos.done)} kills over {runs} whole runs: all {len(expected)} artifacts equal in each.")


if __name__ == "__main__":
    main()
