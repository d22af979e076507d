"""Loading the models: `load(family, profile, device, weights)`.

Three profiles: `tiny` loads the embedded, trained models from data/models; `rehearsal` builds the released models'
architectures from their configs with random weights; `hub` loads released weights from the local cache and never
fetches anything by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from huggingface_hub import try_to_load_from_cache

from . import UsageError, anatomy, scenes

FOLDER = Path(__file__).parent.parent / "data" / "models"
FAMILIES = ("contrastive",)
CARD = ("name", "library", "pairs_seen", "held_out", "chance", "licence", "files")  # what a card must hold
PROFILES = ("tiny", "rehearsal", "hub")


@dataclass(frozen=True)
class Release:
    """A released model: its hub repository, the files needed, what they weigh, and the licence."""

    repository: str
    files: tuple[str, ...]
    megabytes: int
    licence: str


_CLIP_FILES = ("open_clip_config.json", "open_clip_model.safetensors")
# The first of each family is the one that is loaded unless `name` says otherwise.
RELEASED: dict[str, dict[str, Release]] = {
    "contrastive": {
        "ViT-B-32": Release("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", _CLIP_FILES, 605, "MIT"),
        "ViT-L-14": Release("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", _CLIP_FILES, 1711, "MIT"),
    },
}


@dataclass
class Contrastive:
    """A two-tower model ready for study.

    `model` is the open_clip object in evaluation mode, its attention opened; `anatomy` names the places in it;
    `tokenizer` is open_clip's; `resolution` the side of its input pictures in pixels; `card` what is known of it.
    """

    model: torch.nn.Module
    tokenizer: object
    anatomy: anatomy.Anatomy
    device: torch.device
    resolution: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    card: dict

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
        return torch.cat([self.model.encode_image(self.pixels(part), normalize=True) for part in parts])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch: int = 256) -> torch.Tensor:
        """Unit-length text embeddings (text, embed)."""
        parts = self.tokens(texts).split(batch)
        return torch.cat([self.model.encode_text(part, normalize=True) for part in parts])

    def __str__(self) -> str:
        lines = [f"{key:12} {value}" for key, value in self.card.items() if not isinstance(value, dict)]
        for name, value in self.card.get("held_out", {}).items():
            lines.append(f"held out     {name:20} {value:.3f}   chance {self.card['chance'][name]:.3f}")
        return "\n".join(lines)


def device_of(device: str) -> torch.device:
    """ "auto" is a GPU where there is one. Raises UsageError for a device that this machine has not."""
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
) -> Contrastive:
    """A model of a family under a profile.

    `weights="random"` gives the twin of the same architecture as its initialisation left it, drawn from `seed`: the
    control. `name` picks one of the released architectures under `rehearsal` and `hub`.
    Raises UsageError for anything unknown, for a missing or damaged weight file, and for an empty hub cache.
    """
    for what, value, choices in (
        ("family", family, FAMILIES),
        ("profile", profile, PROFILES),
        ("weights", weights, ("trained", "random")),
    ):
        if value not in choices:
            raise UsageError(f"Unknown {what} {value!r}. Choose one of: {', '.join(choices)}.")
    if name is not None and (profile == "tiny" or name not in RELEASED[family]):
        raise UsageError(
            f"No model {name!r} in family {family} under profile {profile}. Under rehearsal and hub choose one of: "
            f"{', '.join(RELEASED[family])}; under tiny leave the name out."
        )
    return _contrastive(profile, device_of(device), weights, name or next(iter(RELEASED[family])), seed)


def _contrastive(profile: str, device: torch.device, weights: str, name: str, seed: int) -> Contrastive:
    card = {"family": "contrastive", "profile": profile, "weights": weights, "precision": "float32"}
    if profile == "tiny":
        source = f"local-dir:{_intact('contrastive', need_weights=weights == 'trained')}"
    elif profile == "hub":
        folder, commit = _cached("contrastive", name)
        source = f"local-dir:{folder}"
        card |= {"name": name, "repository": RELEASED["contrastive"][name].repository, "commit": commit}
    else:
        source, weights = name, "random"
        card |= {"name": name, "weights": "random"}
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # the CPU's only: models are drawn there
        model = (
            open_clip.create_model(source, load_weights=weights == "trained").to(device).eval().requires_grad_(False)
        )
        tokenizer = open_clip.get_tokenizer(source)
    if profile == "tiny" and weights == "trained":
        known = read_card("contrastive")
        card |= {key: known[key] for key in ("name", "library", "pairs_seen", "held_out", "chance", "licence")}
        card["sha256"] = known["files"]["open_clip_model.safetensors"][:16]
    card["parameters"] = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"
    settings = model.visual.preprocess_cfg
    return Contrastive(
        model=model, tokenizer=tokenizer, anatomy=anatomy.of(model), device=device,
        resolution=model.visual.image_size[0], mean=tuple(settings["mean"]), std=tuple(settings["std"]), card=card,
    )  # fmt: skip


@contextlib.contextmanager
def _quiet():
    """open_clip warns through the root logger that a model without weights has random ones: here that is the wish."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger().setLevel(level)


def read_card(family: str) -> dict:
    """The card of an embedded model: data, steps, seed, machine, held-out figures, licence, sha256 of its files."""
    path = FOLDER / family / "card.json"
    try:
        card = json.loads(path.read_text())
        return {key: card[key] for key in CARD} | card
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"The card of the {family} model cannot be read ({type(error).__name__}). "
            f"Restore it: git checkout -- data/models/{family}"
        ) from None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(family: str, with_weights: bool = True) -> tuple[str, str]:
    """ "intact", "missing" or "damaged", and the file that is to blame."""
    for name, expected in read_card(family)["files"].items():
        if name.endswith(".safetensors") and not with_weights:
            continue
        path = FOLDER / family / name
        if not path.exists():
            return "missing", name
        if sha256(path) != expected:
            return "damaged", name
    return "intact", ""


def _intact(family: str, need_weights: bool) -> Path:
    state, name = _state(family, need_weights)
    if state != "intact":
        raise UsageError(
            f"The file data/models/{family}/{name} is {state}. Restore it: git checkout -- data/models/{family}"
        )
    return FOLDER / family


def _cached(family: str, name: str) -> tuple[Path, str]:
    """The folder of a released model in the hub cache, and the commit that it holds."""
    release = RELEASED[family][name]
    found = [try_to_load_from_cache(release.repository, file) for file in release.files]
    if not all(isinstance(path, str | os.PathLike) for path in found):
        raise UsageError(
            f"{name} is not in the hub cache. Fetch it ({release.megabytes} MB, licence {release.licence}): "
            f"hf download {release.repository} {' '.join(release.files)}"
        )
    folder = Path(found[0]).parent
    return folder, folder.name


def inventory() -> list[dict]:
    """One row a model: {family, profile, name, state, path, bytes, hint}; state is intact, missing, damaged,
    from config, cached or not cached."""
    rows = []
    for family in FAMILIES:
        try:
            state, _ = _state(family)
        except UsageError:
            state = "missing"
        size = sum(f.stat().st_size for f in (FOLDER / family).glob("*.safetensors"))
        hint = "" if state == "intact" else f"git checkout -- data/models/{family}"
        rows.append(dict(family=family, profile="tiny", name=family, state=state,
                         path=f"data/models/{family}", bytes=size, hint=hint))  # fmt: skip
        for name, release in RELEASED[family].items():
            rows.append(dict(family=family, profile="rehearsal", name=name, state="from config",
                             path="", bytes=0, hint=""))  # fmt: skip
            try:
                path, state, hint = str(_cached(family, name)[0]), "cached", ""
            except UsageError as error:
                path, state, hint = "", "not cached", str(error)
            rows.append(dict(family=family, profile="hub", name=name, state=state,
                             path=path, bytes=release.megabytes * 10**6, hint=hint))  # fmt: skip
    return rows
