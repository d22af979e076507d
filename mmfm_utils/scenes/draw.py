"""Pictures of scenes, and the exact mask of every object."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFont

from .. import UsageError, data
from .scene import Item, Scene
from .tables import COLOURS, GROUNDS, OBJECTS

SPRITES = data("sprites")
SHEET_COLUMNS = 8
_NAMES = tuple(OBJECTS)


@functools.cache
def _sheet(style: str) -> Image.Image:
    path = SPRITES / f"{style}.png"
    if not path.exists():
        raise UsageError(f"The sprite sheet {path.name} is missing. Restore it: git checkout -- data/sprites")
    return Image.open(path).convert("RGBA")


@functools.lru_cache(maxsize=8192)
def _sprite(name: str, style: str, colour: str | None, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """One object's drawing: premultiplied RGB and alpha, (pixels, pixels, 3) and (pixels, pixels, 1), uint16."""
    sheet, index = _sheet(style), _NAMES.index(name)
    cell = sheet.width // SHEET_COLUMNS
    row, column = divmod(index, SHEET_COLUMNS)
    picture = sheet.crop((column * cell, row * cell, (column + 1) * cell, (row + 1) * cell))
    rgba = np.asarray(picture, dtype=np.float32) / 255
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    if colour is not None:
        rgb = _tint(rgb, alpha, colour)
    cut = (np.concatenate([rgb, alpha], axis=-1) * 255).round().astype(np.uint8)
    cut = np.asarray(Image.fromarray(cut, "RGBA").resize((pixels, pixels), Image.BOX), dtype=np.uint16)
    return (cut[..., :3] * cut[..., 3:] + 127) // 255, cut[..., 3:]


def _tint(rgb: np.ndarray, alpha: np.ndarray, colour: str) -> np.ndarray:
    """Keep a drawing's luminance, give it one hue: shadows go to a dark shade, lights halfway to white."""
    light = rgb @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    low, high = np.quantile(light[alpha[..., 0] > 0.5], [0.02, 0.98])
    light = np.clip((light - low) / max(high - low, 0.15), 0, 1)[..., None]
    target = np.array(COLOURS[colour], dtype=np.float32) / 255
    dark, bright = 0.35 * target, 0.55 * target + 0.45
    return np.where(light < 0.6, dark + (target - dark) * light / 0.6, target + (bright - target) * (light - 0.6) / 0.4)


@functools.lru_cache(maxsize=512)
def _ground(ground: str, texture: int, pixels: int) -> np.ndarray:
    """A ground's picture, (pixels, pixels, 3) uint8: a function of position only, so equal at every resolution."""
    y, x = np.meshgrid(*[(np.arange(pixels) + 0.5) / pixels] * 2, indexing="ij")
    rng = np.random.default_rng([GROUNDS.index(ground), texture])
    lattice = rng.random((2, 64, 64))
    cell = (np.minimum((y * 64).astype(int), 63), np.minimum((x * 64).astype(int), 63))
    fine, other = lattice[0][cell], lattice[1][cell]
    coarse = rng.random((16, 16))[cell[0] // 4, cell[1] // 4]
    phase = rng.random(3) * 6.28
    if ground == "grass":
        shade = 0.75 * fine + 0.5 * (np.sin(40 * x + 6 * np.sin(9 * y + phase[0])) > 0.55)
        colour = np.array([118, 158, 92]) + shade[..., None] * np.array([30, 36, 20])
    elif ground == "sand":
        shade = fine - 0.8 * (other > 0.93) + 0.5 * np.sin(14 * y + 3 * np.sin(5 * x + phase[0]))
        colour = np.array([222, 202, 156]) + shade[..., None] * np.array([12, 12, 14])
    elif ground == "sea":
        shade = np.sin(34 * y + 1.6 * np.sin(11 * x + phase[0]) + phase[1])
        colour = np.array([104, 158, 186]) + shade[..., None] * np.array([22, 18, 14])
    elif ground == "snow":
        shade = fine * 0.6 + coarse * 0.6 - 0.6
        colour = np.array([236, 240, 246]) + shade[..., None] * np.array([20, 16, 8])
    elif ground == "night":
        shade = (fine > 0.965) * 1.0
        colour = np.array([34, 36, 58]) + shade[..., None] * 190 + coarse[..., None] * 8
    elif ground == "brick":
        row = np.floor(y * 8)
        mortar = ((y * 8) % 1 < 0.16) | (((x * 4 + 0.5 * (row % 2) + texture / 8) % 1) < 0.08)
        colour = np.where(mortar[..., None], [206, 196, 186], np.array([168, 106, 92]) + coarse[..., None] * 22)
    elif ground == "wood":
        shade = np.sin(60 * x + 4 * np.sin(2.5 * y + phase[0]) + phase[1]) + ((x * 5 + texture / 8) % 1 < 0.07) * -2.5
        colour = np.array([160, 120, 82]) + shade[..., None] * np.array([13, 11, 9])
    else:  # tiles
        checks = (np.floor(x * 8 + texture % 2) + np.floor(y * 8 + texture // 2 % 2)) % 2
        colour = np.array([176, 178, 196]) + checks[..., None] * np.array([46, 46, 40]) + fine[..., None] * 6
    return np.clip(colour, 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=1024)
def _letters(word: str) -> np.ndarray:
    """A word in a bitmap font, (height, width) bool, with a rim of one pixel; one pixel is 1/64 of a picture."""
    glyphs = ImageFont.load_default_imagefont().getmask(word.upper(), mode="1")
    letters = np.asarray(glyphs, dtype=np.uint8).reshape(glyphs.size[::-1]) > 0
    rows = np.flatnonzero(letters.any(axis=1))
    letters = letters[rows[0] : rows[-1] + 1] if len(rows) else letters
    return np.pad(letters, 1)[:, :64]


def _word_box(scene: Scene, pixels: int) -> tuple[slice, slice, np.ndarray]:
    letters = _letters(scene.word)
    height, width = letters.shape
    top = 1 if scene.word_at == "top" else 63 - height
    left = (64 - width) // 2
    rows, columns = (
        slice(round(a * pixels / 64), round(b * pixels / 64)) for a, b in ((top, top + height), (left, left + width))
    )
    size = (columns.stop - columns.start, rows.stop - rows.start)
    return rows, columns, np.asarray(Image.fromarray(letters).resize(size, Image.NEAREST))


def _box(item: Item, pixels: int) -> tuple[int, slice, slice, slice, slice]:
    """An item's side in pixels, and the rows and columns of picture and of sprite that meet (clipped at the rim)."""
    side = max(1, round(item.size * pixels))
    top, left = round((item.y - item.size / 2) * pixels), round((item.x - item.size / 2) * pixels)
    rows = slice(max(top, 0), min(top + side, pixels))
    columns = slice(max(left, 0), min(left + side, pixels))
    return (
        side,
        rows,
        columns,
        slice(rows.start - top, rows.stop - top),
        slice(columns.start - left, columns.stop - left),
    )


def render(scene: Scene, pixels: int = 64) -> np.ndarray:
    """The scene's picture, (pixels, pixels, 3) uint8."""
    if pixels < 16:
        raise UsageError(f"A picture has at least 16 pixels a side, not {pixels}.")
    picture = _ground(scene.ground, scene.texture % 8, pixels).copy()
    for item in scene.items:
        side, rows, columns, in_rows, in_columns = _box(item, pixels)
        rgb, alpha = _sprite(item.name, scene.style, item.colour, side)
        under = picture[rows, columns]
        picture[rows, columns] = rgb[in_rows, in_columns] + under * (255 - alpha[in_rows, in_columns]) // 255
    if scene.word is not None:
        rows, columns, letters = _word_box(scene, pixels)
        ink = COLOURS[scene.ink] if scene.ink else (0, 0, 0)
        picture[rows, columns] = np.where(letters[..., None], ink, 255)
    return picture


def render_batch(scenes: Sequence[Scene], pixels: int = 64) -> np.ndarray:
    """Pictures of several scenes, (scene, pixels, pixels, 3) uint8."""
    return np.stack([render(scene, pixels) for scene in scenes])


def masks(scene: Scene, pixels: int = 64) -> np.ndarray:
    """The visible pixels of each item, (item, pixels, pixels) bool; no pixel belongs to two items."""
    owner = np.full((pixels, pixels), -1)
    for index, item in enumerate(scene.items):
        side, rows, columns, in_rows, in_columns = _box(item, pixels)
        alpha = _sprite(item.name, scene.style, item.colour, side)[1][in_rows, in_columns, 0]
        owner[rows, columns][alpha > 127] = index
    if scene.word is not None:
        rows, columns, _ = _word_box(scene, pixels)
        owner[rows, columns] = -1
    return np.arange(len(scene.items))[:, None, None] == owner


def word_mask(scene: Scene, pixels: int = 64) -> np.ndarray:
    """The pixels of the plate that bears the written word, (pixels, pixels) bool."""
    mask = np.zeros((pixels, pixels), dtype=bool)
    if scene.word is not None:
        rows, columns, _ = _word_box(scene, pixels)
        mask[rows, columns] = True
    return mask
