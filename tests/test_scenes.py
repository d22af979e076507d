"""Properties of the world: what a scene says of itself agrees with its picture, its masks, its words."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_utils import UsageError, scenes
from mmfm_utils.scenes import Scene, World
from mmfm_utils.scenes import draw as draw_module

worlds = st.sampled_from(
    [
        World(words=0.5, characters=0.2),
        World(counts=(0.0, 1.0), split="test"),
        World(counts=(0.0, 0.0, 1.0, 1.0), natural=1.0),
        World(co_occurrence=1.0, counts=(0.0, 1.0), ground_correlation=1.0),
        World(words=1.0, word_kind="glyphs", counts=(1.0,), split="train"),
    ]
)
seeds = st.integers(0, 2**32 - 1)


def draw(world: World, seed: int) -> Scene:
    return world.sample(np.random.default_rng(seed))


def extent(scene: Scene) -> np.ndarray:
    """The pixels inside the box of any item, (64, 64) bool."""
    inside = np.zeros((64, 64), dtype=bool)
    for item in scene.items:
        top, left = (max(0, int((centre - item.size / 2) * 64) - 1) for centre in (item.y, item.x))
        inside[top : top + int(item.size * 64) + 3, left : left + int(item.size * 64) + 3] = True
    return inside


def test_enough_objects_in_enough_categories_in_four_styles():
    assert len(scenes.OBJECTS) >= 40
    assert len({thing.category for thing in scenes.OBJECTS.values()}) >= 6
    assert {"hot dog", "polar bear"} <= set(scenes.OBJECTS)
    assert len(scenes.COLOURS) == 8 and len(scenes.STYLES) == 4
    pictures = [
        draw_module._sprite(name, style, None, 64)[1].tobytes() for name in scenes.OBJECTS for style in scenes.STYLES
    ]
    assert len(set(pictures)) == len(pictures)  # every object has its own outline in every style


@given(worlds, seeds)
def test_the_same_seed_gives_the_same_bytes(world, seed):
    first, second = draw(world, seed), draw(world, seed)
    assert first == second
    assert scenes.render(first).tobytes() == scenes.render(second).tobytes()
    assert world.caption(first, np.random.default_rng(seed)) == world.caption(second, np.random.default_rng(seed))


@given(worlds, seeds)
def test_masks_are_disjoint_visible_and_where_the_boxes_are(world, seed):
    scene = draw(world, seed)
    masks = scenes.masks(scene, 64)
    assert masks.shape == (len(scene.items), 64, 64)
    assert masks.sum(0).max() <= 1
    assert not (masks.any(0) & scenes.word_mask(scene)).any()
    for mask, item in zip(masks, scene.items, strict=True):
        assert mask.sum() >= 20  # the sampler hides no object
        rows, columns = np.nonzero(mask)
        assert abs((columns.min() + columns.max()) / 128 - item.x) < item.size / 2
        assert max(np.ptp(rows), np.ptp(columns)) <= item.size * 64 + 1


@given(worlds, seeds)
def test_a_mask_is_where_the_picture_changes_when_the_object_goes(world, seed):
    scene = draw(world, seed)
    without = replace(scene, items=scene.items[:-1])
    changed = (scenes.render(scene) != scenes.render(without)).any(-1)
    mask = scenes.masks(scene)[-1]
    assert (changed & mask).sum() >= 0.9 * mask.sum()  # a pixel may happen to have its ground's colour
    drawn = draw_module._sprite(
        scene.items[-1].name, scene.style, scene.items[-1].colour, round(scene.items[-1].size * 64)
    )
    assert changed.sum() <= (drawn[1] > 0).sum()


@given(worlds, seeds)
def test_one_layout_at_every_resolution(world, seed):
    scene = draw(world, seed)
    small, large = scenes.masks(scene, 64), scenes.masks(scene, 256)
    for few, many in zip(small, large, strict=True):
        # corners of the visible part, in 64ths of the picture; thin strokes may lose a pixel when drawn small
        boxes = [
            [f(axis) / scale for axis in np.nonzero(m) for f in (np.min, np.max)] for m, scale in ((few, 1), (many, 4))
        ]
        assert np.abs(np.subtract(*boxes)).max() <= 4
        assert abs(few.mean() - many.mean()) < 0.02
    word = scenes.word_mask(scene, 256).reshape(64, 4, 64, 4).mean((1, 3)) > 0.5
    assert (word == scenes.word_mask(scene, 64)).all()


@given(worlds, seeds)
def test_caption_and_questions_agree_with_the_scene(world, seed):
    scene = draw(world, seed)
    for template in range(3):
        text = scenes.caption(scene, template=template)
        for item in scene.items:
            assert item.name in text and (item.colour or "") in text
        assert f"on {scene.ground}" in text and scene.style in text
        assert (scene.word is None) or scene.word in text
        assert (scene.relation is None) or scene.relation in text
    bare = scenes.caption(scene, mention=())
    assert scene.ground not in bare.split() and not set(bare.split()) & set(scenes.STYLES)
    answers = {(q.kind, q.text): q.answer for q in scenes.questions(scene, seed=seed % 100)}
    assert {kind for kind, _ in answers} <= set(scenes.QUESTIONS)
    for (kind, text), answer in answers.items():
        if kind == "presence":
            asked = text.removeprefix("is there ").removesuffix(" ?")
            asked = asked if asked in scenes.OBJECTS else asked.split(" ", 1)[1]
            assert answer == ("yes" if asked in scene.names else "no")
        if kind == "colour":
            (item,) = [item for item in scene.items if f"the {item.name} ?" in text]
            assert answer == item.colour
        if kind == "relation":
            asked = next(r for r in scenes.RELATIONS if f" {r} " in text)
            assert answer == ("yes" if asked == scene.relation else "no")
        if kind == "count":
            assert answer == scenes.NUMBERS[len(scene.items)]


@given(worlds, seeds, st.sampled_from(["object", "colour", "style", "ground", "size", "position"]))
def test_a_counterfactual_changes_just_its_attribute(world, seed, attribute):
    scene = draw(world, seed)
    value = {
        "object": next(name for name in scenes.OBJECTS if name not in scene.names),
        "colour": "red" if scene.items[0].colour != "red" else "blue",
        "style": next(style for style in scenes.STYLES if style != scene.style),
        "ground": next(ground for ground in scenes.GROUNDS if ground != scene.ground),
        "size": "small" if scene.items[0].size_name != "small" else "large",
        "position": (0.31, 0.47),
    }[attribute]
    changed = scenes.counterfactual(scene, attribute, value)
    assert changed != scene
    field = {"object": "name", "colour": "colour", "size": "size", "position": ("x", "y")}.get(attribute)
    if field is None:
        assert replace(changed, **{attribute: getattr(scene, attribute)}) == scene
    else:
        fields = (field,) if isinstance(field, str) else field
        item = replace(changed.items[0], **{name: getattr(scene.items[0], name) for name in fields})
        assert replace(changed, items=(item, *changed.items[1:])) == scene
    if attribute in ("colour", "style", "object"):  # the ground far from the object keeps its pixels
        outside = ~(extent(scene) | extent(changed))
        assert (scenes.render(scene)[outside] == scenes.render(changed)[outside]).all()
    with pytest.raises(UsageError, match="already"):
        scenes.counterfactual(changed, attribute, value)


@given(seeds)
def test_the_split_keeps_combinations_apart_and_every_value_on_both_sides(seed):
    for split, expected in (("train", False), ("test", True)):
        scene = draw(World(split=split), seed)
        assert all(((i.name, i.colour, scene.ground) in scenes.HELD_OUT) == expected for i in scene.items)


def test_every_value_occurs_on_both_sides_of_the_split():
    everything = {(n, c, g) for n in scenes.OBJECTS for c in (*scenes.COLOURS, None) for g in scenes.GROUNDS}
    for side in (scenes.HELD_OUT, everything - scenes.HELD_OUT):
        assert {n for n, _, _ in side} == set(scenes.OBJECTS)
        assert {c for _, c, _ in side} == {*scenes.COLOURS, None}
        assert {g for _, _, g in side} == set(scenes.GROUNDS)


def share(world: World, happens, n: int = 400) -> float:
    return float(np.mean([happens(scene) for scene in world.sample_many(n, seed=5)]))


def test_every_switch_does_what_it_says():
    home = lambda s: s.ground == scenes.HOME_GROUND[s.items[0].name]  # noqa: E731
    assert share(World(ground_correlation=0.9), home) > 0.85 > 0.3 > share(World(), home)
    companion = lambda s: scenes.COMPANION[s.items[0].name] == s.items[1].name  # noqa: E731
    pairs = World(counts=(0.0, 1.0))
    assert share(replace(pairs, co_occurrence=0.8), companion) > 0.7 > 0.1 > share(pairs, companion)
    assert share(World(natural=1.0), lambda s: all(i.colour is None for i in s.items)) == 1
    assert 0.2 < share(World(words=0.3), lambda s: s.word is not None) < 0.4
    one = World(counts=(1.0,), words=1.0)
    assert share(replace(one, word_kind="matching"), lambda s: s.word == s.items[0].name) == 1
    assert (
        share(replace(one, word_kind="conflicting"), lambda s: s.word in scenes.OBJECTS and s.word not in s.names) == 1
    )
    assert share(replace(one, word_kind="glyphs"), lambda s: not any(letter.isalpha() for letter in s.word)) == 1
    assert share(World(characters=1.0), lambda s: s.items[0].character is not None) == 1
    repeated = World(duplicates=1.0, n_duplicates=3)
    assert len({repeated.sample(np.random.default_rng(i)) for i in range(50)}) == 3
    rng = np.random.default_rng(0)
    scene = Scene((scenes.Item("dog", "red", 0.5, 0.5, 0.44),), "noto", "sea")
    for mention, low, high in ((0.0, 0.0, 0.0), (0.5, 0.4, 0.6), (1.0, 1.0, 1.0)):
        named = np.mean(["red" in World(mention=mention).caption(scene, rng) for _ in range(300)])
        assert low <= named <= high
    assert share(World(styles=("openmoji",)), lambda s: s.style == "openmoji") == 1


@pytest.mark.parametrize("split", [None, "train", "test"])
def test_groups_are_as_frequent_as_the_counts_say(split):
    drawn = World(counts=(0.4, 0.3, 0.2, 0.1), words=0.3, split=split).sample_many(1500, seed=1)
    for count, expected in enumerate((0.4, 0.3, 0.2, 0.1), 1):
        assert abs(np.mean([len(scene.items) == count for scene in drawn]) - expected) < 0.05
    assert abs(np.mean([scene.word is not None for scene in drawn]) - 0.3) < 0.05
    assert {item.size_name for scene in drawn for item in scene.items} == set(scenes.SIZES)


def test_switches_stay_within_the_chosen_objects_and_grounds():
    few = World(
        objects=("dog", "lion", "crab"), grounds=("snow",), counts=(0, 1.0), co_occurrence=1.0, ground_correlation=1.0
    )
    drawn = few.sample_many(50)
    assert {name for scene in drawn for name in scene.names} <= {"dog", "lion", "crab"}
    assert {scene.ground for scene in drawn} == {"snow"}
    known = replace(few, characters=1.0).sample_many(20)
    assert {scene.items[0].character for scene in known} == {"milo", "rex"}


def test_a_duplicated_scene_repeats_with_its_caption():
    world, rng = World(duplicates=1.0, n_duplicates=2, mention=0.5), np.random.default_rng(0)
    pairs = {(scene, world.caption(scene, rng)) for scene in world.sample_many(60)}
    assert len(pairs) == 2


def test_characters_are_called_by_their_name_only_when_asked():
    scene = Scene((scenes.Item("dog", "blue", 0.5, 0.5, 0.44),))
    assert scene.items[0].character == "milo"
    assert "milo" in scenes.caption(scene, named=True) and "milo" not in scenes.caption(scene)
    assert ("name", "milo") in {(q.kind, q.answer) for q in scenes.questions(scene)}


@settings(max_examples=20)
@given(st.sampled_from(scenes.WORDS), st.sampled_from(["top", "bottom"]))
def test_written_words_fit_and_differ(word, where):
    blank = Scene((), "noto", "sea")
    written = replace(blank, word=word, word_at=where)
    plate = scenes.word_mask(written)
    assert draw_module._letters(word).shape[1] < 64  # at 64 it would have been cut
    assert plate.any() and not plate.all()
    assert (scenes.render(written)[~plate] == scenes.render(blank)[~plate]).all()
    other = replace(written, word="zebra" if word != "zebra" else "zigzag")
    assert scenes.render(written).tobytes() != scenes.render(other).tobytes()
    inked = replace(written, ink="red")
    assert (scenes.render(inked)[plate] == scenes.COLOURS["red"]).all(-1).any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: scenes.Item("unicorn", "red", 0.5, 0.5, 0.4),
        lambda: scenes.Item("dog", "mauve", 0.5, 0.5, 0.4),
        lambda: Scene((), style="oil"),
        lambda: Scene((), ground="moon"),
        lambda: Scene((), word="incomprehensible"),
        lambda: World(natural=1.5),
        lambda: World(sizes=("huge",)),
        lambda: World(objects=()),
        lambda: World(n_duplicates=0),
        lambda: World(characters=0.5, objects=("crab",)),
        lambda: World(mention={"mood": 0.5}),
        lambda: scenes.Item("dog", "red", -1, 0.5, 0.4),
        lambda: scenes.Item("dog", "red", 0.5, 0.5, 0),
        lambda: scenes.counterfactual(Scene((scenes.Item("dog", "red", 0.5, 0.5, 0.4),)), "position", 0.3),
        lambda: World(counts=()),
        lambda: World(word_kind="rude"),
        lambda: World(split="validation"),
        lambda: World(objects=("dog",), colours=("red",), grounds=("sea",), natural=0.0, split="test").sample_many(1),
        lambda: scenes.counterfactual(Scene(()), "colour", "red"),
        lambda: scenes.counterfactual(Scene(()), "mood", "red"),
        lambda: scenes.caption(Scene(()), mention=("mood",)),
        lambda: scenes.render(Scene(()), pixels=4),
    ],
)
def test_bad_requests_get_one_line_that_names_the_choices(make):
    with pytest.raises(UsageError) as caught:
        make()
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 20
