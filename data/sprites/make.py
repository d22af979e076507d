"""Draw the sprite sheets of the world from four emoji sets (run once; the sheets are shipped).

    npm install @iconify-json/noto @iconify-json/twemoji @iconify-json/openmoji @iconify-json/fluent-emoji
    python data/sprites/make.py node_modules/@iconify-json

Each sheet holds one cell of CELL x CELL pixels per object, in the order of `scenes.OBJECTS`, eight to a row.
A drawing is cropped to what it shows and centred, so that the same object has the same extent in all four styles.
"""

import io
import json
import sys
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from mmfm_utils.scenes import OBJECTS, SHEET_COLUMNS, STYLES

CELL = 160
HERE = Path(__file__).parent
PACKAGE = {"noto": "noto", "twemoji": "twemoji", "openmoji": "openmoji", "fluent": "fluent-emoji"}


def draw(icons: dict, name: str) -> Image.Image:
    """One icon, cropped to its visible part and centred in a CELL x CELL RGBA picture."""
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = icons["icons"][name]
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=4 * CELL, height=4 * CELL)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    picture = picture.crop(Image.fromarray((np.asarray(picture)[..., 3] > 16).astype(np.uint8)).getbbox())
    scale = (CELL - 4) / max(picture.size)
    picture = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(picture, [(CELL - side) // 2 for side in picture.size])
    return cell


def main(folder: str) -> None:
    rows = -(-len(OBJECTS) // SHEET_COLUMNS)
    for style in STYLES:
        icons = json.loads((Path(folder) / PACKAGE[style] / "icons.json").read_text())
        sheet = Image.new("RGBA", (SHEET_COLUMNS * CELL, rows * CELL))
        for index, thing in enumerate(OBJECTS.values()):
            row, column = divmod(index, SHEET_COLUMNS)
            sheet.paste(draw(icons, thing.icon), (column * CELL, row * CELL))
        sheet.save(HERE / f"{style}.png", optimize=True)
        print(f"{style}: {len(OBJECTS)} sprites, {(HERE / f'{style}.png').stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
