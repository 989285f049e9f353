"""Wall time and processor time of the smoke run, stage by stage: what a stage costs beside its work.

    python benchmarks/overhead.py --revision main --rounds 3

Runs the smallest pipeline of a Git revision and of the working tree in turns, and prints medians for each stage. Then
it prints where the time of the working tree went: what each kind of process used, and how long each phase of a stage
took. Processor time is that of all processes, also of Ray's, which no process of ours waits for: /proc is read ten
times a second. On a shared machine, quote processor time. Needs Linux.
"""

import argparse
import io
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.command_line_project import ROOT, SMOKE, STAGE_STATE, CommandLineProject

SAMPLE_INTERVAL_S = 0.1
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
BEFORE_STAGES, TOTAL = "checks", "total"  # beside the names of stages
# Kinds of processes, by a part of the command line. The first one that matches counts.
KINDS = {
    "dvc": r"-m dvc ",
    "stage": r"vqvae2 stage ",
    "command": r"vqvae2 (run|versions) ",
    "control": r"ray::ControlActor",
    "worker": r"ray::(MapWorker|RayTrainWorker)",
    "Ray actors": r"ray::(?!IDLE)",
    "Ray services": r"",
}
IMPORTS = {
    "a stage that maps parts": "import ray.data, stages.mapping.parts",
    "a stage that trains": "import ray.train.torch, stages.training.ray_train",
    "MLflow": "import mlflow",
    "DVC": "import dvc.cli, dvc.repo",
}


@dataclass
class Process:
    """Observations of one process. Times are seconds since the start of the run."""

    kind: str
    first: float
    last: float = 0.0
    processor: float = 0.0  # seconds


@dataclass
class Run:
    """One run: times at which stages started, processes, and processor seconds by (stage, kind of process)."""

    starts: dict[str, float] = field(default_factory=lambda: {BEFORE_STAGES: 0.0})
    processes: dict[tuple[int, str], Process] = field(default_factory=dict)
    processor: defaultdict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    end: float = 0.0

    def wall(self) -> dict[str, float]:
        """Return the wall seconds of each stage, until the next one starts, and of the run."""
        ends = [*list(self.starts.values())[1:], self.end]
        return {stage: end - start for (stage, start), end in zip(self.starts.items(), ends, strict=True)} | {
            TOTAL: self.end
        }

    def processor_by(self, position: int) -> dict[str, float]:
        """Return the processor seconds by stage (position 0) or kind of process (1), and of the run."""
        seconds: defaultdict[str, float] = defaultdict(float)
        for key, value in self.processor.items():
            seconds[key[position]] += value
        return dict(seconds) | {TOTAL: sum(self.processor.values())}

    def phases(self, stage: str) -> dict[str, float]:
        """Return the wall seconds of the phases of a stage, told from when its processes start and end."""
        start, end = self.starts[stage], self.starts[stage] + self.wall()[stage]
        inside = [process for process in self.processes.values() if start <= process.first < end]

        def first(kind: str) -> float:
            return min((process.first for process in inside if process.kind == kind), default=end)

        def last(kind: str) -> float:
            return max((process.last for process in inside if process.kind == kind), default=end)

        joined, worker_started, worker_ended, ended = (
            first("control"),
            first("worker"),
            last("worker"),
            last("stage"),
        )
        return {
            "imports and cluster": joined - start,
            "worker start": worker_started - joined,
            "worker": worker_ended - worker_started,
            "stage end": ended - worker_ended,
            "DVC commit": end - ended,
        }


def measure(project: CommandLineProject) -> Run:
    """Run the smoke pipeline and sample its processes."""
    run, start, current = Run(), time.monotonic(), [BEFORE_STAGES]
    command = subprocess.Popen(
        ["vqvae2", "run", *SMOKE],
        cwd=project.folder,
        env=project.variables(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output: list[str] = []

    def read() -> None:
        assert command.stdout
        for line in command.stdout:
            output.append(line)
            if match := STAGE_STATE.match(line):
                current[0] = match[1]
                run.starts[match[1]] = time.monotonic() - start

    reader = threading.Thread(target=read)
    reader.start()
    family = {command.pid}
    while True:
        has_ended = command.poll() is not None
        now = time.monotonic() - start
        for pid, start_time, seconds in _descendants(family):
            process = run.processes.setdefault((pid, start_time), Process("", now))
            process.kind = _kind(pid) or process.kind
            run.processor[current[0], process.kind] += seconds - process.processor
            process.processor, process.last = seconds, now
        if has_ended:
            break
        time.sleep(SAMPLE_INTERVAL_S)
    reader.join()
    run.end = now
    if command.returncode:
        raise SystemExit("".join(output))
    return run


def _descendants(family: set[int]) -> Iterator[tuple[int, str, float]]:
    """Yield PID, start time and processor seconds of the PIDs in `family` and their descendants, which it adds.

    A process whose parent has ended stays in the family.
    """
    stats: dict[int, tuple[int, str, float]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        stats[int(path.parent.name)] = (int(fields[1]), fields[19], (int(fields[11]) + int(fields[12])) / TICKS_PER_S)
    while children := {pid for pid, (parent, _, _) in stats.items() if parent in family and pid not in family}:
        family |= children
    family &= stats.keys()
    yield from ((pid, *stats[pid][1:]) for pid in family)


def _kind(pid: int) -> str:
    """Return the kind of a process; "" if it has just ended. An idle worker of Ray becomes an actor later."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, line)) if line else ""


def copy_of(revision: str, folder: Path) -> CommandLineProject:
    """Copy a revision into a new repository; "" is the working tree."""
    if not revision:
        project = CommandLineProject.of_working_tree(folder)
    else:
        archive = subprocess.check_output(["git", "archive", revision], cwd=ROOT)
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        project = CommandLineProject(folder)
        project.call("git", "init", "--quiet")
        project.commit()
    project.environment["PYTHONPATH"] = str(folder)
    return project


def import_seconds(statement: str) -> float:
    """Return the processor seconds that a new interpreter takes to import, with its start."""
    code = f"import time\n{statement}\nprint(time.process_time())"
    return float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True))


def compare(runs: Mapping[str, Sequence[Run]], title: str, seconds_of: Callable[[Run], Mapping[str, float]]) -> None:
    """Print medians by stage of both trees, and their ratio."""
    before, after = runs
    print(f"\n{title:22}{before:>12}{after:>14}{'ratio':>8}")
    for stage in (*runs[after][0].starts, TOTAL):
        old, new = (statistics.median(seconds_of(run).get(stage, 0.0) for run in runs[name]) for name in runs)
        print(f"  {stage:20}{old:12.1f}{new:14.1f}{new / old if old else 0:8.2f}")


def break_down(runs: Sequence[Run]) -> None:
    """Print where the time of one tree went: by kind of process, by phase, and by import."""
    print(f"\n{'processor s by':22}{'':>4}" + "".join(f"{kind:>14}" for kind in KINDS))
    for stage in runs[0].starts:
        medians = (statistics.median(run.processor[stage, kind] for run in runs) for kind in KINDS)
        print(f"  {stage:24}" + "".join(f"{seconds:14.1f}" for seconds in medians))
    stages = [stage for stage in runs[0].starts if stage != BEFORE_STAGES]
    names = list(runs[0].phases(stages[0]))
    print(f"\n{'wall s of phases':26}" + "".join(f"{name:>22}" for name in names))
    for stage in stages:
        medians = (statistics.median(run.phases(stage)[name] for run in runs) for name in names)
        print(f"  {stage:24}" + "".join(f"{seconds:22.1f}" for seconds in medians))
    print("\nprocessor s to start Python and import")
    for name, statement in IMPORTS.items():
        print(f"  {name:24}{statistics.median(import_seconds(statement) for _ in range(3)):14.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revision", default="HEAD", help="Git revision to compare the working tree with")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each; the result is their median")
    options = parser.parse_args()
    runs: dict[str, list[Run]] = {options.revision: [], "working tree": []}
    with tempfile.TemporaryDirectory(prefix="vqvae2-overhead-") as folder:
        for number in range(options.rounds):
            for name, measured in runs.items():
                revision = name if name == options.revision else ""
                project = copy_of(revision, Path(folder, f"{number}-{'before' if revision else 'after'}"))
                project.environment["DVC_SITE_CACHE_DIR"] = f"{project.folder}-dvc"
                measured.append(measure(project))
                print(
                    f"{name}: {measured[-1].end:.1f} s, processor {measured[-1].processor_by(0)[TOTAL]:.1f} s",
                    flush=True,
                )
    compare(runs, "wall s", Run.wall)
    compare(runs, "processor s", lambda run: run.processor_by(0))
    break_down(runs["working tree"])


if __name__ == "__main__":
    main()
