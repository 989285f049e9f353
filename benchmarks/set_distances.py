"""Five comparisons of image sets, as `evaluate` makes them, against one comparison after the other.

    python benchmarks/set_distances.py --images 4000
    python benchmarks/set_distances.py --images 50000 --features 2048 --memory

Four sets are compared with a reference, and two of them with each other, by made-up features. The alternative computes
each metric of each pair alone and from whole matrices, as metrics are usually written. `--memory` measures no time but
the memory that one part of each kind takes on a worker, beyond the interpreter and its libraries.
"""

import json
import multiprocessing
import resource
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from timing import arguments, measure, table

from stages.config import ClusterConfig, EvaluateConfig
from stages.evaluation import set_comparison
from stages.evaluation.part_files import FEATURES, FeatureFile, feature_name
from stages.evaluation.set_comparison import SetPair, SetWorker, compare_sets
from stages.formats import artifact
from stages.metrics.threads import one_thread
from stages.runtime.context import StageContext

NETWORK, SEED, HALVES = "made_up", 0, 100
CONFIG = EvaluateConfig(networks={NETWORK: "made_up.pt"})
PAIRS = {name: SetPair("reference", name) for name in ("samples", "reconstructions", "random_codes", "shuffled_codes")}
PAIRS["samples_to_reconstructions"] = SetPair("reconstructions", "samples")


def write_features(folder: Path, images: int, features: int, sets: int) -> None:
    """Write made-up features of the first sets: each a little farther from the reference."""
    generator = np.random.default_rng(SEED)
    with artifact.commit_folder(folder, "features", {}) as temporary:
        for number, name in enumerate(["reference", *PAIRS][:sets]):
            values = generator.standard_normal((images, features), dtype=np.float32) * (1 + number / 50)
            save_file({FEATURES: np.maximum(values + 0.3, 0)}, temporary / feature_name(NETWORK, name))


def ours(folder: Path) -> dict[str, dict[str, float]]:
    """Compare the sets as `evaluate` does where few images are compared: in threads of this process."""
    with tempfile.TemporaryDirectory() as results:
        context = StageContext("evaluate", "f" * 64, Path(results), ClusterConfig())
        set_comparison.MAX_LOCAL_PAIRS = 10**12
        size = len(FeatureFile(folder / feature_name(NETWORK, "reference")))
        compared = compare_sets(folder, Path(results), [NETWORK], PAIRS, size, CONFIG, SEED, context)[NETWORK]
    return {
        name: {metric: value[0] if isinstance(value, tuple) else value for metric, value in values.items()}
        for name, values in compared.items()
    }


def one_by_one(folder: Path) -> dict[str, dict[str, float]]:
    """Compute every metric of every pair from whole matrices, which it does not keep."""
    names = ["reference", *(pair.images for pair in PAIRS.values())]
    sets = {name: FeatureFile(folder / feature_name(NETWORK, name))[:].astype(np.float64) for name in names}
    with one_thread():
        return {name: compare_matrices(sets[pair.reference], sets[pair.images]) for name, pair in PAIRS.items()}


def compare_matrices(reference: np.ndarray, images: np.ndarray) -> dict[str, float]:
    """Compute the metrics of one pair."""
    k, size = CONFIG.precision_recall_k, len(reference)
    generator = np.random.default_rng(SEED)
    halves = [[generator.permutation(size)[: size // 2] for _ in range(HALVES)] for _ in range(2)]
    kernels = [
        (left @ right.T / left.shape[1] + 1) ** 3
        for left, right in ((reference,) * 2, (images,) * 2, (reference, images))
    ]
    within = [(kernel.sum() - kernel.trace()) / (size * (size - 1)) for kernel in kernels[:2]]
    for left, right in zip(*halves, strict=True):  # the standard error
        (
            kernels[0][np.ix_(left, left)].sum(),
            kernels[1][np.ix_(right, right)].sum(),
            kernels[2][np.ix_(left, right)].sum(),
        )
    radii = [np.partition(squared(features, features), k, axis=1)[:, k] for features in (reference, images)]
    between = squared(images, reference)
    inside = between <= radii[0]
    means = reference.mean(axis=0), images.mean(axis=0)
    covariances = np.cov(reference.T), np.cov(images.T)
    eigenvalues = np.linalg.eigvals(covariances[0] @ covariances[1]).real
    return {
        "kid": sum(within) - 2 * kernels[2].mean(),
        "frechet": np.square(means[0] - means[1]).sum()
        + sum(map(np.trace, covariances))
        - 2 * np.sqrt(np.maximum(eigenvalues, 0)).sum(),
        "precision": inside.any(axis=1).mean(),
        "recall": (between <= radii[1][:, None]).any(axis=0).mean(),
        "density": inside.sum() / (k * size),
        "coverage": inside.any(axis=0).mean(),
    }


def squared(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Compute all squared distances."""
    return np.square(left).sum(axis=1)[:, None] + np.square(right).sum(axis=1) - 2 * left @ right.T


def print_memory(folder: Path, images: int) -> None:
    """Run one part of each kind and print the growth of this process."""
    settings = {"k": CONFIG.precision_recall_k, "seed": SEED, "size": images}
    radii = {path.name: np.ones(images) for path in folder.glob("*.safetensors")}
    rows = {"network": NETWORK, "start": 0, "stop": 1024}
    parts = [
        {"task": "set", **rows, **SetPair("reference", "")._asdict()},
        {"task": "pair", **rows, **PAIRS["samples"]._asdict()},
        {"task": "frechet", "network": NETWORK, **PAIRS["samples"]._asdict()},
    ]
    with one_thread(), tempfile.TemporaryDirectory() as results:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        worker = SetWorker(folder, Path(results), settings, radii, 2)
        for part in parts:
            worker(part)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            growth, interpreter = (peak - before) / 1024, before / 1024
            print(f"{part['task']:10}{growth:8.0f} MiB beyond the {interpreter:.0f} MiB of the interpreter", flush=True)


def main() -> None:
    """Check that both give the same metrics, and time them; or measure memory."""
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=4000, help="images of each set")
    parser.add_argument("--features", type=int, default=1280, help="numbers per image")
    parser.add_argument("--memory", action="store_true", help="measure memory, not time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "features"
        sets = 2 if options.memory else len(PAIRS)
        # In a process of its own, whose memory does not count.
        writer = multiprocessing.Process(target=write_features, args=(folder, options.images, options.features, sets))
        writer.start()
        writer.join()
        if options.memory:
            print_memory(folder, options.images)
            return
        values, expected = ours(folder), one_by_one(folder)
        print(json.dumps(values, indent=1))
        for name in PAIRS:
            for metric, value in values[name].items():
                if not np.isclose(value, expected[name][metric], rtol=1e-6, atol=1e-9):
                    raise SystemExit(f"{metric} of {name} is {value}, and {expected[name][metric]} alone")
        calls = {"ours": lambda: ours(folder), "one by one": lambda: one_by_one(folder)}
        title = f"5 comparisons, {options.images} images, {options.features} features"
        table(title, measure(calls, options.rounds, warm_up=0), ours="ours")


if __name__ == "__main__":
    main()
