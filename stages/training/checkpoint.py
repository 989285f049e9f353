"""Checkpoints of a training run: whole, hashed, found by scanning, written behind the steps' back.

Each is an artifact folder `step-000001000` in the run's work folder (see formats/artifact.py): its manifest holds the
step and the run's fingerprint, and it exists only once renamed into place. What is damaged is set aside and the one
before it is used. Where a storage is given, each is put there too, and what lies there is what counts.
"""

import json
import platform
import re
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
from stages.runtime.context import StageContext
from stages.runtime.storage import Storage, Unreachable, Unwritable

KIND = "checkpoint"
STATE, HISTORY = "state.safetensors", "history.json"
MIB = 2**20
SET_ASIDE = "None is needed: it is set aside, and the checkpoint before it is used."


@dataclass(frozen=True)
class State:
    """Everything a training run is made of after `step` steps."""

    step: int
    tensors: Mapping[str, Tensor]
    history: list[dict[str, Any]]  # rows of step, name, value: the curves so far


class Checkpoints:
    """The checkpoints of one run, in one folder, and in the storage if there is one."""

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        keep: int,
        note: Callable[[str], None] = lambda text: None,
        storage: Storage | None = None,
    ):
        self.folder, self.fingerprint, self.keep, self.note, self.storage = folder, fingerprint, keep, note, storage
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    @classmethod
    def of(cls, context: StageContext, keep: int) -> "Checkpoints":
        """Open the checkpoints of a run, of which the newest so many are kept."""
        return cls(context.work, context.fingerprint, keep, context.reporter.note, context.storage)

    def latest(self) -> State | None:
        """Read the newest whole and intact checkpoint that is here; None if there is none at all.

        Raises UserError if all are damaged: the next call then finds none.
        """
        steps = sorted((_step(path) for path in self.folder.glob("step-*[0-9]")), reverse=True)
        for step in steps:
            folder = self.place(step)
            try:
                state = self._read(folder)
            except UserError as error:
                self._set_aside(folder)
                self.note(f"Checkpoint of step {step} is damaged and set aside: {error.what}")
                continue
            if state.step < steps[0]:
                self.note(f"Going on from step {state.step}; {steps[0] - state.step} steps are lost.")
            return state
        if steps:
            raise UserError(
                f"No checkpoint is intact: {steps[0]} steps are lost. The damaged ones are kept, as step-*.damaged.",
                where=self.folder,
                fix="Put an intact copy of one in its place, if you have it, and run the same command again: it goes "
                "on from there, or else begins at step 0.",
                code=5,
            )
        return None

    def _read(self, folder: Path) -> State:
        found = artifact.read(folder, KIND)
        found.verify()
        # The manifest itself has no hash: what it says is held against what is known.
        if set(found.files) != {STATE, HISTORY} or found.meta.get("step") != _step(folder):
            raise UserError("Its manifest is not what was written.", where=folder, fix=SET_ASIDE, code=5)
        if found.meta.get("fingerprint") != self.fingerprint:
            raise UserError(
                f"It belongs to another run: {found.meta.get('fingerprint')}, not {self.fingerprint}.",
                where=folder,
                fix=SET_ASIDE,
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

    def fetch(self) -> int:
        """Bring the newest whole and intact checkpoint here from the storage; return its step, 0 if there is none."""
        steps = self._stored()
        for step in steps:
            try:
                self.fetch_step(step)
                self._read(self.place(step))
            except (Unreachable, Unwritable):
                raise
            except UserError as error:
                assert self.storage
                self.storage.set_aside(self.place(step).name)  # or it would count among those that are kept
                self.note(f"Checkpoint of step {step} is damaged in the storage and set aside there: {error.what}")
                continue
            if step < steps[0]:
                self.note(f"Going on from step {step}; {steps[0] - step} steps are lost.")
            return step
        return 0

    def fetch_step(self, step: int) -> None:
        """Bring the checkpoint of a step here from the storage."""
        assert self.storage
        self.storage.fetch(self.place(step).name, self.place(step), KIND)

    def forget_all_but(self, step: int) -> None:
        """Remove the checkpoints that are here, but one: what the storage does not have is no other worker's."""
        for folder in self.folder.glob("step-*[0-9]"):
            if _step(folder) != step:
                shutil.rmtree(folder)

    def exchange(self) -> None:
        """Bring the newest checkpoint here from the storage, or put it there, wherever it is."""
        if self.storage is None:
            return
        there, here = self.fetch(), self.latest()
        if here is not None and here.step > there:
            self._store(here.step)
        self._prune()

    def _store(self, step: int) -> None:
        """Put the checkpoint of a step into the storage."""
        assert self.storage
        folder = self.place(step)
        self.storage.upload(folder, folder.name)

    def _prune(self) -> None:
        """Remove all but the newest of the checkpoints that are here."""
        kept = sorted(self.folder.glob("step-*[0-9]"), reverse=True)
        for old in kept[self.keep :]:
            shutil.rmtree(old)

    def _stored(self) -> list[int]:
        """The steps of the checkpoints in the storage, newest first."""
        assert self.storage
        names = [name for name in self.storage.names() if re.fullmatch(r"step-\d+", name)]
        return sorted((int(name.removeprefix("step-")) for name in names), reverse=True)

    def require_room(self, tensors: Mapping[str, Tensor], remaining_checkpoints: int) -> None:
        """Refuse a disk too small for the checkpoints that will lie here at a time, of `coming` that are to be written.

        Raises UserError: hours of steps are lost where the disk is full before the first of them is whole.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        size = sum(tensor.nbytes for tensor in tensors.values())
        # One more than are kept: the oldest goes once the newest is there.
        more = min(remaining_checkpoints, self.keep + 1 - sum(1 for _ in self.folder.glob("step-*[0-9]")))
        free = shutil.disk_usage(self.folder).free
        if more * size > free:
            raise UserError(
                f"The disk is too small for checkpoints: {more} more, of {size / MIB:,.1f} MiB each, are to come, "
                f"and {free / MIB:,.1f} MiB are free.",
                where=f"{self.folder} on {platform.node()}",
                fix="Free some space, or lower keep_checkpoints, then run the same command again.",
                code=3,
            )

    def unfit(self, step: int, what: str) -> UserError:
        """Word that an intact checkpoint is not what this run needs."""
        place, runs = str(self.place(step)), ""
        if self.storage:  # to which it is brought again as long as the command's own folder has it
            place = f"{self.storage.url}/{self.place(step).name}"
            runs = " there, and from runs/ where the command is given"
        return UserError(
            f"The checkpoint of step {step} is not of this network: {what}.",
            where=place,
            fix=f"Remove it{runs}, then run the same command again: it goes on from the one before, or from step 0.",
            code=5,
        )

    def save(self, state: State) -> None:
        """Copy the state and write it in the background; wait only if the one before is still on its way."""
        self.wait()
        # A copy on the CPU: the next steps change the tensors in place. Contiguous: safetensors stores no strides,
        # and tensors that share storage are written apart.
        tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.tensors.items()}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise UserError(
                    f"{name} holds numbers that are not finite at step {state.step}; this state is not kept.",
                    where=self.folder,
                    fix="Lower learning_rate, or set max_grad_norm, then run again.",
                )
        self._pending = self._writer.submit(self._write, State(state.step, tensors, list(state.history)))

    def wait(self) -> None:
        """Return once everything handed to `save` is where it is to be; raise what went wrong on the way."""
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
        with artifact.commit_folder(self.place(state.step), KIND, meta) as folder:
            save_file(dict(state.tensors), folder / STATE)
            (folder / HISTORY).write_text(json.dumps(state.history), encoding="utf-8")
        self._prune()
        if self.storage:
            self._store(state.step)
            for step in self._stored()[self.keep :]:
                self.storage.discard(self.place(step).name)

    def place(self, step: int) -> Path:
        """Say where the checkpoint of a step lies here."""
        return self.folder / f"step-{step:09d}"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
