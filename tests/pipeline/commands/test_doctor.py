"""Tests of `vqvae2 doctor`."""

import importlib.metadata
import json
import socket

import pytest

from pipeline.commands import doctor

GIB = doctor.GIB


@pytest.mark.parametrize(
    ("result", "state", "text", "fix"),
    [
        (doctor.judge_memory(GIB, 8 * GIB), "warning", "1.0 of 8.0 GiB available", "Close other programs"),
        (doctor.judge_memory(4 * GIB, 8 * GIB), "ok", "4.0 of 8.0 GiB available", ""),
        (doctor.judge_shared_memory(GIB // 16), "warning", "0.06 GiB", "--shm-size=2g"),
        (doctor.judge_shared_memory(GIB), "ok", "1.0 GiB", ""),
        (doctor.judge_disk(2 * GIB, writable=True), "warning", "2.0 GiB free", "Free some space."),
        (doctor.judge_disk(20 * GIB, writable=True), "ok", "20.0 GiB free", ""),
        (doctor.judge_disk(20 * GIB, writable=False), "error", "not writable", "fix its permissions"),
        (doctor.judge_packages({"torch": "2", "ray": None}), "error", "missing: ray", "pip install"),
        (doctor.judge_packages({"torch": "2"}), "ok", "torch 2", ""),
        (doctor.judge_torchvision("1"), "warning", "1 is installed", "pip uninstall torchvision"),
        (doctor.judge_torchvision(None), "ok", "not installed, not required", ""),
    ],
    ids=lambda value: value.name if isinstance(value, doctor.CheckResult) else "",
)
def test_checks_have_a_fix_unless_they_pass(result, state, text, fix):
    """An error stops a run, a warning may stop it; both have a fix."""
    assert result.state == state and text in result.text and fix in result.fix
    assert bool(result.fix) == (state != "ok")


def test_installed_packages_are_reported_with_their_versions():
    """The check reads the metadata of this environment."""
    assert f"torch {importlib.metadata.version('torch')}" in doctor.check_packages().text
    assert doctor.installed_version("no-such-package") is None


def test_healthy_machine_passes_all_checks(project):
    """The JSON output has every check, and the exit status is 0."""
    done = project.command("doctor", "--json")
    states = {result["name"]: result["state"] for result in json.loads(done.stdout)}
    assert states["settings"] == states["images"] == states["packages"] == "ok"
    assert done.returncode == 0


def test_invalid_settings_and_missing_images_are_errors(current_project):
    """Doctor and run have the same texts."""
    current_project.edit(lambda data: data["dataset"].update(source="photos"))
    result = doctor.check_images()
    assert result.state == "error" and result.text.endswith("(photos)") and result.fix
    current_project.edit(lambda data: data["cluster"].update(gpus_per_worker=500))
    result = doctor.check_settings()
    assert result.state == "error" and "cluster requires 1000 GPUs" in result.text and "RAY_ADDRESS" in result.fix
    current_project.edit(lambda data: data.update(sed=1))
    result = doctor.check_settings()
    assert (
        result.state == "error" and "sed is not a valid setting" in result.text and result.fix == "Did you mean seed?"
    )


def test_ray_cluster_must_answer_and_should_require_a_token():
    """An address without a port is resolved by Ray and not checked."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = {"RAY_ADDRESS": f"127.0.0.1:{server.getsockname()[1]}"}
        result = doctor.check_ray(environment)
        assert result.state == "warning" and "no token is set" in result.text and "RAY_AUTH_MODE=token" in result.fix
        assert doctor.check_ray({**environment, "RAY_AUTH_TOKEN": "secret"}).state == "ok"
    result = doctor.check_ray(environment)
    assert result.state == "error" and environment["RAY_ADDRESS"] in result.text
    assert doctor.check_ray({"RAY_ADDRESS": "auto", "RAY_AUTH_TOKEN": "secret"}).state == "ok"
    assert doctor.check_ray({}).state == "ok"


def test_mlflow_server_that_does_not_answer_is_a_warning():
    """Runs continue without it. The password of the address is not shown."""
    result = doctor.check_mlflow({"MLFLOW_TRACKING_URI": "http://me:hunter2@127.0.0.1:9"})
    assert result.state == "warning" and "127.0.0.1:9 does not answer" in result.text and "sync-metrics" in result.fix
    assert "hunter2" not in result.text


def test_unreachable_cluster_sets_the_exit_status(project):
    """The command prints the address that does not answer."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    done = project.command("doctor", RAY_ADDRESS=address)
    assert done.returncode == 3 and f"RAY_ADDRESS={address}" in done.stdout and "Traceback" not in done.stderr
