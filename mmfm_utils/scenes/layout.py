"""Where objects lie in a scene that is drawn at random."""

from __future__ import annotations

import numpy as np

from .tables import SIZES


def pick(values, rng: np.random.Generator):
    """One of the values, each as likely."""
    return values[int(rng.random() * len(values))]


def boxes_of(
    sizes: tuple[str, ...], count: int, word_at: str | None, rng: np.random.Generator
) -> list[tuple[float, float, float]] | None:
    """Boxes (x, y, size) that barely touch; two of them lie clearly beside or clearly above each other.

    A size too large for that many objects gives way to the largest of `sizes` that fits, None if none is found.
    """
    low, high = (0.2 if word_at == "top" else 0.0), (0.8 if word_at == "bottom" else 1.0)
    known = [SIZES[size] for size in sizes]
    fitting = [size for size in known if size <= (0.62, 0.5, 0.34, 0.34)[count - 1]] or [min(known)]
    boxes: list = []
    for _ in range(count):
        size = min(pick(known, rng), max(fitting))
        size = size if size in known else max(fitting)
        for _ in range(40):
            x = size / 2 + rng.random() * (1 - size)
            y = low + size / 2 + rng.random() * max(high - low - size, 0)
            box = (round(x, 4), round(y, 4), size)
            if all(_apart(box, other) for other in boxes) and (count != 2 or not boxes or _clear(box, boxes[0])):
                boxes.append(box)
                break
        else:
            return None
    return boxes


def _apart(a: tuple[float, float, float], b: tuple[float, float, float]) -> bool:
    gap = 0.46 * (a[2] + b[2])  # boxes may overlap a little, for drawings seldom fill their corners
    return max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= gap


def _clear(a: tuple[float, float, float], b: tuple[float, float, float]) -> bool:
    dx, dy = abs(a[0] - b[0]), abs(a[1] - b[1])
    return max(dx, dy) >= 1.5 * min(dx, dy)
