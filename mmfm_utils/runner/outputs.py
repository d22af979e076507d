"""Write what a reference run made into the committed notebook, the expected values and README."""

import base64
import io
import json
from pathlib import Path

import nbformat
from PIL import Image

from .. import UsageError, findings, root, write_atomic
from .notebook import code_cells, tags
from .readme import filled
from .stamps import MEASURED, stamp

LIMIT_KB = 500  # of a committed notebook


def _with_palette(png: str, colours: int) -> str:
    """A PNG, base64, in so many colours that cover all of its own, the rare ones too: 256 are a third of the size."""
    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    small = io.BytesIO()
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")).convert("RGB")
    flat.quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE).save(
        small, "PNG", optimize=True, dpi=picture.info.get("dpi", (72, 72))
    )
    return base64.b64encode(small.getvalue()).decode()


def commit(task: dict, result: dict) -> list[str]:
    """Write outputs and stamp into the notebook, and the values into data/expected/<profile>.json.

    Figures have 256 colours, and fewer in a notebook that would be too large with these.
    """
    for colours in (256, 128, 64, 32):
        text = _committed(task, result, colours)
        if len(text.encode()) <= LIMIT_KB * 1000:
            break
    else:
        return [f"{len(text.encode()) // 1000} KB with its outputs, more than {LIMIT_KB}: make its figures smaller"]
    try:
        pictures = readme_pictures(nbformat.reads(text, as_version=4), task["name"])
    except UsageError as error:  # nothing is written then
        return [str(error)]
    path, known = root() / "data" / "expected" / f"{task['profile']}.json", findings.registry()
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    values = {id: value for id, value in values.items() if id in known and known[id].notebook != task["name"]}
    values |= {row["id"]: {"verdict": row["verdict"], "value": row["value"]} for row in result["rows"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(dict(sorted(values.items())), indent=1) + "\n")
    write_atomic(Path(task["path"]), text)
    for path, picture in pictures.items():
        path.write_bytes(picture)
    if (page := root() / "README.md").exists():
        write_atomic(page, filled(page.read_text(encoding="utf-8")))
    return []


def readme_pictures(nb, name: str) -> dict[Path, bytes]:
    """README's pictures that a notebook draws: data/readme/NAME.7.png is the first figure of its code cell 7.

    Raises UsageError where that cell draws none any more.
    """
    found, cells = {}, code_cells(nb)
    for path in sorted((root() / "data" / "readme").glob(f"{name}.*.png")):
        number = int(path.name.split(".")[-2])
        outputs = cells[number - 1].outputs if 0 < number <= len(cells) else []
        drawn = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
        if not drawn:
            raise UsageError(f"{path.name}: code cell {number} of {name} draws no figure; rename it, and README's link")
        found[path] = base64.b64decode(drawn[0])
    return found


def _committed(task: dict, result: dict, colours: int) -> str:
    """The text of the notebook as it is committed: its outputs, their cost, its stamp."""
    source, ran = (nbformat.reads(text, as_version=4) for text in (task["notebook"], result["executed"]))
    for number, (cell, done) in enumerate(zip(code_cells(source), code_cells(ran)), 1):
        cell.execution_count = number
        cell.outputs = [o for o in done.outputs if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = _with_palette(output["data"]["image/png"], colours)
            output |= {"execution_count": number} if "execution_count" in output else {}
    cost = rf"\g<1>{result['seconds']:.0f} s, {result['peak_mb'] / 1000:.1f} GB\g<2>"
    source.cells = [cell for cell in source.cells if "injected-parameters" not in tags(cell)]
    for cell in source.cells:
        cell.source = MEASURED.sub(cost, cell.source) if cell.cell_type == "markdown" else cell.source
        cell.metadata = {k: v for k, v in cell.metadata.items() if k not in ("papermill", "execution")}
    source.metadata = {k: v for k, v in source.metadata.items() if k not in ("papermill", "widgets")} | {
        "kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"},
        "language_info": {"name": "python"},
        "mmfm": source.metadata.get("mmfm", {}) | {"stamp": stamp(source, result["loaded"], task["profile"])},
    }
    return nbformat.writes(source) + "\n"
