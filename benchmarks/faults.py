"""Let every fault come once, in real runs, and write what came of it into the table of docs/reliability.md.

    python benchmarks/faults.py

Each row begins with a copy of a finished run of the smallest pipeline, in which one stage has to run again. The fault
comes, the same command is given again if it has ended, and what the stage makes in the end is held against an unbroken
run's. Fails if one byte differs, if a process of ours outlives its command by ten seconds, or one of Ray's own by a
hundred. Needs Linux and root, for private namespaces.
"""

import argparse
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals

sys.path.append(str(Path(__file__).parents[1] / "tests" / "system"))  # the copies and namespaces of the tests

from nodes import Nodes, wait_for
from projects import ROOT, SMOKE, Job, Namespace, Project, kind_of, namespaces_refused, until

from stages.formats import curves

DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- written by benchmarks/faults.py -->\n", "<!-- to here -->\n"
HEAD = "| fault | stage | what happened | steps lost | s | the plain stack |\n|---|---|---|---|---|---|\n"
PATIENCE = 300.0  # seconds
STEPS, CHECKPOINT_EVERY, FALL = 40, 5, 13
EVERY = {"steps": STEPS, "log_every": CHECKPOINT_EVERY, "checkpoint_every": CHECKPOINT_EVERY, "evaluate_every": STEPS}
SETTINGS = {  # by which a stage has to run again
    "shard": ("dataset.images_per_shard=16",),
    "vqvae": tuple(f"train_vqvae.{key}={value}" for key, value in EVERY.items()),
    "codes": ("codes.copies=2",),
    "prior_top": tuple(f"priors.top.train.{key}={value}" for key, value in EVERY.items()),
    "prior_bottom": tuple(f"priors.bottom.train.{key}={value}" for key, value in EVERY.items()),
    "sample": ("sample.temperature=0.9", "sample.images_per_part=4"),
    "evaluate": ("evaluate.max_images=40",),
}
MADE = {
    "shard": "shards",
    "vqvae": "vqvae",
    "codes": "codes",
    "prior_top": "priors/top",
    "prior_bottom": "priors/bottom",
    "sample": "samples",
    "evaluate": "report",
}
ON_NODES = (
    *(*SMOKE, "-S", "cluster=local", "-S", "cluster.max_failures=8", "-S", "train_vqvae.evaluate_every=60"),
    *("-S", "train_vqvae.steps=60", "-S", "train_vqvae.checkpoint_every=10", "-S", "train_vqvae.log_every=1"),
    *("--only", "--stage", "vqvae"),
)
LOSSES = {  # on several nodes: the newest checkpoint, what is lost, and what comes of it with Ray Train alone
    10: ("`kill -9` of a worker", "goes back from 13 to 5 after 18.6 s"),
    20: ("`kill -9` of a raylet, a node to spare", "goes back from 13 to 10 after 29.6 s"),
    30: ("a cut cable, a node to spare", "goes back from 13 to 5 after 73.6 s"),
    40: ("`kill -9` of a raylet, no node to spare", "tries again without end"),
}


@dataclass(frozen=True)
class Scenario:
    """A fault that is asked for by VQVAE2_FAULT, or a signal, or a signal at the moment of the fault."""

    what: str
    stage: str
    kind: str = ""  # of the fault
    signal: Signals | None = None
    to: str = ""  # the process that gets the signal
    step: int = FALL  # or part, of the fault
    environment: dict[str, str] = field(default_factory=dict)
    plain: str = ""  # what Ray Train, DVC and MLflow do by themselves, where it has been measured


IMPATIENT = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "10"}
MAPPING = ("shard", "codes", "sample", "evaluate")  # parts
KILLED = "goes back from 13 to 5 after 18.6 s"
SCENARIOS = (
    Scenario("`kill -9` of a worker", "vqvae", "kill", plain=KILLED),
    *(Scenario("`kill -9` of a worker", stage, "kill", plain=KILLED) for stage in ("prior_top", "prior_bottom")),
    Scenario("a worker exits", "vqvae", "exit"),
    Scenario("a worker raises", "vqvae", "raise"),
    Scenario(
        "a worker hangs, which is waited for 10 s",
        "vqvae",
        "stop",
        environment=IMPATIENT,
        plain="goes back from 13 to 5 after 55.8 s",
    ),
    Scenario("the loss is no number", "vqvae", "nan"),
    Scenario(
        "the disk is full", "vqvae", "full", plain="not retried; half a checkpoint stays under a whole one's name"
    ),
    Scenario(
        "SIGTERM to the command, in a step of 5 s",
        "vqvae",
        "slow",
        signal=SIGTERM,
        to="run",
        plain="goes back from 18 to 10",
    ),
    Scenario("`kill -9` of the command", "vqvae", "slow", signal=SIGKILL, to="run", plain="goes back from 13 to 10"),
    Scenario(
        "`kill -9` of DVC",
        "vqvae",
        "slow",
        signal=SIGKILL,
        to="dvc",
        plain="training goes on alone; the next run deletes its output and starts a second",
    ),
    Scenario("`kill -9` of the stage", "vqvae", "slow", signal=SIGKILL, to="stage"),
    Scenario("`kill -9` of the cluster", "vqvae", "slow", signal=SIGKILL, to="cluster"),
    *(Scenario("`kill -9` of a worker", stage, signal=SIGKILL, to="worker") for stage in MAPPING),
    *(
        Scenario("a worker hangs, which is waited for 10 s", stage, "stop", step=0, environment=IMPATIENT)
        for stage in MAPPING
    ),
)
FLIPS = (
    ("a checkpoint", "stages/runtime/test_checkpoint_damage.py::test_a_thousand_bit_flips_are_all_found", "0 of 100"),
    ("a shard", "stages/formats/test_shards.py::test_a_thousand_bit_flips_are_all_found", "18 of 20 images vanish"),
    ("codes", "stages/test_training_stages.py::test_every_flipped_bit_in_a_codes_file_is_caught", "4 of 180"),
)


class Bench:
    """Copies of a finished run, to break."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.finished = Project.of_working_tree(folder / "finished" / "project")
        self.finished.environment["DVC_SITE_CACHE_DIR"] = str(folder / "finished" / "dvc")
        self.finished.run(*SMOKE)
        self.unbroken = cache(self._unbroken)

    def copy(self, name: str, **environment: str) -> Project:
        folder = self.folder / re.sub(r"\W+", "-", name)
        folder.mkdir()
        return self.finished.copy(folder / "project", DVC_SITE_CACHE_DIR=str(folder / "dvc"), **environment)

    def _unbroken(self, stage: str) -> tuple[dict[str, str], float]:
        """What a stage makes when it is left alone, and in how many seconds."""
        project, began = self.copy(f"unbroken {stage}"), time.time()
        project.call(*command(stage))
        return project.digests(MADE[stage]), time.time() - began

    def fall(self, number: int, scenario: Scenario) -> str:
        """Let a fault come, and see the run to its end."""
        fault = f"{scenario.kind}@{scenario.stage}:0:{scenario.step}"
        # A step of this pipeline takes milliseconds: the one before is slowed, so that the checkpoint is on disk.
        slow = f"slow@{scenario.stage}:0:{scenario.step - 1}," if scenario.step else ""
        asked = {"VQVAE2_FAULT": f"{slow}{fault}"} if scenario.kind else {}
        project = self.copy(f"{number} {scenario.kind}", **asked, **scenario.environment)
        with Namespace() as namespace:
            job = namespace.start(project, *command(scenario.stage), log="first")
            due = (lambda: fell(project, scenario.step)) if scenario.kind else (lambda: namespace.find(scenario.to))
            until(lambda: due() or job.ended, PATIENCE, lambda: job.output)
            if scenario.kind and not fell(project, scenario.step):
                raise SystemExit(f"{fault} did not come:\n{job.output}")
            if scenario.signal:
                job.send(scenario.signal, scenario.to)
            began = time.time() if scenario.signal else fell(project, scenario.step)
            until(lambda: job.ended or resumed_at(job), PATIENCE, lambda: job.output)
            seconds, happened = time.time() - began, "goes on by itself"
            if job.ended and job.wait().status:
                happened = f"{ending(job)} after {seconds:.1f} s; {alone(namespace)}; goes on when run again"
                again = time.time()
                job = namespace.start(project, *command(scenario.stage), log="second")
                until(lambda: job.ended or resumed_at(job), PATIENCE, lambda: job.output)
                seconds += time.time() - again
            if (done := job.wait()).status:
                raise SystemExit(f"{scenario} cannot be got over:\n{done.output}")
            lost = str(max(0, scenario.step - int(step))) if (step := resumed_at(job)) else "-"
        if project.digests(MADE[scenario.stage]) != self.unbroken(scenario.stage)[0]:
            raise SystemExit(f"{scenario} leaves other bytes in {project.folder}")
        return row(scenario.what, scenario.stage, happened, lost, f"{seconds:.1f}", scenario.plain)

    def missing_gpu(self) -> str:
        """Ask for what is not there."""
        with Namespace() as namespace:
            began = time.time()
            asked = command("vqvae", "-S", "cluster.gpus_per_worker=1")
            job = namespace.start(self.copy("gpu"), *asked, log="gpu")
            if job.wait().status != 3:
                raise SystemExit(job.output)
            return row(
                "no GPU where one is asked for", "vqvae", ending(job), "-", f"{time.time() - began:.1f}", "never ends"
            )

    def silent_server(self) -> str:
        """Track to a server that accepts and never answers."""
        project = self.copy("silent", MLFLOW_TRACKING_URI="http://127.0.0.1:5000")
        listen = "import socket, time; s = socket.create_server(('127.0.0.1', 5000), backlog=99); time.sleep(9999)"
        with Namespace() as namespace:
            namespace.start(project, "python", "-c", listen, log="server")
            began = time.time()
            job = namespace.start(project, *command("vqvae"), log="silent")
            if job.wait().status or project.digests("vqvae") != self.unbroken("vqvae")[0]:
                raise SystemExit(job.output)
            later = max(0.0, time.time() - began - self.unbroken("vqvae")[1])
        happened = f"trains on; ends {later:.1f} s later than with a server that answers"
        return row("a silent MLflow server", "vqvae", happened, "-", "-", "waits 246 s at each call")

    def dead_server(self) -> str:
        """Track to a server that is killed in the middle, and comes back when training is over."""
        uri = "http://127.0.0.1:5000"
        project = self.copy("dead", MLFLOW_TRACKING_URI=uri, VQVAE2_FAULT=f"slow@vqvae:0:{FALL}")
        points = project.folder.parent / "points.db"
        server = ("mlflow", "server", "--workers", "1", "--port", "5000", "--backend-store-uri", f"sqlite:///{points}")
        with Namespace() as namespace:
            wait_for(namespace.start(project, *server, log="server"), "startup complete")
            job = namespace.start(project, *command("vqvae"), log="dead")
            until(lambda: fell(project) or job.ended, PATIENCE, lambda: job.output)
            for process in namespace.processes():
                if "mlflow" in " ".join(process.cmdline()):
                    process.kill()
            if job.wait().status or project.digests("vqvae") != self.unbroken("vqvae")[0]:
                raise SystemExit(job.output)
            wait_for(namespace.start(project, *server, log="server-again"), "startup complete")
            sync = namespace.start(project, "vqvae2", "sync-metrics", log="sync").wait()
        rows = curves.read(project.folder / "artifacts" / "vqvae" / curves.FILE)
        with sqlite3.connect(points) as store:
            kept = set(store.execute("select step, key from metrics"))
        missing = sum((step, name) not in kept for step, name, _ in rows)
        (told,) = re.findall(r"\d+ points are not in MLflow yet", job.output)
        sent = sync.output.splitlines()[-1]
        happened = (
            f"trains on (`{told}`); then `vqvae2 sync-metrics` (`{sent}`): "
            f"{missing} of {len(rows)} points of the curves missing"
        )
        return row("`kill -9` of the MLflow server", "vqvae", happened, "-", "-", "loses them")

    def lost_nodes(self) -> Iterator[str]:
        """Lose a worker, a node, a link and the last node to spare, in one run over nodes that share a bucket."""
        alone, project = self.copy("alone"), self.copy("nodes")
        alone.run(*ON_NODES)
        with Namespace() as namespace:
            nodes = Nodes(namespace, project, 4)
            # A step that lasts leaves time for the checkpoint before it to arrive, and for what is to be lost.
            slow = ",".join(f"slow@vqvae:0:{step + 3}" for step in LOSSES)

            def lose(step: int, way: Callable[[int], None]) -> tuple[int, float]:
                until(lambda: job.ended or project.reported_step("vqvae") > step + 2, PATIENCE, lambda: job.output)
                nodes.wait_for_checkpoint(step)
                made = project.reported_step("vqvae")
                way(next(iter(nodes.workers())))
                return made, time.time()

            job = nodes.run(*ON_NODES, log="nodes", VQVAE2_FAULT=slow)
            ways = (
                lambda number: nodes.workers()[number].kill(),
                lambda number: nodes.raylet(number).kill(),
                nodes.cut,
            )
            *spared, (last, (what_last, plain_last)) = LOSSES.items()
            for (step, (what, plain)), way in zip(spared, ways, strict=True):
                made, began = lose(step, way)
                wait_for(job, f"Resuming at step {step} of")
                seconds = f"{time.time() - began:.1f}"
                yield row(f"{what}, nodes apart", "vqvae", "goes on by itself", str(made - step), seconds, plain)
            made, began = lose(last, ways[1])
            happened, seconds = ending(job, 600), time.time() - began
            if not job.wait().status:
                raise SystemExit(job.output)
            nodes.add(5)
            began = time.time()
            job = nodes.run(*ON_NODES, log="nodes-again")
            wait_for(job, f"Resuming at step {last} of")
            happened += f" after {seconds:.1f} s; goes on when run again, with another node"
            seconds += time.time() - began
            if (done := job.wait()).status or project.digests("vqvae") != alone.digests("vqvae"):
                raise SystemExit(done.output)
            yield row(f"{what_last}, nodes apart", "vqvae", happened, str(made - last), f"{seconds:.1f}", plain_last)


def command(stage: str, *words: str) -> tuple[str, ...]:
    """The command that runs one stage again, longer than it has run before."""
    changes = chain.from_iterable(("-S", setting) for setting in SETTINGS[stage])
    return ("vqvae2", "run", *SMOKE, *changes, "--only", "--stage", stage, *words)


def fell(project: Project, step: int = FALL) -> float:
    """When the fault came; 0 while it has not."""
    markers = (project.folder / "runs").rglob(f"fault-*-{step}")
    return max((path.stat().st_mtime for path in markers), default=0.0)


def resumed_at(job: Job) -> str:
    """The step from which training goes on; "" while it does not."""
    return (re.findall(r"Resuming at step (\d+)", job.output) or [""])[-1]


def ending(job: Job, seconds: float = PATIENCE) -> str:
    """How a command ended: its status, and its own word for it."""
    done = job.wait(seconds)
    # The first error is the root of the others; the last to stop is the command itself.
    said = re.findall(r"^error: .*", done.output, re.MULTILINE)[:1] or re.findall(
        r"^Stopped by \w+", done.output, re.MULTILINE
    )
    return f"status {done.status}" + (f" (`{said[-1]}`)" if said else "")


def alone(namespace: Namespace) -> str:
    """Wait until nothing of ours is left of a command; fail after ten seconds."""
    began = time.time()
    until(lambda: not any(map(kind_of, namespace.processes())), 10, lambda: f"left: {namespace.processes()}")
    told = f"no process of ours left {time.time() - began:.1f} s later"
    # Two agents of Ray's own notice only later that their node is gone; they hold nothing.
    until(lambda: not namespace.processes(), 90, lambda: f"left: {namespace.processes()}")
    return told


def flips() -> Iterator[str]:
    """Have the tests flip a thousand bits of each kind of file."""
    for what, test, plain in FLIPS:
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", f"tests/{test}"], cwd=ROOT, check=True, capture_output=True
        )
        yield row(f"1,000 flips of one bit in {what}", "-", "1,000 of 1,000 found", "-", "-", plain)


def row(*cells: str) -> str:
    line = f"| {' | '.join(cells)} |"
    print(line, flush=True)
    return f"{line}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=SETTINGS, help="only the faults of this stage; leaves the document alone")
    given = parser.parse_args()
    if reason := namespaces_refused():
        raise SystemExit(f"private namespaces cannot be had here: {reason}")
    bench = Bench(Path(tempfile.mkdtemp(prefix="vqvae2-faults-")))
    print(HEAD, end="")
    rows = [bench.fall(*each) for each in enumerate(SCENARIOS) if given.stage in (None, each[1].stage)]
    if given.stage is None:
        rows += [*bench.lost_nodes(), bench.missing_gpu(), bench.silent_server(), bench.dead_server(), *flips()]
        before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        DOCUMENT.write_text(f"{before}{BEGIN}\n{HEAD}{''.join(rows)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
