"""Nearest training images of queries by pixels: one part of `evaluate`, against a float32 search with exact re-ranking.

    python benchmarks/neighbours.py --threads 2

1,365 queries and 256 training images of 256 x 256 pixels, as in a part of ImageNet's evaluation. The alternative is the
usual way to exact distances: one matrix product in float32 selects candidates, whose differences are then computed. The
floor is the matrix product alone.
"""

import numpy as np
import torch
from timing import arguments, measure, table

from stages.metrics import neighbours

K = 3
EXTRA_CANDIDATES = 8


def reranked(queries: np.ndarray, candidates: np.ndarray) -> neighbours.Neighbours:
    """Select by the distance in float32, then compute the distances of the selected images in float64."""
    queries, candidates = queries.reshape(len(queries), -1), candidates.reshape(len(candidates), -1)
    mean = candidates.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = torch.from_numpy(candidates - mean)
    fast = centred.square().sum(dim=1) - 2 * torch.cat(
        [torch.from_numpy(q - mean) @ centred.T for q in chunks(queries)]
    )
    selected = fast.topk(K + EXTRA_CANDIDATES, dim=1, largest=False).indices.numpy()
    distances = np.empty(selected.shape)
    for row, query in enumerate(queries):
        difference = candidates[selected[row]].astype(np.float64) - query
        distances[row] = np.sqrt(np.square(difference).sum(axis=1))
    return neighbours.merge([(distances, selected)], K)


def chunks(rows: np.ndarray, size: int = 128) -> list[np.ndarray]:
    """Cut rows, so that their float32 copies fit into memory."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def main() -> None:
    """Check that both give the same distances, and time them."""
    parser = arguments(__doc__)
    parser.add_argument("--side", type=int, default=256, help="pixels per side")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = np.random.default_rng(0)
    shape = (options.side, options.side, 3)
    queries = generator.integers(0, 256, (1365, *shape), dtype=np.uint8)
    candidates = generator.integers(0, 256, (256, *shape), dtype=np.uint8)
    candidates[:16] = queries[::85][:16]  # copies
    ours, usual = neighbours.nearest(queries, candidates, K), reranked(queries, candidates)
    copies = int((ours[0][:, 0] == 0).sum())
    print(f"copies found: {copies} of 16; distances that differ: {int((ours[0] != usual[0]).sum())}")
    if copies != 16 or (ours[0] != usual[0]).any() or (ours[1] != usual[1]).any():
        raise SystemExit("the neighbours are not exact: fix them before comparing speed")
    blocks = [
        tuple(torch.randn(rows, neighbours.EXACT_COLUMNS) for rows in (len(queries), len(candidates)))
        for _ in range(0, queries[0].size, neighbours.EXACT_COLUMNS)
    ]
    calls = {
        "ours": lambda: neighbours.nearest(queries, candidates, K),
        "float32 and exact re-ranking": lambda: reranked(queries, candidates),
        "floor: matrix product": lambda: [left @ right.T for left, right in blocks],
    }
    seconds = measure(calls, options.rounds)
    table(f"1,365 queries, 256 images of {options.side} x {options.side}", seconds, ours="ours")


if __name__ == "__main__":
    main()
