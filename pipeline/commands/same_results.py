"""Check that two Git revisions compute the same: the smoke pipeline runs at both, and its results are compared.

Manifests, names of weights, digests in texts and the metadata of Parquet schemas are not compared: they are names, not
results. Everything else in artifacts/, metrics/ and plots/ must be equal.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline import result_versions
from pipeline.process import handle_signals
from pipeline.text import first_few
from stages.errors import UserError
from stages.formats.artifact import MANIFEST
from stages.images.count import format_count

ROOTS = ("artifacts", "metrics", "plots")  # folders that hold results
COMMAND = ("run", "-S", "experiment=smoke", "-S", "+critic=smoke")  # every kind of stage
# Variables that would lead both runs to one tracking server, one cluster or the caller's sources.
UNSET = ("MLFLOW_", "RAY_", "VQVAE2_", "DVC_", "PYTHONPATH")
# Prints the version of each key of the table as JSON; null if the table lacks the source.
VERSIONS_PROGRAM = """
import json
from pipeline import stage_source
sources = {key: stage_source.source_of_key(key) for key in stage_source.table_keys()}
print(json.dumps({key: source.version if source.is_recorded else None for key, source in sources.items()}))
"""
DIGEST = re.compile(rb"\b[0-9a-f]{12,64}\b")


def compare(revision: str) -> list[str]:
    """Run the smoke pipeline at a revision and with the working tree; return the result files that differ.

    Raises UserError if the revision does not exist or a run fails.
    """
    with (
        _checkout(_resolve(revision)) as before,
        _checkout(_commit_working_tree()) as after,
    ):
        for folder in (before, after):
            _run_pipeline(folder)
        return sorted(differences(before, after))


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def require_equal(revision: str) -> None:
    """Raise UserError if a result of the working tree differs from that of the revision."""
    if different_files := compare(revision):
        files = format_count(len(different_files), "file differs", "files differ")
        raise UserError(
            f"{files} from those of {revision}: {first_few(different_files, 10)}.",
            where=", ".join(ROOTS),
            fix="Record new versions: vqvae2 versions --new --reason TEXT",
        )


def versions_at(revision: str, keys: Sequence[str]) -> dict[str, str]:
    """Return the versions of the source at a revision, by key of the table; a key that it does not know is left out.

    The revision's own code says them: it may hash other files than this code does. Raises UserError if its table lacks
    its source, because then no earlier result would keep its version, or if its code fails.
    """
    with _checkout(_resolve(revision)) as folder:
        done = _run_program(folder, VERSIONS_PROGRAM, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise UserError(
            f"The code of {revision} does not say its versions: {last_line}",
            where="--same-as",
            fix="Name a revision at which `vqvae2 versions` works.",
            code=2,
        )
    versions: dict[str, str | None] = json.loads(done.stdout)
    if missing := [key for key in keys if key in versions and versions[key] is None]:
        raise UserError(
            f"{revision} must have its source in its own table of versions, got none for {first_few(missing, 5)}.",
            where="--same-as",
            fix="Name a revision whose `vqvae2 versions` lists no change.",
            code=2,
        )
    return {key: version for key in keys if (version := versions.get(key))}


def differences(before: Path, after: Path) -> Iterator[str]:
    """Yield the names of the result files that only one folder has, or whose contents differ."""
    names = {
        path.relative_to(folder).as_posix()
        for folder in (before, after)
        for root in ROOTS
        for path in (folder / root).rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
    for name in names - {result_versions.FILE.as_posix()}:
        left, right = before / name, after / name
        if not left.is_file() or not right.is_file() or not _have_equal_contents(left, right):
            yield name


def _have_equal_contents(left: Path, right: Path) -> bool:
    if left.suffix != ".safetensors":
        return _content(left) == _content(right)
    first, second = _tensors(left), _tensors(right)
    if first.keys() == second.keys():
        return first == second
    return sorted(first.values()) == sorted(second.values())  # renamed: the names compute nothing


def _tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Return type, shape and hash of each tensor by name."""
    import torch
    from safetensors.torch import load_file

    return {
        name: (
            str(tensor.dtype),
            tuple(tensor.shape),
            hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest(),
        )
        for name, tensor in load_file(path).items()
    }


def _content(path: Path) -> object:
    """Return the contents of a file without the names."""
    match path.suffix:
        case ".parquet":
            import pyarrow.parquet

            # As text, in which NaN equals NaN.
            return repr(pyarrow.parquet.read_table(path).replace_schema_metadata(None).to_pydict())
        case ".html":
            return DIGEST.sub(b"", path.read_bytes())
        case _:
            return path.read_bytes()


@contextmanager
def _checkout(revision: str) -> Iterator[Path]:
    """Check out a revision into a temporary folder, which is removed after the block."""
    with tempfile.TemporaryDirectory(prefix="vqvae2-revision-", ignore_cleanup_errors=True) as folder:
        tree = Path(folder, "tree")
        _git("worktree", "add", "--quiet", "--detach", str(tree), revision)
        try:
            with handle_signals(_stop):  # the checkout must be removed
                yield tree
        finally:
            with suppress(UserError):  # it must not replace an error of the block; Git forgets a missing folder itself
                _git("worktree", "remove", "--force", str(tree))


def _commit_working_tree() -> str:
    """Commit the working tree, new files included, to no branch, without touching the index."""
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        _git("read-tree", "HEAD", **index)
        _git("add", "--all", **index)
        # Git may know no identity, as in a container.
        identity = {f"GIT_{role}_{key}": "vqvae2" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
        return _git("commit-tree", _git("write-tree", **index), "-p", "HEAD", "-m", "working tree", **identity)


def _resolve(revision: str) -> str:
    return _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")


def _run_pipeline(folder: Path) -> None:
    done = _run_program(folder, "from pipeline.cli import main; main()", *COMMAND)
    if done.returncode:
        raise UserError(
            f"The smoke pipeline ended with status {done.returncode}.",
            where=folder,
            fix=f"Check out that revision and run: vqvae2 {' '.join(COMMAND)}",
        )


def _run_program(
    folder: Path, program: str, *arguments: str, stdout: int | None = None, stderr: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python in a checkout, with its sources."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(UNSET)}
    variables["PYTHONPATH"] = str(folder)
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=folder, env=variables, stdout=stdout, stderr=stderr, text=True, check=False)


def _git(*arguments: str, **variables: str) -> str:
    done = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=False, env={**os.environ, **variables}
    )
    if done.returncode:
        raise UserError(
            f"git {arguments[0]} failed: {done.stderr.strip() or 'no such revision'}.",
            where=Path.cwd(),
            fix="Run in a clone of the repository, with a revision that it has.",
            code=2,
        )
    return done.stdout.strip()
