"""What is looked at before anything starts: each finding names what it found and what to do."""

import importlib.metadata
import socket
from types import SimpleNamespace

import pytest

from pipeline import params, preflight
from pipeline.preflight import GIB
from stages.errors import UserError


@pytest.fixture
def here(project, monkeypatch):
    """Stand in a project."""
    monkeypatch.chdir(project.folder)
    return project


VERSION = "importlib.metadata.version"


def versions(**found):
    """Stand for what is installed."""

    def version(name):
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    return version


def memory(gib):
    return lambda: SimpleNamespace(available=gib * GIB, total=8 * GIB)


def disk(gib):
    return lambda path: SimpleNamespace(total=gib * GIB, free=gib * GIB)


@pytest.mark.parametrize(
    ("look", "what", "instead", "state", "text", "fix"),
    [
        (
            preflight._packages,
            VERSION,
            versions(torch="2"),
            "error",
            "missing: vqvae2, ray",
            "pip",
        ),
        (
            preflight._torchvision,
            VERSION,
            versions(torchvision="1"),
            "warning",
            "1 is",
            "uninstall",
        ),
        (preflight._torchvision, VERSION, versions(), "ok", "absent, and not needed", ""),
        (preflight._memory, "psutil.virtual_memory", memory(1), "warning", "1.0 of 8.0 GiB", "Close other programs"),
        (preflight._memory, "psutil.virtual_memory", memory(4), "ok", "4.0 of 8.0 GiB", ""),
        (preflight._shared_memory, "shutil.disk_usage", disk(0.0625), "warning", "0.06 GiB", "--shm-size=2g"),
        (preflight._disk, "shutil.disk_usage", disk(2), "warning", "2.0 GiB free here", "Free some space."),
        (preflight._disk, "shutil.disk_usage", disk(20), "ok", "20.0 GiB free here", ""),
        (preflight._disk, "os.access", lambda *_: False, "error", "cannot be written", "mend its permissions"),
    ],
)
def test_a_machine_that_lacks_something_is_told_what(monkeypatch, look, what, instead, state, text, fix):
    """What stops a run is an error, what may is a warning, and both come with the remedy."""
    monkeypatch.setattr(what, instead)
    found = look()
    assert found.state == state and text in found.text and fix in found.fix and bool(found.fix) == (state != "ok")


def test_settings_and_images_that_cannot_be_used_are_errors(here):
    """In the words that a run would use."""
    here.edit(lambda data: data["dataset"].update(source="photos"))
    found = preflight._source()
    assert (found.state, found.text) == ("error", "The source of images does not exist. (photos)") and found.fix
    here.edit(lambda data: data.update(sed=1))
    found = preflight._settings()
    assert found.state == "error" and "sed is not a setting" in found.text and found.fix == "Did you mean seed?"


def test_a_ray_cluster_is_reached_and_should_ask_for_a_token(monkeypatch):
    """What listens is taken for one; what is no host and port is Ray's to find."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        found = preflight._ray()
        assert found.state == "warning" and "no token is set" in found.text and "RAY_AUTH_MODE=token" in found.fix
        monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
        assert preflight._ray().state == "ok"
    assert preflight._ray().state == "error"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert preflight._ray().state == "ok"


def test_a_server_that_does_not_answer_is_a_warning(monkeypatch):
    """The run goes on without it; no password is shown."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    found = preflight._mlflow()
    assert found.state == "warning" and "127.0.0.1:9 does not answer" in found.text and "sync-metrics" in found.fix
    assert "hunter2" not in found.text


def test_results_can_be_had_where_the_gpus_and_the_images_are_not(here, monkeypatch):
    """A run that may pull them computes nothing; one that may not is refused, with the other overrides kept."""
    monkeypatch.setattr(preflight, "gpus", lambda: 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    settings = params.load()
    monkeypatch.setattr(preflight.origin, "kept", lambda: ["experiment=smoke", "cluster=gpu", "dataset.name=a b"])
    object.__setattr__(settings.cluster, "gpus_per_worker", 1)
    object.__setattr__(settings.dataset, "source", "nowhere")
    object.__setattr__(settings.sample, "classes", ("flags",))
    preflight.check(settings, ["shard", "vqvae", "sample"], "params.yaml", pull=True)
    with pytest.raises(UserError, match="The source of images does not exist"):
        preflight.check(settings, ["shard"], "params.yaml", pull=False)
    with pytest.raises(UserError, match=r"cluster asks for 2 GPUs; this machine has 0\.") as caught:
        preflight.check(settings, ["vqvae"], "params.yaml", pull=False)
    assert "-S experiment=smoke -S 'dataset.name=a b' -S cluster=local, or name" in caught.value.fix
