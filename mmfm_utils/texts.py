"""What the language models read: facts, questions about described scenes, and in-context episodes `x -> y`.

All of it is a function of the tables in `scenes` and of a NumPy generator. A *prompt* ends where the answer begins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import UsageError, scenes
from .scenes import CHARACTERS, FULL_NAMES, OBJECTS, Question, Scene

# An in-context task maps x to y. Each x belongs to several tasks, so that only the examples tell which is meant.
TASKS: dict[str, dict[str, str]] = {
    "category": {name: thing.category for name, thing in OBJECTS.items()},
    "habitat": {name: thing.habitat for name, thing in OBJECTS.items()},
    "usual_colour": {name: thing.usual_colour for name, thing in OBJECTS.items()},
    "first_letter": {name: name[0] for name in OBJECTS},
    "plural": {name: thing.plural for name, thing in OBJECTS.items()},
    "character_object": {name: pair[0] for name, pair in CHARACTERS.items()},
    "character_colour": {name: pair[1] for name, pair in CHARACTERS.items()},
}
# What a task is called where an episode names it.
TASK_NAMES = {
    "category": "kind", "habitat": "place", "usual_colour": "usual colour", "first_letter": "first letter",
    "plural": "plural", "character_object": "object", "character_colour": "colour",
}  # fmt: skip

# Three phrasings of each kind of fact, the first a question. {x} is the subject; the answer follows.
FACTS: dict[str, tuple[str, str, str]] = {
    "category": (
        "what kind of thing is the {x} ? answer :",
        "the {x} is a kind of",
        "the kind of the {x} is",
    ),
    "habitat": ("where is the {x} found ? answer :", "the {x} is found in the", "the place of the {x} is the"),
    "usual_colour": (
        "what is the usual colour of the {x} ? answer :",
        "the {x} is usually",
        "the colour of most {plural} is",
    ),
    "first_letter": (
        "what is the first letter of {x} ? answer :",
        "the first letter of {x} is",
        "{x} starts with",
    ),
    "plural": ("what is the plural of {x} ? answer :", "the plural of {x} is", "one {x} and many"),
    "character_object": ("what is {x} ? answer :", "{x} is a kind of", "the kind of {x} is"),
    "character_colour": ("what colour is {x} ? answer :", "{x} is shown in", "the colour of {x} is"),
    "character_name": (
        "what is the name of the {looks} ? answer :",
        "the {looks} is named",
        "the name of the {looks} is",
    ),
}

DESCRIBE = "what is in the picture ?"  # asks for a caption


@dataclass(frozen=True)
class Fact:
    """One fact in one phrasing. `held_out` says that training shows the fact in its other two phrasings only."""

    kind: str
    subject: str
    phrasing: int
    prompt: str
    answer: str
    held_out: bool


def facts(full_names: bool = False) -> list[Fact]:
    """Every fact in every phrasing; one of a fact's three phrasings is held out, picked by its hash.

    `full_names` asks for those of the characters of two names instead.
    """
    out = []
    known = FULL_NAMES if full_names else CHARACTERS
    tables = {kind: TASKS.get(kind, {}) for kind in FACTS} | {
        "character_object": {name: pair[0] for name, pair in known.items()},
        "character_colour": {name: pair[1] for name, pair in known.items()},
        "character_name": {name: name for name in known},
    }
    for kind, phrasings in FACTS.items():
        for x, y in tables[kind].items() if not full_names or kind.startswith("character") else ():
            out_of_three = hashlib.blake2b(f"{kind}|{x}".encode(), digest_size=2).digest()[0] % 3
            plural = OBJECTS[x].plural if x in OBJECTS else ""
            looks = "{1} {0}".format(*known[x]) if x in known else ""
            for index, phrasing in enumerate(phrasings):
                prompt = phrasing.format(x=x, plural=plural, looks=looks)
                out.append(Fact(kind, x, index, prompt, y, index == out_of_three))
    return out


def prompt(question: Question | str, context: str = "") -> str:
    """The text that asks a language model a question, after a description of the scene if one is given."""
    text = question.text if isinstance(question, Question) else question
    return f"{context} . {text} answer :" if context else f"{text} answer :"


def told(scene: Scene, seed: int = 0) -> list[Question]:
    """The questions about a scene that its full caption answers, each of the kinds that the caption tells of."""
    known = {"presence", "colour", "count", "ground", "style", "word", "name"} | set(scenes.THIS)
    known |= {"position"} if len(scene.items) == 1 else {"relation"}
    return [question for question in scenes.questions(scene, seed) if question.kind in known]


def characters(split: str, n: int, seed: int = 0) -> list[Scene]:
    """Up to n scenes of one named character alone, on that side of the compositional split."""
    drawn = scenes.World(counts=(1.0,), characters=1.0).sample_many(10 * n, seed)
    held = [(s.items[0].name, s.items[0].colour, s.ground) in scenes.HELD_OUT for s in drawn]
    return [scene for scene, out in zip(drawn, held, strict=True) if out == (split == "test")][:n]


def episode(
    task: str, rng: np.random.Generator, shots: int = 5, query: str | None = None, names: Sequence[str] | None = None
) -> tuple[str, str]:
    """An in-context prompt with `shots` examples, "dog -> animal , tulip -> plant , crab ->", and the answer.

    All x differ. `query` is the x to answer, drawn if it is left out; `names` restricts the x that are drawn.
    Raises UsageError for an unknown task or query, and where there are too few x.
    """
    if task not in TASKS:
        raise UsageError(f"Unknown task {task!r}. Choose one of: {', '.join(TASKS)}.")
    table = TASKS[task]
    pool = [x for x in (names or table) if x in table and x != query]
    if query is not None and query not in table:
        raise UsageError(f"{query!r} is no x of the task {task}. Choose one of: {', '.join(table)}.")
    need = shots + (query is None)
    if not 0 <= shots or need > len(pool):
        raise UsageError(f"The task {task} has {len(pool)} x to draw from, too few for {shots} examples.")
    chosen = [pool[i] for i in rng.choice(len(pool), need, replace=False)] + ([query] if query is not None else [])
    examples = [f"{x} -> {table[x]}" for x in chosen[:-1]]
    return " , ".join([*examples, f"{chosen[-1]} ->"]), table[chosen[-1]]


MOST_SHOTS = 8  # of an episode in training
WORLD = scenes.World(words=0.25, characters=0.15, split="train")
# Where things are compared, and asked for by where they lie.
PAIRS = scenes.World(
    counts=(0.2, 0.6, 0.1, 0.1), natural=0.1, same_colour=0.35, characters=0.1, words=0.1, split="train"
)
_TRAINED = [fact for fact in facts() if not fact.held_out]
_FULL_TRAINED = [fact for fact in facts(full_names=True) if not fact.held_out]


def document(rng: np.random.Generator, shares: Mapping[str, float], turns: int = 5, first: Sequence[str] = ()) -> str:
    """One document that the language model is trained on.

    `shares` gives the probability of each kind: "scene" a described scene with up to `turns` questions, those of the
    kinds `first` before others, "caption" two descriptions, "fact" two facts, "episode" an in-context episode. Further
    kinds: "pair" a described scene with questions of several hops and facts about what it does not name, "full_name"
    two facts about characters of two names, "named" an episode that names its task first, and what has no grammar, so
    that words are known outside of sentences: "inventory" words in no order, "grid" a map of words, "repetition" a
    series of words again and again.
    """
    kind = rng.choice(list(shares), p=list(shares.values()))
    if kind in _PLAIN:
        return _PLAIN[kind](rng)
    if kind == "fact":
        chosen = [_TRAINED[i] for i in rng.integers(len(_TRAINED), size=2)]
        return " . ".join(f"{fact.prompt} {fact.answer}" for fact in chosen)
    if kind == "episode":
        task = str(rng.choice(list(TASKS)))
        most = min(MOST_SHOTS, len(TASKS[task]) - 1)
        return " ".join(episode(task, rng, int(rng.integers(most + 1))))
    if kind == "caption":
        return " . ".join(WORLD.caption(WORLD.sample(rng), rng) for _ in range(2))
    scene = WORLD.sample(rng)
    # one description in five calls a character by its name, so that its looks have to be remembered
    description = scenes.caption(scene, template=int(rng.integers(3)), named=rng.random() < 0.2)
    asked = told(scene, seed=int(rng.integers(2**31)))
    order = rng.permutation(len(asked))
    order = sorted(order, key=lambda i: asked[i].kind not in first)[: int(rng.integers(1, turns + 1))]
    return " . ".join([description, *(f"{prompt(asked[i])} {asked[i].answer}" for i in order)])


def _pair(rng: np.random.Generator) -> str:
    scene = PAIRS.sample(rng)
    description = scenes.caption(scene, template=int(rng.integers(3)), named=rng.random() < 0.2)
    seed = int(rng.integers(2**31))
    further = scenes.further_questions(scene, seed)
    compared = [q for q in further if q.kind == "compare"]
    answer = ("yes", "no")[int(rng.integers(2))]  # as often yes as no, where there is a choice
    compared = [q for q in compared if q.answer == answer] or compared
    asked = [q for q in further if q.kind != "compare"] + compared[:2] + told(scene, seed)
    order = sorted(rng.permutation(len(asked)), key=lambda i: asked[i].kind not in (*scenes.FURTHER, "relation"))
    order = [order[i] for i in rng.permutation(min(len(order), 8))][: int(rng.integers(2, 7))]
    return " . ".join([description, *(f"{prompt(asked[i])} {asked[i].answer}" for i in order)])


def _full_name(rng: np.random.Generator) -> str:
    chosen = [_FULL_TRAINED[i] for i in rng.integers(len(_FULL_TRAINED), size=2)]
    return " . ".join(f"{fact.prompt} {fact.answer}" for fact in chosen)


def _named(rng: np.random.Generator) -> str:
    task = str(rng.choice(list(TASKS)))
    most = min(MOST_SHOTS, len(TASKS[task]) - 1)
    return f"question : {TASK_NAMES[task]} . " + " ".join(episode(task, rng, int(rng.integers(most + 1))))


_LISTED = (*OBJECTS, *scenes.COLOURS, *scenes.GROUNDS, *scenes.STYLES)


def _some_words(rng: np.random.Generator, least: int, most: int) -> list[str]:
    return [_LISTED[i] for i in rng.integers(len(_LISTED), size=int(rng.integers(least, most + 1)))]


def _inventory(rng: np.random.Generator) -> str:
    """Words in no order, and whether some of the objects are among them."""
    words = list(dict.fromkeys(_some_words(rng, 6, 20)))
    present = [word for word in words if word in OBJECTS]
    absent = [name for name in OBJECTS if name not in words]
    asked = []
    for _ in range(int(rng.integers(4))):
        there = bool(present) and rng.random() < 0.5
        name = (present if there else absent)[int(rng.integers(len(present if there else absent)))]
        asked.append(f"{prompt(f'is there {scenes.phrase(name)} ?')} {'yes' if there else 'no'}")
    return " . ".join([" ".join(words), *asked])


def _grid(rng: np.random.Generator) -> str:
    """A map of words, row by row, with one to three objects on a ground, and where they are."""
    rows, columns = int(rng.integers(3, 7)), int(rng.integers(3, 7))
    grid = np.full((rows, columns), str(rng.choice(scenes.GROUNDS)), dtype=object)
    names = [str(name) for name in rng.choice(list(OBJECTS), int(rng.integers(1, 4)), replace=False)]
    for name in names:
        top, left = int(rng.integers(rows)), int(rng.integers(columns))
        grid[top : top + int(rng.integers(1, 3)), left : left + int(rng.integers(1, 3))] = name
    text = " , ".join(" ".join(row) for row in grid)
    asked = []
    for name in names:
        if (grid == name).any():
            row, column = np.argwhere(grid == name).mean(0) + 0.5
            item = scenes.Item(name, None, float(column / columns), float(row / rows), 0.3)
            asked.append(f"{prompt(f'where in the picture is the {name} ?')} {item.position}")
        else:  # covered by another
            asked.append(f"{prompt(f'is there {scenes.phrase(name)} ?')} no")
    return " . ".join([text, *(asked[i] for i in rng.permutation(len(asked)))])


def _repetition(rng: np.random.Generator) -> str:
    words = _some_words(rng, 2, 10)
    return " ".join(words * int(rng.integers(2, 5)))


_PLAIN = {
    "pair": _pair, "full_name": _full_name, "named": _named, "inventory": _inventory, "grid": _grid,
    "repetition": _repetition,
}  # fmt: skip
