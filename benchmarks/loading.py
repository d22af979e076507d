"""Seconds until a family is ready, as a notebook pays them, and of `mmfm doctor`; each in a process of its own.

    python benchmarks/loading.py        this tree
    python benchmarks/loading.py OTHER  this tree and another, in turn, and their ratio

Prints the least over the rounds of wall-clock and of processor seconds (user and system) from start to end of a
process, on one thread. The first rows are floors: the libraries alone, which no code of this project is in.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
SETUP = """
import matplotlib.pyplot as plt
import numpy as np
import torch
from ipywidgets import Dropdown
from mmfm_utils import anatomy, findings, metrics, models, plots, scenes, texts
from mmfm_utils.hooks import edit, record
models.load({family!r}, device="cpu")
"""  # the set-up cell of most notebooks, and the first line after it
FLOORS = {
    "torch": "import torch",
    "torch, pyplot": "import torch, matplotlib.pyplot",
    "torch, open_clip": "import torch, open_clip",
    "torch, Llama": "import torch\nfrom transformers import LlamaForCausalLM",
    "torch, diffusers": "import torch\nfrom diffusers import StableDiffusionPipeline",
}
FAMILIES = ("contrastive", "language", "generative", "diffusion")
CASES = {f"set up {family}": ["-c", SETUP.format(family=family)] for family in FAMILIES}
CASES |= {"import models": ["-c", "from mmfm_utils import models"], "mmfm doctor": ["-m", "mmfm_utils.cli", "doctor"]}
PACKAGES = ("torch", "torchvision", "open_clip_torch", "transformers", "diffusers")


def seconds(arguments: list[str], tree: Path) -> tuple[float, float]:
    """Wall-clock and processor seconds of a process that imports from a tree. Raises where it fails."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    environment.pop("MMFM_ROOT", None)
    before, begun = os.times(), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=tree, capture_output=True, text=True)
    wall, after = time.perf_counter() - begun, os.times()
    if done.returncode:
        raise SystemExit(f"{tree}: {' '.join(arguments)} failed:\n{done.stderr}")
    return wall, after.children_user + after.children_system - before.children_user - before.children_system


def least(cases: dict[str, list[str]], trees: list[Path], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """{case: for each tree the least wall-clock and the least processor seconds}, the trees taking turns."""
    runs = {name: [[] for _ in trees] for name in cases}
    for _ in range(rounds):
        for name, arguments in cases.items():
            for tree, into in zip(trees, runs[name], strict=True):
                into.append(seconds(arguments, tree))
    return {name: [tuple(map(min, zip(*one, strict=True))) for one in of] for name, of in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", nargs="?", type=Path, help="another tree of this project, to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", metavar="TEXT", help="the rows whose name holds this text")
    options = parser.parse_args()
    trees = [HERE, options.other.resolve()] if options.other else [HERE]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    print(f"{platform.node()}, {platform.processor() or platform.machine()}, Python {platform.python_version()}")
    print(f"{versions}; one thread, least of {options.rounds}")
    heads = ["wall s", "cpu s", *(["other", "cpu s", "ratio"] if options.other else [])]
    print(f"{'':20}" + "".join(f"{head:>8}" for head in heads))
    floors = {name: ["-c", source] for name, source in FLOORS.items()}
    for cases, of in ((floors, trees[:1]), (CASES, trees)):
        cases = {name: arguments for name, arguments in cases.items() if options.only in name}
        for name, found in least(cases, of, options.rounds).items():
            cells = [value for one in found for value in one]
            cells += [found[0][1] / found[1][1]] if len(found) > 1 else []
            print(f"{name:20}" + "".join(f"{value:8.2f}" for value in cells), flush=True)
    if options.other:
        print("ratio: processor seconds of this tree over those of the other")


if __name__ == "__main__":
    main()
