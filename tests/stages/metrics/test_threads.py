"""Numbers that do not depend on the number of threads, and so on the machine: subprocesses with one and two threads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from stages.metrics.chunks import map_chunks
from stages.metrics.set_metrics import SET_METRICS

ROOT = Path(__file__).parents[3]
PRINT_METRICS = """
import json
import sys
import numpy as np
import torch
from stages.config import EvaluateConfig
from stages.metrics.set_metrics import compare
from stages.metrics.threads import one_thread

torch.set_num_threads(int(sys.argv[1]))
generator = np.random.default_rng(0)
# Some more features than images, as in the demo, and more images than one chunk.
features = [generator.normal(size=(600, 1280)).astype(np.float32) * scale for scale in (1, 0.9)]
with one_thread():
    print(json.dumps(compare(*features, EvaluateConfig(), 0)))
assert torch.get_num_threads() == int(sys.argv[1])
"""


def metrics_with_threads(threads: int) -> str:
    """Compute all metrics of two sets in a process whose libraries use `threads` threads."""
    variables = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return subprocess.run(
        [sys.executable, "-c", PRINT_METRICS, str(threads)],
        env={**os.environ, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_comparisons_have_the_same_bytes_with_any_number_of_threads():
    """All metrics are equal to the last digit with one, two and four threads."""
    metrics = metrics_with_threads(1)
    assert set(json.loads(metrics)) == set(SET_METRICS)
    assert metrics_with_threads(2) == metrics
    assert metrics_with_threads(4) == metrics


def test_chunks_are_mapped_in_order():
    """Results come in the order of the rows, whatever thread is first."""
    rows = np.arange(1000)
    assert np.concatenate(list(map_chunks(lambda chunk: rows[chunk], len(rows)))).tolist() == rows.tolist()
