"""The oracle that judges painted pictures: its reading of exact labels, its own error, its recipe."""

import numpy as np
import pytest
import torch

from mmfm_utils import UsageError, models, oracle, scenes
from tests.test_models import recipe_of, resume


@pytest.fixture(scope="module")
def recipe():
    return recipe_of("diffusion_oracle")


@pytest.fixture(scope="module")
def reader():
    return oracle.Oracle("cpu")


def certain(labels):
    """Probabilities (class, 64, 64) that say the labels; where there is none all classes are as likely."""
    p = {}
    for name, classes in oracle.CLASSES.items():
        own = np.eye(len(classes))[np.maximum(labels[name][0].numpy(), 0)].transpose(2, 0, 1)
        p[name] = np.where(labels[name][0].numpy() < 0, 1 / len(classes), own)
    return p


@pytest.mark.parametrize(("counts", "may_err"), [((1.0,), 0), ((0, 1.0), 5), ((0, 0, 1.0), 10)])
def test_exact_labels_are_read_as_the_scene(counts, may_err):
    """All but a few of 100: things of one colour that touch are read as one, and a clover's noto drawing is nearly
    twemoji's. What is not read wrong is read at its exact place."""
    world, wrong = scenes.World(counts=counts, natural=0.2, sizes=("medium", "large")), 0
    for scene in world.sample_many(100, seed=3):
        read = oracle._reading(scenes.render(scene), certain(oracle.labels([scene])))
        truth = {item.name: (item.colour or "own", mask) for item, mask in zip(scene.items, scenes.masks(scene))}
        found = {(thing.name, thing.colour, thing.style) for thing in read.things}
        if found != {(name, colour, scene.style) for name, (colour, _) in truth.items()}:
            wrong += 1
            continue
        assert (read.ground, read.style) == (scene.ground, scene.style)
        for thing in read.things:
            mask = truth[thing.name][1]
            assert (thing.mask & mask).sum() >= 0.9 * mask.sum() and not (thing.mask & ~mask).any()
    assert wrong <= may_err


def test_labels_leave_out_what_has_no_truth():
    (scene,) = scenes.World(counts=(1.0,), natural=0.0).sample_many(1, seed=0)
    labels, mask = oracle.labels([scene]), scenes.masks(scene)[0]
    assert (labels["colour"][0].numpy() >= 0).tolist() == mask.tolist() == (labels["there"][0] == 1).tolist()
    assert (labels["ground"] == scenes.GROUNDS.index(scene.ground)).all()


@pytest.mark.parametrize(("x", "y", "place"), [(0.1, 0.1, "top left"), (0.5, 0.5, "middle"), (1.0, 0.5, "right")])
def test_positions_are_those_of_scenes(x, y, place):
    assert oracle.Found("dog", "noto", "red", np.ones((64, 64), bool), x, y, 1.0).position == place


def test_the_card_tells_the_truth(recipe, reader):
    card = models.read_card("diffusion_oracle")
    measured = recipe.evaluate(reader, n=200, seed=4)
    assert measured.keys() == card["held_out"].keys()
    for name, value in measured.items():
        said = card["held_out"][name]
        noise = 3 * (max(said * (1 - said), 0.01) / 200) ** 0.5
        assert abs(value - said) <= card["tolerance"] + noise, name


def test_large_pictures_are_read_as_small_ones(reader):
    drawn = scenes.World(counts=(1.0,), sizes=("large",), natural=0.0, split="test").sample_many(8, seed=2)
    small, large = (reader.read(scenes.render_batch(drawn, side)) for side in (64, 256))
    assert [read.names for read in large] == [read.names for read in small] == [scene.names for scene in drawn]
    assert large[0].things[0].mask.shape == (64, 64)


def test_batches_do_not_matter(reader):
    pictures = scenes.render_batch(scenes.World(counts=(0.5, 0.5)).sample_many(5, seed=1))
    whole, single = reader.read(pictures), reader.read(pictures, batch=2)
    assert [(r.ground, r.style, r.names) for r in whole] == [(r.ground, r.style, r.names) for r in single]


def test_missing_weights_are_named(monkeypatch, tmp_path):
    folder = tmp_path / "data" / "models" / "diffusion_oracle"
    folder.mkdir(parents=True)
    (folder / "card.json").write_text((models.FOLDER / "diffusion_oracle" / "card.json").read_text())
    monkeypatch.setenv("MMFM_ROOT", str(tmp_path))
    with pytest.raises(UsageError, match="missing. Restore it: git checkout -- data/models/diffusion_oracle"):
        oracle.Oracle("cpu")


def test_the_recipe_resumes_to_the_same_weights(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(recipe, "BATCH", 4)
    resume(recipe, monkeypatch, tmp_path, (1, 2), lambda stop: recipe.train("cpu", stop, helpers=0))


def test_half_of_what_it_learns_from_is_worn(recipe):
    x = torch.rand(40, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    worn = recipe.worn(x, np.random.default_rng(0))
    changed = (worn != x).flatten(1).any(1).float().mean()
    assert 0.3 < changed < 0.7 and worn.abs().max() <= 1
