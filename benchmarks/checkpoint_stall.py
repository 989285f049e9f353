"""Seconds for which saving a checkpoint stalls training, beside the plain way: copy to new memory, then `isfinite`.

    python benchmarks/checkpoint_stall.py --mib 1024

Three checkpoints, each after the one before is on the disk, as with steps between them. The first one pays for new
memory. Writing and hashing run in a thread. `pause` is the longest time for which they keep Python code of the training
thread from running: both release Python's lock, so another process would save nothing.
"""

import argparse
import tempfile
import threading
import time
from pathlib import Path

import torch

from stages.training.checkpoint import MIB, Checkpoints
from stages.training.checkpoint_state import TrainState


def main() -> None:
    """Print one row per checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="size of the state, in tensors of 16 MiB")
    parser.add_argument("--threads", type=int, default=1, help="threads torch may use")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tensors = {f"network.{index}": torch.randn(4 * MIB) for index in range(options.mib // 16)}
    print(
        f"{'checkpoint':<12}{'stall s':>9}{'CPU s':>7}{'plain s':>9}{'CPU s':>7}{'written after s':>17}{'pause s':>9}"
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), "print", keep=1)
        for step in range(1, 4):
            wall, processor = time.perf_counter(), time.thread_time()
            checkpoints.save(TrainState(step, tensors, []))
            stall, stall_cpu = time.perf_counter() - wall, time.thread_time() - processor
            pause = _longest_pause(checkpoints)
            written = time.perf_counter() - wall
            plain, plain_cpu = _save_plainly(tensors)
            print(f"{step:<12}{stall:>9.2f}{stall_cpu:>7.2f}{plain:>9.2f}{plain_cpu:>7.2f}{written:>17.2f}", end="")
            print(f"{pause:>9.3f}", flush=True)


def _longest_pause(checkpoints: Checkpoints) -> float:
    """Run Python code until the checkpoint is written; return the longest time for which it did not run."""
    writing = threading.Thread(target=checkpoints.wait)
    writing.start()
    longest, last = 0.0, time.perf_counter()
    while writing.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


def _save_plainly(tensors: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Return the seconds, of the clock and of the processor, to copy a state to new memory and check it."""
    wall, processor = time.perf_counter(), time.thread_time()
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    assert all(torch.isfinite(tensor).all() for tensor in copies.values())
    return time.perf_counter() - wall, time.thread_time() - processor


if __name__ == "__main__":
    main()
