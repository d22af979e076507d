"""Contrastive models: open_clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import open_clip
import torch

from .. import anatomy, hooks, scenes
from .loaded import Loaded, built
from .store import Source


@dataclass
class Contrastive(Loaded):
    """A two-tower model of open_clip; `resolution` is the side of its input pictures in pixels."""

    resolution: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def pixels(self, drawn: Sequence[scenes.Scene] | np.ndarray) -> torch.Tensor:
        """Scenes, or pictures (image, height, width, 3) uint8, as the model's normalised input (image, 3, R, R)."""
        pictures = drawn if isinstance(drawn, np.ndarray) else scenes.render_batch(drawn, self.resolution)
        x = torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def tokens(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts as token ids (text, context), padded."""
        return self.tokenizer(list(texts)).to(self.device)

    @torch.no_grad()
    def embed_images(self, drawn: Sequence[scenes.Scene] | np.ndarray, batch: int = 128) -> torch.Tensor:
        """Unit-length image embeddings (image, embed)."""
        parts = (drawn[i : i + batch] for i in range(0, len(drawn), batch))
        return torch.cat([self.model.encode_image(self.pixels(part), normalize=True) for part in hooks.runs(parts)])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch: int = 256) -> torch.Tensor:
        """Unit-length text embeddings (text, embed)."""
        parts = self.tokens(texts).split(batch)
        return torch.cat([self.model.encode_text(part, normalize=True) for part in hooks.runs(parts)])


def load(source: Source, device: torch.device, seed: int) -> Contrastive:
    where = f"local-dir:{source.folder}" if source.folder else source.name
    with built(seed):
        model = open_clip.create_model(where, load_weights=source.trained).to(device).eval().requires_grad_(False)
        tokenizer = open_clip.get_tokenizer(where)
    settings = model.visual.preprocess_cfg
    return Contrastive(
        model=model, tokenizer=tokenizer, anatomy=anatomy.of(model), device=device, card=source.card(model),
        resolution=model.visual.image_size[0], mean=tuple(settings["mean"]), std=tuple(settings["std"]),
    )  # fmt: skip
