"""Scenes drawn at random from the switches of a `World`, and captions with what each switch makes of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from .. import UsageError
from .layout import boxes_of, pick
from .scene import MEMORISED, Item, Scene, known
from .split import on_side
from .tables import (
    ATTRIBUTES,
    CHARACTERS,
    COLOUR_BIAS,
    COLOURS,
    COMPANION,
    GROUNDS,
    HOME_GROUND,
    OBJECTS,
    SIZES,
    STYLES,
    WORDS,
)  # fmt: skip
from .words import caption

_NAMES = tuple(OBJECTS)
WORD_KINDS = ("any", "matching", "conflicting", "glyphs", "colour")


SHARES = (
    "natural", "same_colour", "hypernyms", "ground_correlation", "co_occurrence", "words", "ink", "misnamed", "signs",
    "characters", "duplicates", "memorised", "colour_bias",
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """The switches from which scenes are drawn.

    counts              weights of 1, 2, 3 and 4 objects
    natural             share of objects that keep their drawing's own colours (less where the split forbids it)
    same_colour         share of scenes in which all objects have the first one's colour (questions that compare)
    mention             share of attributes that a caption mentions (information imbalance), or such a share for each
                        attribute; those left out of the mapping are always mentioned
    hypernyms           share of captions that name kinds instead of objects: "a red bird"
    ground_correlation  how often the ground is set to the first object's home ground; otherwise it is drawn, and may be
                        that by chance (spurious correlation)
    grounded            the objects that this holds for, or None for all. Given, it holds for whichever grounds there
                        are: a first object of this kind without its home ground among them is drawn anew
    co_occurrence       how often the second object is set to the first one's companion (hallucination)
    accompanied         the objects that this holds for, or None for all
    words, word_kind    share of scenes with a written word, and which: "any", "matching" (the first object's name, of
                        one word), "conflicting" (another object's), "glyphs" (no letters: a control of the same area),
                        "colour" (the first object's colour, if it has one), or weights of several: {"matching": 2}.
                        With weights, captions never speak of glyphs
    ink                 share of written words in the ink of a colour
    misnamed            share of captions that give a first object the name of another one, where that is written on it
    signs               share of pictures without an object: a written word on a ground, whose caption is the bare word
    characters          share of scenes in which one object is a named character (where the split allows one there)
    duplicates          share of draws that repeat one of `n_duplicates` fixed scenes, with one caption (memorisation)
    memorised           share of draws that show one of `MEMORISED`, always with its odd sentence
    colour_bias         how often the objects of `COLOUR_BIAS` have their colour; in any other, captions name colours
    split               "train", "test" (every object-colour-ground combination held out) or None for both
    """

    objects: tuple[str, ...] = _NAMES
    styles: tuple[str, ...] = STYLES
    colours: tuple[str, ...] = tuple(COLOURS)
    grounds: tuple[str, ...] = GROUNDS
    sizes: tuple[str, ...] = tuple(SIZES)
    counts: tuple[float, ...] = (0.5, 0.3, 0.1, 0.1)
    natural: float = 0.2
    same_colour: float = 0.0
    mention: float | Mapping[str, float] = 1.0
    hypernyms: float = 0.0
    ground_correlation: float = 0.0
    grounded: tuple[str, ...] | None = None
    co_occurrence: float = 0.0
    accompanied: tuple[str, ...] | None = None
    words: float = 0.0
    word_kind: str | Mapping[str, float] = "any"
    ink: float = 0.0
    misnamed: float = 0.0
    signs: float = 0.0
    characters: float = 0.0
    duplicates: float = 0.0
    n_duplicates: int = 4
    memorised: float = 0.0
    colour_bias: float = 0.0
    split: str | None = None

    def __post_init__(self) -> None:
        shares = self.mention if isinstance(self.mention, Mapping) else {"": self.mention}
        if not set(shares) <= {"", *ATTRIBUTES} or not all(0 <= share <= 1 for share in shares.values()):
            raise UsageError(f"World.mention is a share between 0 and 1, or one for each of: {', '.join(ATTRIBUTES)}.")
        for what in SHARES:
            if not 0 <= getattr(self, what) <= 1:
                raise UsageError(f"World.{what} is a share between 0 and 1, not {getattr(self, what)}.")
        for kind in [self.word_kind] if isinstance(self.word_kind, str) else self.word_kind:
            known("word kind", kind, WORD_KINDS)
        weights = [1.0] if isinstance(self.word_kind, str) else list(self.word_kind.values())
        if not weights or min(weights) < 0 or sum(weights) <= 0:
            raise UsageError("World.word_kind is a kind, or weights of several kinds with a positive sum.")
        known("split", self.split, ("train", "test", None) if self.split is None else ("train", "test"))
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
                known(what[:-1], value, choices)
        for name in (*(self.grounded or ()), *(self.accompanied or ())):
            known("object", name, OBJECTS)

    def sample(self, rng: np.random.Generator) -> Scene:
        """One scene drawn from the switches."""
        if self.duplicates and rng.random() < self.duplicates:
            return self._fixed[int(rng.integers(self.n_duplicates))]
        if self.memorised and rng.random() < self.memorised:
            return pick(tuple(MEMORISED), rng)
        if self.signs and rng.random() < self.signs:
            return self._sign(rng)
        # What the switches give shares of is drawn once; only the rest is drawn again until it fits.
        count = 1 + int(np.searchsorted(np.cumsum(self.counts) / sum(self.counts), rng.random(), side="right"))
        correlated, companion, character, word, alike = (
            share > 0 and rng.random() < share
            for share in (self.ground_correlation, self.co_occurrence, self.characters, self.words, self.same_colour)
        )
        kind = self._kind(rng) if word else None
        ground, word_at = pick(self.grounds, rng), pick(("top", "bottom"), rng) if word else None
        character = character and any(self._fits(*pair, ground, correlated, kind) for pair in self._characters)
        for _ in range(200):
            names = self._names(count, companion, rng)
            tints: list[str | None] = []
            if character:
                name, tint = pick(self._characters, rng)
                names, tints = [name, *(other for other in names if other != name)][:count], [tint]
            if len(names) < count or (kind == "matching" and names[0] not in WORDS):
                continue
            on = self._ground_of(names[0], ground, correlated)
            if on is None:
                continue
            tints += [self._tint(name, on, rng) for name in names[len(tints) :]]
            tints = [tints[0]] * count if alike else tints
            sides = (on_side(self.split, name, tint, on) for name, tint in zip(names, tints, strict=True))
            if self.split is not None and not all(sides):
                continue
            boxes = boxes_of(self.sizes, count, word_at, rng)
            if boxes:
                break
        else:
            raise UsageError("No scene fits these switches of the world; widen objects, colours, sizes or the split.")
        items = tuple(Item(name, tint, *box) for name, tint, box in zip(names, tints, boxes, strict=True))
        written = self._word(kind, items, rng) if word else None
        scene = Scene(items, pick(self.styles, rng), on, written, word_at or "bottom", texture=int(rng.random() * 8))
        return self._inked(scene, rng)

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
        if self.memorised and scene in MEMORISED:
            return MEMORISED[scene]
        if self.signs and not scene.items:
            return scene.word
        draws = rng.random(len(ATTRIBUTES) + 2)
        shares = self.mention if isinstance(self.mention, Mapping) else dict.fromkeys(ATTRIBUTES, self.mention)
        mention = [name for name, draw in zip(ATTRIBUTES, draws, strict=False) if draw < shares.get(name, 1.0)]
        named = self.characters > 0 and draws[-2] < 0.5
        biased = [item.colour == COLOUR_BIAS[item.name] for item in scene.items if item.name in COLOUR_BIAS]
        if self.colour_bias and not all(biased):
            mention = [*mention, "colour"]
        if scene.word and not isinstance(self.word_kind, str) and not scene.word.isalpha():
            mention = [name for name in mention if name != "word"]
        other = scene.word in OBJECTS and scene.word not in scene.names
        if self.misnamed and other and rng.random() < self.misnamed:
            scene, named = replace(scene, items=(replace(scene.items[0], name=scene.word), *scene.items[1:])), False
        kinds = self.hypernyms > 0 and rng.random() < self.hypernyms
        return caption(scene, mention, template=int(draws[-1] * 3), named=named, kinds=kinds)

    @functools.cached_property
    def _fixed(self) -> list[Scene]:
        once = replace(self, duplicates=0.0)
        return [once.sample(np.random.default_rng([2024, index])) for index in range(self.n_duplicates)]

    @property
    def _characters(self) -> list[tuple[str, str]]:
        return [pair for pair in CHARACTERS.values() if pair[0] in self.objects and pair[1] in self.colours]

    def _ground_of(self, name: str, ground: str, correlated: bool) -> str | None:
        """Where a scene with this first object is: on the ground that was drawn, or at home; None where it has none."""
        home = HOME_GROUND[name]
        if not correlated or (self.grounded is not None and name not in self.grounded):
            return ground
        return home if home in self.grounds else (ground if self.grounded is None else None)

    def _fits(self, name: str, colour: str, ground: str, correlated: bool, kind: str | None) -> bool:
        on = self._ground_of(name, ground, correlated)
        written = kind != "matching" or name in WORDS
        return written and on is not None and (self.split is None or on_side(self.split, name, colour, on))

    def _names(self, count: int, companion: bool, rng: np.random.Generator) -> list[str]:
        names: list[str] = []
        while len(names) < count:
            name = pick(self.objects, rng)
            comes = companion and (self.accompanied is None or names[:1] and names[0] in self.accompanied)
            if len(names) == 1 and comes and COMPANION[names[0]] in self.objects:
                name = COMPANION[names[0]]
            if name not in names or len(set(self.objects)) < count:
                names.append(name)
        return names

    def _tint(self, name: str, ground: str, rng: np.random.Generator) -> str | None:
        """A tint that the split allows for this object on this ground, if there is one."""
        biased = self.colour_bias > 0 and name in COLOUR_BIAS
        if biased and rng.random() < self.colour_bias:
            if self.split is None or on_side(self.split, name, COLOUR_BIAS[name], ground):
                return COLOUR_BIAS[name]
        if not biased and rng.random() < self.natural:  # in its own colours it would have none that can be named
            return None
        allowed = [c for c in self.colours if self.split is None or on_side(self.split, name, c, ground)]
        return pick(allowed or self.colours, rng)

    def _kind(self, rng: np.random.Generator) -> str:
        """The kind of a written word; of a single kind nothing is drawn."""
        if isinstance(self.word_kind, str):
            return self.word_kind
        edges = np.cumsum(list(self.word_kind.values()))
        return list(self.word_kind)[int(np.searchsorted(edges / edges[-1], rng.random(), side="right"))]

    def _word(self, kind: str, items: tuple[Item, ...], rng: np.random.Generator) -> str:
        names = [item.name for item in items]
        if kind == "glyphs":
            return "".join(pick("#%&@$*+=<>", rng) for _ in range(3 + int(rng.random() * 7)))
        if kind == "matching":
            return names[0]
        if kind == "conflicting":
            return pick([word for word in WORDS if word in OBJECTS and word not in names], rng)
        if kind == "colour":
            return items[0].colour or pick(self.colours, rng)
        return pick(WORDS, rng)

    def _sign(self, rng: np.random.Generator) -> Scene:
        """A written word on a ground, and nothing else."""
        ground, word, at = (pick(values, rng) for values in (self.grounds, WORDS, ("top", "bottom")))
        scene = Scene((), pick(self.styles, rng), ground, word, at, texture=int(rng.random() * 8))
        return self._inked(scene, rng)

    def _inked(self, scene: Scene, rng: np.random.Generator) -> Scene:
        if scene.word and self.ink and rng.random() < self.ink:
            return replace(scene, ink=pick(tuple(COLOURS), rng))
        return scene
