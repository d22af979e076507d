"""Loading the models: `load(family, profile, device, weights, name)`.

Three profiles: `tiny` loads the embedded, trained models from data/models; `rehearsal` builds the released models'
architectures from their configs with random weights; `hub` loads released weights from the local cache and never
fetches anything by itself.

Each family has a module of its own, which imports that family's library and is imported by the first `load`: open_clip
for the contrastive family, transformers for language and generative models, diffusers for text-to-image models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .. import UsageError
from .released import RELEASED, Release
from .store import (
    BESIDE,
    CARD,
    EMBEDDED,
    FAMILIES,
    IMAGE,
    LOADED,
    PROFILES,
    SEEN,
    folder,
    intact,
    inventory,
    read_card,
    sha256,
    source_of,
)

if TYPE_CHECKING:
    import torch

    from .loaded import Loaded

# Public names that need a library, and the module that holds them.
_HOMES = {
    "Loaded": "loaded", "Contrastive": "contrastive", "Writer": "language", "Language": "language",
    "Generative": "generative", "Diffusion": "diffusion",
    "of_pipeline": "diffusion", "of_processor": "generative",
}  # fmt: skip
__all__ = [
    "BESIDE", "CARD", "EMBEDDED", "FAMILIES", "FOLDER", "IMAGE", "LOADED", "PROFILES", "RELEASED", "Release", "SEEN",
    "device_of", "intact", "inventory", "load", "read_card", "sha256", *_HOMES,
]  # fmt: skip


def __getattr__(name: str):
    if name == "FOLDER":  # follows $MMFM_ROOT
        return folder()
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def device_of(device: str) -> torch.device:
    """ "auto" is a GPU where there is one. Raises UsageError for a device that this machine has not."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise UsageError(f"Unknown device {device!r}. Choose one of: auto, cpu, cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("This machine has no CUDA device that PyTorch can use. Choose the device cpu or auto.")
    return torch.device(device)


def load(
    family: str,
    profile: str = "tiny",
    device: str = "auto",
    weights: str = "trained",
    name: str | None = None,
    seed: int = 0,
) -> Loaded:
    """A model of a family under a profile: a `Contrastive`, `Language`, `Generative` or `Diffusion`.

    `weights="random"` gives the twin of the same architecture as its initialisation left it, drawn from `seed`: the
    control. `name` picks one of the family's embedded models (`EMBEDDED`) under `tiny`, and one of the released
    architectures (`RELEASED`) under `rehearsal` and `hub`; without it the first is taken. "first", the first generation
    of embedded models, is known to every profile, and under the other two means what leaving it out means. Precision is
    float32, but bfloat16 for released language and generative models on a GPU and for those above 10 GB.
    Raises UsageError for anything unknown, for a missing or damaged weight file, and for an empty hub cache.
    """
    for what, value, choices in (
        ("family", family, FAMILIES),
        ("profile", profile, PROFILES),
        ("weights", weights, ("trained", "random")),
    ):
        if value not in choices:
            raise UsageError(f"Unknown {what} {value!r}. Choose one of: {', '.join(choices)}.")
    name = None if name == "first" and profile != "tiny" else name
    known = EMBEDDED[family] if profile == "tiny" else RELEASED[family]
    if name is not None and (not name or name not in known):
        others = ", ".join(repr(each) for each in EMBEDDED[family] if each)
        raise UsageError(
            f"No model {name!r} in family {family} under profile {profile}. Under rehearsal and hub choose one of: "
            f"{', '.join(RELEASED[family])}; under tiny leave the name out{others and f' or say {others}'}."
        )
    where = device_of(device)
    source = source_of(family, profile, name or next(iter(known)), weights)
    return importlib.import_module(f".{family}", __name__).load(source, where, seed)
