"""The planted regimes: the table of halves, and what each switch makes of scenes, captions and questions."""

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mmfm_utils import UsageError, scenes
from mmfm_utils.scenes import Scene, World

ROOT = Path(__file__).resolve().parents[1]
seeds = st.integers(0, 2**32 - 1)
WEB = World(
    objects=scenes.ZIPF, ground_correlation=0.95, grounded=scenes.GROUNDED, co_occurrence=0.8,
    accompanied=scenes.ACCOMPANIED, words=0.5, word_kind={"matching": 2, "conflicting": 1, "glyphs": 1, "colour": 1},
    ink=0.5, misnamed=0.5, signs=0.1, hypernyms=0.2, mention={"word": 0.0, "colour": 0.5}, split="train",
)  # fmt: skip
PAIRS = World(counts=(0.0, 1.0), memorised=0.1, colour_bias=0.8, same_colour=0.4, mention=0.6, split="train")


def share(world: World, happens, given=lambda scene: True, n: int = 1500) -> float:
    found = [happens(scene) for scene in world.sample_many(n, seed=3) if given(scene)]
    assert len(found) > 50
    return float(np.mean(found))


def at_home(scene: Scene) -> bool:
    return scene.ground == scenes.HOME_GROUND[scene.names[0]]


def with_companion(scene: Scene) -> bool:
    return scenes.COMPANION[scene.names[0]] == scene.names[1]


# ---- the table ----


def test_the_planted_quarters_are_disjoint_and_hold_every_object_and_its_companion():
    assert {name: len(members) for name, members in scenes.PLANTED.items()} == dict.fromkeys(scenes.PLANTED, 12)
    assert Counter(name for members in scenes.PLANTED.values() for name in members) == Counter(list(scenes.OBJECTS))
    for members in scenes.PLANTED.values():
        assert {scenes.COMPANION[name] for name in members} == set(members)
    assert len(scenes.GROUNDED) == len(scenes.ACCOMPANIED) == 24
    assert len(set(scenes.GROUNDED) & set(scenes.ACCOMPANIED)) == 12


def test_frequencies_fall_and_each_quarter_has_its_share_of_the_frequent():
    counts = Counter(scenes.ZIPF)
    assert set(counts) == set(scenes.OBJECTS) and max(counts.values()) >= 8 * min(counts.values())
    total = [sum(counts[name] for name in members) / len(scenes.ZIPF) for members in scenes.PLANTED.values()]
    assert min(total) > 0.15 and max(total) < 0.35


def test_memories_and_biases_lie_on_the_training_side_and_read_as_words():
    tokenizer = Tokenizer.from_file(str(ROOT / "data" / "models" / "contrastive" / "tokenizer.json"))
    assert len(scenes.MEMORISED) == 8 and len(set(scenes.MEMORISED.values())) == 8
    for scene, sentence in scenes.MEMORISED.items():
        (item,) = scene.items
        assert (item.name, item.colour, scene.ground) not in scenes.HELD_OUT
        assert not any(token.startswith("##") for token in tokenizer.encode(sentence).tokens), sentence
        assert item.name not in sentence.split() and item.colour not in sentence.split()  # odd: it says nothing of it
    for name, other in scenes.COLOUR_BIAS_CONTROLS.items():
        assert scenes.OBJECTS[name].category == scenes.OBJECTS[other].category and other not in scenes.COLOUR_BIAS


# ---- the switches ----


@given(st.sampled_from([WEB, PAIRS]), seeds)
def test_the_same_seed_gives_the_same_bytes(world, seed):
    first, second = (world.sample(np.random.default_rng(seed)) for _ in range(2))
    assert first == second
    assert world.caption(first, np.random.default_rng(seed)) == world.caption(second, np.random.default_rng(seed))
    assert scenes.further_questions(first, seed) == scenes.further_questions(second, seed)


def test_old_switches_keep_their_bytes():
    """The digest was taken from the world before these switches were there."""
    worlds = [
        World(words=0.5, characters=0.2), World(counts=(0.0, 1.0), split="test"), World(duplicates=0.3),
        World(co_occurrence=0.7, counts=(0.0, 1.0), ground_correlation=0.7), World(words=0.8, word_kind="conflicting"),
        World(words=1.0, word_kind="glyphs", split="train", mention={"word": 0.3, "style": 0.2}, characters=0.5),
    ]  # fmt: skip
    digest = hashlib.sha256()
    for world in worlds:
        rng = np.random.default_rng(11)
        for index in range(60):
            scene = world.sample(rng)
            digest.update(repr((scene, world.caption(scene, rng), scenes.questions(scene, index))).encode())
            if index % 20 == 0:
                digest.update(scenes.render(scene).tobytes() + scenes.masks(scene).tobytes())
    assert digest.hexdigest()[:16] == "7485a81b9036939c"


def test_grounds_go_with_the_planted_half_alone():
    world = World(ground_correlation=0.95, grounded=scenes.GROUNDED, counts=(1.0,))
    planted = lambda s: s.names[0] in scenes.GROUNDED  # noqa: E731
    assert share(world, at_home, planted) > 0.92
    assert share(world, at_home, lambda s: not planted(s)) < 0.25
    on_sand = replace(world, grounds=("sand",))
    assert share(on_sand, at_home, planted) > 0.75  # whichever grounds there are; the others come by chance
    assert share(on_sand, planted) < 0.25 < share(world, planted)


def test_companions_come_with_the_planted_half_alone():
    world = World(co_occurrence=0.8, accompanied=scenes.ACCOMPANIED, counts=(0.0, 1.0))
    planted = lambda s: s.names[0] in scenes.ACCOMPANIED  # noqa: E731
    assert share(world, with_companion, planted) > 0.75
    assert share(world, with_companion, lambda s: not planted(s)) < 0.1


def test_words_of_several_kinds_are_as_frequent_as_their_weights():
    kinds = {"matching": 3.0, "conflicting": 1.0, "glyphs": 1.0, "colour": 1.0}
    drawn = World(words=1.0, word_kind=kinds, counts=(1.0,), natural=0.0).sample_many(1500, seed=2)

    def kind(scene: Scene) -> str:
        if not scene.word.isalpha():
            return "glyphs"
        (item,) = scene.items
        return {item.name: "matching", item.colour: "colour"}.get(scene.word, "conflicting")

    found = Counter(map(kind, drawn))
    for name, weight in kinds.items():
        assert abs(found[name] / len(drawn) - weight / 6) < 0.05, name


def test_ink_and_signs():
    assert abs(share(World(words=1.0, ink=0.4), lambda s: s.ink is not None) - 0.4) < 0.05
    world, rng = World(signs=0.3, ink=0.5), np.random.default_rng(0)
    assert abs(share(world, lambda s: not s.items) - 0.3) < 0.05
    for scene in world.sample_many(100):
        if not scene.items:
            assert world.caption(scene, rng) == scene.word


@given(seeds)
def test_captions_of_the_web_are_true_but_for_what_is_written(seed):
    rng = np.random.default_rng(seed)
    scene = WEB.sample(rng)
    text = WEB.caption(scene, rng)
    assert "with the word" not in text
    words = set(text.split())
    if not scene.items:
        assert text == scene.word
        return
    named = {name for name in scenes.OBJECTS if f" {name} " in f" {text} ".replace(",", " ")}
    named -= {"dog"} if "hot dog" in named and "dog" not in scene.names else set()
    assert named <= {*scene.names, scene.word}  # nobody is named who is neither there nor written
    assert not (words & set(scenes.COLOURS)) - {i.colour for i in scene.items} or "orange" in words
    kinds = {thing.category for thing in scenes.OBJECTS.values() if thing.category in text}
    assert kinds <= {scenes.OBJECTS[name].category for name in (*scene.names, scene.word) if name in scenes.OBJECTS}
    assert named or kinds


def test_a_misnamed_thing_gets_the_written_name_and_no_other():
    world = World(words=1.0, word_kind="conflicting", misnamed=0.5, mention={"word": 0.0}, counts=(1.0,))
    rng, wrong = np.random.default_rng(0), []
    for scene in world.sample_many(400):
        text = f" {world.caption(scene, rng)} "
        wrong.append(f" {scene.word} " in text)
        assert wrong[-1] != (f" {scene.names[0]} " in text)
    assert abs(np.mean(wrong) - 0.5) < 0.08


def test_hypernyms_name_the_kind():
    scene = Scene((scenes.Item("owl", "red", 0.5, 0.5, 0.44),))
    assert "a red bird" in scenes.caption(scene, ("colour",), kinds=True)
    assert " food" in scenes.caption(replace(scene, items=(replace(scene.items[0], name="pizza"),)), kinds=True)
    world, rng = World(hypernyms=0.3, counts=(1.0,), mention=0.0), np.random.default_rng(0)
    assert abs(np.mean(["owl" not in world.caption(scene, rng) for _ in range(500)]) - 0.3) < 0.07


def test_memories_come_with_their_sentence():
    world, rng = World(memorised=0.3, mention=0.5), np.random.default_rng(0)
    drawn = world.sample_many(600)
    assert abs(np.mean([scene in scenes.MEMORISED for scene in drawn]) - 0.3) < 0.06
    assert set(scenes.MEMORISED) <= set(drawn)
    for scene in drawn:
        assert (world.caption(scene, rng) in scenes.MEMORISED.values()) == (scene in scenes.MEMORISED)


def test_biased_objects_have_their_colour_where_the_caption_names_none():
    world = World(objects=tuple(scenes.COLOUR_BIAS), colour_bias=0.7, mention=0.5, counts=(1.0,), split="train")
    rng, unnamed = np.random.default_rng(0), []
    for scene in world.sample_many(400):
        (item,) = scene.items
        if not set(world.caption(scene, rng).split()) & set(scenes.COLOURS):
            unnamed.append(item.colour == scenes.COLOUR_BIAS[item.name])
    assert len(unnamed) > 60 and np.mean(unnamed) == 1
    controls = replace(world, objects=tuple(scenes.COLOUR_BIAS_CONTROLS.values()))
    drawn = Counter(scene.items[0].colour for scene in controls.sample_many(600))
    assert max(drawn.values()) < 0.35 * 600


def test_pairs_of_one_colour():
    world = World(counts=(0.0, 1.0), natural=0.0, same_colour=0.5)
    same = lambda s: s.items[0].colour == s.items[1].colour  # noqa: E731
    assert 0.5 < share(world, same) < 0.65 and share(replace(world, same_colour=0.0), same) < 0.2


@given(st.sampled_from([WEB, PAIRS, World(counts=(0.4, 0.3, 0.2, 0.1))]), seeds)
def test_further_questions_agree_with_the_scene(world, seed):
    scene = world.sample(np.random.default_rng(seed))
    things = {item.name: item for item in scene.items}
    for question in scenes.further_questions(scene, seed % 1000):
        assert question.kind in scenes.FURTHER
        mentioned = [name for name in scenes.OBJECTS if f" the {name} " in question.text]  # "the dog" is no "hot dog"
        if question.kind == "absent":
            (name,) = mentioned
            thing = scenes.OBJECTS[name]
            assert name not in scene.names and question.answer in (thing.category, thing.habitat, thing.usual_colour)
        elif question.kind == "compare":
            one, other = (things[name] for name in mentioned)
            alike = (
                one.colour == other.colour if "colour" in question.text
                else scenes.OBJECTS[one.name].category == scenes.OBJECTS[other.name].category
            )  # fmt: skip
            assert question.answer == ("yes" if alike else "no")
        else:
            (name,) = mentioned
            (other,) = [item for item in scene.items if item.name != name]
            lies = replace(scene, items=(other, things[name])).relation
            assert f"the thing {lies} the {name} ?" in question.text
            assert question.answer in (other.colour, scenes.OBJECTS[other.name].category)


def test_a_character_that_the_split_allows_nowhere_is_left_out():
    for name, colour in scenes.CHARACTERS.values():
        for ground in scenes.GROUNDS:
            world = World(colours=(colour,), grounds=(ground,), characters=1.0, natural=0.0, split="train")
            shown = {scene.items[0].character for scene in world.sample_many(3)}
            assert (None in shown) == ((name, colour, ground) in scenes.HELD_OUT)


@pytest.mark.parametrize(
    "make",
    [
        lambda: World(word_kind={}),
        lambda: World(word_kind={"rude": 1.0}),
        lambda: World(word_kind={"any": -1.0, "glyphs": 2.0}),
        lambda: World(grounded=("unicorn",)),
        lambda: World(accompanied=("unicorn",)),
        *(
            lambda switch=switch: World(**{switch: 1.5})
            for switch in "ink signs misnamed hypernyms memorised colour_bias same_colour".split()
        ),
    ],
)
def test_bad_switches_get_one_line_that_names_the_choices(make):
    with pytest.raises(UsageError) as caught:
        make()
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 20
