"""Words for scenes: noun phrases, captions, questions with their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .scene import Item, Scene, known
from .tables import ATTRIBUTES, NUMBERS, OBJECTS, OPPOSITE

# Asked of a scene's only object without naming it: "where is this found ?"
THIS = ("this_object", "this_colour", "this_category", "this_habitat", "this_usual_colour", "this_name")
QUESTIONS = (
    *"presence colour position relation count ground style word category habitat usual_colour name".split(),
    *THIS,
)
FURTHER = ("absent", "compare", "two_hop")


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def phrase(name: str, *adjectives: str) -> str:
    """A noun phrase for an object: "an orange car", "red grapes" (what is not counted takes no article)."""
    noun = " ".join([*adjectives, name])
    return noun if name in ("grapes", "food") else article(noun)


def _noun_phrase(item: Item, mention: set[str], named: bool, kinds: bool) -> str:
    if named and item.character:
        return item.character
    size = [item.size_name] if "size" in mention and item.size_name != "medium" else []
    colour = [item.colour] if "colour" in mention and item.colour else []
    return phrase(OBJECTS[item.name].category if kinds else item.name, *size, *colour)


def place(item: Item) -> str:
    """Where an object is, as captions say it: "at the top left", "in the middle"."""
    return "in the middle" if item.position == "middle" else f"at the {item.position}"


def caption(
    scene: Scene, mention: Sequence[str] = ATTRIBUTES, template: int = 0, named: bool = False, kinds: bool = False
) -> str:
    """A sentence about the scene that names its objects and those of its attributes that `mention` lists.

    A position is told of a single object only, a relation of exactly two. `template` 0 to 2 varies the order of the
    parts; `named` calls characters by their name instead of by looks; `kinds` says what kind of thing an object is in
    place of its name ("a red bird").
    """
    for attribute in mention:
        known("attribute", attribute, ATTRIBUTES)
    mention = set(mention)
    nouns = [_noun_phrase(item, mention, named, kinds) for item in scene.items]
    if not nouns:
        core = "nothing"
    elif len(nouns) == 1:
        core = nouns[0] + (f" {place(scene.items[0])}" if "position" in mention else "")
    elif len(nouns) == 2 and "relation" in mention:
        core = f"{nouns[0]} {scene.relation} {nouns[1]}"
    else:
        core = ", ".join(nouns[:-1]) + " and " + nouns[-1]
    ground = f"on {scene.ground}" if "ground" in mention else ""
    style = scene.style if "style" in mention else ""
    word = f"with the word {scene.word}" if "word" in mention and scene.word else ""
    if template == 0:
        parts = [f"{article(style)} drawing of" if style else "", core, ground, word]
    elif template == 1:
        parts = [core, ground, word, f"in {style} style" if style else ""]
    else:
        parts = ["a picture of", core, word, ground, f"drawn by {style}" if style else ""]
    return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def questions(scene: Scene, seed: int = 0) -> list[Question]:
    """Every question that the scene answers, of the kinds in `QUESTIONS`.

    The seed picks the absent object that is asked after, and the second of two relations asked after.
    """
    rng = np.random.default_rng([seed, *(ord(letter) for name in scene.names for letter in name)])
    names = scene.names
    out = [
        Question("count", "how many objects are there ?", NUMBERS[len(names)] if len(names) < 5 else str(len(names)))
    ]
    out.append(Question("ground", "what is the ground ?", scene.ground))
    out.append(Question("style", "what is the style ?", scene.style))
    out.append(Question("word", "what is the written word ?", scene.word or "no word"))
    absent = [name for name in OBJECTS if name not in names]
    out.append(Question("presence", f"is there {phrase(absent[rng.integers(len(absent))])} ?", "no"))
    for item in scene.items:
        thing = OBJECTS[item.name]
        out.append(Question("presence", f"is there {phrase(item.name)} ?", "yes"))
        out.append(Question("category", f"what kind of thing is the {item.name} ?", thing.category))
        out.append(Question("habitat", f"where is the {item.name} found ?", thing.habitat))
        out.append(Question("usual_colour", f"what is the usual colour of the {item.name} ?", thing.usual_colour))
        if names.count(item.name) > 1:
            continue  # "the dog" would not say which
        if item.colour:
            out.append(Question("colour", f"what colour is the {item.name} ?", item.colour))
        if item.character:
            out.append(Question("name", f"what is the name of the {item.name} ?", item.character))
        out.append(Question("position", f"where in the picture is the {item.name} ?", item.position))
    if scene.relation and names[0] != names[1]:
        asked, answer = ((scene.relation, "yes"), (OPPOSITE[scene.relation], "no"))[rng.integers(2)]
        out.append(Question("relation", f"is the {names[0]} {asked} the {names[1]} ?", answer))
    if len(scene.items) == 1:
        item, thing = scene.items[0], OBJECTS[names[0]]
        answers = (item.name, item.colour, thing.category, thing.habitat, thing.usual_colour, item.character)
        texts = (
            "what is this ?", "what colour is this ?", "what kind of thing is this ?", "where is this found ?",
            "what is the usual colour of this ?", "what is the name of this ?",
        )  # fmt: skip
        out += [Question(*parts) for parts in zip(THIS, texts, answers, strict=True) if parts[-1]]
    return out


def further_questions(scene: Scene, seed: int = 0) -> list[Question]:
    """Questions that need more than one look, of the kinds in `FURTHER`, those that the scene answers.

    absent: a fact about an object that is not there, picked by the seed. compare: whether two objects are of one
    colour, or of one kind. two_hop: what colour or kind the thing has that lies so to another.
    """
    rng = np.random.default_rng([seed, *(ord(letter) for name in scene.names for letter in name)])
    absent = [name for name in OBJECTS if name not in scene.names]
    name = absent[rng.integers(len(absent))]
    thing = OBJECTS[name]
    facts = (
        (f"what kind of thing is the {name} ?", thing.category), (f"where is the {name} found ?", thing.habitat),
        (f"what is the usual colour of the {name} ?", thing.usual_colour),
    )  # fmt: skip
    out = [Question("absent", *fact) for fact in facts]
    if len(set(scene.names)) < len(scene.names):
        return out  # "the dog" would not say which
    for i, one in enumerate(scene.items):
        for other in scene.items[i + 1 :]:
            kinds = OBJECTS[one.name].category, OBJECTS[other.name].category
            alike = {"kind": kinds[0] == kinds[1]}
            if one.colour and other.colour:
                alike["colour"] = one.colour == other.colour
            for what, same in alike.items():
                text = f"are the {one.name} and the {other.name} of one {what} ?"
                out.append(Question("compare", text, "yes" if same else "no"))
    if scene.relation:
        first, second = scene.items
        for thing, relation, to in ((first, scene.relation, second), (second, OPPOSITE[scene.relation], first)):
            where = f"the thing {relation} the {to.name} ?"
            out.append(Question("two_hop", f"what kind of thing is {where}", OBJECTS[thing.name].category))
            if thing.colour:
                out.append(Question("two_hop", f"what colour is {where}", thing.colour))
    return out
