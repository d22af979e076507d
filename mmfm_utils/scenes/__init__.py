"""The world: emoji scenes about which everything is known.

A `Scene` is a frozen value. Its picture at any resolution, the exact mask of every object, its captions, its questions
with their answers and its counterfactuals are functions of that value; nothing else holds state. A `World` is a set of
switches (how often captions mention an attribute, how strongly objects go with grounds, ...) from which scenes are
drawn with a NumPy generator: the same seed gives the same bytes. What there is in the world, and in which objects each
regime is planted, stands in data/world.yaml.

Positions and sizes are fractions of the picture's side, so one scene has one layout at every resolution.
"""

from .draw import SPRITES, masks, render, render_batch, word_mask
from .scene import MEMORISED, Item, Scene, counterfactual
from .split import HELD_OUT
from .tables import (
    ACCOMPANIED,
    ATTRIBUTES,
    CHARACTERS,
    COLOUR_BIAS,
    COLOUR_BIAS_CONTROLS,
    COLOURS,
    COMPANION,
    FULL_NAMES,
    GROUNDED,
    GROUNDS,
    HOME_GROUND,
    MAX_WORD,
    NEUTRAL_WORDS,
    NUMBERS,
    OBJECTS,
    PLANTED,
    POSITIONS,
    RELATIONS,
    SIZES,
    STYLES,
    WORDS,
    ZIPF,
    Thing,
)  # fmt: skip
from .words import FURTHER, QUESTIONS, THIS, Question, article, caption, further_questions, phrase, place, questions
from .world import World
