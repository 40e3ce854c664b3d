"""Make the built-in synthetic dataset (`qskd shapes`).

python -m pipelines.shapes data/shapes
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.command import local_path, run
from pipelines.run.logs import tell
from qskd.errors import QskdError


def command(
    folder: Annotated[Path, typer.Argument(parser=local_path, help="Where annotations.json and images/ go.")],
    images: Annotated[int, typer.Option(min=1)] = 12_000,
    first_image: Annotated[int, typer.Option(min=0, help="Images are numbered; take other ones for validation.")] = 0,
    set: Annotated[
        list[str] | None, typer.Option("--set", metavar="A=B", help="A field of qskd.datasets.shapes.ShapesConfig.")
    ] = None,
) -> None:
    """Make the built-in synthetic dataset: COCO JSON and JPEG files."""
    from pydantic import ValidationError

    from qskd.config.recipe import parse_override
    from qskd.datasets.shapes import ShapesConfig, make_shapes

    fields = {".".join(path): value for path, value in map(parse_override, set or ())}
    try:
        config = ShapesConfig(**{"images": images, "first_image": first_image, **fields})
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise QskdError("qskd shapes", said, ", ".join(ShapesConfig.model_fields)) from None
    annotations, _ = make_shapes(config, folder)
    tell(f"{annotations}: {config.images} images")


if __name__ == "__main__":
    run(command, "shapes")
