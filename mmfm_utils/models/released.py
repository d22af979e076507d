"""The released models: where they are, what they weigh, how they are built. The table is data/models/released.yaml."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from .. import data, root


@dataclass(frozen=True)
class Release:
    """A released model: its hub repository, the files needed, what they weigh, and the licence.

    An index among the files stands for itself and for the shards that it names. `config` is the architecture in
    transformers' own words, or those of a pipeline's parts (open_clip knows its own by their names).
    """

    repository: str
    files: tuple[str, ...]
    megabytes: int
    licence: str
    config: dict | None = None

    @property
    def fetch(self) -> str:
        """The command that fills the hub cache: never pickles, nor the same weights in other formats."""
        kinds = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")
        whole = "model_type" in (self.config or {})  # a pipeline's repository has each part in several formats
        what = [f"--include '{kind}'" for kind in kinds] if whole else self.files
        return f"{_hf()} download {self.repository} {' '.join(what)}"


def _hf() -> str:
    """How to call `hf` from the project's root: by its path in the project's own .venv, which need not be active."""
    own = Path(sys.executable).with_name("hf")
    return str(own.relative_to(root())) if own.is_relative_to(root()) and own.exists() else "hf"


def _read(path: Path) -> dict[str, dict[str, Release]]:
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {
        family: {name: Release(**entry | {"files": tuple(entry["files"])}) for name, entry in entries.items()}
        for family, entries in table.items()
    }


RELEASED = _read(data("models/released.yaml"))
