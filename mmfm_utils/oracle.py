"""Reading a picture of the world without the models under study: what is in it, where, and in which colour and style.

Two steps, neither of which shares anything with the models that it judges. A small segmentation network
(data/models/diffusion_oracle), trained on exact labels of drawn scenes, says for every pixel whether it belongs to a
thing, in which colour, and which ground lies there. Then each thing is held against all drawings of the world, each
object in each style: the nearest one names it. The error on drawn scenes stands in the card; most of it with several
objects is that two of one colour which touch are taken for one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from . import models, scenes

# The groups of the network's output channels; "own" is the colour of a drawing that keeps its own colours.
CLASSES = {"there": ("ground", "thing"), "colour": (*scenes.COLOURS, "own"), "ground": scenes.GROUNDS}
CHANNELS = sum(map(len, CLASSES.values()))
SMALLEST = 40  # pixels of a thing: the smallest objects have about 120
MOST = 5  # pieces that lie near each other
SIDE = 24  # of the square to which a thing is stretched before it is compared


@dataclass(frozen=True)
class Found:
    """One thing in a picture: its name, style and colour, the pixels it covers (64, 64) bool, its centre (0 to 1), and
    how much it looks like the drawing that names it (at most 1)."""

    name: str
    style: str
    colour: str
    mask: np.ndarray
    x: float
    y: float
    likeness: float

    @property
    def position(self) -> str:
        """One of the nine places of `scenes.POSITIONS`, by the thirds in which the centre of its pixels lies."""
        return scenes.POSITIONS[3 * min(int(self.y * 3), 2) + min(int(self.x * 3), 2)]


@dataclass(frozen=True)
class Reading:
    """A picture: its ground, and the things in it, largest first."""

    ground: str
    things: tuple[Found, ...]

    @property
    def style(self) -> str:
        """That of the largest thing; "" where there is none."""
        return self.things[0].style if self.things else ""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(thing.name for thing in self.things)


def as_input(pictures: np.ndarray) -> torch.Tensor:
    """Pictures (picture, 64, 64, 3) uint8 as the network's input (picture, 3, 64, 64)."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def labels(drawn: Sequence[scenes.Scene]) -> dict[str, torch.Tensor]:
    """The true class of every pixel, {group: (picture, 64, 64)}, -1 where there is none."""
    out = {name: np.full((len(drawn), 64, 64), -1) for name in CLASSES}
    out["there"][:] = 0
    for row, scene in enumerate(drawn):
        out["ground"][row] = scenes.GROUNDS.index(scene.ground)
        for item, mask in zip(scene.items, scenes.masks(scene), strict=True):
            out["there"][row][mask] = 1
            out["colour"][row][mask] = CLASSES["colour"].index(item.colour or "own")
    return {name: torch.from_numpy(values) for name, values in out.items()}


def split(output: torch.Tensor) -> dict[str, torch.Tensor]:
    """The network's output (picture, channel, 64, 64) by group: {group: (picture, class, 64, 64)}."""
    return dict(zip(CLASSES, output.split([len(c) for c in CLASSES.values()], 1), strict=True))


class Oracle:
    """`read(pictures)` says what is in pictures of the world. Raises UsageError where its weights are missing."""

    def __init__(self, device: str = "auto"):
        from diffusers import UNet2DModel  # slow

        self.device = models.device_of(device)
        folder = models.intact("diffusion_oracle", need_weights=True)
        self.network = UNet2DModel.from_pretrained(folder, use_safetensors=True).to(self.device).eval()

    @torch.no_grad()
    def read(self, pictures: np.ndarray, batch: int = 64) -> list[Reading]:
        """Pictures (picture, row, column, 3) uint8, shrunk to 64 x 64 if they are larger -> what is in each of them."""
        if pictures.shape[1:3] != (64, 64):
            pictures = np.stack([Image.fromarray(picture).resize((64, 64), Image.BOX) for picture in pictures])
        found = []
        for start in range(0, len(pictures), batch):
            said = split(self.network(as_input(pictures[start : start + batch]).to(self.device), 0).sample.float())
            chances = {name: scores.softmax(1).cpu().numpy() for name, scores in said.items()}
            part = pictures[start : start + batch]
            found += [_reading(p, {name: chance[i] for name, chance in chances.items()}) for i, p in enumerate(part)]
        return found


def _reading(picture: np.ndarray, p: dict[str, np.ndarray]) -> Reading:
    """What a picture and the network's probabilities {group: (class, 64, 64)} say."""
    there = p["there"][1] > 0.5
    light = picture @ np.array([0.299, 0.587, 0.114])
    things = []
    for mask, (likeness, name, style) in _things(light, _pieces(there, p["colour"].argmax(0))):
        colour = CLASSES["colour"][p["colour"][:, mask].mean(1).argmax()]
        rows, columns = np.nonzero(mask)
        x, y = (columns.mean() + 0.5) / 64, (rows.mean() + 0.5) / 64
        things.append(Found(name, style, colour, mask, x, y, likeness))
    off = ~there if (~there).any() else np.ones_like(there)
    return Reading(
        ground=scenes.GROUNDS[p["ground"][:, off].mean(1).argmax()],
        things=tuple(sorted(things, key=lambda thing: -thing.mask.sum())),
    )


def _pieces(there: np.ndarray, colour: np.ndarray) -> list[np.ndarray]:
    """The masks of connected pixels; where two colours share them, those of each."""
    whole, n = ndimage.label(there, structure=np.ones((3, 3)))
    pieces = []
    for number in range(1, n + 1):
        piece = whole == number
        kinds, times = np.unique(colour[piece], return_counts=True)
        major = kinds[times >= max(SMALLEST, piece.sum() / 4)]
        if len(major) < 2:
            pieces.append(piece)
            continue
        # two things touch: each pixel goes to the nearest one of their colours
        sure = piece & np.isin(colour, major)
        nearest = ndimage.distance_transform_edt(~sure, return_distances=False, return_indices=True)
        pieces += [piece & (colour[tuple(nearest)] == kind) for kind in major]
    return pieces


def _things(light: np.ndarray, pieces: list[np.ndarray]) -> list[tuple[np.ndarray, tuple[float, str, str]]]:
    """Pieces put together to things, each a mask and (likeness, name, style) of the drawing that it is nearest to.

    A drawing may fall apart, a stalk from its flower. Of all ways to group near pieces the one is taken whose things
    look most like drawings.
    """
    groups, n = ndimage.label(ndimage.binary_dilation(np.any([*pieces, np.zeros((64, 64), bool)], 0), iterations=2))
    things = []
    for number in range(1, n + 1):
        near = [piece for piece in pieces if (groups[piece] == number).any()]
        near = sorted(near, key=lambda piece: -piece.sum())[:MOST]
        known = functools.cache(lambda chosen, near=near: _nearest(light, np.any([near[i] for i in chosen], 0)))
        area = [piece.sum() for piece in near]

        def likeness(partition, known=known, area=area):
            return sum(known(chosen)[0] * sum(area[i] for i in chosen) for chosen in partition)

        for chosen in max(_partitions(tuple(range(len(near)))), key=likeness):
            things.append((np.any([near[i] for i in chosen], 0), known(chosen)))
    return [(mask, known) for mask, known in things if mask.sum() >= SMALLEST]


def _partitions(items: tuple[int, ...]) -> Iterator[list[tuple[int, ...]]]:
    """All ways to group items."""
    if not items:
        yield []
        return
    for rest in _partitions(items[1:]):
        yield [items[:1], *rest]
        for i, group in enumerate(rest):
            yield [*rest[:i], (items[0], *group), *rest[i + 1 :]]


def _nearest(light: np.ndarray, mask: np.ndarray) -> tuple[float, str, str]:
    vectors, names = _drawings()
    alike = vectors @ _vector(light, mask)
    best = int(alike.argmax())
    return float(alike[best]), *names[best]


def _vector(light: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A thing as a unit vector, whatever its place, size and colour: its lights and shades, its outline, its shape.

    The first two are stretched to SIDE x SIDE and centred, the third is its width over its height.
    """
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    outline = mask[box].astype(np.float32)
    shades = (light[box] - light[mask].mean()).astype(np.float32) * outline
    parts = []
    for values in (shades, outline):
        values = np.asarray(Image.fromarray(values).resize((SIDE, SIDE), Image.BILINEAR)).ravel()
        values = values - values.mean()
        parts.append(values / max(np.linalg.norm(values), 1e-6))
    angle = np.arctan2(outline.shape[1], outline.shape[0])
    return np.concatenate([*parts, [np.cos(2 * angle), np.sin(2 * angle)]]).astype(np.float32) / 3**0.5


@functools.cache
def _drawings() -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Every object in every style, large and medium, tinted and in its own colours: vectors, and (name, style)."""
    vectors, names = [], []
    for name in scenes.OBJECTS:
        for style in scenes.STYLES:
            for size in ("medium", "large"):
                for colour in ("grey", None):
                    item = scenes.Item(name, colour, 0.5, 0.5, scenes.SIZES[size])
                    scene = scenes.Scene((item,), style=style, ground="snow")
                    light = scenes.render(scene) @ np.array([0.299, 0.587, 0.114])
                    vectors.append(_vector(light, scenes.masks(scene)[0]))
                    names.append((name, style))
    return np.stack(vectors), names
