"""Inject every fault into real runs, and write the results into the table of docs/reliability.md.

    python benchmarks/faults.py

Each row starts from a copy of a finished run of the smallest pipeline, in which one stage has to run again. The fault
happens, the same command runs again if it has ended, and the artifact is compared with that of an undisturbed run. The
script fails if one byte differs, if a process of ours outlives its command by 10 s, or if one of Ray's own processes
outlives it by 100 s. Needs Linux and root, for private namespaces.
"""

import argparse
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path

from benchmarks.fault_scenarios import BIT_FLIP_TESTS, FAULT_STEP, SCENARIOS, Scenario
from stages.formats import curves
from tests.command_line_project import ROOT, SMOKE, CommandLineProject
from tests.namespace import Job, Namespace, missing_namespace_support, process_role, wait_until
from tests.system.nodes import Nodes, wait_for

DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- written by benchmarks/faults.py -->\n", "<!-- to here -->\n"
TABLE_HEADER = "| fault | stage | what happened | steps lost | s | the plain stack |\n|---|---|---|---|---|---|\n"
TIMEOUT_S = 300.0  # for one wait
STEPS, CHECKPOINT_EVERY = 40, 5
EVERY = {"steps": STEPS, "log_every": CHECKPOINT_EVERY, "checkpoint_every": CHECKPOINT_EVERY, "evaluate_every": STEPS}
CHANGED_SETTINGS = {  # they make a stage run again
    "shard": ("dataset.images_per_shard=16",),
    "vqvae": tuple(f"train_vqvae.{key}={value}" for key, value in EVERY.items()),
    "codes": ("codes.copies=2",),
    "prior_top": tuple(f"priors.top.train.{key}={value}" for key, value in EVERY.items()),
    "prior_bottom": tuple(f"priors.bottom.train.{key}={value}" for key, value in EVERY.items()),
    "sample": ("sample.temperature=0.9", "sample.images_per_part=4"),
    "evaluate": ("evaluate.max_images=40",),
}
ARTIFACTS = {
    "shard": "shards",
    "vqvae": "vqvae",
    "codes": "codes",
    "prior_top": "priors/top",
    "prior_bottom": "priors/bottom",
    "sample": "samples",
    "evaluate": "report",
}
NODES_COMMAND = (
    *(*SMOKE, "-S", "cluster=local", "-S", "cluster.max_failures=8", "-S", "train_vqvae.evaluate_every=60"),
    *("-S", "train_vqvae.steps=60", "-S", "train_vqvae.checkpoint_every=10", "-S", "train_vqvae.log_every=1"),
    *("--only", "--stage", "vqvae"),
)
NODE_LOSSES = {  # by step of the newest checkpoint: the loss, and its effect with Ray Train alone
    10: ("`kill -9` of a worker", "goes back from 13 to 5 after 18.6 s"),
    20: ("`kill -9` of a raylet, a spare node", "goes back from 13 to 10 after 29.6 s"),
    30: ("a disconnected node, a spare node", "goes back from 13 to 5 after 73.6 s"),
    40: ("`kill -9` of a raylet, no spare node", "retries without end"),
}


class Bench:
    """Copies of one finished run, into which faults are injected."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.finished = CommandLineProject.of_working_tree(folder / "finished" / "project")
        self.finished.environment["DVC_SITE_CACHE_DIR"] = str(folder / "finished" / "dvc")
        self.finished.run(*SMOKE)
        self.undisturbed = cache(self._run_undisturbed)

    def copy(self, name: str, **environment: str) -> CommandLineProject:
        """Copy the finished run into a folder named after a row."""
        folder = self.folder / re.sub(r"\W+", "-", name)
        folder.mkdir()
        return self.finished.copy(folder / "project", DVC_SITE_CACHE_DIR=str(folder / "dvc"), **environment)

    def _run_undisturbed(self, stage: str) -> tuple[dict[str, str], float]:
        """Run a stage without faults; return the digest of its artifact and the seconds it took."""
        project, start = self.copy(f"undisturbed {stage}"), time.time()
        project.call(*command(stage))
        return project.digests(ARTIFACTS[stage]), time.time() - start

    def run_scenario(self, number: int, scenario: Scenario) -> str:
        """Inject a fault, run until the stage has finished, and return the row."""
        fault = f"{scenario.kind}@{scenario.stage}:0:{scenario.step}"
        # Steps of this pipeline take milliseconds. A slow step before the fault lets the checkpoint reach the disk.
        slow = f"slow@{scenario.stage}:0:{scenario.step - 1}," if scenario.step else ""
        variables = {"VQVAE2_FAULT": f"{slow}{fault}"} if scenario.kind else {}
        project = self.copy(f"{number} {scenario.kind}", **variables, **scenario.environment)
        with Namespace() as namespace:
            job = namespace.start(project, *command(scenario.stage), log="first")
            is_due = (
                (lambda: fault_time(project, scenario.step))
                if scenario.kind
                else (lambda: namespace.find(scenario.target))
            )
            wait_until(lambda: is_due() or job.ended, TIMEOUT_S, lambda: job.output)
            if scenario.kind and not fault_time(project, scenario.step):
                raise SystemExit(f"{fault} did not happen:\n{job.output}")
            if scenario.signal:
                job.send(scenario.signal, scenario.target)
            start = time.time() if scenario.signal else fault_time(project, scenario.step)
            wait_until(lambda: job.ended or resume_step(job), TIMEOUT_S, lambda: job.output)
            seconds, effect = time.time() - start, "resumes by itself"
            if job.ended and job.wait().status:
                effect = f"{describe_end(job)} after {seconds:.1f} s; {wait_for_processes(namespace)}; "
                effect += "resumes when run again"
                restart = time.time()
                job = namespace.start(project, *command(scenario.stage), log="second")
                wait_until(lambda: job.ended or resume_step(job), TIMEOUT_S, lambda: job.output)
                seconds += time.time() - restart
            if (ended := job.wait()).status:
                raise SystemExit(f"{scenario} does not recover:\n{ended.output}")
            steps_lost = str(max(0, scenario.step - int(step))) if (step := resume_step(job)) else "-"
        if project.digests(ARTIFACTS[scenario.stage]) != self.undisturbed(scenario.stage)[0]:
            raise SystemExit(f"{scenario} gives other bytes in {project.folder}")
        return row(scenario.description, scenario.stage, effect, steps_lost, f"{seconds:.1f}", scenario.plain_stack)

    def request_missing_gpu(self) -> str:
        """Request a GPU on a machine without one."""
        with Namespace() as namespace:
            start = time.time()
            job = namespace.start(self.copy("gpu"), *command("vqvae", "-S", "cluster.gpus_per_worker=1"), log="gpu")
            if job.wait().status != 3:
                raise SystemExit(job.output)
            seconds = f"{time.time() - start:.1f}"
            return row("a GPU is requested and there is none", "vqvae", describe_end(job), "-", seconds, "never ends")

    def use_silent_mlflow_server(self) -> str:
        """Track to a server that accepts connections and never answers."""
        project = self.copy("silent", MLFLOW_TRACKING_URI="http://127.0.0.1:5000")
        listen = "import socket, time; s = socket.create_server(('127.0.0.1', 5000), backlog=99); time.sleep(9999)"
        with Namespace() as namespace:
            namespace.start(project, "python", "-c", listen, log="server")
            start = time.time()
            job = namespace.start(project, *command("vqvae"), log="silent")
            if job.wait().status or project.digests("vqvae") != self.undisturbed("vqvae")[0]:
                raise SystemExit(job.output)
            delay_s = max(0.0, time.time() - start - self.undisturbed("vqvae")[1])
        effect = f"training continues; ends {delay_s:.1f} s later than with a server that answers"
        return row("a silent MLflow server", "vqvae", effect, "-", "-", "waits 246 s at each call")

    def kill_mlflow_server(self) -> str:
        """Track to a server that is killed during training and restarted after it."""
        uri = "http://127.0.0.1:5000"
        project = self.copy("dead", MLFLOW_TRACKING_URI=uri, VQVAE2_FAULT=f"slow@vqvae:0:{FAULT_STEP}")
        database = project.folder.parent / "points.db"
        server = (
            "mlflow",
            "server",
            "--workers",
            "1",
            "--port",
            "5000",
            "--backend-store-uri",
            f"sqlite:///{database}",
        )
        with Namespace() as namespace:
            wait_for(namespace.start(project, *server, log="server"), "startup complete")
            job = namespace.start(project, *command("vqvae"), log="dead")
            wait_until(lambda: fault_time(project) or job.ended, TIMEOUT_S, lambda: job.output)
            for process in namespace.processes():
                if "mlflow" in " ".join(process.cmdline()):
                    process.kill()
            if job.wait().status or project.digests("vqvae") != self.undisturbed("vqvae")[0]:
                raise SystemExit(job.output)
            wait_for(namespace.start(project, *server, log="server-again"), "startup complete")
            sync = namespace.start(project, "vqvae2", "sync-metrics", log="sync").wait()
        points = curves.read(project.folder / "artifacts" / "vqvae" / curves.FILE)
        with sqlite3.connect(database) as connection:
            stored = set(connection.execute("select step, key from metrics"))
        missing = sum((step, name) not in stored for step, name, _ in points)
        (warning,) = re.findall(r"\d+ points are not in MLflow yet", job.output)
        sync_result = sync.output.splitlines()[-1]
        effect = (
            f"training continues (`{warning}`); then `vqvae2 sync-metrics` (`{sync_result}`): "
            f"{missing} of {len(points)} points of the curves missing"
        )
        return row("`kill -9` of the MLflow server", "vqvae", effect, "-", "-", "loses them")

    def lose_nodes(self) -> Iterator[str]:
        """Lose a worker, a node, a link and the last spare node, in one run over nodes that share a bucket."""
        one_machine, project = self.copy("one machine"), self.copy("nodes")
        one_machine.run(*NODES_COMMAND)
        with Namespace() as namespace:
            nodes = Nodes(namespace, project, 4)
            # A slow step gives the checkpoint before it time to arrive, and the loss time to happen.
            slow = ",".join(f"slow@vqvae:0:{step + 3}" for step in NODE_LOSSES)

            def lose(checkpoint_step: int, cause_loss: Callable[[int], None]) -> tuple[int, float]:
                """Cause a loss after a checkpoint; return the step and the time of the loss."""
                wait_until(
                    lambda: job.ended or project.reported_step("vqvae") > checkpoint_step + 2,
                    TIMEOUT_S,
                    lambda: job.output,
                )
                nodes.wait_for_checkpoint(checkpoint_step)
                loss_step = project.reported_step("vqvae")
                cause_loss(next(iter(nodes.workers())))
                return loss_step, time.time()

            job = nodes.run(*NODES_COMMAND, log="nodes", VQVAE2_FAULT=slow)
            causes = (
                lambda number: nodes.workers()[number].kill(),
                lambda number: nodes.raylet(number).kill(),
                nodes.disconnect,
            )
            *first_losses, (last_step, (last_loss, last_plain_stack)) = NODE_LOSSES.items()
            for (step, (loss, plain_stack)), cause_loss in zip(first_losses, causes, strict=True):
                loss_step, start = lose(step, cause_loss)
                wait_for(job, f"Resuming at step {step} of")
                seconds = time.time() - start
                yield row(
                    f"{loss}, isolated nodes",
                    "vqvae",
                    "resumes by itself",
                    str(loss_step - step),
                    f"{seconds:.1f}",
                    plain_stack,
                )
            loss_step, start = lose(last_step, causes[1])
            effect, seconds = describe_end(job, 600), time.time() - start
            if not job.wait().status:
                raise SystemExit(job.output)
            nodes.add(5)
            start = time.time()
            job = nodes.run(*NODES_COMMAND, log="nodes-again")
            wait_for(job, f"Resuming at step {last_step} of")
            effect += f" after {seconds:.1f} s; resumes when run again, with another node"
            seconds += time.time() - start
            if (ended := job.wait()).status or project.digests("vqvae") != one_machine.digests("vqvae"):
                raise SystemExit(ended.output)
            yield row(
                f"{last_loss}, isolated nodes",
                "vqvae",
                effect,
                str(loss_step - last_step),
                f"{seconds:.1f}",
                last_plain_stack,
            )


def command(stage: str, *arguments: str) -> tuple[str, ...]:
    """Return the command that runs one stage again, for more steps than before."""
    overrides = chain.from_iterable(("-S", setting) for setting in CHANGED_SETTINGS[stage])
    return ("vqvae2", "run", *SMOKE, *overrides, "--only", "--stage", stage, *arguments)


def fault_time(project: CommandLineProject, step: int = FAULT_STEP) -> float:
    """Return the time of the fault, in seconds since 1970; 0 before it happens."""
    markers = (project.folder / "runs").rglob(f"fault-*-{step}")
    return max((path.stat().st_mtime for path in markers), default=0.0)


def resume_step(job: Job) -> str:
    """Return the step at which training last resumed; "" if it has not."""
    return (re.findall(r"Resuming at step (\d+)", job.output) or [""])[-1]


def describe_end(job: Job, timeout_s: float = TIMEOUT_S) -> str:
    """Wait for a command; return its status and its message."""
    ended = job.wait(timeout_s)
    # The first error is the cause of the others; the last process to stop is the command itself.
    errors = re.findall(r"^error: .*", ended.output, re.MULTILINE)[:1]
    messages = errors or re.findall(r"^Stopped by \w+", ended.output, re.MULTILINE)
    return f"status {ended.status}" + (f" (`{messages[-1]}`)" if messages else "")


def wait_for_processes(namespace: Namespace) -> str:
    """Wait until no process of ours is left; fail after 10 s."""
    start = time.time()
    wait_until(lambda: not any(map(process_role, namespace.processes())), 10, lambda: f"left: {namespace.processes()}")
    text = f"no process of ours left {time.time() - start:.1f} s later"
    # Two agents of Ray take longer to notice that their node is gone. They hold no files and no data.
    wait_until(lambda: not namespace.processes(), 90, lambda: f"left: {namespace.processes()}")
    return text


def flip_bits() -> Iterator[str]:
    """Run the tests that flip a thousand bits of each kind of file."""
    for file_kind, test, plain_stack in BIT_FLIP_TESTS:
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", f"tests/{test}"], cwd=ROOT, check=True, capture_output=True
        )
        yield row(f"1,000 single-bit flips in {file_kind}", "-", "1,000 of 1,000 detected", "-", "-", plain_stack)


def row(*cells: str) -> str:
    """Print and return a row of the table."""
    line = f"| {' | '.join(cells)} |"
    print(line, flush=True)
    return f"{line}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stage", choices=CHANGED_SETTINGS, help="only the faults of this stage; does not change the document"
    )
    options = parser.parse_args()
    if reason := missing_namespace_support():
        raise SystemExit(f"private namespaces are not available: {reason}")
    bench = Bench(Path(tempfile.mkdtemp(prefix="vqvae2-faults-")))
    print(TABLE_HEADER, end="")
    rows = [
        bench.run_scenario(number, scenario)
        for number, scenario in enumerate(SCENARIOS)
        if options.stage in (None, scenario.stage)
    ]
    if options.stage is None:
        rows += [
            *bench.lose_nodes(),
            bench.request_missing_gpu(),
            bench.use_silent_mlflow_server(),
            bench.kill_mlflow_server(),
            *flip_bits(),
        ]
        before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        DOCUMENT.write_text(f"{before}{BEGIN}\n{TABLE_HEADER}{''.join(rows)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
