"""What the language models read: facts, told questions, episodes, documents."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfm_utils import UsageError, scenes, texts


def test_each_fact_is_held_out_in_exactly_one_phrasing():
    held = {}
    for fact in texts.facts():
        held.setdefault((fact.kind, fact.subject), []).append(fact.held_out)
    assert all(sum(flags) == 1 and len(flags) == 3 for flags in held.values())
    # and every phrasing of every kind is held out for some subject, so that none is untrained or untested
    assert {(f.kind, f.phrasing) for f in texts.facts() if f.held_out} == {
        (kind, i) for kind in texts.FACTS for i in range(3)
    }


def test_facts_agree_with_the_world():
    for fact in texts.facts():
        if fact.kind == "habitat":
            assert fact.answer == scenes.OBJECTS[fact.subject].habitat
        if fact.kind == "character_name":
            assert fact.answer == fact.subject
            name, colour = scenes.CHARACTERS[fact.subject]
            assert f"{colour} {name}" in fact.prompt


@given(st.integers(0, 10**6), st.sampled_from(list(texts.TASKS)), st.integers(0, 6))
def test_an_episode_shows_true_and_distinct_examples(seed, task, shots):
    prompt, answer = texts.episode(task, np.random.default_rng(seed), shots)
    *examples, query = prompt.split(" , ")
    pairs = [tuple(example.split(" -> ")) for example in examples] + [(query.removesuffix(" ->"), answer)]
    assert len(examples) == shots and query.endswith(" ->")
    assert len({x for x, _ in pairs}) == shots + 1
    assert all(texts.TASKS[task][x] == y for x, y in pairs)


def test_an_episode_takes_a_query_and_names():
    rng = np.random.default_rng(0)
    prompt, answer = texts.episode("habitat", rng, 2, query="dog", names=["owl", "lion", "dog"])
    assert prompt.endswith("dog ->") and answer == "house" and prompt.count("dog") == 1
    with pytest.raises(UsageError, match="category"):
        texts.episode("weight", rng)
    with pytest.raises(UsageError, match="too few"):
        texts.episode("character_colour", rng, shots=8)
    with pytest.raises(UsageError, match="no x of the task"):
        texts.episode("habitat", rng, query="milo")


@given(st.integers(0, 10**6))
def test_what_is_told_stands_in_the_caption(seed):
    scene = texts.WORLD.sample(np.random.default_rng(seed))
    caption = scenes.caption(scene)
    for question in texts.told(scene, seed):
        if question.kind in ("colour", "ground", "style", "this_object", "this_colour", "position"):
            assert question.answer in caption
        if question.kind == "relation":
            said = next(r for r in scenes.RELATIONS if f" {r} " in caption)
            asked = next(r for r in scenes.RELATIONS if f" {r} " in question.text)
            first = question.text.removeprefix("is the ").split(f" {asked} ")[0]
            assert question.answer == ("yes" if said == asked and scene.names[0] == first else "no")


def test_documents_keep_to_the_training_side(monkeypatch):
    """No description of a held-out combination is read in training, and no held-out phrasing."""
    drawn = []
    sample = scenes.World.sample
    monkeypatch.setattr(scenes.World, "sample", lambda self, rng: drawn.append(sample(self, rng)) or drawn[-1])
    rng = np.random.default_rng(1)
    read = [texts.document(rng, {kind: 1.0}) for kind in ("scene", "caption", "fact", "episode") for _ in range(150)]
    combinations = {(item.name, item.colour, scene.ground) for scene in drawn for item in scene.items}
    assert len(combinations) > 200 and not combinations & scenes.HELD_OUT
    held = {f"{fact.prompt} {fact.answer}" for fact in texts.facts() if fact.held_out}
    assert not held & {part for text in read for part in text.split(" . ")}


def test_characters_alone_on_one_side_of_the_split():
    for split in ("train", "test"):
        found = texts.characters(split, 40, seed=3)
        assert len(found) == 40 and all(scene.items[0].character for scene in found)
        sides = {((s.items[0].name, s.items[0].colour, s.ground) in scenes.HELD_OUT) for s in found}
        assert sides == {split == "test"}
