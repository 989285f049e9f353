"""Commands that use trained models and their samples."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_common import MODELS, Guidance, LevelRules, Model, Temperature, TopK, TopP, complete, run_and_exit

ClassOfImages = Annotated[
    str,
    typer.Option(
        "--class",
        "-c",
        help="Class of the images. [default: the most probable one of each]",
        autocompletion=complete("class"),
    ),
]

app = typer.Typer()


@app.command(rich_help_panel=MODELS)
def sample(
    out: Annotated[Path, typer.Argument(help="Write the images to this folder, and nothing else.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Number of images.")] = 16,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            "-c",
            help="Draw images of this class, or of several in turn. Repeatable.",
            autocompletion=complete("class"),
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal images.")] = 0,
    model: Model = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the contact sheet to this PNG file. [default: OUT.png]")
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    guidance: Guidance = None,
    level: LevelRules = None,
) -> None:
    """Draw images from the trained priors.

    Replaces an earlier draw in the same folder. Temperature, top-k, top-p and guidance default to the section `sample`
    of params.yaml; with --model, to those of FOLDER/samples if it exists.

    Example:  vqvae2 sample drawn --count 16 --class flags --seed 3

    Example:  vqvae2 sample drawn --model ../other/artifacts
    """

    def action() -> int:
        from pipeline.commands import sample

        return sample.run(
            out,
            count,
            classes or (),
            seed=seed,
            model=model,
            sheet=sheet,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance=guidance,
            level_rules=level or (),
        )

    run_and_exit(action, require_project=model is None)


@app.command(rich_help_panel=MODELS)
def reconstruct(
    images: Annotated[list[Path], typer.Argument(help="Image files to reconstruct.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write the reconstructions to this folder.")] = Path(
        "reconstructed"
    ),
    model: Model = None,
) -> None:
    """Encode and decode your own images.

    Decodes each image from every prefix of levels, coarse to fine, and writes it next to its reconstructions. Replaces
    earlier reconstructions in the same folder.

    Example:  vqvae2 reconstruct cat.png dog.jpg --out reconstructed
    """

    def action() -> int:
        from pipeline.commands import reconstruct

        return reconstruct.run(images, out, *([model] if model else []))

    run_and_exit(action, require_project=model is None)


@app.command(rich_help_panel=MODELS)
def score(
    images: Annotated[list[Path], typer.Argument(help="Image files to score.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write a table and heat maps to this folder.")] = Path(
        "scores"
    ),
    class_name: ClassOfImages = "",
    model: Model = None,
) -> None:
    """Score how unlikely your own images are under the trained priors.

    Writes scores.csv, with nats per image and per code of each level, and heat maps: bright where a code is unlikely.
    Replaces earlier scores in the same folder.

    Example:  vqvae2 score cat.png dog.jpg --out scores
    """

    def action() -> int:
        from pipeline.commands import score

        return score.run(images, out, model=model, class_name=class_name)

    run_and_exit(action, require_project=model is None)


@app.command(rich_help_panel=MODELS)
def restore(
    images: Annotated[list[Path], typer.Argument(help="Image files to restore.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write the restored images to this folder.")] = Path(
        "restored"
    ),
    threshold: Annotated[
        float | None,
        typer.Option(min=0.0, help="Draw codes of more nats than this again. [default: ln of the codebook's entries]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal images.")] = 0,
    class_name: ClassOfImages = "",
    model: Model = None,
) -> None:
    """Replace the unlikely parts of your own images.

    Draws unlikely codes again from the trained priors, coarse to fine, and writes each image next to its reconstruction
    and the restored image. Replaces earlier images of this command in the same folder.

    Example:  vqvae2 restore scratched.png --threshold 5 --out restored
    """

    def action() -> int:
        from pipeline.commands import restore

        return restore.run(images, out, threshold=threshold, seed=seed, model=model, class_name=class_name)

    run_and_exit(action, require_project=model is None)


@app.command("complete", rich_help_panel=MODELS)
def complete_image(
    image: Annotated[Path, typer.Argument(help="Image file to complete.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write the images to this folder.")] = Path("completed"),
    rows: Annotated[float, typer.Option(min=0.0, max=1.0, help="Fraction of the rows that are kept.")] = 0.5,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Number of images.")] = 4,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal images.")] = 0,
    class_name: ClassOfImages = "",
    model: Model = None,
) -> None:
    """Draw the lower part of an image several times.

    Keeps the upper rows of the codes of the image and draws the others from the trained priors. Writes the images, and
    sheet.png: the image, its reconstruction, and the drawn images. Replaces earlier images of this command in the same
    folder.

    Example:  vqvae2 complete cat.png --rows 0.5 --count 4 --out completed
    """

    def action() -> int:
        from pipeline.commands import complete

        return complete.run(image, out, rows=rows, count=count, seed=seed, model=model, class_name=class_name)

    run_and_exit(action, require_project=model is None)


@app.command(rich_help_panel=MODELS)
def export(
    what: Annotated[
        str,
        typer.Argument(
            metavar="samples|images|model|encoder|decoder",
            help="Drawn samples, images of the dataset, the model, or a half of the VQ-VAE.",
        ),
    ],
    out: Annotated[Path, typer.Argument(help="An .npz file or a folder; a .pt2 or .onnx file for a half.")],
    split: Annotated[str, typer.Option(help="Split of the images: train, validation or test.")] = "train",
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="Number of images, from the first; 0: all.")] = 0,
    model: Model = None,
    title: Annotated[str, typer.Option(help="Title of the model card. [default: name of the folder]")] = "",
    license_id: Annotated[
        str, typer.Option("--license", metavar="ID", help="Licence of the model, in the form of the hub, such as mit.")
    ] = "unknown",
) -> None:
    """Write samples, dataset images or the trained model for other programs and machines.

    An .npz file has the images as arr_0 (uint8, N x H x W x 3) and their labels as arr_1. A folder has PNG files. A
    model becomes a folder with config.json, safetensors and a model card, as the Hugging Face hub shows it; it includes
    pictures of validation images. The encoder or the decoder becomes a graph of torch.export (.pt2) or ONNX (.onnx).

    Example:  vqvae2 export samples samples.npz

    Example:  vqvae2 export images validation --split validation

    Example:  vqvae2 export model my-model --license mit

    Example:  vqvae2 export decoder decoder.pt2
    """

    def action() -> int:
        if what == "model":
            from pipeline.commands import export_model

            return export_model.run(out, model=model, title=title, license_id=license_id)
        if what in ("encoder", "decoder"):
            from pipeline.commands import export_graph

            return export_graph.run(what, out, model=model)
        from pipeline.commands import export

        return export.run(what, out, split=split, count=count)

    run_and_exit(action, require_project=what in ("samples", "images") or model is None)


@app.command("import", rich_help_panel=MODELS)
def import_model(
    format_name: Annotated[
        str, typer.Argument(metavar="FORMAT", help="Project that has written the file: rosinality.")
    ],
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of the VQ-VAE, such as vqvae_560.pt.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write the model to this folder.")] = Path("imported"),
    image_size: Annotated[
        int, typer.Option(min=8, help="Side of the images that the VQ-VAE was trained on, in pixels.")
    ] = 256,
) -> None:
    """Import a VQ-VAE that another project has trained.

    Reads a checkpoint of rosinality/vq-vae-2-pytorch as weights only, without running code of the file. The model has
    the same codes and reconstructions. PixelSNAIL checkpoints are refused: their networks differ from the priors here.

    Example:  vqvae2 import rosinality vqvae_560.pt --out imported
    """

    def action() -> int:
        from pipeline.commands import import_model

        return import_model.run(format_name, checkpoint, out, image_size=image_size)

    run_and_exit(action, require_project=False)


@app.command(rich_help_panel=MODELS)
def promote(
    run: Annotated[str, typer.Argument(help="Pipeline run in MLflow: its id, the first digits of it, or its name.")],
    alias: Annotated[str, typer.Option(help="Alias that the version of the model receives.")] = "champion",
    name: Annotated[str, typer.Option(help="Name of the model in the registry.")] = "vqvae2",
) -> None:
    """Register the model of a run in MLflow under an alias.

    The alias moves from the version that had it before. Python and MLflow then load the model by its address.

    Example:  vqvae2 promote 3f9c21d0 --alias champion
    """

    def action() -> int:
        from pipeline.commands import promote

        return promote.run(run, name=name, alias=alias)

    run_and_exit(action)
