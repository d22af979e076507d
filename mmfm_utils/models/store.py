"""The files of the models: which there are, whether they are intact, what their cards say. No library is needed."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .. import UsageError, root
from .released import RELEASED, Release

if TYPE_CHECKING:
    import torch

FAMILIES = ("contrastive", "generative", "diffusion", "language")
# The folders of each family's embedded models, by the name that picks them; "" is the one loaded without a name, and
# "first" the first generation, which is still the only one of three families.
EMBEDDED = {
    "contrastive": {"": "contrastive", "web": "contrastive_web", "first": "contrastive_first"},
    "language": {"": "language", "half": "language_half", "first": "language"},
    "generative": {"": "generative", "first": "generative"},
    "diffusion": {"": "diffusion", "first": "diffusion"},
}
# What the notebooks of a family read besides: the oracle that judges what is painted.
BESIDE = {"diffusion": ("diffusion_oracle",)}
LOADED = set()  # the folders of the embedded models that this process has opened, for the stamp of a notebook
CARD = ("name", "library", "held_out", "chance", "licence", "files")  # what a card must hold
# How much training, in its words.
SEEN = ("pairs_seen", "tokens_seen", "pictures_seen", "steps", "pictures_a_step", "trained_on")
PROFILES = ("tiny", "rehearsal", "hub")
IMAGE = "<image>"  # stands in a prompt for a picture


def folder() -> Path:
    """The folder of the embedded models."""
    return root() / "data" / "models"


def read_card(name: str) -> dict:
    """The card of an embedded model: data, steps, seed, machine, held-out figures, licence, sha256 of its files.

    A card with a "base" belongs to a folder that holds a part: only the tensors that differ from those of the model
    in the folder of this name, or that it lacks. All else is the base's.
    """
    path = folder() / name / "card.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        return {key: card[key] for key in CARD} | card
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"The card of the {name} model cannot be read ({type(error).__name__}). "
            f"Restore it: git checkout -- data/models/{name}"
        ) from None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault(name: str, with_weights: bool = True) -> tuple[str, str, str]:
    """The folder, the file that is to blame and "missing" or "damaged", of a model and of its base; else nothing."""
    card = read_card(name)
    for each in filter(None, (name, card.get("base"))):
        for file, expected in read_card(each)["files"].items():
            if file.endswith(".safetensors") and not with_weights:
                continue
            path = folder() / each / file
            if not path.exists():
                return each, file, "missing"
            if sha256(path) != expected:
                return each, file, "damaged"
    return "", "", ""


def intact(name: str, need_weights: bool) -> Path:
    """The folder of an embedded model. Raises UsageError where a file of it, or of its base, is missing or damaged."""
    at, file, state = _fault(name, need_weights)
    if state:
        raise UsageError(f"The file data/models/{at}/{file} is {state}. Restore it: git checkout -- data/models/{at}")
    LOADED.update(filter(None, (name, read_card(name).get("base"))))
    return folder() / name


def _cached(family: str, name: str) -> tuple[Path, str]:
    """The folder of a released model in the hub cache, and the commit that it holds."""
    from huggingface_hub import try_to_load_from_cache

    release = RELEASED[family][name]
    files, found = list(release.files), []
    for file in files:
        path = try_to_load_from_cache(release.repository, file)
        if not isinstance(path, str | os.PathLike):
            raise UsageError(
                f"{name} is not in the hub cache ({file} is missing). Fetch it ({release.megabytes} MB, licence "
                f"{release.licence}): {release.fetch}"
            )
        found.append(Path(path))
        if file.endswith(".index.json"):
            files += sorted(set(json.loads(found[-1].read_text(encoding="utf-8"))["weight_map"].values()))
    return found[0].parent, found[0].parent.name


@dataclass(frozen=True)
class Source:
    """Where a model comes from, under whichever profile.

    `folder` holds its config, tokenizer and weights; under `rehearsal` the tokenizer alone, that of the embedded model,
    whose ids are within any vocabulary, or it is None where the library knows architecture and tokenizer by `name`.
    `part` is a file with tensors that take the place of those in `folder`. `weights` are "trained" or "random".
    `embedded` names the embedded model, `release` is the released one.
    """

    family: str
    profile: str
    name: str
    weights: str
    folder: Path | None
    part: Path | None = None
    embedded: str = ""
    release: Release | None = None
    about: dict = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        return self.weights == "trained"

    def card(self, model: torch.nn.Module, precision: str = "float32") -> dict:
        """What one wants to see of a loaded model: where it comes from, what its card says, its size."""
        shown = dict(family=self.family, profile=self.profile, weights=self.weights, precision=precision) | self.about
        if self.embedded and self.trained:
            known = read_card(self.embedded)
            shown |= {key: known[key] for key in (*CARD[:2], "base", *SEEN, *CARD[2:-1]) if key in known}
            shown["sha256"] = next(hash for name, hash in known["files"].items() if name.endswith(".safetensors"))[:16]
        return shown | {"parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"}


def source_of(family: str, profile: str, name: str, weights: str) -> Source:
    """Where a model comes from; its files are there and intact.

    `name` is one of `EMBEDDED[family]` under `tiny` and of `RELEASED[family]` else. Raises UsageError for a missing or
    damaged file and for an empty hub cache.
    """
    if profile == "tiny":
        at = EMBEDDED[family][name]
        path, base = intact(at, need_weights=weights == "trained"), read_card(at).get("base")
        if base and family not in ("language", "generative"):
            raise UsageError(f"data/models/{at} holds a part of {base}; only transformers' models are put together.")
        whole, part = (folder() / base, path / "model.safetensors") if base else (path, None)
        return Source(family, profile, name, weights, whole, part, embedded=at)
    release, about = RELEASED[family][name], {"name": name}
    if profile == "hub":
        path, commit = _cached(family, name)
        about |= {"repository": release.repository, "commit": commit}
        return Source(family, profile, name, weights, path, release=release, about=about)
    path = None
    if release.config:
        path = intact(EMBEDDED[family][""], need_weights=False)
        about |= {"tokenizer": f"that of the embedded {family} model"}
    return Source(family, profile, name, "random", path, release=release, about=about)


def inventory() -> list[dict]:
    """One row a model: {family, profile, name, state, path, bytes, hint}; state is intact, missing, damaged,
    from config, cached or not cached."""
    rows = []
    for family in FAMILIES:
        for name in dict.fromkeys((*EMBEDDED[family].values(), *BESIDE.get(family, ()))):
            try:
                at, _, state = _fault(name)
            except UsageError:
                at, state = name, "missing"
            size = sum(f.stat().st_size for f in (folder() / name).rglob("*.safetensors"))
            hint = f"git checkout -- data/models/{at}" if state else ""
            rows.append(dict(family=family, profile="tiny", name=name, state=state or "intact",
                             path=f"data/models/{name}", bytes=size, hint=hint))  # fmt: skip
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
