"""Proof that two Git revisions compute the same: the smoke pipeline runs at both, and every artifact is compared.

Manifests are not compared, nor are names of weights, digests in texts and the metadata of Parquet schemas: they name
things and compute nothing. Everything else must be equal byte for byte.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stages.errors import UserError
from stages.formats.artifact import MANIFEST

COMMAND = ("run", "-S", "experiment=smoke")
# Variables that would lead both runs to one tracking server, one cluster or the caller's sources.
UNSET = ("MLFLOW_", "RAY_", "VQVAE2_", "DVC_", "PYTHONPATH")
DIGEST = re.compile(rb"\b[0-9a-f]{12,64}\b")


def compare(revision: str, folders: Sequence[str] = ("artifacts",)) -> list[str]:
    """Run the smoke pipeline at a revision and with the working tree; return the files that differ.

    Raises UserError if a run fails.
    """
    with _checkout(_resolve(revision)) as before, _checkout(_commit_of_working_tree()) as after:
        for folder in (before, after):
            _run(folder)
        return sorted(name for root in folders for name in differences(before, after, root))


def require(revision: str, stages: Sequence[str]) -> None:
    """Raise UserError if an artifact of the working tree differs from that of the revision."""
    if different := compare(revision):
        raise UserError(
            f"{len(different)} files differ from those of {revision}: {', '.join(different[:10])}.",
            where="artifacts/",
            fix=f"Give new versions to the stages that write them, by --new, instead of {', '.join(stages)}.",
        )


def differences(before: Path, after: Path, root: str) -> Iterator[str]:
    """Yield the names of files under `root` that only one folder has, or whose contents differ."""
    names = {
        path.relative_to(folder).as_posix()
        for folder in (before, after)
        for path in (folder / root).rglob("*")
        if path.is_file() and path.name != MANIFEST and path.parent.name != root
    }
    for name in names:
        left, right = before / name, after / name
        if not left.is_file() or not right.is_file() or _content(left) != _content(right):
            yield name


def _content(path: Path) -> object:
    """Return what a file holds, without the names that compute nothing."""
    match path.suffix:
        case ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path).values()
            return sorted(
                (str(t.dtype), tuple(t.shape), hashlib.sha256(t.numpy().tobytes()).hexdigest()) for t in tensors
            )
        case ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).replace_schema_metadata(None).to_pydict()
        case ".html":
            return DIGEST.sub(b"", path.read_bytes())
        case _:
            return path.read_bytes()


@contextmanager
def _checkout(revision: str) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="vqvae2-revision-"))
    try:
        _git("worktree", "add", "--quiet", "--detach", str(folder / "tree"), revision)
        yield folder / "tree"
    finally:
        _git("worktree", "remove", "--force", str(folder / "tree"))
        shutil.rmtree(folder, ignore_errors=True)


def _commit_of_working_tree() -> str:
    """Commit the working tree, new files included, to no branch, without touching the index."""
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        _git("read-tree", "HEAD", **index)
        _git("add", "--all", **index)
        return _git("commit-tree", _git("write-tree", **index), "-p", "HEAD", "-m", "working tree")


def _resolve(revision: str) -> str:
    return _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")


def _run(folder: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(UNSET)}
    script = "from pipeline.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, *COMMAND], cwd=folder, env={**variables, "PYTHONPATH": str(folder)}, check=False
    )
    if done.returncode:
        raise UserError(
            f"The smoke pipeline ended with status {done.returncode}.",
            where=folder,
            fix=f"Check out that revision and run: vqvae2 {' '.join(COMMAND)}",
        )


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
