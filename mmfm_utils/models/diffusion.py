"""Text-to-image models: diffusers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from .. import UsageError, anatomy, hooks, scenes
from .loaded import Loaded, built
from .store import Source


@dataclass
class Diffusion(Loaded):
    """diffusers' StableDiffusionPipeline. Its places: `anatomy.of`; its noise is drawn on the CPU, a seed a picture.

    `resolution` is the side of its pictures in pixels, `side` that of its latents.
    """

    resolution: int
    side: int

    def tokens(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts as token ids (prompt, token), padded to the text tower's length."""
        options = dict(padding="max_length", truncation=True, max_length=self.tokenizer.model_max_length)
        return self.tokenizer(list(prompts), return_tensors="pt", **options).input_ids.to(self.device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """What the U-Net reads of prompts: the text tower's states (prompt, token, width) after its last norm."""
        return self.model.text_encoder(self.tokens(prompts)).last_hidden_state

    def noise(self, n: int, seed: int = 0) -> torch.Tensor:
        """Latents (picture, 4, side, side) to begin from; picture i has the noise of seed + i, whatever n is."""
        shape = (self.model.unet.config.in_channels, self.side, self.side)
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + index)) for index in range(n)]
        return torch.stack(drawn).to(self.device)

    @torch.no_grad()
    def paint(
        self, prompts: Sequence[str] | torch.Tensor, seed: int = 0, steps: int = 30, guidance: float = 4.0,
        batch: int = 32, noise: torch.Tensor | None = None,
    ) -> np.ndarray:  # fmt: skip
        """A picture for each prompt, (prompt, resolution, resolution, 3) uint8.

        Prompts may be given as what the U-Net reads of them (prompt, token, width). Empty prompts and prompts are one
        batch in the text tower too, the empty ones first, so `anatomy.conditional` serves for edits in both; without
        guidance (1 or less) the U-Net runs the prompts alone. The `passes` of an edit are the steps of each `batch`.
        `noise` takes the place of `self.noise(len(prompts), seed)`. Raises UsageError without prompts.
        """
        if isinstance(prompts, str) or not len(prompts):
            raise UsageError("paint takes a list of prompts, one for each picture.")
        noise = self.noise(len(prompts), seed) if noise is None else noise
        painted = []
        for start in hooks.runs(range(0, len(prompts), batch)):
            part = prompts[start : start + batch]
            states = isinstance(part, torch.Tensor)
            without = self.encode([""]).expand_as(part) if states else None
            with anatomy.painting(len(part)):
                without, told = (without, part) if states else self.encode([""] * len(part) + list(part)).chunk(2)
                out = self.model(
                    prompt_embeds=told, negative_prompt_embeds=without, latents=noise[start : start + batch],
                    guidance_scale=guidance, num_inference_steps=steps, output_type="np",
                )  # fmt: skip
            painted.append((out.images * 255).round().astype(np.uint8))
        return np.concatenate(painted)

    @torch.no_grad()
    def latents(self, drawn: Sequence[scenes.Scene] | np.ndarray, batch: int = 64) -> torch.Tensor:
        """Scenes, or pictures (picture, R, R, 3) uint8, as the U-Net's latents (picture, 4, side, side), no noise."""
        pictures = drawn if isinstance(drawn, np.ndarray) else scenes.render_batch(drawn, self.resolution)
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().to(self.device) / 127.5 - 1
        parts = [self.model.vae.encode(part).latent_dist.mean for part in x.split(batch)]
        return torch.cat(parts) * self.model.vae.config.scaling_factor

    @torch.no_grad()
    def pictures(self, latents: torch.Tensor, batch: int = 64) -> np.ndarray:
        """Latents (picture, 4, side, side) as pictures (picture, R, R, 3) uint8."""
        parts = (latents / self.model.vae.config.scaling_factor).split(batch)
        x = torch.cat([self.model.vae.decode(part).sample for part in parts])
        return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


_UNGUARDED = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def load(source: Source, device: torch.device, seed: int) -> Diffusion:
    with built(seed):
        pipe = _untrained(source) if not source.trained else StableDiffusionPipeline.from_pretrained(
            source.folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, **_UNGUARDED
        )  # fmt: skip
    opened = of_pipeline(pipe, device)
    opened.card.update(source.card(opened.anatomy.module))
    return opened


def _untrained(source: Source) -> StableDiffusionPipeline:
    folder = source.folder
    parts = source.release.config if source.profile == "rehearsal" else {
        "vae": AutoencoderKL.load_config(folder / "vae"),
        "unet": UNet2DConditionModel.load_config(folder / "unet"),
        "text": json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8")),
        "scheduler": DDIMScheduler.load_config(folder / "scheduler"),
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    text = CLIPTextConfig.from_dict(parts["text"] | {"eos_token_id": tokenizer.eos_token_id})
    tokenizer.model_max_length = text.max_position_embeddings
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(parts["vae"]), unet=UNet2DConditionModel.from_config(parts["unet"]),
        text_encoder=CLIPTextModel(text), tokenizer=tokenizer,
        scheduler=DDIMScheduler.from_config(parts["scheduler"]), **_UNGUARDED,
    )  # fmt: skip


def of_pipeline(pipe: StableDiffusionPipeline, device: torch.device) -> Diffusion:
    """A pipeline opened for study, on a device; its card is empty."""
    # one pass of the U-Net a step, and no randomness of its own
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    for part in (pipe.vae, pipe.unet, pipe.text_encoder):
        part.eval().requires_grad_(False)
    side = pipe.unet.config.sample_size
    return Diffusion(
        model=pipe, tokenizer=pipe.tokenizer, anatomy=anatomy.of(pipe), device=device, card={},
        resolution=side * pipe.vae_scale_factor, side=side,
    )  # fmt: skip
