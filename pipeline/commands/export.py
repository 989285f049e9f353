"""`vqvae2 export`: samples or dataset images in the layouts that other programs for evaluation read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from pipeline.checks.inputs import require_outside_project_source
from pipeline.image_commands import MODEL, replace_folder, require_replaceable, safe_name
from stages.errors import UserError
from stages.formats.image_files import write_npz
from stages.formats.samples import open_samples
from stages.formats.shards import open_shards
from stages.images.contact_sheet import encode_png
from stages.images.count import format_count
from stages.images.listing import SPLITS

KIND = "exported images"
READ_AT_ONCE = 256  # samples
MIN_COUNT_FOR_PROGRESS = 256


@dataclass(frozen=True)
class ImageSource:
    """Images to export, read one by one."""

    count: int
    size: int  # side in pixels
    labels: np.ndarray  # (count,) int64
    classes: tuple[str, ...]
    images: Callable[[int], Iterator[np.ndarray]]  # yields the first images, (H, W, 3) uint8 each


def run(what: str, out: Path, *, split: str, count: int, artifacts: Path = MODEL) -> int:
    """Write the first `count` images, or all for 0, to an .npz file or a folder; return the exit status.

    Raises UserError if the images do not exist, if the file exists, or if the folder has files that an earlier export
    did not write.
    """
    is_archive = out.suffix == ".npz"
    if is_archive:
        _require_absent(out)
    else:
        require_replaceable(out, KIND)
    source = _open(what, split, artifacts)
    count = min(count, source.count) if count else source.count
    labels = source.labels[:count].astype(np.int64) if source.classes else None
    progress = track(
        source.images(count),
        description=f"Exporting {format_count(count, 'image', 'images')}",
        total=count,
        console=Console(stderr=True),
        disable=count < MIN_COUNT_FOR_PROGRESS,
    )
    if is_archive:
        write_npz(out, progress, (count, source.size, source.size, 3), labels)
    else:
        with replace_folder(out, KIND, {"what": what, "split": split, "count": count}) as folder:
            for number, image in enumerate(progress):
                name = (
                    f"{number:06d}" if labels is None else f"{number:06d}-{safe_name(source.classes[labels[number]])}"
                )
                (folder / f"{name}.png").write_bytes(encode_png(image))
    print(out)
    return 0


def _open(what: str, split: str, artifacts: Path) -> ImageSource:
    if what == "samples":
        samples = open_samples(artifacts / "samples")
        return ImageSource(
            samples.count,
            samples.image_size,
            samples.labels,
            samples.classes,
            lambda count: (
                image
                for start in range(0, count, READ_AT_ONCE)
                for image in samples.images(start, min(start + READ_AT_ONCE, count))
            ),
        )
    if what != "images":
        raise UserError(
            f"WHAT must be samples, images, model, encoder or decoder, got {what}.",
            where="vqvae2 export",
            fix="Run: vqvae2 export samples OUT, vqvae2 export images OUT or vqvae2 export model OUT",
            code=2,
        )
    shards = open_shards(artifacts / "shards")
    splits = [name for name in SPLITS if len(shards.split(name))]
    if split not in splits:
        raise UserError(
            f"--split must be one of {', '.join(splits)}, got {split}.",
            where=artifacts / "shards",
            fix=f"Use for example --split {splits[0]}.",
            code=2,
        )
    images = shards.split(split)
    return ImageSource(
        len(images),
        images.image_size,
        images.labels,
        shards.classes,
        lambda count: map(images.read, range(count)),
    )


def _require_absent(out: Path) -> None:
    """Raise UserError if the file exists, if its folder is missing, or if it lies in the source of images."""
    require_outside_project_source(out)
    if not out.parent.is_dir():
        raise UserError(
            f"The folder of {out.name} does not exist.", where=out.parent.absolute(), fix="Create it first.", code=2
        )
    if out.exists():
        raise UserError(f"{out.name} exists.", where=out.absolute(), fix="Choose another name, or remove it.", code=2)
