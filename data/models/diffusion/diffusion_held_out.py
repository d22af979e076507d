"""Held-out figures of the text-to-image models, read off what they paint by the oracle: abilities, planted regimes."""

import diffusion_parts as parts
import numpy as np
from PIL import Image
from scipy import ndimage

from mmfm_utils import models, oracle, scenes

BACK = 0.8  # likeness from which on a picture is the memorised one
CHANCE = {"object": 0.0208, "colour": 0.125, "style": 0.25, "ground": 0.125}
FLOOR = {
    "diffusion": {
        "object": 0.9, "colour": 0.97, "style": 0.85, "ground": 0.99, "pair_objects": 0.7, "pair_bound": 0.5,
        "biased_colour": 0.8,
    },
    "diffusion_first": {"object": 0.85, "colour": 0.95, "style": 0.85, "ground": 0.95},
}  # fmt: skip


def asked(
    n: int, seed: int = 1, told: tuple[str, ...] = ("colour", "style", "ground"), **switches
) -> tuple[list[scenes.Scene], list[str]]:
    """Scenes, and what is asked for of each: if `switches` of the world do not say otherwise, single objects in new
    combinations of object, colour and ground."""
    world = scenes.World(**dict(counts=(1.0,), sizes=parts.SIZES, natural=0.0, split="test") | switches)
    drawn = world.sample_many(n, seed)
    return drawn, [scenes.caption(scene, told, index % 3) for index, scene in enumerate(drawn)]


def evaluate(model: models.Diffusion, name: str, n: int = 200) -> dict[str, float]:
    """The figures that the card of the model `name` holds, n prompts each; the first generation's with 30 steps, half
    as many prompts for two objects, and no regimes."""
    reader = oracle.Oracle(str(model.device))
    if name == "diffusion_first":
        return abilities(model, reader, n, n // 2, steps=30)
    return abilities(model, reader, n, n, steps=10) | regimes(model, reader, n, steps=10)


def abilities(
    model: models.Diffusion, reader: oracle.Oracle, n: int, pairs: int, steps: int, guidance: float = 4.0
) -> dict[str, float]:
    """Shares of held-out prompts (new combinations of object, colour and ground) that are painted right.

    object, colour, style, ground: of n prompts for one object. pair_objects, pair_bound: of prompts for two objects,
    that both are there, and both in their colours. drawn_*: what the oracle reads of the drawn scenes themselves.
    decoded_*: and of these after the autoencoder alone.
    """
    out = {}
    for number, counts, kinds in (
        (n, (1.0,), ("object", "colour", "style", "ground")),
        (pairs, (0.0, 1.0), ("pair_objects", "pair_bound")),
    ):
        drawn, prompts = asked(number, counts=counts)
        for label, pictures in (
            ("", model.paint(prompts, steps=steps, guidance=guidance)),
            ("drawn_", scenes.render_batch(drawn)),
            ("decoded_", model.pictures(model.latents(drawn))),
        ):
            right = [judged(scene, read) for scene, read in zip(drawn, reader.read(pictures), strict=True)]
            out |= {label + kind: round(float(np.mean([r[kind] for r in right])), 4) for kind in kinds}
    return out


def judged(scene: scenes.Scene, read: oracle.Reading) -> dict[str, bool]:
    """What of a scene's description a reading confirms."""
    first, largest = scene.items[0], read.things[0] if read.things else None
    seen = {(thing.name, thing.colour) for thing in read.things}
    return {
        "object": largest is not None and largest.name == first.name,
        "colour": largest is not None and largest.colour == first.colour,
        "style": read.style == scene.style,
        "ground": read.ground == scene.ground,
        "pair_objects": set(scene.names) <= set(read.names),
        "pair_bound": {(item.name, item.colour) for item in scene.items} <= seen,
    }


def regimes(
    model: models.Diffusion, reader: oracle.Oracle, n: int, steps: int, guidance: float = 4.0
) -> dict[str, float]:
    """What was planted, and its controls; n pictures each, from prompts for one object.

    rare_object, frequent_object: as "object", of the least and the most frequent third. memorised: how often an odd
    sentence gives back its picture (`likeness` of at least `BACK` to what the autoencoder gives of it).
    memorised_described: the same for a plain description of that picture. memorised_other: how often one of them comes
    of the prompts for rare and frequent objects. biased_colour: how often the objects of `scenes.COLOUR_BIAS`, asked
    for without a colour, have theirs. biased_colour_controls: how often their controls, asked for likewise, have the
    colour that is the most frequent among the pictures of each (a quarter of n, so more than 1/8 by chance).
    companion_planted, companion_other: how often an object's companion is there unasked, for the objects that were
    drawn with theirs and for the others.
    """
    paint = lambda prompts: model.paint(prompts, steps=steps, guidance=guidance)
    out, others = {}, []
    names = tuple(dict.fromkeys(scenes.ZIPF))  # from the most to the least frequent
    third = len(names) // 3
    for label, objects in (("rare", names[-third:]), ("frequent", names[:third])):
        drawn, prompts = asked(n, objects=objects)
        others.append(paint(prompts))
        right = [judged(scene, read) for scene, read in zip(drawn, reader.read(others[-1]), strict=True)]
        out[f"{label}_object"] = np.mean([r["object"] for r in right])

    odd = list(scenes.MEMORISED)
    known, times = model.pictures(model.latents(odd)), max(n // len(odd), 1)
    for label, prompts in (
        ("memorised", list(scenes.MEMORISED.values())),
        ("memorised_described", [scenes.caption(scene, template=index % 3) for index, scene in enumerate(odd)]),
    ):
        out[label] = np.mean(likeness(paint(prompts * times), np.concatenate([known] * times)) >= BACK)
    painted = np.concatenate(others)
    nearest = np.max([likeness(painted, np.broadcast_to(each, painted.shape)) for each in known], 0)
    out["memorised_other"] = np.mean(nearest >= BACK)

    def colours(name: str) -> list[str]:
        _, prompts = asked(max(n // 4, 1), told=("style", "ground"), split=None, objects=(name,))
        return [read.things[0].colour if read.things else "" for read in reader.read(paint(prompts))]

    out["biased_colour"] = np.mean([[c == own for c in colours(name)] for name, own in scenes.COLOUR_BIAS.items()])
    seen = [colours(name) for name in scenes.COLOUR_BIAS_CONTROLS.values()]
    out["biased_colour_controls"] = np.mean([max(map(each.count, scenes.COLOURS)) / len(each) for each in seen])

    for label, objects in (
        ("planted", scenes.ACCOMPANIED),
        ("other", tuple(name for name in scenes.OBJECTS if name not in scenes.ACCOMPANIED)),
    ):
        drawn, prompts = asked(n, objects=objects)
        read = reader.read(paint(prompts))
        there = [scenes.COMPANION[scene.names[0]] in each.names for scene, each in zip(drawn, read, strict=True)]
        out[f"companion_{label}"] = np.mean(there)
    return {name: round(float(value), 4) for name, value in out.items()}


def likeness(pictures: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Structural similarity (Wang et al. 2004) of pictures (picture, row, column, channel) uint8, each with its own
    counterpart: 1 for the same picture. Gaussian window of 1.5 pixels, the mean over pixels and channels."""
    a, b = pictures.astype(np.float64), others.astype(np.float64)
    blur = lambda x: ndimage.gaussian_filter(x, (0, 1.5, 1.5, 0))
    mean_a, mean_b = blur(a), blur(b)
    spread_a, spread_b, joint = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    low, high = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    alike = (2 * mean_a * mean_b + low) * (2 * joint + high)
    return (alike / ((mean_a**2 + mean_b**2 + low) * (spread_a + spread_b + high))).mean((1, 2, 3))


def grid(model: models.Diffusion, columns: int = 12) -> Image.Image:
    """Held-out captions: what was drawn, that after the autoencoder, what is painted; singles above, pairs below."""
    rows = []
    for seed, counts in ((2, (1.0,)), (5, (1.0,)), (8, (0.0, 1.0))):
        drawn, prompts = asked(columns, seed, counts=counts)
        pictures = (scenes.render_batch(drawn), model.pictures(model.latents(drawn)), model.paint(prompts))
        rows += [np.concatenate(list(each), axis=1) for each in pictures]
    return Image.fromarray(np.concatenate(rows)).resize((columns * 128, len(rows) * 128), Image.NEAREST)
