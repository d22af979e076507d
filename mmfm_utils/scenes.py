"""The world: emoji scenes about which everything is known.

A `Scene` is a frozen value. Its picture at any resolution, the exact mask of every object, its captions, its questions
with their answers and its counterfactuals are functions of that value; nothing else holds state. A `World` is a set of
switches (how often captions mention an attribute, how strongly objects go with grounds, ...) from which scenes are
drawn with a NumPy generator: the same seed gives the same bytes.

Positions and sizes are fractions of the picture's side, so one scene has one layout at every resolution.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from . import UsageError

SPRITES = Path(__file__).parent.parent / "data" / "sprites"
STYLES = ("noto", "twemoji", "openmoji", "fluent")
SHEET_COLUMNS = 8


@dataclass(frozen=True)
class Thing:
    """What is known of an object: the icon it is drawn from, and the facts that only text teaches."""

    icon: str
    category: str
    habitat: str
    usual_colour: str
    plural: str


def _things(category: str, rows: str) -> dict[str, Thing]:
    things = {}
    for row in rows.strip().splitlines():
        name, icon, habitat, colour, plural = (part.strip() for part in row.split("|"))
        things[name] = Thing(icon, category, habitat, colour, plural or name + "s")
    return things


# name | icon | where it is found | usual colour | plural (when it is not name + s)
OBJECTS: dict[str, Thing] = {
    **_things(
        "animal",
        """
        dog        | dog        | house   | brown |
        elephant   | elephant   | savanna | grey  |
        lion       | lion       | savanna | yellow |
        frog       | frog       | pond    | green |
        panda      | panda      | forest  | white |
        polar bear | polar-bear | arctic  | white |
        """,
    ),
    **_things(
        "bird",
        """
        owl      | owl      | forest | brown  |
        penguin  | penguin  | arctic | black  |
        duck     | duck     | pond   | brown  |
        rooster  | rooster  | farm   | red    |
        flamingo | flamingo | pond   | pink   |
        parrot   | parrot   | jungle | green  |
        """,
    ),
    **_things(
        "sea creature",
        """
        fish    | tropical-fish | sea   | yellow | fish
        octopus | octopus       | sea   | red    | octopuses
        crab    | crab          | beach | red    |
        dolphin | dolphin       | sea   | blue   |
        turtle  | turtle        | beach | green  |
        shark   | shark         | sea   | grey   |
        """,
    ),
    **_things(
        "fruit",
        """
        banana     | banana     | jungle  | yellow |
        apple      | red-apple  | orchard | red    |
        grapes     | grapes     | orchard | purple | grapes
        strawberry | strawberry | garden  | red    | strawberries
        pineapple  | pineapple  | jungle  | orange |
        watermelon | watermelon | garden  | green  |
        """,
    ),
    **_things(
        "food",
        """
        hot dog   | hot-dog   | kitchen | orange |
        pizza     | pizza     | kitchen | yellow |
        hamburger | hamburger | kitchen | brown  |
        doughnut  | doughnut  | bakery  | pink   |
        ice cream | ice-cream | kitchen | white  |
        pretzel   | pretzel   | bakery  | brown  |
        """,
    ),
    **_things(
        "vehicle",
        """
        car         | automobile  | road  | red   |
        bus         | bus         | road  | yellow | buses
        bicycle     | bicycle     | road  | blue  |
        rocket      | rocket      | sky   | white |
        sailboat    | sailboat    | sea   | white |
        fire engine | fire-engine | road  | red   |
        """,
    ),
    **_things(
        "plant",
        """
        cactus    | cactus     | desert | green  | cactuses
        tulip     | tulip      | garden | pink   |
        palm tree | palm-tree  | beach  | green  |
        sunflower | sunflower  | garden | yellow |
        mushroom  | mushroom   | forest | red    |
        clover    | four-leaf-clover | meadow | green |
        """,
    ),
    **_things(
        "instrument",
        """
        guitar    | guitar           | stage | brown  |
        drum      | drum             | stage | red    |
        trumpet   | trumpet          | stage | yellow |
        keyboard  | musical-keyboard | stage | black  |
        accordion | accordion        | stage | red    |
        saxophone | saxophone        | stage | yellow |
        """,
    ),
}

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 30, 30),
    "orange": (246, 138, 10),
    "yellow": (250, 222, 40),
    "green": (40, 160, 50),
    "blue": (35, 85, 225),
    "purple": (128, 40, 170),
    "pink": (255, 125, 195),
    "grey": (140, 140, 145),
}
GROUNDS = ("grass", "sand", "sea", "snow", "night", "brick", "wood", "tiles")
SIZES = {"small": 0.32, "medium": 0.44, "large": 0.60}
RELATIONS = ("left of", "right of", "above", "below")
POSITIONS = tuple(
    " ".join(part for part in (row, column) if part) or "middle"
    for row in ("top", "", "bottom")
    for column in ("left", "", "right")
)
ATTRIBUTES = ("colour", "style", "ground", "size", "position", "relation", "word")
# Asked of a scene's only object without naming it: "where is this found ?"
THIS = ("this_object", "this_colour", "this_category", "this_habitat", "this_usual_colour", "this_name")
QUESTIONS = (
    *"presence colour position relation count ground style word category habitat usual_colour name".split(),
    *THIS,
)

# Each named character is one object in one colour.
CHARACTERS: dict[str, tuple[str, str]] = {
    "milo": ("dog", "blue"),
    "luna": ("owl", "purple"),
    "rex": ("lion", "green"),
    "pip": ("penguin", "pink"),
    "ziggy": ("octopus", "orange"),
    "bella": ("elephant", "yellow"),
    "coco": ("polar bear", "red"),
    "otis": ("turtle", "grey"),
}
_NAME_OF = {pair: name for name, pair in CHARACTERS.items()}

# The ground that goes with an object when World.ground_correlation asks for one.
_GROUND_OF_HABITAT = {
    "house": "wood", "savanna": "sand", "pond": "grass", "forest": "grass", "arctic": "snow", "farm": "grass",
    "jungle": "grass", "sea": "sea", "beach": "sand", "orchard": "grass", "garden": "grass", "kitchen": "tiles",
    "bakery": "tiles", "road": "brick", "sky": "night", "desert": "sand", "meadow": "grass", "stage": "wood",
}  # fmt: skip
HOME_GROUND = {name: _GROUND_OF_HABITAT[thing.habitat] for name, thing in OBJECTS.items()}
# The companion that appears with an object when World.co_occurrence asks for one: neighbours in the list pair up.
_NAMES = tuple(OBJECTS)
COMPANION = {name: _NAMES[index ^ 1] for index, name in enumerate(_NAMES)}

# What may be written on a picture: at most ten letters, so that a 6-pixel font fits into 64 pixels.
NEUTRAL_WORDS = ("sale", "open", "hello", "taxi", "stop", "free", "news", "cafe")
WORDS = tuple(name for name in OBJECTS if " " not in name) + tuple(COLOURS) + NEUTRAL_WORDS
MAX_WORD = 10


@dataclass(frozen=True)
class Item:
    """One object in a scene: what it is, its tint (None keeps the drawing's own colours), and where.

    `x`, `y` are the centre (0 to 1, from the left and from the top), `size` the side of its box, as fractions.
    """

    name: str
    colour: str | None
    x: float
    y: float
    size: float

    def __post_init__(self) -> None:
        _known("object", self.name, OBJECTS)
        if self.colour is not None:
            _known("colour", self.colour, COLOURS)
        if not (0 <= self.x <= 1 and 0 <= self.y <= 1 and 0 < self.size <= 1):
            raise UsageError(
                f"An item's x, y and size are fractions of the picture, not {self.x}, {self.y}, {self.size}."
            )

    @property
    def character(self) -> str | None:
        """The name of the character that this object is, if it is one."""
        return _NAME_OF.get((self.name, self.colour))

    @property
    def position(self) -> str:
        """One of nine places, "top left" to "bottom right", by the thirds in which the centre lies."""
        column, row = min(int(self.x * 3), 2), min(int(self.y * 3), 2)
        return POSITIONS[3 * row + column]

    @property
    def size_name(self) -> str:
        return min(SIZES, key=lambda name: abs(SIZES[name] - self.size))


@dataclass(frozen=True)
class Scene:
    """A picture as a value. Later items are painted over earlier ones, the written word over all.

    `word` is written on a white plate at `word_at` ("top" or "bottom"), in black or in the colour `ink`; `texture`
    picks one of eight variants of the ground.
    """

    items: tuple[Item, ...]
    style: str = "noto"
    ground: str = "grass"
    word: str | None = None
    word_at: str = "bottom"
    ink: str | None = None
    texture: int = 0

    def __post_init__(self) -> None:
        _known("style", self.style, STYLES)
        _known("ground", self.ground, GROUNDS)
        _known("word position", self.word_at, ("top", "bottom"))
        if self.ink is not None:
            _known("ink", self.ink, COLOURS)
        if self.word is not None and not (0 < len(self.word) <= MAX_WORD and self.word.isascii()):
            raise UsageError(f"A written word has 1 to {MAX_WORD} ASCII characters, and {self.word!r} has not.")

    @property
    def relation(self) -> str | None:
        """How the first of exactly two objects lies to the second, by the axis on which they are further apart."""
        if len(self.items) != 2:
            return None
        dx, dy = self.items[0].x - self.items[1].x, self.items[0].y - self.items[1].y
        if abs(dx) >= abs(dy):
            return "left of" if dx < 0 else "right of"
        return "above" if dy < 0 else "below"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(item.name for item in self.items)


def _known(what: str, value: str, choices) -> None:
    if value not in choices:
        raise UsageError(f"Unknown {what} {value!r}. Choose one of: {', '.join(choices)}.")


# --------------------------------------------------------------------------------------------------------- pictures


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


# ------------------------------------------------------------------------------------------------- words for pictures


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def phrase(name: str, *adjectives: str) -> str:
    """A noun phrase for an object: "an orange car", "red grapes" (plurals take no article)."""
    noun = " ".join([*adjectives, name])
    return noun if name == "grapes" else article(noun)


def _noun_phrase(item: Item, mention: set[str], named: bool) -> str:
    if named and item.character:
        return item.character
    size = [item.size_name] if "size" in mention and item.size_name != "medium" else []
    colour = [item.colour] if "colour" in mention and item.colour else []
    return phrase(item.name, *size, *colour)


def place(item: Item) -> str:
    """Where an object is, as captions say it: "at the top left", "in the middle"."""
    return "in the middle" if item.position == "middle" else f"at the {item.position}"


def caption(scene: Scene, mention: Sequence[str] = ATTRIBUTES, template: int = 0, named: bool = False) -> str:
    """A sentence about the scene that names its objects and those of its attributes that `mention` lists.

    A position is told of a single object only, a relation of exactly two. `template` 0 to 2 varies the order of the
    parts; `named` calls characters by their name instead of by looks.
    """
    for attribute in mention:
        _known("attribute", attribute, ATTRIBUTES)
    mention = set(mention)
    nouns = [_noun_phrase(item, mention, named) for item in scene.items]
    if not nouns:
        core = "nothing"
    elif len(nouns) == 1:
        core = nouns[0] + (f" {place(scene.items[0])}" if "position" in mention else "")
    elif len(nouns) == 2 and "relation" in mention:
        core = f"{nouns[0]} {scene.relation} {nouns[1]}"
    else:
        core = ", ".join(nouns[:-1]) + " and " + nouns[-1]
    ground = f"on {scene.ground}" if "ground" in mention else ""
    style = scene.style if "style" in mention else ""
    word = f"with the word {scene.word}" if "word" in mention and scene.word else ""
    if template == 0:
        parts = [f"{article(style)} drawing of" if style else "", core, ground, word]
    elif template == 1:
        parts = [core, ground, word, f"in {style} style" if style else ""]
    else:
        parts = ["a picture of", core, word, ground, f"drawn by {style}" if style else ""]
    return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


NUMBERS = ("no", "one", "two", "three", "four")


def questions(scene: Scene, seed: int = 0) -> list[Question]:
    """Every question that the scene answers, of the kinds in `QUESTIONS`.

    The seed picks the absent object that is asked after, and the second of two relations asked after.
    """
    rng = np.random.default_rng([seed, *(ord(letter) for name in scene.names for letter in name)])
    names = scene.names
    out = [
        Question("count", "how many objects are there ?", NUMBERS[len(names)] if len(names) < 5 else str(len(names)))
    ]
    out.append(Question("ground", "what is the ground ?", scene.ground))
    out.append(Question("style", "what is the style ?", scene.style))
    out.append(Question("word", "what is the written word ?", scene.word or "no word"))
    absent = [name for name in OBJECTS if name not in names]
    out.append(Question("presence", f"is there {phrase(absent[rng.integers(len(absent))])} ?", "no"))
    for item in scene.items:
        thing = OBJECTS[item.name]
        out.append(Question("presence", f"is there {phrase(item.name)} ?", "yes"))
        out.append(Question("category", f"what kind of thing is the {item.name} ?", thing.category))
        out.append(Question("habitat", f"where is the {item.name} found ?", thing.habitat))
        out.append(Question("usual_colour", f"what is the usual colour of the {item.name} ?", thing.usual_colour))
        if names.count(item.name) > 1:
            continue  # "the dog" would not say which
        if item.colour:
            out.append(Question("colour", f"what colour is the {item.name} ?", item.colour))
        if item.character:
            out.append(Question("name", f"what is the name of the {item.name} ?", item.character))
        out.append(Question("position", f"where in the picture is the {item.name} ?", item.position))
    if scene.relation and names[0] != names[1]:
        opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))[scene.relation]
        asked, answer = ((scene.relation, "yes"), (opposite, "no"))[rng.integers(2)]
        out.append(Question("relation", f"is the {names[0]} {asked} the {names[1]} ?", answer))
    if len(scene.items) == 1:
        item, thing = scene.items[0], OBJECTS[names[0]]
        answers = (item.name, item.colour, thing.category, thing.habitat, thing.usual_colour, item.character)
        texts = (
            "what is this ?", "what colour is this ?", "what kind of thing is this ?", "where is this found ?",
            "what is the usual colour of this ?", "what is the name of this ?",
        )  # fmt: skip
        out += [Question(*parts) for parts in zip(THIS, texts, answers, strict=True) if parts[-1]]
    return out


def counterfactual(scene: Scene, attribute: str, value: str | tuple[float, float] | None, index: int = 0) -> Scene:
    """The same scene with one attribute changed: a minimal pair.

    `attribute` is "object", "colour", "size" or "position" (a pair x, y), of item `index`; or "style", "ground",
    "word", "ink", of the scene. Raises UsageError when nothing would change.
    """
    if attribute in ("style", "ground", "word", "ink"):
        changed = replace(scene, **{attribute: value})
    elif attribute in ("object", "colour", "size", "position"):
        if not 0 <= index < len(scene.items):
            raise UsageError(f"The scene has {len(scene.items)} items, so there is no item {index}.")
        item = scene.items[index]
        if attribute == "position":
            if not isinstance(value, tuple) or len(value) != 2:
                raise UsageError(f"A position is a pair (x, y) of fractions of the picture, not {value!r}.")
            item = replace(item, x=float(value[0]), y=float(value[1]))
        elif attribute == "size":
            _known("size", value, SIZES)
            item = replace(item, size=SIZES[value])
        else:
            item = replace(item, **{"name" if attribute == "object" else "colour": value})
        changed = replace(scene, items=scene.items[:index] + (item,) + scene.items[index + 1 :])
    else:
        choices = "object, colour, size, position, style, ground, word, ink"
        raise UsageError(f"Unknown attribute {attribute!r}. Choose one of: {choices}.")
    if changed == scene:
        raise UsageError(f"The scene's {attribute} is {value!r} already, so this counterfactual would change nothing.")
    return changed


# ------------------------------------------------------------------------------------------ drawing scenes at random


def _held_out(name: str, colour: str | None, ground: str) -> bool:
    digest = hashlib.blake2b(f"{name}|{colour}|{ground}".encode(), digest_size=2).digest()
    return int.from_bytes(digest, "big") < 0.15 * 65536


# The compositional split: every object, colour and ground is seen in training, some of their combinations are not.
HELD_OUT = frozenset(
    (name, colour, ground)
    for name in OBJECTS
    for colour in (*COLOURS, None)
    for ground in GROUNDS
    if _held_out(name, colour, ground)
)


@dataclass(frozen=True)
class World:
    """The switches from which scenes are drawn.

    counts              weights of 1, 2, 3 and 4 objects
    natural             share of objects that keep their drawing's own colours (less where the split forbids it)
    mention             share of attributes that a caption mentions (information imbalance), or such a share for each
                        attribute; those left out of the mapping are always mentioned
    ground_correlation  how often the ground is set to the first object's home ground; otherwise it is drawn, and may be
                        that by chance (spurious correlation)
    co_occurrence       how often the second object is set to the first one's companion (hallucination)
    words, word_kind    share of scenes with a written word, and which: "any", "matching" (the first object's name, of
                        one word), "conflicting" (another object's), "glyphs" (no letters: a control of the same area)
    characters          share of scenes in which one object is a named character
    duplicates          share of draws that repeat one of `n_duplicates` fixed scenes, with one caption (memorisation)
    split               "train", "test" (every object-colour-ground combination held out) or None for both
    """

    objects: tuple[str, ...] = _NAMES
    styles: tuple[str, ...] = STYLES
    colours: tuple[str, ...] = tuple(COLOURS)
    grounds: tuple[str, ...] = GROUNDS
    sizes: tuple[str, ...] = tuple(SIZES)
    counts: tuple[float, ...] = (0.5, 0.3, 0.1, 0.1)
    natural: float = 0.2
    mention: float | Mapping[str, float] = 1.0
    ground_correlation: float = 0.0
    co_occurrence: float = 0.0
    words: float = 0.0
    word_kind: str = "any"
    characters: float = 0.0
    duplicates: float = 0.0
    n_duplicates: int = 4
    split: str | None = None

    def __post_init__(self) -> None:
        shares = self.mention if isinstance(self.mention, Mapping) else {"": self.mention}
        if not set(shares) <= {"", *ATTRIBUTES} or not all(0 <= share <= 1 for share in shares.values()):
            raise UsageError(f"World.mention is a share between 0 and 1, or one for each of: {', '.join(ATTRIBUTES)}.")
        for what in ("natural", "ground_correlation", "co_occurrence", "words", "characters", "duplicates"):
            if not 0 <= getattr(self, what) <= 1:
                raise UsageError(f"World.{what} is a share between 0 and 1, not {getattr(self, what)}.")
        _known("word kind", self.word_kind, ("any", "matching", "conflicting", "glyphs"))
        _known("split", self.split, ("train", "test", None) if self.split is None else ("train", "test"))
        if not 1 <= len(self.counts) <= 4 or min(self.counts) < 0 or sum(self.counts) <= 0:
            raise UsageError("World.counts holds one to four weights, for one to four objects, with a positive sum.")
        if self.n_duplicates < 1:
            raise UsageError(f"World.n_duplicates is a number of at least 1, not {self.n_duplicates}.")
        if self.characters and not self._characters:
            raise UsageError("World.characters needs a character whose object and colour are among the world's.")
        for what, choices in {
            "sizes": SIZES,
            "objects": OBJECTS,
            "styles": STYLES,
            "colours": COLOURS,
            "grounds": GROUNDS,
        }.items():
            if not getattr(self, what):
                raise UsageError(f"World.{what} is empty. Choose some of: {', '.join(choices)}.")
            for value in getattr(self, what):
                _known(what[:-1], value, choices)

    def sample(self, rng: np.random.Generator) -> Scene:
        """One scene drawn from the switches."""
        if self.duplicates and rng.random() < self.duplicates:
            return self._fixed[int(rng.integers(self.n_duplicates))]
        # What the switches give shares of is drawn once; only the rest is drawn again until it fits.
        count = 1 + int(np.searchsorted(np.cumsum(self.counts) / sum(self.counts), rng.random(), side="right"))
        correlated, companion, character, word = (
            share > 0 and rng.random() < share
            for share in (self.ground_correlation, self.co_occurrence, self.characters, self.words)
        )
        ground, word_at = _pick(self.grounds, rng), _pick(("top", "bottom"), rng) if word else None
        for _ in range(200):
            names = self._names(count, companion, rng)
            tints: list[str | None] = []
            if character:
                name, tint = _pick(self._characters, rng)
                names, tints = [name, *(other for other in names if other != name)][:count], [tint]
            if len(names) < count or (word and self.word_kind == "matching" and names[0] not in WORDS):
                continue
            home = HOME_GROUND[names[0]]
            on = home if correlated and home in self.grounds else ground
            tints += [self._tint(name, on, rng) for name in names[len(tints) :]]
            sides = (_on_side(self.split, name, tint, on) for name, tint in zip(names, tints, strict=True))
            if self.split is not None and not all(sides):
                continue
            boxes = self._layout(count, word_at, rng)
            if boxes:
                break
        else:
            raise UsageError("No scene fits these switches of the world; widen objects, colours, sizes or the split.")
        items = tuple(Item(name, tint, *box) for name, tint, box in zip(names, tints, boxes, strict=True))
        written = self._word(names, rng) if word else None
        return Scene(items, _pick(self.styles, rng), on, written, word_at or "bottom", texture=int(rng.random() * 8))

    def sample_many(self, n: int, seed: int = 0) -> list[Scene]:
        """n scenes; the same seed gives the same scenes."""
        rng = np.random.default_rng(seed)
        return [self.sample(rng) for _ in range(n)]

    def caption(self, scene: Scene, rng: np.random.Generator) -> str:
        """A caption that mentions each attribute with probability `mention`, in a random template.

        A duplicated scene has one caption, so that the pair repeats and not just the picture.
        """
        if self.duplicates and scene in self._fixed:
            return caption(scene)
        draws = rng.random(len(ATTRIBUTES) + 2)
        shares = self.mention if isinstance(self.mention, Mapping) else dict.fromkeys(ATTRIBUTES, self.mention)
        mention = [name for name, draw in zip(ATTRIBUTES, draws, strict=False) if draw < shares.get(name, 1.0)]
        return caption(scene, mention, template=int(draws[-1] * 3), named=self.characters > 0 and draws[-2] < 0.5)

    @functools.cached_property
    def _fixed(self) -> list[Scene]:
        once = replace(self, duplicates=0.0)
        return [once.sample(np.random.default_rng([2024, index])) for index in range(self.n_duplicates)]

    @property
    def _characters(self) -> list[tuple[str, str]]:
        return [pair for pair in CHARACTERS.values() if pair[0] in self.objects and pair[1] in self.colours]

    def _names(self, count: int, companion: bool, rng: np.random.Generator) -> list[str]:
        names: list[str] = []
        while len(names) < count:
            name = _pick(self.objects, rng)
            if len(names) == 1 and companion and COMPANION[names[0]] in self.objects:
                name = COMPANION[names[0]]
            if name not in names or len(set(self.objects)) < count:
                names.append(name)
        return names

    def _tint(self, name: str, ground: str, rng: np.random.Generator) -> str | None:
        """A tint that the split allows for this object on this ground, if there is one."""
        if rng.random() < self.natural:
            return None
        allowed = [c for c in self.colours if self.split is None or _on_side(self.split, name, c, ground)]
        return _pick(allowed or self.colours, rng)

    def _word(self, names: list[str], rng: np.random.Generator) -> str:
        if self.word_kind == "glyphs":
            return "".join(_pick("#%&@$*+=<>", rng) for _ in range(3 + int(rng.random() * 7)))
        if self.word_kind == "matching":
            return names[0]
        if self.word_kind == "conflicting":
            return _pick([word for word in WORDS if word in OBJECTS and word not in names], rng)
        return _pick(WORDS, rng)

    def _layout(self, count: int, word_at: str | None, rng: np.random.Generator) -> list | None:
        """Boxes (x, y, size) that barely touch; two of them lie clearly beside or clearly above each other.

        A size too large for that many objects gives way to the largest of the world's sizes that fits.
        """
        low, high = (0.2 if word_at == "top" else 0.0), (0.8 if word_at == "bottom" else 1.0)
        known = [SIZES[size] for size in self.sizes]
        fitting = [size for size in known if size <= (0.62, 0.5, 0.34, 0.34)[count - 1]] or [min(known)]
        boxes: list = []
        for _ in range(count):
            size = min(_pick(known, rng), max(fitting))
            size = size if size in known else max(fitting)
            for _ in range(40):
                x = size / 2 + rng.random() * (1 - size)
                y = low + size / 2 + rng.random() * max(high - low - size, 0)
                box = (round(x, 4), round(y, 4), size)
                if all(_apart(box, other) for other in boxes) and (count != 2 or not boxes or _clear(box, boxes[0])):
                    boxes.append(box)
                    break
            else:
                return None
        return boxes


def _pick(values, rng: np.random.Generator):
    return values[int(rng.random() * len(values))]


def _on_side(split: str, name: str, colour: str | None, ground: str) -> bool:
    return ((name, colour, ground) in HELD_OUT) == (split == "test")


def _apart(a: tuple[float, float, float], b: tuple[float, float, float]) -> bool:
    gap = 0.46 * (a[2] + b[2])  # boxes may overlap a little, for drawings seldom fill their corners
    return max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= gap


def _clear(a: tuple[float, float, float], b: tuple[float, float, float]) -> bool:
    dx, dy = abs(a[0] - b[0]), abs(a[1] - b[1])
    return max(dx, dy) >= 1.5 * min(dx, dy)
