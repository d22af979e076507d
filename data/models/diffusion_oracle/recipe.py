"""Train the oracle: it reads a picture pixel by pixel, by exact labels, and shares nothing with the models it judges.

    python data/models/diffusion_oracle/recipe.py               train; goes on from the checkpoint if there is one
    python data/models/diffusion_oracle/recipe.py --export      write the checkpoint as the shipped weights
    python data/models/diffusion_oracle/recipe.py --evaluate    its own error on scenes whose truth is known

Generated pictures are softer and noisier than drawn ones, so half of what it learns from is blurred, noisy or faded.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # training.py lies there

import numpy as np
import optimisation
import torch
import torch.nn.functional as F
import training
from diffusers import UNet2DModel
from torch import nn

from mmfm_utils import models, oracle, scenes

HERE = Path(__file__).parent
CHECKPOINT = HERE.parents[2] / "checkpoints" / "oracle" / "last.safetensors"
SHIPPED = ("diffusion_pytorch_model.safetensors", "config.json")
SEED = 0
STEPS, BATCH, PARTS = 400, 32, 4
WARM_UP, DECAY = 50, 0.4
WORLD = scenes.World(counts=(0.4, 0.35, 0.15, 0.1), natural=0.1, split="train")


def build() -> UNet2DModel:
    """A U-Net without attention and without noise: its timestep is always 0."""
    torch.manual_seed(SEED)
    return UNet2DModel(
        sample_size=64, in_channels=3, out_channels=oracle.CHANNELS, block_out_channels=(16, 24, 32, 32),
        down_block_types=("DownBlock2D",) * 4, up_block_types=("UpBlock2D",) * 4, layers_per_block=1,
        norm_num_groups=8, add_attention=False,
    )  # fmt: skip


def worn(x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Half of the pictures (picture, 3, 64, 64) blurred through a smaller size, noisy, or with other contrast."""
    out = x.clone()
    for row in np.flatnonzero(rng.random(len(x)) < 0.5):
        one = x[row : row + 1]
        side = int(rng.integers(24, 65))
        one = F.interpolate(one, (side, side), mode="bilinear", antialias=True)
        one = F.interpolate(one, (64, 64), mode="bilinear")
        one = one * rng.uniform(0.8, 1.2) + rng.uniform(-0.1, 0.1)
        out[row] = (one + rng.uniform(0, 0.15) * torch.from_numpy(rng.standard_normal(one.shape)).float())[0]
    return out.clamp(-1, 1)


def loss_of(model: nn.Module, step: int, part: int, device: str) -> torch.Tensor:
    rng = np.random.default_rng([SEED, step, part])
    drawn = [WORLD.sample(rng) for _ in range(BATCH // PARTS)]
    truth = {name: labels.to(device) for name, labels in oracle.labels(drawn).items()}  # (picture, 64, 64)
    x = worn(oracle.as_input(scenes.render_batch(drawn)), rng).to(device)
    said = oracle.split(model(x, 0).sample)
    return sum(F.cross_entropy(said[name], truth[name], ignore_index=-1) for name in truth)


def train(device: str, steps: int, helpers: int) -> None:
    model = build().to(device)
    opts = optimisation.optimisers(model, blocks="none", adam_rate=2e-3)

    def loss(step: int, part: int) -> torch.Tensor:
        return loss_of(model, step, part, device)

    training.run(model, opts, loss, PARTS, CHECKPOINT, steps, (WARM_UP, DECAY), helpers)


def evaluate(reader: oracle.Oracle, n: int = 600, seed: int = 1) -> dict[str, float]:
    """Shares of held-out scenes (new combinations of object, colour and ground) that are read right.

    object, colour, style, ground, position: of scenes with one object. count: of scenes with one to four. pair_*: of
    scenes with two, that both names are read, and both with their colours. iou: of the largest thing's pixels.
    """
    single, pair, several = (
        scenes.World(counts=counts, natural=0.0, split="test").sample_many(n, seed)
        for counts in ((1.0,), (0.0, 1.0), (0.25, 0.25, 0.25, 0.25))
    )
    hits = {name: [] for name in ("object", "colour", "style", "ground", "position", "iou")}
    for scene, read in zip(single, reader.read(scenes.render_batch(single)), strict=True):
        item, mask = scene.items[0], scenes.masks(scene)[0]
        thing = read.things[0] if read.things else None
        hits["object"].append(thing is not None and thing.name == item.name)
        hits["colour"].append(thing is not None and thing.colour == item.colour)
        hits["position"].append(thing is not None and thing.position == item.position)
        hits["iou"].append((thing.mask & mask).sum() / (thing.mask | mask).sum() if thing else 0.0)
        hits["style"].append(read.style == scene.style)
        hits["ground"].append(read.ground == scene.ground)
    out = {name: np.mean(values) for name, values in hits.items()}
    both, bound = [], []
    for scene, read in zip(pair, reader.read(scenes.render_batch(pair)), strict=True):
        seen = {(thing.name, thing.colour) for thing in read.things}
        both.append(set(scene.names) <= set(read.names))
        bound.append({(item.name, item.colour) for item in scene.items} <= seen)
    read = reader.read(scenes.render_batch(several))
    out |= {
        "pair_objects": np.mean(both),
        "pair_bound": np.mean(bound),
        "count": np.mean([len(r.things) == len(s.items) for r, s in zip(read, several, strict=True)]),
    }
    return {name: round(float(value), 4) for name, value in out.items()}


def export(device: str) -> None:
    """Write the shipped half-precision weights, their config, and the card with the oracle's own error."""
    model = build()
    step, seconds, machine = training.restore(CHECKPOINT, model, [])
    if step == 0:
        raise SystemExit(f"{CHECKPOINT} does not exist: train first, without --export.")
    model.half().save_pretrained(HERE)
    card = {
        "name": "diffusion_oracle",
        "library": "diffusers",
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": "emoji scenes, training side of the compositional split, half of them blurred, noisy or faded",
        "steps": step,
        "pictures_a_step": BATCH,
        "seed": SEED,
        "machine": machine,
        "minutes": round(seconds / 60),
        "held_out": {},
        "chance": {
            "object": 0.0208,
            "colour": 0.125,
            "style": 0.25,
            "ground": 0.125,
            "position": 0.1111,
            "count": 0.25,
        },  # fmt: skip
        "tolerance": 0.03,
        "licence": "MIT; trained on pictures composed of the emoji sets named in data/sprites/LICENCES.md",
        "files": {file: models.sha256(HERE / file) for file in SHIPPED},
        "repeat": f"recipe.py --steps {step}, then recipe.py --export, in data/models/diffusion_oracle",
    }
    (HERE / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    card["held_out"] = evaluate(oracle.Oracle(device))
    (HERE / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=STEPS, help="how many steps to train")
    parser.add_argument("--helpers", type=int, default=(os.cpu_count() or 1) - 1, help="further processes, on a CPU")
    parser.add_argument("--export", action="store_true", help="write the checkpoint as the shipped weights")
    parser.add_argument("--evaluate", action="store_true", help="the shipped oracle's own error")
    options = parser.parse_args()
    if options.evaluate:
        print(json.dumps(evaluate(oracle.Oracle(options.device)), indent=2))
    elif options.export:
        export(options.device)
    else:
        train(options.device, options.steps, options.helpers)
