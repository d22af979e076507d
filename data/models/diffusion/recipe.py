"""Train the text-to-image model as Stable Diffusion 1 was (Rombach et al. 2022): a U-Net in an autoencoder's latents.

    python data/models/diffusion/recipe.py                          train the U-Net; goes on from its checkpoint
    python data/models/diffusion/recipe.py --name diffusion_first   the same for the first generation; with
        --autoencoder its autoencoder, which the second takes over as it is shipped
    python data/models/diffusion/recipe.py --grid                   paint held-out captions with the checkpoint
    python data/models/diffusion/recipe.py --measure                held-out figures of the checkpoint
    python data/models/diffusion/recipe.py --export                 write the checkpoint as the shipped pipeline
    python data/models/diffusion/recipe.py --evaluate               held-out figures of the shipped pipeline

The text tower is a contrastive model's and stays frozen. The U-Net sees a fixed set of scenes, encoded once, from the
training side of the compositional split; what each step shows stands in diffusion_batches.py. Checkpoints live in
checkpoints/, outside git (or in the folder that MMFM_CHECKPOINTS names).
"""

import argparse
import copy
import functools
import hashlib
import json
import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # training.py lies there

import diffusion_autoencoder as autoencoder
import diffusion_batches as batches
import diffusion_held_out as held_out
import diffusion_parts as parts
import optimisation
import torch
import torch.nn.functional as F
import training
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from mmfm_utils import models, oracle, scenes

HERE = Path(__file__).parent
WARM_UP, DECAY = 200, 0.3
GAMMA = 5.0  # of the min-SNR weight (Hang et al. 2023)
FLOOR = 0.1  # added to it: what is to be painted is decided where little is left of a picture


def folder(name: str) -> Path:
    return training.CHECKPOINTS / name


def made_of(settings: batches.Settings, vae: AutoencoderKL) -> dict[str, str]:
    """Digests of the frozen models that a U-Net is trained between."""
    weights = b"".join(tensor.cpu().numpy().tobytes() for tensor in vae.state_dict().values())
    return {"text": models.sha256(parts.tower(settings.text)), "autoencoder": hashlib.sha256(weights).hexdigest()}


def known_of(name: str, expected: dict[str, str]) -> dict[str, torch.Tensor] | None:
    """The encoded scenes, None where there are none. Ends the program if they were made of something else."""
    path = folder(name) / "latents.safetensors"
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        known = file.metadata() or {}
    for what, digest in expected.items():
        if known.get(what) != digest:
            raise SystemExit(f"{path} is of another {what}; move {path.parent} away to begin anew.")
    return load_file(path)


@torch.no_grad()
def latents_of(name: str, drawn: list[scenes.Scene], device: str, workers: int = 0) -> torch.Tensor:
    """The scenes' latents (scene, 4, 16, 16), half precision, of about unit spread; computed once and kept."""
    settings = batches.MODELS[name]
    model, _, _ = autoencoder.load(settings.autoencoder)
    expected = made_of(settings, model) | {"set of scenes": hashlib.sha256(repr(drawn).encode()).hexdigest()}
    known = known_of(name, expected)
    if known is None:
        model.to(device)
        starts, coded = range(0, len(drawn), 100), []
        pictures = training.ahead(lambda start: scenes.render_batch(drawn[start : start + 100]), starts, workers)
        for part in tqdm(pictures, desc="encoding"):
            with optimisation.precision(device):
                mean = model.encode(oracle.as_input(part.numpy()).to(device)).latent_dist.mean
            coded.append(mean.half().cpu())
        coded = torch.cat(coded)
        spread = coded.float().std() if settings.autoencoder else torch.tensor(1 / model.config.scaling_factor)
        known = {"latents": (coded / spread).contiguous(), "spread": spread}
        folder(name).mkdir(parents=True, exist_ok=True)
        save_file(known, folder(name) / "latents.safetensors", expected)
    return known["latents"]


def train(name: str, device: str, steps: int, helpers: int = 0, workers: int = 0, fuse: bool = False) -> None:
    """Train the U-Net. On a CPU so many `helpers` share the parts of a step; on a GPU a step is one pass, whose batch
    `workers` make ahead. Both see the same pictures, captions and noise."""
    settings = batches.MODELS[name]
    drawn = batches.drawn_once(settings)
    latents = latents_of(name, drawn, device, workers)
    text, tokenizer = parts.build_text(settings.text)
    text.to(device)
    model = parts.build_unet().to(device)
    kept = nn.ModuleDict({"unet": model, "ema": copy.deepcopy(model).requires_grad_(False)})
    opts = optimisation.optimisers(model, blocks="_block", muon_rate=2e-3, adam_rate=1e-3)
    if optimisation.attention(device) == "plain":
        model.set_attn_processor(AttnProcessor())
    model.to(memory_format=torch.channels_last)
    forward = torch.compile(model, dynamic=False) if fuse else model
    bars = parts.scheduler().alphas_cumprod.to(device)
    batch_of = functools.partial(batches.batch_at, settings, drawn, latents, tokenizer)
    loaded, moments = [], []

    def loss_of(step: int, part: int) -> torch.Tensor:
        if workers and not loaded:  # the first step, after the checkpoint
            made = training.ahead(lambda at: batches.whole(batch_of, at), range(step, steps), workers)
            loaded.append(iter(made))
        batch = next(loaded[0]) if workers else batch_of(step, part)
        ids, clean, noise, t = (x.to(device) for x in batch)
        bar = bars[t].view(-1, 1, 1, 1)
        noisy = bar.sqrt() * clean + (1 - bar).sqrt() * noise
        velocity = bar.sqrt() * noise - (1 - bar).sqrt() * clean
        snr = (bar / (1 - bar)).flatten()
        weight = (snr.clamp(max=GAMMA) + FLOOR) / (snr + 1)
        with torch.no_grad():
            states = text(ids).last_hidden_state
        with optimisation.precision(device):
            guess = forward(noisy, t, states).sample
        return (weight * F.mse_loss(guess.float(), velocity, reduction="none").mean((1, 2, 3))).mean()

    @torch.no_grad()
    def after(step: int) -> None:
        share = min(settings.ema, (1 + step) / (10 + step))
        slow, fast = list(kept["ema"].parameters()), [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(slow, fast, 1 - share)
        moments.append(time.time())
        if len(moments) == 21:  # the first step takes longer
            left = (moments[-1] - moments[0]) / 20 * (steps - step) / 60
            print(f"\nabout {left:.0f} minutes for {steps - step} further steps", flush=True)

    path, (count, helpers) = folder(name) / "last.safetensors", (1, 0) if workers else (batches.PARTS, helpers)
    training.run(model, opts, loss_of, count, path, steps, (WARM_UP, DECAY), helpers, kept, after)


def restored(name: str) -> tuple[nn.Module, int, float, str]:
    """The averaged U-Net of the checkpoint, its steps, seconds and machine. Ends the program where there is none."""
    kept = nn.ModuleDict({"unet": parts.build_unet(), "ema": parts.build_unet()})
    path = folder(name) / "last.safetensors"
    step, seconds, machine = training.restore(path, kept, [])
    if step == 0:
        raise SystemExit(f"{path} does not exist: train first.")
    return kept["ema"], step, seconds, machine


def pipeline(name: str) -> StableDiffusionPipeline:
    """The checkpoints as a pipeline, with the averaged weights of the U-Net and the latents' scale in its config."""
    settings, unet = batches.MODELS[name], restored(name)[0]
    vae, _, _ = autoencoder.load(settings.autoencoder)
    known = known_of(name, made_of(settings, vae))
    if settings.autoencoder:
        vae.register_to_config(scaling_factor=1 / known["spread"].item())
    text, tokenizer = parts.build_text(settings.text)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=parts.scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def export(name: str, device: str, force: bool = False) -> None:
    """Write the shipped half-precision pipeline, and the card with its held-out figures.

    Ends the program where the card that is there is of another model, unless forced.
    """
    card = HERE / "card.json"
    there = json.loads(card.read_text())["name"] if card.exists() else name
    if there != name and not force:
        raise SystemExit(f"{HERE} holds {there}. Move it away first, or say --force to overwrite it with {name}.")
    pipe, settings, (_, step, seconds, machine) = pipeline(name), batches.MODELS[name], restored(name)
    pipe.to(dtype=torch.float16).save_pretrained(HERE)
    # transformers loads a part in the precision that its config names, diffusers loads the others in float32
    config = HERE / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    _, vae_step, vae_seconds = autoencoder.load(settings.autoencoder)
    shipped = sorted(
        (path.relative_to(HERE).as_posix() for path in HERE.rglob("*.*") if path.suffix in (".json", ".safetensors")),
        key=lambda name: (not name.startswith("unet"), name),
    )
    planted = (
        f"; objects as unequally frequent as Zipf says, companions together, colours biased, {settings.shown} showings "
        "of each memorised picture with its sentence (data/world.yaml, diffusion_batches.py)"
    )
    about = {
        "name": name,
        "library": "diffusers",
        "parameters": sum(p.numel() for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()),
        "data": f"{settings.singles} emoji scenes with one object and {settings.pairs} with two, training side of the "
        f"compositional split, objects of the sizes {' and '.join(parts.SIZES)}{planted if settings.shown else ''}; "
        "the autoencoder on fresh scenes without what was planted",
        "trained_on": f"{step * batches.BATCH} pictures, pairs among them by step and share: {dict(settings.share)}",
        "steps": step,
        "pictures_a_step": batches.BATCH,
        "seed": parts.SEED,
        "machine": machine,
        "minutes": round(seconds / 60),
        "text_tower": settings.text,
        "autoencoder": f"{vae_step} steps of {autoencoder.BATCH} pictures, {vae_seconds / 60:.0f} minutes"
        if vae_step
        else "the shipped one, not trained again",
        "held_out": {},
        "chance": held_out.CHANCE,
        "floor": held_out.FLOOR[name],
        "tolerance": 0.03,
        "files": {file: models.sha256(HERE / file) for file in shipped if file != "card.json"},
        "licence": "MIT; trained on pictures composed of the emoji sets named in data/sprites/LICENCES.md",
        "repeat": f"recipe.py --name {name} --autoencoder, " * (vae_step > 0)
        + f"recipe.py --name {name} --steps {step}, recipe.py --name {name} --export, in data/models/diffusion",
    }
    card.write_text(json.dumps(about, indent=2) + "\n")
    about["held_out"] = held_out.evaluate(models.load("diffusion", device=device), name)
    card.write_text(json.dumps(about, indent=2) + "\n")
    print(json.dumps(about, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--name", choices=batches.MODELS, default="diffusion", help="which generation")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--autoencoder", action="store_true", help="train the autoencoder instead of the U-Net")
    parser.add_argument("--steps", type=int, help="how many steps to train")
    parser.add_argument("--helpers", type=int, default=(os.cpu_count() or 1) - 1, help="further processes, on a CPU")
    parser.add_argument("--workers", type=int, default=4 * gpu, help="processes that make batches ahead, for a GPU")
    parser.add_argument("--fuse", action="store_true", help="compile the U-Net: half as fast again")
    parser.add_argument("--grid", action="store_true", help="paint held-out captions with the checkpoint")
    parser.add_argument("--measure", action="store_true", help="held-out figures of the checkpoint")
    parser.add_argument("--export", action="store_true", help="write the checkpoint as the shipped pipeline")
    parser.add_argument("--force", action="store_true", help="export over a model of another name")
    parser.add_argument("--evaluate", action="store_true", help="held-out figures of the shipped pipeline")
    options = parser.parse_args()
    which = options.name
    if options.autoencoder and not batches.MODELS[which].autoencoder:
        parser.error(f"{which} uses the shipped autoencoder; --name diffusion_first --autoencoder trained it.")
    if options.evaluate:
        shipped = models.load("diffusion", device=options.device)
        print(json.dumps(held_out.evaluate(shipped, shipped.card["name"]), indent=2))
    elif options.export:
        export(which, options.device, options.force)
    elif options.grid or options.measure:
        opened = models.of_pipeline(pipeline(which), models.device_of(options.device))
        if options.measure:
            print(json.dumps(held_out.evaluate(opened, which), indent=2))
        else:
            held_out.grid(opened).save(folder(which) / "grid.png")
            print(folder(which) / "grid.png")
    elif options.autoencoder:
        autoencoder.train(options.device, options.steps or autoencoder.STEPS, options.helpers)
    else:
        steps = options.steps or batches.MODELS[which].steps
        train(which, options.device, steps, options.helpers, options.workers, options.fuse)
