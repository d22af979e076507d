"""Train the text-to-image model as Stable Diffusion 1 was (Rombach et al. 2022): an autoencoder, then a U-Net in it.

    python data/models/diffusion/recipe.py --autoencoder    train the autoencoder; goes on from its checkpoint
    python data/models/diffusion/recipe.py                  train the U-Net; goes on from its checkpoint, in the latents
                                                            of the autoencoder's checkpoint or, without one, the shipped
    python data/models/diffusion/recipe.py --grid           paint held-out captions, to checkpoints/diffusion/grid.png
    python data/models/diffusion/recipe.py --export         write the checkpoints as the shipped pipeline
    python data/models/diffusion/recipe.py --evaluate       held-out figures of the shipped pipeline

The text tower is the contrastive model's and stays frozen. The U-Net sees a fixed set of scenes, encoded once, from the
training side of the compositional split: single objects first, then pairs as well. Checkpoints live in checkpoints/,
outside git.
"""

import argparse
import copy
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from mmfm_utils import models, oracle, scenes, training

HERE = Path(__file__).parent
SHIPPED = HERE / "vae" / "diffusion_pytorch_model.safetensors"
CONTRASTIVE = HERE.parent / "contrastive_first"
CHECKPOINTS = HERE.parents[2] / "checkpoints" / "diffusion"
AUTOENCODER, UNET, LATENTS, GRID = (
    CHECKPOINTS / name for name in ("autoencoder.safetensors", "unet.safetensors", "latents.safetensors", "grid.png")
)
SEED = 0
WARM_UP, DECAY = 200, 0.3

SIZES = ("medium", "large")  # a small object is ten pixels wide, and three latents: its style is lost in them
AUTOENCODER_STEPS, AUTOENCODER_BATCH, AUTOENCODER_PARTS = 4000, 32, 4
SHARP = 0.5  # weight of the differences between neighbouring pixels: without it the outlines blur
FIRST = 5.0  # weight of an object's pixels; a ground's is 1
KL = 1e-3  # per latent, against the mean over pixels: enough that near latents mean near pictures

SINGLES, PAIRS = 48_000, 24_000  # scenes that are encoded once
STEPS, BATCH, PARTS = 4_800, 64, 4
PAIRS_SHARE = {0: 0.0, 2_600: 0.4, 3_700: 0.7}  # step from which on: share of a batch
MENTION = {"colour": 0.95, "style": 0.9, "ground": 0.9, "size": 0.5, "position": 0.5, "relation": 0.9}
NO_CAPTION = 0.1  # share of pictures whose caption is empty, for classifier-free guidance
GAMMA = 5.0  # of the min-SNR weight (Hang et al. 2023)
FLOOR = 0.1  # added to it: what is to be painted is decided where little is left of a picture
EMA = 0.998


# ---- the parts ----


def build_autoencoder() -> AutoencoderKL:
    """64 x 64 pixels to 16 x 16 latents of 4 channels."""
    torch.manual_seed(SEED)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=64,
        mid_block_add_attention=False,
    )  # fmt: skip


def build_unet() -> UNet2DConditionModel:
    """Cross-attention to the caption's tokens at 16 x 16 and at 8 x 8."""
    torch.manual_seed(SEED)
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128), layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=144, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    """Velocity is predicted, and the last step is pure noise: else the model learns to read a ground's brightness off
    what noise leaves of it, and cannot choose it (Lin et al. 2024)."""
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
        steps_offset=1,
    )  # fmt: skip


def build_text() -> tuple[CLIPTextModel, PreTrainedTokenizerFast]:
    """The contrastive model's text tower under transformers' names; what it gives is its states after the last norm."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CONTRASTIVE)
    known = json.loads((CONTRASTIVE / "open_clip_config.json").read_text())["model_cfg"]
    config = known["text_cfg"]
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=config["vocab_size"], hidden_size=config["width"], num_hidden_layers=config["layers"],
        num_attention_heads=config["heads"], intermediate_size=int(config["width"] * config["mlp_ratio"]),
        max_position_embeddings=config["context_length"], hidden_act="gelu", projection_dim=known["embed_dim"],
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    text.load_state_dict(text_weights(load_file(CONTRASTIVE / "open_clip_model.safetensors")))
    return text.eval().requires_grad_(False), tokenizer


def text_weights(clip: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of open_clip's text tower under the names of transformers' CLIPTextModel."""
    outside = {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias",
    }  # fmt: skip
    return training.from_open_clip(clip, "transformer.resblocks.", outside)


def pixels(drawn: list[scenes.Scene]) -> torch.Tensor:
    return torch.from_numpy(scenes.render_batch(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---- the autoencoder ----


def picture_loss(guess: torch.Tensor, truth: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Absolute differences of pixels, and of the steps from pixel to pixel, so that outlines stay sharp.

    `weight` (picture, 1, 64, 64) is that of each pixel.
    """
    off = guess - truth
    flat = (weight * off.abs()).mean()
    across = (weight[..., 1:] * off.diff(dim=3).abs()).mean()
    down = (weight[..., 1:, :] * off.diff(dim=2).abs()).mean()
    return flat + SHARP * (across + down)


def train_autoencoder(device: str, steps: int, helpers: int) -> None:
    model = build_autoencoder().to(device)
    opts = training.optimisers(model, blocks="none", adam_rate=1.5e-3)
    world = scenes.World(counts=(0.6, 0.4), sizes=SIZES, natural=0.1, split="train")

    def loss_of(step: int, part: int) -> torch.Tensor:
        rng = np.random.default_rng([SEED, step, part])
        drawn = [world.sample(rng) for _ in range(AUTOENCODER_BATCH // AUTOENCODER_PARTS)]
        truth = pixels(drawn).to(device)
        there = torch.from_numpy(np.stack([scenes.masks(scene).any(0) for scene in drawn]))[:, None].to(device)
        weight = (1 + (FIRST - 1) * there) / (1 + (FIRST - 1) * there).mean((2, 3), keepdim=True)
        generator = torch.Generator("cpu").manual_seed(int(rng.integers(2**31)))
        with training.precision(device):
            coded = model.encode(truth).latent_dist
            guess = model.decode(coded.sample(generator)).sample.float()
            return picture_loss(guess, truth, weight) + KL * coded.kl().mean() / 1024

    training.run(model, opts, loss_of, AUTOENCODER_PARTS, AUTOENCODER, steps, (WARM_UP, DECAY), helpers)


# ---- the U-Net ----


def drawn_once() -> list[scenes.Scene]:
    """The scenes that the U-Net learns from: single objects, then pairs."""
    single, pair = (scenes.World(counts=c, sizes=SIZES, natural=0.05, split="train") for c in ((1.0,), (0.0, 1.0)))
    return single.sample_many(SINGLES, SEED) + pair.sample_many(PAIRS, SEED)


def autoencoder() -> tuple[AutoencoderKL, int, float]:
    """That of the checkpoint, its steps and seconds; where there is none, the shipped one, and (0, 0.0)."""
    model = build_autoencoder()
    step, seconds, _ = training.restore(AUTOENCODER, model, [])
    if step == 0:
        if not SHIPPED.exists():
            raise SystemExit("Train the autoencoder first: recipe.py --autoencoder")
        model.load_state_dict({name: x.float() for name, x in load_file(SHIPPED).items()})
    return model, step, seconds


@torch.no_grad()
def latents_of(drawn: list[scenes.Scene], device: str) -> torch.Tensor:
    """The scenes' latents (scene, 4, 16, 16), half precision, of unit spread; computed once and kept."""
    model, step, _ = autoencoder()
    if LATENTS.exists():
        known = load_file(LATENTS)
        if (known["autoencoder_step"].item(), len(known["latents"])) != (step, len(drawn)):
            raise SystemExit(f"{LATENTS} is of other scenes or another autoencoder; move it and {UNET.name} away.")
        return known["latents"]
    model.to(device)
    parts = []
    for start in tqdm(range(0, len(drawn), 100), desc="encoding"):
        with training.precision(device):
            coded = model.encode(pixels(drawn[start : start + 100]).to(device)).latent_dist.mean
        parts.append(coded.half().cpu())
    coded = torch.cat(parts)
    spread = coded.float().std()
    LATENTS.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {"latents": (coded / spread).contiguous(), "spread": spread, "autoencoder_step": torch.tensor(step)}, LATENTS
    )
    return load_file(LATENTS)["latents"]


def train(device: str, steps: int, helpers: int, fuse: bool = False) -> None:
    drawn = drawn_once()
    latents = latents_of(drawn, device)
    text, tokenizer = build_text()
    text.to(device)
    model = build_unet().to(device)
    kept = nn.ModuleDict({"unet": model, "ema": copy.deepcopy(model).requires_grad_(False)})
    opts = training.optimisers(model, blocks="_block", muon_rate=2e-3, adam_rate=1e-3)
    if training.attention(device) == "plain":
        model.set_attn_processor(AttnProcessor())
    model.to(memory_format=torch.channels_last)
    forward = torch.compile(model, dynamic=False) if fuse else model
    bars = scheduler().alphas_cumprod.to(device)
    world = scenes.World(mention=MENTION)

    def loss_of(step: int, part: int) -> torch.Tensor:
        n, rng = BATCH // PARTS, np.random.default_rng([SEED, step, part])
        pair = rng.random(n) < [share for start, share in PAIRS_SHARE.items() if start <= step][-1]
        chosen = np.where(pair, SINGLES + rng.integers(PAIRS, size=n), rng.integers(SINGLES, size=n))
        told = ["" if rng.random() < NO_CAPTION else world.caption(drawn[index], rng) for index in chosen]
        ids = tokenizer(told, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
        generator = torch.Generator("cpu").manual_seed(int(rng.integers(2**31)))
        clean = latents[torch.from_numpy(chosen)].float()
        noise = torch.randn(clean.shape, generator=generator).to(device)
        clean = clean.to(device)
        t = ((torch.arange(n) + torch.rand(n, generator=generator)) / n * 1000).long().to(device)  # stratified
        bar = bars[t].view(-1, 1, 1, 1)
        noisy = bar.sqrt() * clean + (1 - bar).sqrt() * noise
        velocity = bar.sqrt() * noise - (1 - bar).sqrt() * clean
        snr = (bar / (1 - bar)).flatten()
        weight = (snr.clamp(max=GAMMA) + FLOOR) / (snr + 1)
        with torch.no_grad():
            states = text(ids.input_ids.to(device)).last_hidden_state
        with training.precision(device):
            guess = forward(noisy, t, states).sample
        return (weight * F.mse_loss(guess.float(), velocity, reduction="none").mean((1, 2, 3))).mean()

    @torch.no_grad()
    def average(step: int) -> None:
        share = min(EMA, (1 + step) / (10 + step))
        slow, fast = list(kept["ema"].parameters()), [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(slow, fast, 1 - share)

    training.run(model, opts, loss_of, PARTS, UNET, steps, (WARM_UP, DECAY), helpers, kept, average)


# ---- what comes of it ----


def pipeline() -> StableDiffusionPipeline:
    """The checkpoints as a pipeline, with the averaged weights of the U-Net and the latents' spread in its config."""
    vae, unet = autoencoder()[0], build_unet()
    kept = nn.ModuleDict({"unet": unet, "ema": copy.deepcopy(unet)})
    if training.restore(UNET, kept, [])[0] == 0:
        raise SystemExit(f"{UNET} does not exist: train first.")
    vae.register_to_config(scaling_factor=1 / load_file(LATENTS)["spread"].item())
    text, tokenizer = build_text()
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=kept["ema"], scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def held_out(n: int, pairs: bool, seed: int = 1) -> tuple[list[scenes.Scene], list[str]]:
    """Scenes with new combinations of object, colour and ground, and what is asked for of each."""
    counts, told = ((0.0, 1.0) if pairs else (1.0,)), ("colour", "style", "ground")
    drawn = scenes.World(counts=counts, sizes=SIZES, natural=0.0, split="test").sample_many(n, seed)
    return drawn, [scenes.caption(scene, told, index % 3) for index, scene in enumerate(drawn)]


def evaluate(model: models.Diffusion, n: int = 200, guidance: float = 4.0) -> dict[str, float]:
    """Shares of held-out prompts (new combinations of object, colour and ground) that are painted right, by the oracle.

    object, colour, style, ground: of prompts for one object. pair_objects, pair_bound: of half as many prompts for two
    objects, that both are there, and both in their colours. drawn_*: what the oracle reads of the drawn scenes
    themselves. decoded_*: and of these after the autoencoder alone.
    """
    reader, out = oracle.Oracle(str(model.device)), {}
    for pairs, kinds in ((False, ("object", "colour", "style", "ground")), (True, ("pair_objects", "pair_bound"))):
        drawn, prompts = held_out(n // 2 if pairs else n, pairs)
        for label, pictures in (
            ("", model.paint(prompts, guidance=guidance)),
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


def grid(model: models.Diffusion, columns: int = 12) -> Image.Image:
    """Held-out captions: what was drawn, that after the autoencoder, what is painted; singles above, pairs below."""
    rows = []
    for pairs in (False, False, True):
        drawn, prompts = held_out(columns, pairs, seed=2 + len(rows))
        pictures = (scenes.render_batch(drawn), model.pictures(model.latents(drawn)), model.paint(prompts))
        rows += [np.concatenate(list(each), axis=1) for each in pictures]
    return Image.fromarray(np.concatenate(rows)).resize((columns * 128, len(rows) * 128), Image.NEAREST)


def export(device: str) -> None:
    """Write the shipped half-precision pipeline, and the card with its held-out figures."""
    pipe = pipeline()
    pipe.to(dtype=torch.float16).save_pretrained(HERE)
    # transformers loads a part in the precision that its config names, diffusers loads the others in float32
    config = HERE / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    _, vae_step, vae_seconds = autoencoder()
    step, seconds, machine = training.restore(UNET, nn.ModuleDict({"unet": build_unet(), "ema": build_unet()}), [])
    shipped = sorted(
        (path.relative_to(HERE).as_posix() for path in HERE.rglob("*.*") if path.suffix in (".json", ".safetensors")),
        key=lambda name: (not name.startswith("unet"), name),
    )
    card = {
        "name": "diffusion",
        "library": "diffusers",
        "parameters": sum(p.numel() for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()),
        "data": f"{SINGLES} emoji scenes with one object and {PAIRS} with two, training side of the compositional "
        f"split, objects of the sizes {' and '.join(SIZES)}; the autoencoder on fresh scenes of this kind",
        "trained_on": f"{step * BATCH} pictures, pairs among them by step and share: {PAIRS_SHARE}",
        "steps": step,
        "pictures_a_step": BATCH,
        "seed": SEED,
        "machine": machine,
        "minutes": round(seconds / 60),
        "autoencoder": f"{vae_step} steps of {AUTOENCODER_BATCH} pictures, {vae_seconds / 60:.0f} minutes"
        if vae_step
        else "the shipped one, not trained again",
        "held_out": {},
        "chance": {"object": 0.0208, "colour": 0.125, "style": 0.25, "ground": 0.125},
        "tolerance": 0.03,
        "files": {name: models.sha256(HERE / name) for name in shipped if name != "card.json"},
        "licence": "MIT; trained on pictures composed of the emoji sets named in data/sprites/LICENCES.md",
        "repeat": f"recipe.py --autoencoder, recipe.py --steps {step}, recipe.py --export, in data/models/diffusion",
    }
    (HERE / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    card["held_out"] = evaluate(models.load("diffusion", device=device))
    (HERE / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autoencoder", action="store_true", help="train the autoencoder instead of the U-Net")
    parser.add_argument("--steps", type=int, help=f"how many steps ({AUTOENCODER_STEPS}, {STEPS})")
    parser.add_argument("--helpers", type=int, default=(os.cpu_count() or 1) - 1, help="further processes, on a CPU")
    parser.add_argument("--fuse", action="store_true", help="compile the U-Net: half as fast again")
    parser.add_argument("--grid", action="store_true", help="paint held-out captions with the checkpoint")
    parser.add_argument("--export", action="store_true", help="write the checkpoints as the shipped pipeline")
    parser.add_argument("--evaluate", action="store_true", help="held-out figures of the shipped pipeline")
    options = parser.parse_args()
    if options.evaluate:
        print(json.dumps(evaluate(models.load("diffusion", device=options.device)), indent=2))
    elif options.export:
        export(options.device)
    elif options.grid:
        grid(models.of_pipeline(pipeline(), models.device_of(options.device))).save(GRID)
        print(GRID)
    elif options.autoencoder:
        train_autoencoder(options.device, options.steps or AUTOENCODER_STEPS, options.helpers)
    else:
        train(options.device, options.steps or STEPS, options.helpers, options.fuse)
