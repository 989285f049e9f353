"""Tests of `vqvae2 doctor`."""

import json
import socket

from pipeline.checks.check import Answer, result_of
from pipeline.commands import doctor
from stages.errors import UserError


def states(results):
    """Return the state of each check by its name."""
    return {result.name: result.state for result in results}


def test_healthy_machine_passes_all_checks(project):
    """The JSON output has every check, and the exit status is 0."""
    done = project.command("doctor", "--json")
    results = {result["name"]: result["state"] for result in json.loads(done.stdout)}
    required = (
        "settings",
        "images",
        "packages",
        "pipeline",
        "dvc",
        "folder",
        "permissions",
        "ray",
        "mlflow",
        "storage",
    )
    assert {results[name] for name in required} == {"ok"}
    assert done.returncode == 0


def test_answers_become_results():
    """An answer with a fix is a warning. An error has its location; one of the operating system is no traceback."""

    def refuse(subject):
        raise UserError("It is wrong.", where=subject, fix="Correct it.")

    def deny(subject):
        raise PermissionError(13, "Permission denied", subject)

    assert result_of("a", lambda subject: Answer("good"), "x").state == "ok"
    assert result_of("a", lambda subject: Answer("poor", "Improve it."), "x").state == "warning"
    result = result_of("a", refuse, "x")
    assert (result.state, result.text, result.fix) == ("error", "It is wrong. (x)", "Correct it.")
    result = result_of("a", deny, "x")
    assert result.state == "error" and "Permission denied" in result.text and result.fix


def test_invalid_settings_and_missing_images_are_errors(current_project):
    """Doctor and run have the same texts. Invalid settings leave the checks that need them out."""
    current_project.edit(lambda data: data["dataset"].update(source="photos"))
    results = doctor.run_checks()
    (images,) = [result for result in results if result.name == "images"]
    assert images.state == "error" and images.text.endswith("(photos)") and images.fix
    current_project.edit(lambda data: data["cluster"].update(gpus_per_worker=500))
    (resources,) = [result for result in doctor.run_checks() if result.name == "resources"]
    assert "cluster requires 1000 GPUs" in resources.text and "RAY_ADDRESS" in resources.fix
    current_project.edit(lambda data: data.update(sed=1))
    results = doctor.run_checks()
    (settings,) = [result for result in results if result.name == "settings"]
    assert "sed is not a valid setting" in settings.text and settings.fix == "Did you mean seed?"
    assert settings.state == "error" and "images" not in states(results) and states(results)["disk"] != "error"


def test_project_without_git_is_an_error(current_project):
    """DVC would refuse every run; the fix names both ways on."""
    (current_project.folder / ".dvc" / "config").write_text("")
    (result,) = [result for result in doctor.run_checks() if result.name == "dvc"]
    assert result.state == "error" and "not a git repository" in result.text
    assert "git init" in result.fix and "core.no_scm true" in result.fix


def test_folder_without_a_project_is_an_error(project):
    """Each check that needs the project names what is missing."""
    for name in ("dvc.yaml", "params.yaml"):
        (project.folder / name).unlink()
    done = project.command("doctor")
    assert done.returncode == 3 and "dvc.yaml does not exist" in done.stdout and "Traceback" not in done.stderr


def test_unreachable_cluster_sets_the_exit_status(project):
    """The command prints the address that does not answer."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    done = project.command("doctor", RAY_ADDRESS=address)
    assert done.returncode == 3 and f"RAY_ADDRESS={address}" in done.stdout and "Traceback" not in done.stderr
