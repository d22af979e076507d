"""The compositional split: every object, colour and ground is seen in training, some of their combinations are not."""

import hashlib

from .tables import COLOURS, GROUNDS, OBJECTS


def _held_out(name: str, colour: str | None, ground: str) -> bool:
    digest = hashlib.blake2b(f"{name}|{colour}|{ground}".encode(), digest_size=2).digest()
    return int.from_bytes(digest, "big") < 0.15 * 65536


HELD_OUT = frozenset(
    (name, colour, ground)
    for name in OBJECTS
    for colour in (*COLOURS, None)
    for ground in GROUNDS
    if _held_out(name, colour, ground)
)


def on_side(split: str, name: str, colour: str | None, ground: str) -> bool:
    """Whether a combination belongs to that side of the split, "train" or "test"."""
    return ((name, colour, ground) in HELD_OUT) == (split == "test")
