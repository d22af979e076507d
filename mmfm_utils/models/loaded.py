"""What the loaded models of all families have in common."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .. import anatomy


@dataclass
class Loaded:
    """A model ready for study: what all families have in common.

    `model` is the library's own object in evaluation mode, its attention opened; `anatomy` names the places in it;
    `tokenizer` is its library's too; `card` holds what is known of it, and is printed by `print`.
    """

    model: torch.nn.Module
    tokenizer: object
    anatomy: anatomy.Anatomy
    device: torch.device
    card: dict

    def __str__(self) -> str:
        lines = [f"{key:12} {value}" for key, value in self.card.items() if not isinstance(value, dict)]
        chance = self.card.get("chance", {})
        for name, value in self.card.get("held_out", {}).items():
            by_chance = f"   chance {chance[name]:.3f}" if name in chance else ""
            lines.append(f"held out     {name:20} {value:.3f}{by_chance}")
        return "\n".join(lines)


@contextlib.contextmanager
def built(seed: int) -> Iterator[None]:
    """Models are built quietly here, and what is random in them is drawn from the seed, on the CPU.

    open_clip warns through the root logger that a model without weights has random ones: here that is the wish. And no
    progress bars of transformers and diffusers, for what takes a moment.
    """
    level = logging.getLogger().level
    libraries = [sys.modules[name].utils.logging for name in ("transformers", "diffusers") if name in sys.modules]
    bars = [library for library in libraries if library.is_progress_bar_enabled()]
    logging.getLogger().setLevel(logging.ERROR)
    for library in bars:
        library.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            yield
    finally:
        logging.getLogger().setLevel(level)
        for library in bars:
            library.enable_progress_bar()
