"""The autoencoder of the text-to-image model: its training, and which one a recipe uses."""

import json
from pathlib import Path

import diffusion_parts as parts
import numpy as np
import optimisation
import torch
import training
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from mmfm_utils import oracle, scenes

SHIPPED = Path(__file__).parent / "vae" / "diffusion_pytorch_model.safetensors"
STEPS, BATCH, PARTS = 4000, 32, 4
WARM_UP, DECAY = 200, 0.3
SHARP = 0.5  # weight of the differences between neighbouring pixels: without it the outlines blur
FIRST = 5.0  # weight of an object's pixels; a ground's is 1
KL = 1e-3  # per latent, against the mean over pixels: enough that near latents mean near pictures


def checkpoint() -> Path:
    return training.CHECKPOINTS / "diffusion_autoencoder" / "last.safetensors"


def picture_loss(guess: torch.Tensor, truth: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Absolute differences of pixels, and of the steps from pixel to pixel, so that outlines stay sharp.

    `weight` (picture, 1, 64, 64) is that of each pixel.
    """
    off = guess - truth
    flat = (weight * off.abs()).mean()
    across = (weight[..., 1:] * off.diff(dim=3).abs()).mean()
    down = (weight[..., 1:, :] * off.diff(dim=2).abs()).mean()
    return flat + SHARP * (across + down)


def train(device: str, steps: int, helpers: int) -> None:
    model = parts.build_autoencoder().to(device)
    opts = optimisation.optimisers(model, blocks="none", adam_rate=1.5e-3)
    world = scenes.World(counts=(0.6, 0.4), sizes=parts.SIZES, natural=0.1, split="train")

    def loss_of(step: int, part: int) -> torch.Tensor:
        rng = np.random.default_rng([parts.SEED, step, part])
        drawn = [world.sample(rng) for _ in range(BATCH // PARTS)]
        truth = oracle.as_input(scenes.render_batch(drawn)).to(device)
        there = torch.from_numpy(np.stack([scenes.masks(scene).any(0) for scene in drawn]))[:, None].to(device)
        weight = (1 + (FIRST - 1) * there) / (1 + (FIRST - 1) * there).mean((2, 3), keepdim=True)
        generator = torch.Generator("cpu").manual_seed(int(rng.integers(2**31)))
        with optimisation.precision(device):
            coded = model.encode(truth).latent_dist
            guess = model.decode(coded.sample(generator)).sample.float()
            return picture_loss(guess, truth, weight) + KL * coded.kl().mean() / 1024

    training.run(model, opts, loss_of, PARTS, checkpoint(), steps, (WARM_UP, DECAY), helpers)


def load(anew: bool) -> tuple[AutoencoderKL, int, float]:
    """That of the checkpoint, its steps and seconds, if it is to be trained `anew` and there is one; else the shipped
    one with its scale of the latents, and (0, 0.0). Ends the program where there is none."""
    model = parts.build_autoencoder()
    step, seconds, _ = training.restore(checkpoint(), model, []) if anew else (0, 0.0, "")
    if step == 0:
        if not SHIPPED.exists():
            raise SystemExit("Train the autoencoder first: recipe.py --name diffusion_first --autoencoder")
        model.load_state_dict({name: x.float() for name, x in load_file(SHIPPED).items()})
        known = json.loads(SHIPPED.with_name("config.json").read_text())
        model.register_to_config(scaling_factor=known["scaling_factor"])
    return model, step, seconds
