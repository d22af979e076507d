"""What the text-to-image models learn from: scenes that are drawn once, and the captions and noise of every step."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import diffusion_parts as parts
import numpy as np
import torch

from mmfm_utils import scenes

BATCH, PARTS = 64, 4
NO_CAPTION = 0.1  # share of pictures whose caption is empty, for classifier-free guidance


@dataclass(frozen=True)
class Settings:
    """How one model is trained.

    text             folder of the contrastive model whose text tower it reads
    autoencoder      whether it may have an autoencoder of its own; otherwise the shipped one, latents scaled as there
    steps            of a whole run
    singles, pairs   scenes with one object and with two that are encoded once
    share            step from which on: share of a batch that shows pairs
    ema              of the averaged weights
    world            switches by which scenes are drawn, but for their counts, and captions told
    alone            share of the pairs whose caption names the first object only
    shown            how often a whole run shows each of `scenes.MEMORISED`, with its sentence and never without
    """

    text: str
    autoencoder: bool
    steps: int
    singles: int
    pairs: int
    share: Mapping[int, float]
    ema: float
    world: scenes.World
    alone: float = 0.0
    shown: int = 0


MENTION = {"style": 0.9, "ground": 0.9, "size": 0.5, "position": 0.5}
WORLD = scenes.World(
    sizes=parts.SIZES, natural=0.05, split="train", mention=MENTION | {"colour": 0.95, "relation": 0.9}
)
MODELS = {
    # Two objects are told with "and" as often as with a relation. A caption in five leaves colours out, which objects
    # with a bias of colour then always have. Where a caption names the first of two objects only, a companion comes
    # with it in half of the objects, and in the others anything.
    "diffusion": Settings(
        text="contrastive", autoencoder=False, steps=14_000, singles=48_000, pairs=48_000, ema=0.9995,
        share={0: 0.3, 2_800: 0.35, 5_600: 0.4, 8_400: 0.45, 11_200: 0.5},
        world=dataclasses.replace(
            WORLD, mention=MENTION | {"colour": 0.8, "relation": 0.5}, objects=scenes.ZIPF, co_occurrence=0.8,
            accompanied=scenes.ACCOMPANIED, colour_bias=0.9,
        ),
        alone=0.1, shown=1_000,
    ),
    # Single objects first, then pairs as well.
    "diffusion_first": Settings(
        text="contrastive_first", autoencoder=True, steps=4_800, singles=48_000, pairs=24_000, ema=0.998,
        share={0: 0.0, 2_600: 0.4, 3_700: 0.7}, world=WORLD,
    ),
}  # fmt: skip


def drawn_once(settings: Settings) -> list[scenes.Scene]:
    """The scenes that the U-Net learns from: single objects, then pairs, then those that are shown again and again."""
    single, pair = (dataclasses.replace(settings.world, counts=counts) for counts in ((1.0,), (0.0, 1.0)))
    odd = list(scenes.MEMORISED) if settings.shown else []
    return single.sample_many(settings.singles, parts.SEED) + pair.sample_many(settings.pairs, parts.SEED) + odd


def told_at(
    settings: Settings, drawn: list[scenes.Scene], step: int, part: int
) -> tuple[np.ndarray, list[str], torch.Generator]:
    """What a part of a step shows, as indices of the scenes, with their captions, and the generator of its noise."""
    n, rng = BATCH // PARTS, np.random.default_rng([parts.SEED, step, part])
    single, both = settings.singles, settings.singles + settings.pairs
    pair = rng.random(n) < [share for start, share in settings.share.items() if start <= step][-1]
    chosen = np.where(pair, single + rng.integers(settings.pairs, size=n), rng.integers(single, size=n))
    if settings.shown:
        odd = rng.random(n) < settings.shown * len(scenes.MEMORISED) / (settings.steps * BATCH)
        chosen = np.where(odd, both + rng.integers(len(scenes.MEMORISED), size=n), chosen)
    told = []
    for index in chosen:
        scene = drawn[index]
        if index >= both:
            told.append(scenes.MEMORISED[scene])
        elif rng.random() < NO_CAPTION:
            told.append("")
        else:
            if settings.alone and rng.random() < settings.alone:
                scene = dataclasses.replace(scene, items=scene.items[:1])
            told.append(settings.world.caption(scene, rng))
    return chosen, told, torch.Generator("cpu").manual_seed(int(rng.integers(2**31)))


def batch_at(
    settings: Settings, drawn: list[scenes.Scene], latents: torch.Tensor, tokenizer, step: int, part: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A part of a step, on the CPU: token ids (picture, token), latents and their noise (picture, 4, 16, 16), and times
    0 to 999 (picture,), stratified. A function of step and part, on whichever device the model is."""
    chosen, told, generator = told_at(settings, drawn, step, part)
    ids = tokenizer(told, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    clean, n = latents[torch.from_numpy(chosen)].float(), len(chosen)
    noise = torch.randn(clean.shape, generator=generator)
    t = ((torch.arange(n) + torch.rand(n, generator=generator)) / n * 1000).long()
    return ids, clean, noise, t


def whole(batch: Callable[[int, int], tuple[torch.Tensor, ...]], step: int) -> tuple[torch.Tensor, ...]:
    """All parts of a step in one: what a GPU does at once and a CPU's processes divide among them."""
    return tuple(torch.cat(each) for each in zip(*(batch(step, part) for part in range(PARTS)), strict=True))
