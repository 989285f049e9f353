"""Running one stage: its arguments, signals, restarts, and results that are taken over."""

import inspect
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline import params, result_versions, stage_runner, stage_source
from pipeline.stage_runner import RESTARTED_MARKER
from stages import shard
from stages.config import ClusterConfig
from stages.errors import UserError
from stages.formats import artifact
from stages.runtime.context import StageContext
from stages.tracking.journal import JOURNAL_FILE, read_records
from tests.command_line_project import CommandLineProject

ROOT = Path(__file__).parents[2]


class ToyStage:
    """A stage in place of `shard`: it counts its calls and may edit settings while it runs."""

    __signature__ = inspect.signature(shard.run)

    def __init__(self) -> None:
        self.calls = 0
        self.edits = lambda: None

    def __call__(self, source: Path, out: Path, metrics: Path, *, dataset, context: StageContext) -> None:
        self.calls += 1
        self.context = context
        with artifact.commit_folder(out, "shards", {}) as folder:
            (folder / "train-00000.tar").write_bytes(b"images")
        metrics.write_text("{}")
        self.edits()


@pytest.fixture
def toy(current_project: CommandLineProject, monkeypatch) -> ToyStage:
    """The current folder is a project whose first stage is a toy."""
    stage = ToyStage()
    stage.project = current_project
    monkeypatch.setattr(shard, "run", stage)
    return stage


def run() -> None:
    stage_runner._run("shard", Path("runs/shard"))


def test_settings_edited_while_a_stage_runs_are_refused(toy: ToyStage):
    """DVC would record them for a result of the old ones. Edits of other stages' settings do not matter."""
    toy.edits = lambda: toy.project.edit(lambda data: data["sample"].update(count=3))
    run()
    toy.edits = lambda: toy.project.edit(lambda data: data["dataset"].update(image_size=64, resize_mode="pad"))
    toy.project.edit(lambda data: data["dataset"].update(background="#000000"))
    with pytest.raises(UserError, match=r'dataset.image_size \d+ -> 64, dataset.resize_mode "crop" -> "pad"\.'):
        run()


def test_stage_runs_with_its_own_settings_of_the_cluster(toy: ToyStage):
    """A later change of them leaves its result valid."""
    settings = {"workers": 3, "gpus_per_worker": 0.0}
    toy.project.edit(lambda data: data["cluster"].update(gpus_per_worker=1.0, stages={"shard": settings}))
    run()
    assert toy.context.cluster == ClusterConfig(3, 1.0) and toy.context.flops_per_image == 0
    toy.project.edit(lambda data: data["cluster"].update(stages={}))
    run()
    assert toy.calls == 1


@pytest.mark.parametrize("arguments", [("prior", "top"), ("prior_top",), ("prior@top",)], ids=" ".join)
def test_stage_has_one_name_whatever_name_is_typed(project, arguments):
    """Messages and folders use prior_top."""
    done = project.command("stage", *arguments)
    assert done.returncode == 4
    assert done.stderr.startswith("error: prior_top reads artifacts/codes, which does not exist.")


def test_finished_result_is_not_computed_again(toy: ToyStage, capsys):
    """A second run verifies the result in place and puts deleted metrics back; --force computes."""
    run()
    Path("metrics/shard.json").unlink()
    run()
    assert toy.calls == 1 and Path("metrics/shard.json").read_text() == "{}"
    assert "shard: restored the finished result" in capsys.readouterr().err


def test_stage_that_dvc_started_describes_its_pipeline_run(toy: ToyStage, monkeypatch):
    """The journal has all settings, and the name with that of DVC's experiment, for MLflow's run of the pipeline."""
    monkeypatch.setenv("DVC_EXP_NAME", "tidy-owl")
    monkeypatch.setenv("DVC_STAGE", "shard")
    monkeypatch.setattr(stage_runner, "die_with_parent", lambda number: None)
    run()
    (journal,) = Path("runs/shard").rglob(JOURNAL_FILE)
    begin, _ = next(read_records(journal))
    assert (
        begin["parent_tags"].items()
        >= {
            "mlflow.runName": "tidy-owl · emoji32",
            "command": "dvc exp run",
            "dataset": "emoji",
            "preset": "emoji32",
            "dvc.experiment": "tidy-owl",
        }.items()
    )
    assert begin["parent"].endswith("-tidy-owl")
    assert begin["parent_params"]["sample.temperature"] == str(params.load().sample.temperature)
    assert not any(name.startswith("composed_from") for name in begin["parent_params"])


def test_forced_run_computes_a_finished_result_again(toy: ToyStage, monkeypatch):
    """VQVAE2_FRESH is what `vqvae2 run --force` sets."""
    run()
    monkeypatch.setenv(stage_runner.FORCE_RESTART, "1")
    run()
    assert toy.calls == 2


def test_stage_ends_after_a_signal_even_if_a_library_swallows_the_exception():
    """A timer ends the process."""
    script = "import os, signal, time; from pipeline import stage_runner; stage_runner.SHUTDOWN_TIMEOUT_S = 0.2\n"
    script += "signal.signal(signal.SIGTERM, stage_runner._stop)\n"
    script += "try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\nexcept BaseException: time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=30)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == "Stopped by SIGTERM. Run the same command again to resume.\n"


def test_stage_stops_also_if_a_signal_arrives_inside_of_a_finalizer():
    """Python ignores exceptions in `__del__` and callbacks of weakref, and prints a traceback."""
    script = "import os, signal, time; from pipeline import stage_runner\n"
    script += "signal.signal(signal.SIGINT, stage_runner._stop)\n"
    script += "class Finalized:\n    def __del__(self): signal.raise_signal(number); time.sleep(0)\n"
    script += (
        "try:\n    for number in (signal.SIGINT, signal.SIGALRM, signal.SIGALRM): Finalized()\n    time.sleep(60)\n"
    )
    script += "except stage_runner.StageStopped as stop: raise SystemExit(100 + stop.number)"
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=30)
    assert (done.returncode, done.stderr) == (100 + signal.SIGINT, "")


def test_second_signal_ends_a_stage_at_once():
    """It does not wait for what the first one has started."""
    script = "import os, signal, time; from pipeline import stage_runner\n"
    script += "signal.signal(signal.SIGTERM, stage_runner._stop)\n"
    script += "try: os.kill(os.getpid(), signal.SIGTERM)\n"
    script += "except stage_runner.StageStopped: os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=10)
    assert done.returncode == -signal.SIGTERM


@pytest.mark.parametrize("storage", ["", "memory://store"])
def test_forced_run_discards_earlier_state_once(tmp_path: Path, storage: str, capsys):
    """An interrupted forced run resumes; after one that has finished, the next discards again."""
    context = StageContext("vqvae", "f" * 64, tmp_path, ClusterConfig(storage=storage))

    def write_state() -> None:
        for folder in (tmp_path / "step-000000005", tmp_path / "tracked"):
            with suppress(FileExistsError), artifact.commit_folder(folder, "checkpoint", {}) as checkpoint:
                (checkpoint / "state").touch()
        (tmp_path / "file").touch()
        if context.storage:
            context.storage.upload(tmp_path / "step-000000005", "step-000000005")

    for finished, resumed in ((True, False), (False, True), (True, False)):
        write_state()
        if finished:
            (tmp_path / RESTARTED_MARKER).unlink(missing_ok=True)
        stage_runner._clear(context)
        assert {(tmp_path / name).exists() for name in ("step-000000005", "file")} == {resumed}
        assert (tmp_path / "tracked").exists()  # MLflow may not have received all of it
        assert context.storage is None or context.storage.exists("step-000000005") == resumed
        assert (f"to restart once more, delete {tmp_path}" in capsys.readouterr().err) == resumed


@pytest.mark.parametrize("by_dvc", [True, False])
def test_stage_dies_with_its_parent_only_under_dvc(monkeypatch, by_dvc: bool):
    """The parent of a stage that is started by hand is a shell, which may end first, as under nohup."""
    signals = []
    monkeypatch.setattr(stage_runner, "die_with_parent", signals.append)
    monkeypatch.setattr(stage_runner, "_run", lambda *_: None)
    monkeypatch.setenv("DVC_STAGE", "vqvae") if by_dvc else monkeypatch.delenv("DVC_STAGE", raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    assert stage_runner.run_stage("vqvae") == 0 and signals == [signal.SIGINT] * by_dvc
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_source_edited_while_a_stage_runs_makes_its_result_out_of_date(toy: ToyStage, tmp_path: Path, monkeypatch):
    """Processes that started late imported the edit. Restoring the source must not make the result valid."""
    for package in stage_source.PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / "edited" / package)
    monkeypatch.setattr(stage_source, "ROOT", tmp_path / "edited")
    data = params.read()
    before = result_versions.compute(data, params.check(data))
    result_versions.write(before)

    def edit_source() -> None:
        with (tmp_path / "edited/stages/shard.py").open("a") as file:
            file.write("\n\nprint('edited')\n")
        result_versions.write(result_versions.compute(data, params.check(data)))  # as `vqvae2 versions --write` does

    toy.edits = edit_source
    with pytest.raises(UserError, match="The source of shard was edited while it ran"):
        run()
    (tmp_path / "edited/stages/shard.py").write_bytes((ROOT / "stages/shard.py").read_bytes())
    toy.edits = lambda: None
    run()
    assert toy.calls == 2  # not restored
    assert params.read(result_versions.FILE)["shard"] == before["shard"]


def test_version_that_ran_is_written_at_the_end(toy: ToyStage):
    """`vqvae2 versions --write` may have written another one meanwhile. DVC records what it finds at the end."""
    data = params.read()
    before = result_versions.compute(data, params.check(data))
    result_versions.write(before)
    toy.edits = lambda: result_versions.write({**before, "shard": "0123456789abcdef"})
    run()
    assert params.read(result_versions.FILE)["shard"] == before["shard"]


def test_result_of_a_folder_of_images_is_computed_again(toy: ToyStage, tmp_path: Path):
    """Its files are identified by names, sizes and times, which do not prove that their contents are the same."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").touch()
    toy.project.edit(lambda data: data["dataset"].update(source=str(tmp_path / "images")))
    run()
    run()
    assert toy.calls == 2
