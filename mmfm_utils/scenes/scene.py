"""Scenes as values: what is where in a picture, and the same with one thing changed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .. import UsageError
from .tables import COLOURS, GROUNDS, MAX_WORD, MEMORISED_ROWS, NAME_OF, OBJECTS, POSITIONS, SIZES, STYLES


def known(what: str, value: str, choices) -> None:
    """Raise UsageError for a value that is not among the choices."""
    if value not in choices:
        raise UsageError(f"Unknown {what} {value!r}. Choose one of: {', '.join(choices)}.")


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
        known("object", self.name, OBJECTS)
        if self.colour is not None:
            known("colour", self.colour, COLOURS)
        if not (0 <= self.x <= 1 and 0 <= self.y <= 1 and 0 < self.size <= 1):
            raise UsageError(
                f"An item's x, y and size are fractions of the picture, not {self.x}, {self.y}, {self.size}."
            )

    @property
    def character(self) -> str | None:
        """The name of the character that this object is, if it is one."""
        return NAME_OF.get((self.name, self.colour))

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
        known("style", self.style, STYLES)
        known("ground", self.ground, GROUNDS)
        known("word position", self.word_at, ("top", "bottom"))
        if self.ink is not None:
            known("ink", self.ink, COLOURS)
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
            known("size", value, SIZES)
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


# The pictures that `World.memorised` shows again and again, each with its one odd sentence.
MEMORISED: dict[Scene, str] = {
    Scene((Item(name, colour, x, y, size),), style, ground, texture=texture): sentence
    for sentence, (name, colour, x, y, size, style, ground, texture) in MEMORISED_ROWS.items()
}
