"""Tests of wrong uses: each prints the problem, its location and a fix, and ends with the right exit status.

The expected output is in wrong_uses/NAME.txt. To update it:  UPDATE=1 pytest tests/pipeline -k wrong_uses
"""

import fcntl
import os
import re
import shutil
import socket
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

SNAPSHOTS = Path(__file__).parent / "wrong_uses"
MAX_LINES = 12
RUN = ("run", "--stage", "shard")


def _nothing(project):
    pass


def _text_file(project):
    (project.folder / "notes.txt").write_text("no images")
    project.edit(lambda data: data["dataset"].update(source="notes.txt"))


def _no_images(project):
    (project.folder / "documents" / "letters").mkdir(parents=True)
    (project.folder / "documents" / "letters" / "a.txt").write_text("not an image")
    project.edit(lambda data: data["dataset"].update(source="documents"))


def _empty_folder(project):
    (project.folder / "empty").mkdir()
    project.edit(lambda data: data["dataset"].update(source="empty"))


def _labels(name):
    """Return a preparation that looks for the classes of the emoji in this table."""
    return lambda project: project.edit(lambda data: data["dataset"].update(labels=name))


def _no_labels_file(project):
    _images("1.png")(project)
    project.edit(lambda data: data["dataset"].update(labels="labels.csv"))


def _images(*names, table=""):
    """Return a preparation that writes image files, of which only names are read, and perhaps a table of labels."""

    def write(project):
        for name in names:
            (project.folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
            (project.folder / "photos" / name).write_bytes(b"image")
        if table:
            (project.folder / "photos" / "labels.csv").write_text(table)
        labels = "labels.csv" if table else "folders"
        project.edit(lambda data: data["dataset"].update(source="photos", labels=labels))

    return write


def _tracked_images(project):
    (project.folder / "photos.dvc").write_text("outs:\n- md5: d41d8cd98f00b204e9800998ecf8427e\n  path: photos\n")
    project.edit(lambda data: data["dataset"].update(source="photos"))


def _incomplete_shards(project):
    (project.folder / "artifacts" / "shards").mkdir(parents=True)


def _reserved_level_name(project):
    def rename(data):
        for mapping in (data["vqvae"]["levels"], data["priors"]):
            levels = {name: mapping.pop(name) for name in list(mapping)}
            mapping.update({"label" if name == "top" else name: value for name, value in levels.items()})

    project.edit(rename)


def _other_files(project):
    (project.folder / "drawn").mkdir()
    for number in range(5):
        (project.folder / "drawn" / f"{number}.txt").touch()


def _project_beside(project):
    (project.folder / "other" / "artifacts").mkdir(parents=True)


def _no_dvc(project):
    shutil.rmtree(project.folder / ".dvc")


def _write(name, text):
    return lambda project: (project.folder / name).write_bytes(text)


def _remove(name):
    return lambda project: (project.folder / name).unlink()


def _section_is_a_number(project):
    project.edit(lambda data: data.update(dataset=3))


def _set(section, **values):
    return lambda project: project.edit(lambda data: data[section].update(values))


PRESET, PETS = "conf/experiment/mine.yaml", "conf/dataset/pets.yaml"
MINE = ("run", "-S", "experiment=mine")

CASES = {
    # name: (preparation of the project, the command, the exit status)
    # Commands and options
    "unknown_stage": (_nothing, ["run", "--stage", "priors_bottom"], 2),
    "unknown_command": (_nothing, ["runn"], 2),
    "unknown_option": (_nothing, ["run", "--stages", "shard"], 2),
    "only_without_stage": (_nothing, ["run", "--only"], 2),
    "command_after_run": (_nothing, ["run", "status"], 2),
    "stage_and_command": (_nothing, ["run", "sample"], 2),
    "stage_as_command": (_nothing, ["run", "shard"], 2),
    "setting_as_command": (_nothing, ["run", "seed=1"], 2),
    "level_not_given": (_nothing, ["stage", "prior"], 2),
    "unknown_level": (_nothing, ["stage", "prior", "middle"], 2),
    # Overrides
    "misspelt_override": (_nothing, ["run", "-S", "train_vqvae.step=10"], 2),
    "override_without_value": (_nothing, ["run", "-S", "seed"], 2),
    "override_with_line_break": (_nothing, ["config", "dataset.name='a\nb'"], 2),
    "config_without_value": (_nothing, ["config", "foo"], 2),
    "unknown_experiment": (_nothing, ["run", "-S", "experiment=emoji"], 2),
    "unknown_key_of_section": (_nothing, ["run", "-S", "evaluate.compared=true"], 2),
    "unknown_section": (_nothing, ["run", "-S", "nothing.at.all=1"], 2),
    "value_needs_quotes": (_nothing, ["run", "-S", "dataset.source=photos (1)"], 2),
    "ambiguous_value": (_nothing, ["run", "-S", "dataset.source=a,b"], 2),
    "ambiguous_group": (_nothing, ["run", "-S", "train=smoke"], 2),
    "plus_on_existing_key": (_nothing, ["run", "-S", "+seed=1"], 2),
    "plus_on_existing_group": (_nothing, ["run", "-S", "+experiment=smoke"], 2),
    "plus_missing": (_nothing, ["run", "-S", "vqvae.levels.middle.stride=4"], 2),
    # Files in conf/
    "preset_without_package": (_write(PRESET, b"train_vqvae:\n  steps: 500\n"), MINE, 2),
    "preset_with_comment_above_package": (
        _write(PRESET, b"# my photos\n# @package _global_\ndefaults:\n  - override /dataset: folder\n"),
        MINE,
        2,
    ),
    "preset_with_value_for_group": (_write(PRESET, b"# @package _global_\ndataset: folder\n"), MINE, 2),
    "preset_without_override": (_write(PRESET, b"# @package _global_\ndefaults:\n  - /dataset: folder\n"), MINE, 2),
    "preset_with_relative_group": (_write(PRESET, b"# @package _global_\ndefaults:\n  - dataset: folder\n"), MINE, 2),
    "dataset_file_with_package": (_write(PETS, b"# @package _global_\nname: pets\n"), ["config", "dataset=pets"], 2),
    "dataset_file_nested": (_write(PETS, b"dataset:\n  name: pets\n"), ["config", "dataset=pets"], 2),
    # Values of settings
    "misspelt_key": (_set("train_vqvae", learing_rate=0.1), RUN, 2),
    "data_of_a_path": (_nothing, ["data", "../photos"], 2),
    "plan_of_a_setting": (_nothing, ["plan", "dataset=folder"], 2),
    "source_contains_project": (_nothing, ["run", "-S", "dataset.source=.."], 2),
    "source_empty": (_nothing, ["run", "-S", "dataset.source="], 2),
    "seed_not_a_number": (_nothing, ["run", "-S", "seed=abc"], 2),
    "steps_not_a_number": (_set("train_vqvae", steps="many"), RUN, 2),
    "section_is_a_number": (_section_is_a_number, RUN, 2),
    "unknown_precision": (_nothing, ["run", "-S", "train_vqvae.precision=bf17"], 2),
    "zero_workers": (_nothing, ["run", "-S", "cluster.workers=0"], 2),
    "stride_not_a_power_of_two": (_nothing, ["run", "-S", "vqvae.levels.top.stride=5"], 2),
    "dropout_out_of_range": (_nothing, ["run", "-S", "priors.top.network.dropout=1.5"], 2),
    "learning_rate_negative": (_set("train_vqvae", learning_rate=-1.0), RUN, 2),
    "top_k_too_large": (_nothing, ["run", "-S", "sample.top_k=999"], 2),
    "temperature_infinite": (_nothing, ["sample", "drawn", "--temperature", "inf"], 2),
    "two_errors": (_nothing, ["run", "-S", "seed=abc", "-S", "cluster.workers=0"], 2),
    "batch_smaller_than_workers": (_nothing, ["run", "-S", "cluster.workers=33"], 2),
    "image_size_not_divisible": (_nothing, ["run", "-S", "dataset.image_size=30"], 2),
    "reserved_level_name": (_reserved_level_name, RUN, 2),
    "level_without_prior": (_nothing, ["run", "-S", "vqvae=three_level"], 2),
    "unknown_class": (_nothing, ["run", "--dry-run", "-S", "sample.classes=[flag]"], 2),
    "gpu_missing": (_nothing, ["run", "-S", "cluster=gpu"], 3),
    # Files of the project
    "params_missing": (_remove("params.yaml"), RUN, 2),
    "params_not_utf8": (_write("params.yaml", "seed: 1".encode("utf-16")), RUN, 2),
    "duplicate_key": (_write("params.yaml", b"seed: 1\nseed: 2\n"), RUN, 2),
    "merge_markers": (_write("params.yaml", b"<<<<<<< HEAD\nseed: 1\n=======\nseed: 2\n>>>>>>> b\n"), RUN, 2),
    "sections_missing": (_write("params.yaml", b"seed: 1\n"), ["status"], 2),
    "conf_missing": (_remove("conf/config.yaml"), ["config"], 2),
    "conf_not_yaml": (_write("conf/config.yaml", b"seed: [\n"), ["config"], 2),
    "run_without_project": (_remove("dvc.yaml"), RUN, 2),
    "ui_without_project": (_remove("dvc.yaml"), ["ui"], 2),
    "sample_without_project": (_remove("dvc.yaml"), ["sample", "drawn"], 2),
    "dvc_not_initialized": (_no_dvc, ["status"], 3),
    "dvc_without_git": (_write(".dvc/config", b""), ["run", "--dry-run"], 3),
    "dvc_yaml_invalid": (_write("dvc.yaml", b"stages: 3\n"), ["status"], 2),
    "dvc_yaml_not_yaml": (_write("dvc.yaml", b"stages: [\n"), ["status"], 2),
    "dvc_lock_invalid": (_write("dvc.lock", b'schema: "2.0"\nstages: []\n'), RUN, 1),
    "dvc_lock_not_yaml": (_write("dvc.lock", b"<<<<<<< HEAD\n"), RUN, 1),
    # Images, models and outputs
    "source_missing": (_set("dataset", source="photos"), RUN, 2),
    "source_missing_dry_run": (_set("dataset", source="photos"), [*RUN, "--dry-run"], 2),
    "source_tracked_by_dvc": (_tracked_images, RUN, 2),
    "source_on_the_web": (_nothing, ["run", "-S", "dataset.source=https://host/images.zip"], 2),
    "source_in_s3": (_nothing, ["run", "-S", "dataset.source=s3://bucket/images"], 2),
    "source_in_home_folder": (_set("dataset", source="~vqvae2-nobody/images"), RUN, 2),
    "feature_network_missing": (_nothing, ["run", "-S", "+evaluate.networks.inception=inception.pt"], 2),
    "codes_without_quantizer": (_nothing, ["run", "--stage", "codes", "-S", "vqvae.quantizer.mode=none"], 2),
    "source_is_not_an_archive": (_text_file, RUN, 2),
    "folder_without_images": (_no_images, RUN, 2),
    "empty_folder": (_empty_folder, RUN, 2),
    "splits_in_some_classes": (_images("a/train/1.png", "a/test/2.png", "b/3.png"), RUN, 4),
    "labels_file_missing": (_no_labels_file, RUN, 2),
    "labels_file_misnamed": (_labels("metadata.csv"), ["stage", "shard"], 2),
    "labels_without_header": (_images("1.png", "2.png", table="1.png;cat\n2.png;dog\n"), RUN, 4),
    "labels_repeat_column": (_images("1.png", table="path,label,label\n1.png,cat,dog\n"), RUN, 4),
    "labels_name_no_image": (_images("1.png", table="file_name,label\n1.png,cat\n2.png,dog\n"), RUN, 4),
    "split_folders_beside_others": (_images("train/a/1.png", "val/a/2.png", "more/a/3.png"), RUN, 4),
    "no_training_images": (_images("dev/a/1.png", "test/a/2.png"), RUN, 4),
    "data_output_is_a_file": (_write("overview", b"a file"), ["data", "--out", "overview"], 3),
    "class_not_utf8": (_images("M\udcfcller/1.png", "other/2.png"), ["data"], 4),
    "inputs_missing": (_nothing, ["stage", "vqvae"], 4),
    "inputs_incomplete": (_incomplete_shards, ["stage", "vqvae"], 4),
    "sample_without_model": (_nothing, ["sample", "drawn"], 4),
    "reconstruct_without_model": (_nothing, ["reconstruct", "cat.png"], 4),
    "score_without_model": (_nothing, ["score", "cat.png"], 4),
    "restore_without_model": (_nothing, ["restore", "cat.png"], 4),
    "restore_threshold_below_0": (_nothing, ["restore", "cat.png", "--threshold", "-1"], 2),
    "restore_threshold_no_number": (_nothing, ["restore", "cat.png", "--threshold", "nan"], 2),
    "sample_output_is_a_file": (_write("drawn", b"a file"), ["sample", "drawn"], 2),
    "sample_output_holds_other_files": (_other_files, ["sample", "drawn"], 2),
    "sample_sheet_among_images": (_nothing, ["sample", "drawn", "--sheet", "drawn/sheet.png"], 2),
    "sample_sheet_exists": (_write("drawn.png", b"a picture"), ["sample", "drawn"], 2),
    "model_folder_of_a_project": (_project_beside, ["sample", "drawn", "--model", "other"], 2),
    "compare_unknown_run": (_nothing, ["compare", "nothing"], 2),
    "compare_page_is_no_html": (_nothing, ["compare", "nothing", "--out", "page.png"], 2),
    "reconstruct_output_is_a_file": (_write("drawn", b"a file"), ["reconstruct", "cat.png", "--out", "drawn"], 2),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_use_is_reported_with_a_fix(name, project):
    """The command prints the problem, its location and a fix, and ends with the right exit status."""
    prepare, command, status = CASES[name]
    if name == "gpu_missing" and os.path.exists("/dev/nvidia0"):  # noqa: PTH110
        pytest.skip("this machine has a GPU")
    prepare(project)
    check(name, project, command, status)


ENVIRONMENT_CASES = {
    # name: (environment variables, the exit status of a run)
    "ray_dashboard": ({"RAY_ADDRESS": "http://10.0.0.5:8265"}, 2),
    "ray_address_without_port": ({"RAY_ADDRESS": "10.0.0.5"}, 2),
    "ray_address_ipv6": ({"RAY_ADDRESS": "fd00::5:6379"}, 2),
    "ray_cluster_dead": ({"RAY_ADDRESS": "127.0.0.1:9"}, 3),
    "ray_tmpdir_too_long": ({"RAY_TMPDIR": "/tmp/" + "x" * 100}, 2),
    "tracking_uri_unknown": ({"MLFLOW_TRACKING_URI": "ftp://host"}, 2),
    "tracking_uri_without_scheme": ({"MLFLOW_TRACKING_URI": "127.0.0.1:5000"}, 2),
    "tracking_uri_without_file": ({"MLFLOW_TRACKING_URI": "sqlite://x.db"}, 2),
}


@pytest.mark.parametrize("name", ENVIRONMENT_CASES)
def test_wrong_environment_is_refused_before_a_run(name, project):
    """A run would find out in its first stage, after DVC has deleted the outputs."""
    environment, status = ENVIRONMENT_CASES[name]
    check(name, project, RUN, status, **environment)


def test_every_snapshot_has_a_test():
    """Renamed cases leave no file behind."""
    others = ENVIRONMENT_CASES.keys() | {
        "already_running",
        "unsupported_tracking_uri",
        "corrupt_images",
        "one_image",
        "one_class",
    }
    assert {path.stem for path in SNAPSHOTS.glob("*.txt")} == CASES.keys() | others


@contextmanager
def locked(path):
    """Hold a lock file as another process would."""
    path.parent.mkdir(parents=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("PID 1 on host since 2000-01-01 00:00:00")
        file.flush()
        yield


def test_stage_that_is_running_is_not_started_again(project):
    """The error names the process that runs it."""
    with locked(project.folder / "runs" / "shard" / "lock"):
        check("already_running", project, ["stage", "shard"], 3)


@pytest.mark.parametrize("lock", ["lock", "vqvae/lock"])
def test_run_refused_for_another_process_changes_no_settings(lock, project):
    """Stages of the other run read params.yaml when they start, and artifacts of former levels are kept."""
    before = (project.folder / "params.yaml").read_bytes()
    obsolete_prior = project.folder / "artifacts" / "priors" / "middle"
    obsolete_prior.mkdir(parents=True)
    with locked(project.folder / "runs" / lock):
        done = project.command("run", "-S", "seed=1")
    assert done.returncode == 3 and "uses this project: PID 1 on host" in done.stderr
    assert (project.folder / "params.yaml").read_bytes() == before and obsolete_prior.is_dir()


def test_run_refused_for_missing_images_changes_no_settings(project):
    """The next command uses the settings from before the refused one."""
    before = (project.folder / "params.yaml").read_bytes()
    assert project.command("run", "-S", "dataset.source=photos").returncode == 2
    assert (project.folder / "params.yaml").read_bytes() == before


def test_unsupported_tracking_uri_is_refused(project):
    """MLflow itself would print a traceback."""
    check("unsupported_tracking_uri", project, ["ui"], 2, MLFLOW_TRACKING_URI="ftp://host")
    done = project.command("doctor", MLFLOW_TRACKING_URI="ftp://host")
    assert done.returncode == 3 and re.search("^error    mlflow         .*ftp", done.stdout, re.MULTILINE)


def test_port_in_use_is_refused(project):
    """MLflow itself would end with status 0."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        done = project.command("ui", "--port", str(port))
    assert done.returncode == 3 and f"{port}" in done.stderr and "--port" in done.stderr
    assert not (project.folder / "mlflow.db").exists()


def test_ui_of_a_tracking_server_that_does_not_answer_is_refused(project):
    """The error has its address without the password."""
    done = project.command("ui", MLFLOW_TRACKING_URI="http://me:hunter2@127.0.0.1:9")
    assert done.returncode == 3 and "does not answer" in done.stderr
    assert "in: http://***@127.0.0.1:9" in done.stderr and "hunter2" not in done.stderr + done.stdout


def test_no_command_shows_a_password(project):
    """Passwords are also removed from overrides that an error repeats."""
    done = project.command("run", "-S", "cluster.storage='s3://me:hunter2@bucket/p'", "-S", "seed=abc")
    assert done.returncode == 2 and "s3://***@bucket/p" in done.stderr and "hunter2" not in done.stderr


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("corrupt_images", 4), ("one_image", 0), ("one_class", 0)])
def test_poor_source_is_used_or_refused(name, status, project):
    """Corrupt images stop the stage and are listed; few images or one class are enough for shards."""
    for number in range({"corrupt_images": 3, "one_image": 1, "one_class": 8}[name]):
        path = project.folder / "images" / "only" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 0, 0)).save(path)
        if name == "corrupt_images":
            path.write_bytes(path.read_bytes()[:40])
    project.edit(lambda data: data["dataset"].update(source="images"))
    check(name, project, ["stage", "shard"], status)


def check(name, project, command, status, **environment):
    """Compare the output of a command with its snapshot."""
    done = project.command(*command, **environment)
    output = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr).replace(str(project.folder), "PROJECT")
    # Progress lines depend on the speed of the machine.
    progress = re.compile(r"\d/\d+ images|points are not in MLflow")
    output = "\n".join(line.rstrip() for line in output.splitlines() if not progress.search(line))
    text = f"$ vqvae2 {' '.join(command)}\n{output}\nexit status {done.returncode}\n"
    path = SNAPSHOTS / f"{name}.txt"
    if "UPDATE" in os.environ:
        path.write_text(text, encoding="utf-8")
    assert done.returncode == status, text
    assert "Traceback" not in text and len(output.splitlines()) <= MAX_LINES
    assert text == path.read_text(encoding="utf-8")
