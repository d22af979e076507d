"""What this machine has, and which notebooks can run on it: `mmfm doctor`. It imports nothing that takes seconds."""

import json
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

import psutil

from . import UsageError, models, root, say

PACKAGES = "torch torchvision transformers diffusers open_clip_torch captum scikit-learn numpy matplotlib papermill"
READY = ("intact", "from config", "cached")  # of the states that models.inventory knows


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu() -> str:
    """The name of the GPU that torch sees, or nothing. torch is slow to import: it is asked only where a driver is."""
    drivers = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, and both under Windows
    if not shutil.which("nvidia-smi") and not any(Path(driver).exists() for driver in drivers):
        return ""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def versions() -> dict[str, str]:
    """The versions of Python, the system and the packages that results depend on; what is not installed is left out."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES.split():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def missing(needs: dict, profile: str, inventory: list[dict]) -> dict[str, str]:
    """The families that a notebook needs under a profile and whose default model is not ready: {family: what to do}."""
    hints = dict.fromkeys(needs.get("families", []), "there is none in this version")
    for row in reversed(inventory):  # the first of a family is the default, so it has the last word
        if row["profile"] == profile and row["family"] in needs.get("families", []):
            hints[row["family"]] = "" if row["state"] in READY else row["hint"] or "see `mmfm doctor`"
    return {family: hint for family, hint in hints.items() if hint}


def needs_of(path: Path) -> dict:
    """What a notebook says of itself in its metadata: families, profiles. Raises UsageError for what is no notebook.

    Read as plain JSON, because nbformat takes seconds to import.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))["metadata"].get("mmfm", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not a notebook ({type(error).__name__}): restore it, or take it away") from None


def doctor() -> int:
    """Say what this machine has and can run: 0 if the embedded models are intact, 1 if not."""
    say("Checking this machine; nothing is written\n")
    seen = gpu()
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(root())
    lines = {
        "device": f"cuda: {seen}" if seen else "cpu (torch sees no CUDA device)",
        "cores": cores(),
        "memory": f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free",
        "disk": f"{disk.free / 1e9:.1f} of {disk.total / 1e9:.1f} GB free at {root()}",
    }
    for name, value in (lines | versions()).items():
        say(f"  {name:<16} {value}")
    inventory = models.inventory()
    line = "  {:<12} {:<10} {:<26} {:<11} {:>8}  {}"
    say("\n" + line.format("family", "profile", "model", "state", "MB", "where, or what to do"))
    for row in inventory:
        size = f"{row['bytes'] / 1e6:.1f}"
        say(line.format(row["family"], row["profile"], row["name"], row["state"], size, row["hint"] or row["path"]))
    say("")
    for path in sorted((root() / "notebooks").glob("*.ipynb")):
        wanted = needs_of(path)
        can = [p for p in wanted.get("profiles", models.PROFILES) if not missing(wanted, p, inventory)]
        say(f"  {path.stem:<40} {'runs under ' + ', '.join(can) if can else 'cannot run: see the table above'}")
    return 1 if any(row["profile"] == "tiny" and row["state"] != "intact" for row in inventory) else 0
