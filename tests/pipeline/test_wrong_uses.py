"""Wrong uses: each gives a few lines that name what, where and the fix, the right exit status, and no traceback.

What a person sees is kept in wrong_uses/NAME.txt. After a change of words:  UPDATE=1 pytest tests/pipeline -k wrong
"""

import fcntl
import os
import re
import shutil
import socket
from pathlib import Path

import pytest

SNAPSHOTS = Path(__file__).parent / "wrong_uses"
RUN = ("run", "--stage", "shard")


def _nothing(project):
    pass


def _text_file(project):
    (project.folder / "notes.txt").write_text("no images")
    project.edit(lambda data: data["dataset"].update(source="notes.txt"))


def _no_images(project):
    (project.folder / "documents" / "letters").mkdir(parents=True)
    (project.folder / "documents" / "letters" / "a.txt").write_text("no image")
    project.edit(lambda data: data["dataset"].update(source="documents"))


def _empty_folder(project):
    (project.folder / "empty").mkdir()
    project.edit(lambda data: data["dataset"].update(source="empty"))


def _no_table(project):
    project.edit(lambda data: data["dataset"].update(labels="labels.csv"))


def _half_written(project):
    (project.folder / "artifacts" / "shards").mkdir(parents=True)


def _rename_level(project):
    def rename(data):
        for mapping in (data["vqvae"]["levels"], data["priors"]):
            rest = {name: mapping.pop(name) for name in list(mapping)}
            mapping.update({"half" if name == "top" else name: value for name, value in rest.items()})

    project.edit(rename)


def _no_dvc(project):
    shutil.rmtree(project.folder / ".dvc")


def _write(name, text):
    return lambda project: (project.folder / name).write_bytes(text)


def _remove(name):
    return lambda project: (project.folder / name).unlink()


def _section_as_number(project):
    project.edit(lambda data: data.update(dataset=3))


def _set(section, **values):
    return lambda project: project.edit(lambda data: data[section].update(values))


CASES = {
    # name: (what is done to the project, the command, the exit status)
    "unknown_stage": (_nothing, ["run", "--stage", "priors_bottom"], 2),
    "unknown_command": (_nothing, ["runn"], 2),
    "unknown_option": (_nothing, ["run", "--stages", "shard"], 2),
    "only_without_stage": (_nothing, ["run", "--only"], 2),
    "misspelt_key": (_set("train_vqvae", learing_rate=0.1), RUN, 2),
    "misspelt_override": (_nothing, ["run", "-S", "train_vqvae.step=10"], 2),
    "malformed_override": (_nothing, ["run", "-S", "seed"], 2),
    "unknown_experiment": (_nothing, ["run", "-S", "experiment=emoji"], 2),
    "dropped_key": (_nothing, ["run", "-S", "evaluate.compared=true"], 2),
    "unheard_of_key": (_nothing, ["run", "-S", "nothing.at.all=1"], 2),
    "no_override": (_nothing, ["config", "foo"], 2),
    "override_of_two_lines": (_nothing, ["config", "dataset.name='a\nb'"], 2),
    "no_yaml_in_conf": (_write("conf/config.yaml", b"seed: [\n"), ["config"], 2),
    "no_source": (_nothing, ["run", "-S", "dataset.source="], 2),
    "no_number": (_nothing, ["run", "-S", "seed=abc"], 2),
    "no_choice": (_nothing, ["run", "-S", "train_vqvae.precision=bf17"], 2),
    "no_workers": (_nothing, ["run", "-S", "cluster.workers=0"], 2),
    "no_power_of_two": (_nothing, ["run", "-S", "vqvae.levels.top.stride=5"], 2),
    "no_share": (_nothing, ["run", "-S", "priors.top.network.dropout=1.5"], 2),
    "more_than_there_are": (_nothing, ["run", "-S", "sample.top_k=999"], 2),
    "no_temperature": (_nothing, ["sample", "drawn", "--temperature", "inf"], 2),
    "wrong_twice": (_nothing, ["run", "-S", "seed=abc", "-S", "cluster.workers=0"], 2),
    "section_as_number": (_section_as_number, RUN, 2),
    "wrong_type": (_set("train_vqvae", steps="many"), RUN, 2),
    "out_of_range": (_set("train_vqvae", learning_rate=-1.0), RUN, 2),
    "batch_not_divisible": (_nothing, ["run", "-S", "cluster.workers=3"], 2),
    "size_not_divisible": (_nothing, ["run", "-S", "dataset.image_size=30"], 2),
    "value_to_quote": (_nothing, ["run", "-S", "dataset.source=photos (1)"], 2),
    "value_or_list": (_nothing, ["run", "-S", "dataset.source=a,b"], 2),
    "group_of_many_places": (_nothing, ["run", "-S", "train=smoke"], 2),
    "plus_of_a_key": (_nothing, ["run", "-S", "+seed=1"], 2),
    "no_conf": (_remove("conf/config.yaml"), ["config"], 2),
    "plus_too_many": (_nothing, ["run", "-S", "+experiment=smoke"], 2),
    "plus_too_few": (_nothing, ["run", "-S", "vqvae.levels.middle.stride=4"], 2),
    "command_under_run": (_nothing, ["run", "status"], 2),
    "stage_and_command": (_nothing, ["run", "sample"], 2),
    "stage_as_command": (_nothing, ["run", "shard"], 2),
    "setting_as_command": (_nothing, ["run", "seed=1"], 2),
    "level_of_torch": (_rename_level, RUN, 2),
    "level_without_prior": (_nothing, ["run", "-S", "vqvae=three_level"], 2),
    "duplicate_key": (_write("params.yaml", b"seed: 1\nseed: 2\n"), RUN, 2),
    "merge_markers": (_write("params.yaml", b"<<<<<<< HEAD\nseed: 1\n=======\nseed: 2\n>>>>>>> b\n"), RUN, 2),
    "not_utf8": (_write("params.yaml", "seed: 1".encode("utf-16")), RUN, 2),
    "no_params": (_remove("params.yaml"), RUN, 2),
    "no_project": (_remove("dvc.yaml"), RUN, 2),
    "ui_without_project": (_remove("dvc.yaml"), ["ui"], 2),
    "sample_without_project": (_remove("dvc.yaml"), ["sample", "drawn"], 2),
    "no_dvc": (_no_dvc, ["status"], 1),
    "stages_not_understood": (_write("dvc.yaml", b"stages: 3\n"), ["status"], 2),
    "stages_not_yaml": (_write("dvc.yaml", b"stages: [\n"), ["status"], 2),
    "lock_of_another_shape": (_write("dvc.lock", b'schema: "2.0"\nstages: []\n'), RUN, 1),
    "broken_lock": (_write("dvc.lock", b"<<<<<<< HEAD\n"), RUN, 1),
    "missing_folder": (_set("dataset", source="photos"), RUN, 2),
    "file_instead_of_folder": (_text_file, RUN, 2),
    "folder_without_images": (_no_images, RUN, 2),
    "empty_folder": (_empty_folder, RUN, 2),
    "missing_labels": (_no_table, ["stage", "shard"], 2),
    "gpu_absent": (_nothing, ["run", "-S", "cluster=gpu"], 3),
    "inputs_missing": (_nothing, ["stage", "vqvae"], 4),
    "inputs_half_written": (_half_written, ["stage", "vqvae"], 4),
    "class_of_nothing": (_nothing, ["run", "--dry-run", "-S", "sample.classes=[flag]"], 2),
    "source_absent_dry": (_set("dataset", source="photos"), [*RUN, "--dry-run"], 2),
    "file_for_samples": (_write("drawn", b"a file"), ["sample", "drawn"], 2),
    "file_for_reconstructions": (_write("drawn", b"a file"), ["reconstruct", "cat.png", "--out", "drawn"], 2),
    "level_missing": (_nothing, ["stage", "prior"], 2),
    "unknown_level": (_nothing, ["stage", "prior", "middle"], 2),
    "no_model_to_sample": (_nothing, ["sample", "drawn"], 4),
    "no_model_to_reconstruct": (_nothing, ["reconstruct", "cat.png"], 4),
    "sections_missing": (_write("params.yaml", b"seed: 1\n"), ["status"], 2),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_use_gets_a_letter(name, project):
    """The command says what is wrong, where, and what to do, and ends with the right status."""
    prepare, command, status = CASES[name]
    if name == "gpu_absent" and os.path.exists("/dev/nvidia0"):  # noqa: PTH110
        pytest.skip("this machine has a GPU")
    prepare(project)
    check(name, project, command, status)


def test_a_second_run_is_refused(project):
    """A stage that runs already is not started twice."""
    folder = project.folder / "runs" / "shard"
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("PID 1 on host since 2000-01-01 00:00:00")
        file.flush()
        check("already_running", project, ["stage", "shard"], 3)


@pytest.mark.parametrize("lock", ["lock", "vqvae/lock"])
def test_a_refused_run_changes_no_settings(lock, project):
    """Stages of the run that is at work read params.yaml when they start: they must find what it began with."""
    path, before = project.folder / "runs" / lock, (project.folder / "params.yaml").read_bytes()
    path.parent.mkdir(parents=True)
    leftover = project.folder / "artifacts" / "priors" / "middle"
    leftover.mkdir(parents=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("PID 1 on host since 2000-01-01 00:00:00")
        file.flush()
        done = project.command("run", "-S", "seed=1")
    assert done.returncode == 3 and "at work here: PID 1 on host" in done.stderr
    assert (project.folder / "params.yaml").read_bytes() == before and leftover.is_dir()


def test_what_cannot_run_here_changes_no_settings(project):
    """The next command is about the settings from before the refused ones."""
    before = (project.folder / "params.yaml").read_bytes()
    assert project.command("run", "-S", "dataset.source=photos").returncode == 2
    assert (project.folder / "params.yaml").read_bytes() == before


def test_a_store_that_mlflow_cannot_open_is_refused(project):
    """MLflow would say so in a traceback."""
    check("no_store", project, ["ui"], 2, MLFLOW_TRACKING_URI="ftp://host")
    done = project.command("doctor", MLFLOW_TRACKING_URI="ftp://host")
    assert done.returncode == 3 and "error    mlflow         MLFLOW_TRACKING_URI begins with ftp://" in done.stdout


def test_a_port_in_use_is_refused(project):
    """MLflow would end with status 0, and say it in the middle of its own words."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = project.command("ui", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 3 and "cannot be used" in done.stderr and "--port" in done.stderr
    assert not (project.folder / "mlflow.db").exists()


def test_a_cluster_that_is_away_is_named_by_the_doctor(project):
    """`doctor` says which address does not answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    done = project.command("doctor", RAY_ADDRESS=address)
    assert done.returncode == 3 and f"RAY_ADDRESS={address}" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.ray
@pytest.mark.parametrize(
    ("name", "status"),
    [("corrupt_pictures", 4), *(pytest.param(name, 0, marks=pytest.mark.slow) for name in ("one_image", "one_class"))],
)
def test_a_poor_source_is_used_or_refused(name, status, project):
    """Corrupt pictures stop the stage with their names; few images or one class are enough for shards."""
    from PIL import Image

    for number in range({"corrupt_pictures": 3, "one_image": 1, "one_class": 8}[name]):
        path = project.folder / "images" / "only" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 0, 0)).save(path)
        if name == "corrupt_pictures":
            path.write_bytes(path.read_bytes()[:40])
    project.edit(lambda data: data["dataset"].update(source="images"))
    check(name, project, ["stage", "shard"], status)


def check(name, project, command, status, **environment):
    """Compare what a command prints with what it printed before."""
    done = project.command(*command, **environment)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr).replace(str(project.folder), "PROJECT")
    # How fast images and metrics went is not what is compared.
    passing = re.compile(r"\d/\d+ images|points are not in MLflow")
    shown = "\n".join(line.rstrip() for line in shown.splitlines() if not passing.search(line))
    text = f"$ vqvae2 {' '.join(command)}\n{shown}\nexit status {done.returncode}\n"
    path = SNAPSHOTS / f"{name}.txt"
    if "UPDATE" in os.environ:
        path.write_text(text, encoding="utf-8")
    assert done.returncode == status, text
    assert "Traceback" not in text and len(shown.splitlines()) <= 12
    assert text == path.read_text(encoding="utf-8")


def test_pages_of_another_server_are_its_own(project):
    """The letter gives its address without the password."""
    given = {"MLFLOW_TRACKING_URI": "http://me:hunter2@127.0.0.1:5000"}
    done = project.command("ui", **given)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: MLFLOW_TRACKING_URI names a server, which has pages of its own.\n"
        "  in: 127.0.0.1:5000\n  fix: Open that address in a browser.\n"
    )


def test_no_command_shows_a_password(project):
    """Also where it stands among the overrides that a letter repeats."""
    done = project.command("run", "-S", "cluster.storage='s3://me:hunter2@bucket/p'", "-S", "seed=abc")
    assert done.returncode == 2 and "s3://***@bucket/p" in done.stderr and "hunter2" not in done.stderr
