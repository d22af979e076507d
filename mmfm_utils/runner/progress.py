"""Says on stderr what a run is doing: a line when a notebook starts, and twice a minute the cell that each is in."""

import json
import sys
import time
from pathlib import Path

from .stamps import measured

EVERY = 30  # seconds between two lines


def last_seconds(task: dict, folder: Path) -> float | None:
    """What a notebook took when it last ran well into this folder with these parameters, or else in the committed run.

    None where neither is known.
    """
    try:
        last = json.loads((folder / f"{task['name']}.json").read_text(encoding="utf-8"))
        if last["status"] == "ok" and last["parameters"] == task["parameters"]:
            return last["seconds"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return measured(task["notebook"]) if task["compared"] else None


class Progress:
    """Says of {name: seconds it took last} what runs; `jobs` of them at once."""

    def __init__(self, last: dict[str, float | None], jobs: int):
        self.last, self.jobs, self.begun, self.said = last, jobs, set(), time.monotonic()

    def tell(self, running: dict, left: set[str]) -> None:
        """running: {name: client with `cell`, `cells` and `begun` (of time.monotonic)}; left: names, not yet done."""
        now, lines = time.monotonic(), []
        for name, client in sorted(running.items()):
            if name not in self.begun and name in left:
                self.begun.add(name)
                usual = f"; it took {self.last[name]:.0f} s last time" if self.last[name] else ""
                lines.append(f"{name}: starts, {client.cells} cells{usual}")
        if now - self.said >= EVERY and left:
            self.said, rest, parts = now, {name: self.last[name] for name in left}, []
            for name, client in sorted(running.items()):
                if name in left:
                    spent = now - client.begun
                    rest[name] = max(0, rest[name] - spent) if rest[name] else None
                    about = f", about {rest[name]:.0f} s left" if rest[name] else ""
                    parts.append(f"{name}: in cell {client.cell} of {client.cells} after {spent:.0f} s{about}")
            times = [0, *rest.values()]
            whole = 0 if None in times else max(*times, sum(times) / self.jobs)
            about = f", about {max(1, whole / 60):.0f} min" if whole else ""
            count = f"{len(left)} notebook{'s' * (len(left) > 1)} left{about}"
            lines.append("; ".join([*parts, count]))
        for line in lines:
            print(f"  {line}", file=sys.stderr, flush=True)
