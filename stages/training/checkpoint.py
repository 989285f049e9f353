"""Checkpoints of a training run: atomic, hashed, found by scanning a folder, written in the background.

Each is an artifact folder `step-000001000` in the run's work folder (see formats/artifact.py). Its manifest holds the
step and the run's fingerprint, and a rename creates the folder once it is complete. A damaged checkpoint is renamed to
`step-*.damaged`, and training continues from the one before it. With a storage, each checkpoint is also uploaded, and
on nodes without a shared disk the storage decides which one is newest. The fields of a checkpoint are defined in
stages/training/checkpoint_state.py.
"""

import json
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.errors import UserError
from stages.formats import artifact
from stages.runtime.context import StageContext
from stages.runtime.node_cache import LocalDiskError
from stages.runtime.storage import Storage, StorageUnavailableError
from stages.training.checkpoint_state import TrainState

KIND = "checkpoint"
STATE_FILE, HISTORY_FILE = "state.safetensors", "history.json"
MIB = 2**20
DAMAGED_FIX = "Nothing to do: the checkpoint before it is used."


class Checkpoints:
    """Checkpoints of one run in one folder, and in the storage if there is one. Keeps the newest `keep`."""

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        keep: int,
        notify: Callable[[str], None] = lambda message: None,
        storage: Storage | None = None,
    ):
        self.folder, self.fingerprint, self.keep, self.notify = folder, fingerprint, keep, notify
        self.storage = storage
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._copies: dict[str, Tensor] = {}  # of the state that is being written, reused for the next one

    @classmethod
    def for_stage(cls, context: StageContext, keep: int) -> "Checkpoints":
        """Open the checkpoints of a stage's run."""
        return cls(context.work_dir, context.fingerprint, keep, context.reporter.message, context.storage)

    def latest(self) -> TrainState | None:
        """Read the newest intact checkpoint of the folder; None if the folder has no checkpoints.

        Raises UserError if all are damaged. They are then renamed, so the next call returns None.
        """
        steps = self._local_steps()
        for step in steps:
            folder = self.path(step)
            try:
                state = self._read(folder)
            except UserError as error:
                self._mark_damaged(folder)
                self.notify(f"The checkpoint of step {step} is damaged and set aside: {error.what}")
                continue
            if state.step < steps[0]:
                self.notify(f"Continuing from step {state.step}; {steps[0] - state.step} steps are lost.")
            return state
        if steps:
            raise UserError(
                f"No checkpoint is intact: {steps[0]} steps are lost. The damaged ones are renamed to step-*.damaged.",
                where=self.folder,
                fix="Restore an intact copy of a checkpoint if you have one, then run the same command again. Training "
                "continues from that copy, or restarts at step 0 without one.",
                code=5,
            )
        return None

    def _read(self, folder: Path) -> TrainState:
        checkpoint = artifact.read(folder, KIND)
        checkpoint.verify()
        # The manifest has no hash of its own, so its contents are compared with what `_write` puts there.
        if set(checkpoint.files) != {STATE_FILE, HISTORY_FILE} or checkpoint.meta.get("step") != _step(folder):
            raise UserError("Its manifest has unexpected contents.", where=folder, fix=DAMAGED_FIX, code=5)
        fingerprint = checkpoint.meta.get("fingerprint")
        if fingerprint != self.fingerprint:
            raise UserError(
                f"Its fingerprint must be {self.fingerprint}, got {fingerprint}: it belongs to another run.",
                where=folder,
                fix=DAMAGED_FIX,
                code=5,
            )
        history = json.loads(checkpoint.path(HISTORY_FILE).read_text(encoding="utf-8"))
        return TrainState(checkpoint.meta["step"], load_file(checkpoint.path(STATE_FILE)), history)

    @staticmethod
    def _mark_damaged(folder: Path) -> None:
        damaged = folder.with_name(f"{folder.name}.damaged")
        try:
            folder.rename(damaged)
        except FileNotFoundError:  # another rank reads the same folder and has renamed it
            pass
        except OSError:  # an older damaged checkpoint of the same step has this name
            shutil.rmtree(damaged, ignore_errors=True)
            with suppress(FileNotFoundError):
                folder.rename(damaged)

    def fetch(self) -> int:
        """Download the newest intact checkpoint of the storage; return its step, 0 if there is none.

        Raises StorageUnavailableError if the storage does not work, and LocalDiskError if this node's disk does not.
        """
        steps = self._stored_steps()
        for step in steps:
            try:
                self.fetch_step(step)
                self._read(self.path(step))
            except (StorageUnavailableError, LocalDiskError):
                raise
            except UserError as error:
                assert self.storage
                self.storage.quarantine(self.path(step).name)  # it must not count among the `keep` newest
                self.notify(
                    f"The checkpoint of step {step} is damaged in the storage and set aside there: {error.what}"
                )
                continue
            if step < steps[0]:
                self.notify(f"Continuing from step {step}; {steps[0] - step} steps are lost.")
            return step
        return 0

    def fetch_step(self, step: int) -> None:
        """Download the checkpoint of a step from the storage."""
        assert self.storage
        self.storage.fetch(self.path(step).name, self.path(step), KIND)

    def remove_except(self, step: int) -> None:
        """Remove all checkpoints of the folder but that of `step`: other ranks cannot fetch what the storage lacks."""
        for folder in self._local_folders():
            if _step(folder) != step:
                shutil.rmtree(folder)

    def sync(self) -> None:
        """Download the newest checkpoint from the storage, or upload it if the folder's is newer."""
        if self.storage is None:
            return
        stored_step, local = self.fetch(), self.latest()
        if local is not None and local.step > stored_step:
            self._upload(local.step)
        self._prune()

    def _upload(self, step: int) -> None:
        assert self.storage
        folder = self.path(step)
        self.storage.upload(folder, folder.name)

    def _prune(self) -> None:
        """Remove all but the newest `keep` checkpoints of the folder, and those whose writer was killed."""
        for folder in self.folder.glob(".step-*.writing"):
            shutil.rmtree(folder)
        for folder in sorted(self._local_folders(), reverse=True)[self.keep :]:
            shutil.rmtree(folder)

    def _local_folders(self) -> list[Path]:
        return list(self.folder.glob("step-*[0-9]"))  # without step-*.damaged

    def _local_steps(self) -> list[int]:
        """Return the steps of the folder's checkpoints, newest first."""
        return sorted(map(_step, self._local_folders()), reverse=True)

    def _stored_steps(self) -> list[int]:
        """Return the steps of the storage's checkpoints, newest first."""
        assert self.storage
        names = [name for name in self.storage.list_artifacts() if re.fullmatch(r"step-\d+", name)]
        return sorted((int(name.removeprefix("step-")) for name in names), reverse=True)

    def require_free_space(self, tensors: Mapping[str, Tensor], remaining_checkpoints: int) -> None:
        """Raise UserError if the disk has no room for the remaining checkpoints that exist at the same time.

        Called after the first step: a disk that fills up at the first checkpoint would cost hours of steps.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        size = sum(tensor.nbytes for tensor in tensors.values())
        # One more than `keep`: the oldest is removed once the newest is complete.
        count = min(remaining_checkpoints, self.keep + 1 - len(self._local_folders()))
        free = shutil.disk_usage(self.folder).free
        if count * size > free:
            raise UserError(
                f"The disk is too small for {count} more checkpoints of {size / MIB:,.1f} MiB each: "
                f"{free / MIB:,.1f} MiB are free.",
                where=f"{self.folder} on {platform.node()}",
                fix="Free some space, or lower keep_checkpoints, then run the same command again.",
                code=3,
            )

    def mismatch_error(self, step: int, reason: str) -> UserError:
        """Create the error for an intact checkpoint that does not match the network."""
        place, folders = str(self.path(step)), ""
        if self.storage:  # a copy in the command's own folder would be uploaded again
            place = f"{self.storage.url}/{self.path(step).name}"
            folders = " there, and from runs/ where the command runs"
        return UserError(
            f"The checkpoint of step {step} does not match this network: {reason}.",
            where=place,
            fix=f"Remove it{folders}, then run the same command again. Training continues from the checkpoint before "
            "it, or from step 0.",
            code=5,
        )

    def save(self, state: TrainState) -> None:
        """Copy a state and write it in the background. Waits first if the previous one is still being written.

        Raises UserError if a tensor is not finite, or if the previous checkpoint could not be written.
        """
        self.wait()
        if name := find_not_finite(state.tensors):
            raise UserError(
                f"{name} must be finite, but is not at step {state.step}; this state is not saved.",
                where=self.folder,
                fix="Lower learning_rate, or set max_grad_norm, then run again.",
            )
        copied = TrainState(state.step, self._copy(state.tensors), list(state.history))
        self._pending = self._writer.submit(self._write, copied)

    def _copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to the CPU, because the next steps change them in place.

        The next state reuses the memory of the copies, because the first use of new memory takes longer than the copy
        itself. Copies from a GPU go to pinned memory and overlap. A copy is contiguous, because safetensors stores no
        strides, and has its own memory, because safetensors refuses shared memory.
        """
        for name, tensor in tensors.items():
            copy = self._copies.get(name)
            if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._copies[name] = copy
            copy.copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return {name: self._copies[name] for name in tensors}

    def wait(self) -> None:
        """Wait until every saved state is on disk and in the storage. Raises UserError if writing failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                pending.result()
            except OSError as error:
                raise UserError(
                    f"The checkpoint could not be written: {error.strerror or error}.",
                    where=self.folder,
                    fix="Free some space or fix the permissions, then run the same command again; it continues from "
                    "the previous checkpoint.",
                    code=3,
                ) from error

    def _write(self, state: TrainState) -> None:
        meta = {"step": state.step, "fingerprint": self.fingerprint}
        with artifact.commit_folder(self.path(state.step), KIND, meta) as folder:
            save_file(dict(state.tensors), folder / STATE_FILE)
            (folder / HISTORY_FILE).write_text(json.dumps(state.history), encoding="utf-8")
        self._prune()
        if self.storage:
            self._upload(state.step)
            for step in self._stored_steps()[self.keep :]:
                self.storage.delete(self.path(step).name)

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.folder / f"step-{step:09d}"


def find_not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of a tensor with a value that is not finite, "" if there is none. Computes on their device."""
    floating = {name: tensor.detach() for name, tensor in tensors.items() if tensor.is_floating_point()}
    # A sum is not finite if any value is not, and takes a fraction of the time of `isfinite`, which writes a tensor.
    # Finite values may overflow it, so each value of a suspect is checked. The host waits for a device once.
    suspects: list[str] = []
    for device in {tensor.device for tensor in floating.values()}:
        names = [name for name, tensor in floating.items() if tensor.device == device]
        finite = torch.stack([floating[name].sum().double() for name in names]).isfinite().tolist()
        suspects += [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
    return next((name for name in suspects if not floating[name].isfinite().all()), "")


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
