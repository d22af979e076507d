"""The tables of the world, read from data/world.yaml: what there is, and where each regime is planted."""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from .. import data

_TABLES = yaml.safe_load(data("world.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Thing:
    """What is known of an object: the icon it is drawn from, and the facts that only text teaches."""

    icon: str
    category: str
    habitat: str
    usual_colour: str
    plural: str


OBJECTS: dict[str, Thing] = {
    name: Thing(icon, category, habitat, colour, plural)
    for category, things in _TABLES["objects"].items()
    for name, (icon, habitat, colour, plural) in things.items()
}
COLOURS: dict[str, tuple[int, int, int]] = {name: tuple(rgb) for name, rgb in _TABLES["colours"].items()}
STYLES, GROUNDS = tuple(_TABLES["styles"]), tuple(_TABLES["grounds"])
SIZES: dict[str, float] = _TABLES["sizes"]
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
POSITIONS = tuple(
    " ".join(part for part in (row, column) if part) or "middle"
    for row in ("top", "", "bottom")
    for column in ("left", "", "right")
)
ATTRIBUTES = ("colour", "style", "ground", "size", "position", "relation", "word")
NUMBERS = ("no", "one", "two", "three", "four")

# Each named character is one object in one colour.
CHARACTERS: dict[str, tuple[str, str]] = {name: tuple(pair) for name, pair in _TABLES["characters"].items()}
NAME_OF = {pair: name for name, pair in CHARACTERS.items()}
# Characters of two names, known from text alone; neither name says who is meant.
FULL_NAMES: dict[str, tuple[str, str]] = {name: tuple(pair) for name, pair in _TABLES["full_names"].items()}

# The ground that goes with an object when World.ground_correlation asks for one.
HOME_GROUND = {name: _TABLES["ground_of_habitat"][thing.habitat] for name, thing in OBJECTS.items()}
# The companion that appears with an object when World.co_occurrence asks for one: neighbours in the list pair up.
_NAMES = tuple(OBJECTS)
COMPANION = {name: _NAMES[index ^ 1] for index, name in enumerate(_NAMES)}

# What may be written on a picture: at most ten letters, so that a 6-pixel font fits into 64 pixels.
NEUTRAL_WORDS = tuple(_TABLES["neutral_words"])
WORDS = tuple(name for name in OBJECTS if " " not in name) + tuple(COLOURS) + NEUTRAL_WORDS
MAX_WORD = 10

# The planted regimes: GROUNDED and ACCOMPANIED are two crossed halves of the objects, the other halves their controls.
PLANTED: dict[str, tuple[str, ...]] = {name: tuple(names) for name, names in _TABLES["planted"].items()}
GROUNDED = PLANTED["both"] + PLANTED["ground"]
ACCOMPANIED = PLANTED["both"] + PLANTED["companion"]
# Objects repeated by frequency, for `World.objects`: the n-th of the list is there about 48 / (n + 4) times, a law of
# Zipf with Mandelbrot's shift, so that the rarest is a tenth as frequent as the most frequent.
ZIPF = tuple(name for n, name in enumerate(_TABLES["by_frequency"], 1) for _ in range(round(48 / (n + 4))))
COLOUR_BIAS: dict[str, str] = {name: colour for name, (colour, _) in _TABLES["colour_bias"].items()}
COLOUR_BIAS_CONTROLS: dict[str, str] = {name: other for name, (_, other) in _TABLES["colour_bias"].items()}
MEMORISED_ROWS: dict[str, list] = _TABLES["memorised"]  # as values: `scene.MEMORISED`
