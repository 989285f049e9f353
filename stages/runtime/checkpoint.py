"""Checkpoints of a training run: whole, hashed, found by scanning, written behind the steps' back.

Each is an artifact folder `step-000001000` in the run's work folder (see formats/artifact.py): its manifest holds the
step and the run's fingerprint, and it exists only once renamed into place. What is damaged is set aside and the one
before it is used.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.errors import UserError
from stages.formats import artifact

KIND = "checkpoint"
STATE, HISTORY = "state.safetensors", "history.json"


@dataclass(frozen=True)
class State:
    """Everything a training run is made of after `step` steps."""

    step: int
    tensors: Mapping[str, Tensor]
    history: list[dict[str, Any]]  # rows of step, name, value: the curves so far


class Checkpoints:
    """The checkpoints of one run, in one folder."""

    def __init__(self, folder: Path, fingerprint: str, keep: int, note: Callable[[str], None] = lambda text: None):
        self.folder, self.fingerprint, self.keep, self.note = folder, fingerprint, keep, note
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def latest(self) -> State | None:
        """Read the newest whole and intact checkpoint, if there is one."""
        steps = sorted((_step(path) for path in self.folder.glob("step-*[0-9]")), reverse=True)
        for step in steps:
            folder = self._folder(step)
            try:
                state = self._read(folder)
            except UserError as error:
                self._set_aside(folder)
                self.note(f"Checkpoint of step {step} is damaged and set aside: {error.what}")
                continue
            if state.step < steps[0]:
                self.note(f"Going on from step {state.step}; {steps[0] - state.step} steps are lost.")
            return state
        return None

    def _read(self, folder: Path) -> State:
        found = artifact.read(folder, KIND)
        found.verify()
        # The manifest itself has no hash: what it says is held against what is known.
        if set(found.files) != {STATE, HISTORY} or found.meta.get("step") != _step(folder):
            raise UserError("Its manifest is not what was written.", where=folder, code=5)
        if found.meta.get("fingerprint") != self.fingerprint:
            raise UserError(
                f"It belongs to another run: {found.meta.get('fingerprint')}, not {self.fingerprint}.",
                where=folder,
                code=5,
            )
        history = json.loads(found.path(HISTORY).read_text(encoding="utf-8"))
        return State(found.meta["step"], load_file(found.path(STATE)), history)

    @staticmethod
    def _set_aside(folder: Path) -> None:
        aside = folder.with_name(f"{folder.name}.damaged")
        try:
            folder.rename(aside)
        except FileNotFoundError:  # another worker, which reads the same folder, has done it
            pass
        except OSError:  # one of an earlier time stands there
            shutil.rmtree(aside, ignore_errors=True)
            with suppress(FileNotFoundError):
                folder.rename(aside)

    def save(self, state: State) -> None:
        """Copy the state and write it in the background; wait only if the one before is still being written."""
        self.wait()
        # A copy on the CPU: the next steps change the tensors in place. Contiguous: safetensors stores no strides,
        # and tensors that share storage are written apart.
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.tensors.items()}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise UserError(
                    f"{name} holds numbers that are not finite at step {state.step}; this state is not kept.",
                    where=self.folder,
                    fix="Lower learning_rate, or set clip, then run again.",
                )
        self._pending = self._writer.submit(self._write, State(state.step, tensors, list(state.history)))

    def wait(self) -> None:
        """Return once everything handed to `save` is on disk; raise what went wrong there."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                pending.result()
            except OSError as error:
                raise UserError(
                    f"The checkpoint could not be written: {error.strerror or error}.",
                    where=self.folder,
                    fix="Free some space or mend the permissions, then run the same command again; it goes on "
                    "from the checkpoint before.",
                    code=3,
                ) from error

    def _write(self, state: State) -> None:
        meta = {"step": state.step, "fingerprint": self.fingerprint}
        with artifact.writing(self._folder(state.step), KIND, meta) as folder:
            save_file(dict(state.tensors), folder / STATE)
            (folder / HISTORY).write_text(json.dumps(state.history), encoding="utf-8")
        kept = sorted(self.folder.glob("step-*[0-9]"), reverse=True)
        for old in kept[self.keep :]:
            shutil.rmtree(old)

    def _folder(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
