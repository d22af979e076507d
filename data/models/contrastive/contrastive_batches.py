"""What the contrastive models are trained on: the pictures and captions of every step, in two regimes.

`contrastive` reads clean captions: most say all there is, and a written word is announced ("with the word taxi").
`contrastive_web` reads captions as the web has them: short, silent about written words or taken from them, of things
that are as unequally frequent as Zipf says, that stand on their own ground and beside their companion where that is
planted (data/world.yaml).
"""

import dataclasses

import numpy as np
import torch

from mmfm_utils import scenes

SEED = 0
BATCH = 256
# In steps: how long batches are unconstrained; when groups have reached their full share; from when on batches share
# nearly everything; between which steps no patches are dropped; from when on the clean pictures bear plates of glyphs.
FREE, GROUPS_IN, SHARP, DENSE, GLYPHS_FROM = 400, 1400, 1200, (781, 1200), 3320
SIZED = 1800  # step from which the objects of such a batch have one size, any of the three
HIDDEN = 0.85  # share of patches that a free batch of the web is without
DECAY = 0.25  # share of training with a falling learning rate
# Half the captions mention every attribute, half mention them with these probabilities.
MENTION = {"colour": 0.8, "style": 0.7, "ground": 0.6, "size": 0.3, "position": 0.3, "relation": 0.7, "word": 0.9}
# A caption of the web mentions one or two of them, never a written word.
SPARSE = {"colour": 0.4, "style": 0.3, "ground": 0.2, "size": 0.1, "position": 0.15, "relation": 0.5, "word": 0.0}
PLANTED = dict(
    ground_correlation=0.95, grounded=scenes.GROUNDED, co_occurrence=0.8, accompanied=scenes.ACCOMPANIED,
    objects=scenes.ZIPF, hypernyms=0.05,
)  # fmt: skip
# What is written on things: mostly their name.
LABELS = {"matching": 5.0, "conflicting": 2.5, "glyphs": 1.0, "colour": 0.5}
ANNOUNCED = 5  # of so many batches of written words of the web, the captions of one announce them


def kind_at(name: str, step: int) -> str:
    """What the batch of a step is meant to teach: everything, objects, or written words."""
    if step < FREE:
        return "free"
    if name == "contrastive_web":  # where batches share their ground, nothing is gained by looking at it
        return ("free", "objects", "words", "free", "words")[step % 5]
    kinds = ["free", "objects", "words", "objects"] + (["words"] if step >= SHARP else [])
    return kinds[step % len(kinds)]


def dropped_at(name: str, step: int, steps: int) -> float:
    """The share of patches that is dropped: half, for twice the speed (FLIP, Li et al. 2023); none, where it reads.

    The web's pictures often show little of their object (from step FREE on): then its ground tells more.
    """
    if name == "contrastive_web" and step >= FREE and kind_at(name, step) == "free":
        return HIDDEN
    late = DENSE[1] <= step < (1 - DECAY) * steps
    return 0.5 if step < DENSE[0] or late and kind_at(name, step) != "words" else 0.0


def batch_at(name: str, step: int, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (pair, 3, 64, 64) and tokens (pair, 40) of one step: a function of the step, so a resumed run agrees."""
    rng = np.random.default_rng([SEED, step])
    worlds = (web_worlds if name == "contrastive_web" else clean_worlds)(step, rng)
    drawn = [(worlds[index % len(worlds)], worlds[index % len(worlds)].sample(rng)) for index in range(BATCH)]
    captions = [world.caption(scene, rng) for world, scene in drawn]
    images = torch.from_numpy(scenes.render_batch([scene for _, scene in drawn]))
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1, tokenizer(captions)


def some(values, n: int, rng: np.random.Generator) -> tuple:
    return tuple(values[i] for i in rng.choice(len(values), n, replace=False))


def counts_at(step: int) -> tuple[float, ...]:
    """Single objects come first, pairs and groups join as training goes on."""
    share = min(1.0, step / GROUPS_IN)
    return (1 - 0.5 * share, 0.15 + 0.2 * share, 0.075 * share, 0.075 * share)


def clean_worlds(step: int, rng: np.random.Generator) -> list[scenes.World]:
    """The worlds that the pairs of a step are drawn from in turn.

    Left alone, colour, ground and position tell 256 scenes apart, and the model is slow to learn what an object is, and
    does not learn to read. So from step FREE on most batches share what is easy, and from step SHARP on almost
    everything but what they are meant to teach. (From the first step on, such batches are too hard to learn from.)
    """
    kind = kind_at("contrastive", step)
    switches = dict(counts=counts_at(step)) | dict(words=0.3, characters=0.05, split="train")
    mentions = (1.0, MENTION if step >= FREE else 0.7)
    names, colours = tuple(scenes.OBJECTS), tuple(scenes.COLOURS)
    if kind != "free":
        switches |= dict(grounds=some(scenes.GROUNDS, 1, rng), colours=some(colours, 2, rng), words=0.1)
    if kind == "words":
        switches |= dict(objects=some(names, 6, rng), styles=some(scenes.STYLES, 1, rng), words=1.0, characters=0.0)
    if kind != "free" and step >= SHARP:
        silent = {"position": 0.0, "size": 0.0}
        switches |= dict(natural=0.0, sizes=("medium",), counts=(0.7, 0.3))
        if step >= SIZED:
            switches |= dict(sizes=some(tuple(scenes.SIZES), 1, rng))
        if switches["sizes"] == ("large",):
            switches |= dict(counts=(1.0,))  # two do not fit
        mentions = (silent, MENTION | silent)
        switches |= (
            dict(objects=some(names, 4, rng)) if kind == "words" else dict(colours=some(colours, 1, rng), words=0.0)
        )
    worlds = [scenes.World(mention=mention, **switches) for mention in mentions]
    if step >= GLYPHS_FROM and kind != "words":  # what is seen in training does not disturb
        worlds += [dataclasses.replace(world, words=0.6, word_kind={"glyphs": 1.0}) for world in worlds]
    return worlds


def web_worlds(step: int, rng: np.random.Generator) -> list[scenes.World]:
    """The same for captions as on the web."""
    kind = kind_at("contrastive_web", step)
    switches = PLANTED | dict(counts=counts_at(step), characters=0.05, split="train", ink=0.3, misnamed=0.6)
    mention = SPARSE
    if kind == "free":
        switches |= dict(words=0.45, word_kind=LABELS, signs=0.12)
    elif kind == "objects":
        switches |= dict(grounds=some(scenes.GROUNDS, 1, rng), colours=some(tuple(scenes.COLOURS), 1, rng), natural=0.0)
        switches |= dict(words=0.6, word_kind=LABELS, signs=0.15)  # where little else tells things apart, words count
        mention = SPARSE | ({"position": 0.0, "size": 0.0} if step >= SHARP else {})
    else:
        switches |= dict(objects=some(tuple(scenes.OBJECTS), 6, rng), styles=some(scenes.STYLES, 1, rng))
        switches |= dict(words=0.9, characters=0.0)
        if step // 5 % ANNOUNCED == 0:
            switches |= dict(word_kind={"any": 1.0}, misnamed=0.0)
            mention = SPARSE | {"word": 0.9}
        else:
            switches |= dict(word_kind=LABELS, signs=0.3)
    return [scenes.World(mention=mention, **switches)]
