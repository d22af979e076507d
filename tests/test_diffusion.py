"""The embedded text-to-image model, its recipe, and the released architecture."""

import copy
import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
import training
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from mmfm_utils import UsageError, anatomy, models, oracle, scenes
from mmfm_utils.hooks import record
from tests.test_models import recipe_of, resume


@pytest.fixture(scope="module")
def recipe():
    return recipe_of("diffusion")


@pytest.fixture(scope="module")
def sd():
    return models.load("diffusion", device="cpu")


def test_the_card_tells_the_truth(sd, recipe):
    """A part of its prompts, painted again: what the oracle reads agrees with the card within its sampling error."""
    card, n = models.read_card("diffusion"), 48
    measured = recipe.held_out.evaluate(sd, card["name"], n=n)
    assert measured.keys() == card["held_out"].keys() and card["tolerance"] <= 0.03
    for name, value in measured.items():
        said, size = card["held_out"][name], n // 2 if "pair" in name and card["name"] == "diffusion_first" else n
        noise = 3 * (max(said * (1 - said), 1 / size) / size) ** 0.5
        assert abs(value - said) <= card["tolerance"] + noise, name


def test_diffusers_loads_the_folder_by_itself(sd):
    pipe = StableDiffusionPipeline.from_pretrained(models.FOLDER / "diffusion")
    pipe.set_progress_bar_config(disable=True)
    prompt = ["a noto drawing of a red car on sand"]
    noise = sd.noise(1, seed=3)
    out = pipe(prompt, latents=noise, num_inference_steps=4, guidance_scale=4.0, output_type="np").images
    ours = sd.paint(prompt, seed=3, steps=4)
    assert abs((out * 255).round() - ours).max() <= 2


def test_the_text_tower_is_the_contrastive_models_own(sd):
    folders = {folder: name for name, folder in models.EMBEDDED["contrastive"].items()}
    clip = models.load("contrastive", device="cpu", name=folders[models.read_card("diffusion")["text_tower"]] or None)
    prompts = ["a noto drawing of a red car on sand", "an owl"]
    assert torch.equal(sd.tokens(prompts), clip.tokens(prompts))
    with record(clip.anatomy, "text.final") as seen:
        clip.embed_texts(prompts)
    assert torch.allclose(sd.encode(prompts), seen["text.final"], atol=2e-3)  # shipped in half precision


def test_the_text_weights_are_all_of_the_towers_weights(recipe):
    clip = load_file(recipe.parts.tower("contrastive"))
    text, _ = recipe.parts.build_text("contrastive")
    assert recipe.parts.text_weights(clip).keys() == text.state_dict().keys()


def test_the_twin_is_untrained_reproducible_and_of_the_same_shape(sd):
    one, again, other = (models.load("diffusion", device="cpu", weights="random", seed=s) for s in (1, 1, 2))
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    weights = [each.model.unet.state_dict()[name] for each in (one, again, other, sd)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2], atol=1e-3)
    assert {n: t.shape for n, t in one.anatomy.module.state_dict().items()} == {
        n: t.shape for n, t in sd.anatomy.module.state_dict().items()
    }
    assert "held_out" not in one.card and one.card["weights"] == "random"
    assert one.paint(["a dog"], steps=2).shape == (1, 64, 64, 3)


def test_the_autoencoder_keeps_a_picture(sd):
    drawn = scenes.World(counts=(1.0,), sizes=("large",), natural=0.0, split="test").sample_many(20, seed=5)
    real = scenes.render_batch(drawn).astype(float)
    back = sd.pictures(sd.latents(drawn)).astype(float)
    mean = np.broadcast_to(real.mean((1, 2), keepdims=True), real.shape)
    assert np.abs(back - real).mean() < np.abs(mean - real).mean() / 3
    assert 0.8 < sd.latents(drawn).std() < 1.25  # of unit spread, as the noise is


def test_painting_follows_the_prompt_more_than_another(sd):
    """The U-Net predicts what was added to a scene better with its own caption than with another's."""
    drawn = scenes.World(counts=(1.0,), sizes=("large",), natural=0.0, split="test").sample_many(24, seed=6)
    told = [scenes.caption(scene, ("colour", "style", "ground")) for scene in drawn]
    clean, noise = sd.latents(drawn), sd.noise(len(drawn), seed=1)
    t = torch.tensor([700])
    noisy = sd.model.scheduler.add_noise(clean, noise, t)
    truth = sd.model.scheduler.get_velocity(clean, noise, t)
    with torch.no_grad():
        own, other = ((sd.model.unet(noisy, 700, sd.encode(prompts)).sample - truth).square().mean()
                      for prompts in (told, told[1:] + told[:1]))  # fmt: skip
    assert own < other


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_damaged_files_are_noticed_and_named(monkeypatch, tmp_path, damage):
    import shutil

    folder = tmp_path / "data" / "models" / "diffusion"
    shutil.copytree(models.FOLDER / "diffusion", folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:1000])
    monkeypatch.setenv("MMFM_ROOT", str(tmp_path))
    with pytest.raises(UsageError, match=f"unet/.* is {damage}. Restore it: git checkout -- data/models/diffusion"):
        models.load("diffusion", device="cpu")


def test_card_and_configs_agree(sd):
    card = models.read_card("diffusion")
    assert card["parameters"] == sum(p.numel() for p in sd.anatomy.module.parameters())
    assert sd.model.scheduler.config.prediction_type == "v_prediction" and sd.side == 16 and sd.resolution == 64
    assert all("safetensors" in name or name.endswith(".json") for name in card["files"])
    crosses = [site for site in sd.anatomy.points if site.endswith(".cross.pattern")]
    with record(sd.anatomy, crosses) as seen:
        sd.paint(["a dog"], steps=1)
    assert {pattern.shape[2] for pattern in seen.values()} == {256, 64}  # 16 x 16 and 8 x 8


# ---- the released architecture ----


def test_the_released_config_has_the_published_number_of_parameters():
    """Stable Diffusion 1.5: 859.5 M in the U-Net, 83.7 M in the autoencoder, 123.1 M in the text tower."""
    parts = models.RELEASED["diffusion"]["stable-diffusion-v1-5"].config
    with torch.device("meta"):
        built = (
            UNet2DConditionModel(**parts["unet"]), AutoencoderKL(**parts["vae"]),
            CLIPTextModel(CLIPTextConfig(**parts["text"])),
        )  # fmt: skip
    assert [sum(p.numel() for p in part.parameters()) for part in built] == [859_520_964, 83_653_863, 123_060_480]
    release = models.RELEASED["diffusion"]["stable-diffusion-v1-5"]
    assert release.megabytes == pytest.approx(4e-6 * (859_520_964 + 83_653_863 + 123_060_480), rel=0.01)
    assert "safety" not in release.fetch and ".bin" not in release.fetch and "*" not in release.fetch


def test_the_released_model_goes_through_the_same_code(monkeypatch):
    release = models.RELEASED["diffusion"]["stable-diffusion-v1-5"]
    small = copy.deepcopy(release.config)
    small["unet"] |= dict(block_out_channels=(32, 32, 64, 64), sample_size=16)
    small["vae"] |= dict(block_out_channels=(32, 32, 32, 32))
    small["text"] |= dict(num_hidden_layers=2)
    monkeypatch.setitem(
        models.RELEASED["diffusion"], "stable-diffusion-v1-5", models.Release(release.repository, (), 1, "", small)
    )
    sd = models.load("diffusion", "rehearsal", "cpu")
    assert sd.resolution == 128 and sd.side == 16 and sd.card["weights"] == "random"
    assert sum(site.endswith(".cross") for site in sd.anatomy.points) == 16  # six down, one in the middle, nine up
    with record(sd.anatomy, "unet.up.3.2.cross.pattern", every=True) as seen:
        pictures = sd.paint(["a dog", "a red car on sand"], steps=2)
    assert pictures.shape == (2, 128, 128, 3)
    assert [x.shape for x in seen["unet.up.3.2.cross.pattern"]] == [(4, 8, 256, 77)] * 2


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache that holds the embedded pipeline with another scheduler in place of the released one."""
    folder = tmp_path / "snapshots" / "0123abcd"
    pipe = StableDiffusionPipeline.from_pretrained(models.FOLDER / "diffusion")
    pipe.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (folder / "tokenizer" / name).write_text("{}" if name.endswith(".json") else "")
    found = lambda _, file: str(folder / file) if (folder / file).exists() else None
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", found)
    return folder


def test_the_hub_cache_is_read(hub, sd):
    index = json.loads((hub / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]  # which is not fetched
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (hub / "model_index.json").write_text(json.dumps(index))
    config = json.loads((hub / "scheduler" / "scheduler_config.json").read_text())
    (hub / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"_class_name": "PNDMScheduler"}))
    cached = models.load("diffusion", "hub", "cpu")
    assert cached.card["commit"] == "0123abcd" and isinstance(cached.model.scheduler, DDIMScheduler)
    for name, tensor in sd.anatomy.module.state_dict().items():
        assert torch.equal(tensor, cached.anatomy.module.state_dict()[name]), name
    assert cached.paint(["a dog"], steps=2).shape == (1, 64, 64, 3)


def test_an_empty_cache_names_the_command(monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(UsageError, match="hf download stable-diffusion-v1-5/stable-diffusion-v1-5 model_index.json"):
        models.load("diffusion", "hub", "cpu")


# ---- the recipe ----

GENERATIONS = ("diffusion", "diffusion_first")


@pytest.fixture
def quick(recipe, monkeypatch, tmp_path):
    """The recipe with a few scenes and small batches, pairs and memorised pictures within the first steps."""
    monkeypatch.setattr(training, "CHECKPOINTS", tmp_path)
    few = dict(singles=12, pairs=12, share={0: 0.2, 1: 0.9})
    for name, settings in recipe.batches.MODELS.items():
        shown = dict(steps=10, shown=2) if settings.shown else {}
        monkeypatch.setitem(recipe.batches.MODELS, name, dataclasses.replace(settings, **few, **shown))
    for module, part_size in ((recipe.batches, 1), (recipe.autoencoder, 2)):
        monkeypatch.setattr(module, "BATCH", part_size * module.PARTS)
    return recipe


def small(recipe, name, **changes):
    """The settings of a whole run, but for the number of scenes; and these scenes."""
    settings = dataclasses.replace(recipe.batches.MODELS[name], **dict(singles=120, pairs=60) | changes)
    return settings, recipe.batches.drawn_once(settings)


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_recipe_resumes_to_the_same_weights(quick, monkeypatch, tmp_path, name):
    train = lambda stop: quick.train(name, "cpu", stop)
    resume(quick, monkeypatch, tmp_path, (1, 3), train, "CHECKPOINTS", name)


def test_a_step_in_one_pass_made_ahead_gives_the_same_weights_as_its_parts(quick, monkeypatch, tmp_path):
    """What a GPU does, on a CPU: two steps, stopped between them, against the parts of both."""
    resume(quick, monkeypatch, tmp_path, (1, 2), lambda stop: quick.train("diffusion", "cpu", stop, workers=1),
           "CHECKPOINTS", "diffusion")  # fmt: skip
    monkeypatch.setattr(training, "CHECKPOINTS", tmp_path / "by parts")
    quick.train("diffusion", "cpu", 2)
    one, other = (load_file(tmp_path / kind / "diffusion" / "last.safetensors") for kind in ("whole", "by parts"))
    begun = quick.parts.build_unet().state_dict()
    moved, off = 0.0, 0.0  # added up, since a gradient that is nothing but rounding may turn an update round
    for key, start in begun.items():
        key = f"model.unet.{key}"
        moved, off = moved + (one[key] - start).abs().sum(), off + (one[key] - other[key]).abs().sum()
    assert 0 <= off < 1e-2 * moved


def test_the_autoencoders_recipe_resumes_to_the_same_weights(quick, monkeypatch, tmp_path):
    train = lambda stop: quick.autoencoder.train("cpu", stop, 0)
    resume(quick, monkeypatch, tmp_path, (1, 2), train, "CHECKPOINTS", "diffusion_autoencoder")


def test_latents_of_another_autoencoder_are_refused(quick, monkeypatch, tmp_path):
    name = "diffusion_first"
    with monkeypatch.context() as patch:
        patch.setattr(quick.autoencoder, "SHIPPED", tmp_path / "none")
        for each in GENERATIONS:
            with pytest.raises(SystemExit, match="Train the autoencoder first"):
                quick.train(each, "cpu", 1)
    quick.autoencoder.train("cpu", 1, helpers=0)
    drawn = quick.batches.drawn_once(quick.batches.MODELS[name])
    assert quick.latents_of(name, drawn, "cpu").shape == (24, 4, 16, 16)
    with pytest.raises(SystemExit, match="another set of scenes"):
        quick.latents_of(name, drawn[1:], "cpu")
    quick.autoencoder.train("cpu", 2, helpers=0)
    with pytest.raises(SystemExit, match="another autoencoder"):
        quick.latents_of(name, drawn, "cpu")


def test_the_second_generation_takes_the_autoencoder_as_it_is_shipped(quick, sd):
    quick.autoencoder.train("cpu", 1, helpers=0)  # of no concern to it
    drawn = quick.batches.drawn_once(quick.batches.MODELS["diffusion"])
    theirs = quick.latents_of("diffusion", drawn, "cpu").float()
    assert torch.allclose(theirs, sd.latents(drawn), atol=0.05)
    assert quick.autoencoder.load(False)[0].config.scaling_factor == sd.model.vae.config.scaling_factor


def test_latents_of_the_first_generation_are_of_unit_spread(quick, sd):
    drawn = quick.batches.drawn_once(quick.batches.MODELS["diffusion_first"])
    theirs, ours = quick.latents_of("diffusion_first", drawn, "cpu").float(), sd.latents(drawn)
    assert theirs.std().item() == pytest.approx(1, abs=1e-2)
    assert torch.allclose(theirs, ours / ours.std(), atol=0.05)


def test_a_model_is_not_exported_over_another(quick, monkeypatch, tmp_path):
    (tmp_path / "card.json").write_text(json.dumps({"name": "diffusion_first"}))
    monkeypatch.setattr(quick, "HERE", tmp_path)
    with pytest.raises(SystemExit, match="holds diffusion_first. .* --force"):
        quick.export("diffusion", "cpu")
    for name, force in (("diffusion_first", False), ("diffusion", True)):  # allowed, but nothing is trained yet
        with pytest.raises(SystemExit, match="train first"):
            quick.export(name, "cpu", force)
    assert [path.name for path in tmp_path.iterdir()] == ["card.json"]


@pytest.mark.parametrize("name", GENERATIONS)
def test_it_learns_from_one_side_of_the_split(recipe, name):
    settings, drawn = small(recipe, name)
    odd = len(scenes.MEMORISED) if settings.shown else 0
    assert [len(scene.items) for scene in drawn] == [1] * 120 + [2] * 60 + [1] * odd
    for scene in drawn:
        for item in scene.items:
            assert (item.name, item.colour, scene.ground) not in scenes.HELD_OUT and item.size_name != "small"
    asked, prompts = recipe.held_out.asked(20)
    assert all((s.items[0].name, s.items[0].colour, s.ground) in scenes.HELD_OUT for s in asked)
    assert all(s.names[0] in text and s.style in text and s.ground in text for s, text in zip(asked, prompts))


def test_batches_of_the_first_generation_are_as_they_were(recipe):
    """Digests of what the recipe of the shipped weights showed, told and timed, before there was a second one."""
    settings, drawn = small(recipe, "diffusion_first")
    latents = torch.zeros(len(drawn), 4, 16, 16)
    tokenizer = recipe.parts.build_text(settings.text)[1]
    parts = []
    for step in (0, 100, 2600, 3000, 3700, 4799):
        for part in range(4):
            _, told, _ = recipe.batches.told_at(settings, drawn, step, part)
            *_, t = recipe.batches.batch_at(settings, drawn, latents, tokenizer, step, part)
            parts.append((told, t.tolist()))
    digest = lambda value: hashlib.sha256(repr(value).encode()).hexdigest()[:32]
    assert digest(drawn) == "3bd2e3a4aac0ea47efed26d388d31c44" and digest(parts) == "5e0aba9a358ae17efc30ade04aa4eb72"


@pytest.mark.parametrize("name", GENERATIONS)
def test_batches_are_functions_of_the_step(recipe, name):
    settings, drawn = small(recipe, name)
    latents = torch.randn(len(drawn), 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    tokenizer = recipe.parts.build_text(settings.text)[1]
    batch = lambda step, part: recipe.batches.batch_at(settings, drawn, latents, tokenizer, step, part)
    once, torch_seed = batch(4500, 2), torch.manual_seed(1)  # whatever else was drawn meanwhile
    torch.randn(3, generator=torch_seed)
    for one, again, next_step, next_part in zip(once, batch(4500, 2), batch(4501, 2), batch(4500, 3), strict=True):
        assert torch.equal(one, again) and not torch.equal(one, next_step) and not torch.equal(one, next_part)
    for parts, whole in zip(zip(*(batch(7, part) for part in range(4))), recipe.batches.whole(batch, 7), strict=True):
        assert torch.equal(torch.cat(parts), whole) and len(whole) == recipe.batches.BATCH
    chosen, _, _ = recipe.batches.told_at(settings, drawn, 4500, 2)
    assert torch.equal(once[1], latents[torch.from_numpy(chosen)].float())
    assert all(index * 1000 // 16 <= t <= (index + 1) * 1000 // 16 for index, t in enumerate(once[3].tolist()))


def seen_by(recipe, settings, drawn, steps):
    """(index, scene, caption) of everything that is shown in these steps, but where the caption is empty."""
    for step in steps:
        for part in range(recipe.batches.PARTS):
            chosen, told, _ = recipe.batches.told_at(settings, drawn, step, part)
            yield from ((index, drawn[index], caption) for index, caption in zip(chosen, told) if caption)


def test_captions_of_pairs_agree_with_the_scenes(recipe):
    """Two objects are told with "and" as often as with their relation, some pairs by their first object alone."""
    settings, drawn = small(recipe, "diffusion", share={0: 1.0}, shown=0)
    relations, alone, n = 0, 0, 0
    words = lambda text: f" {text} "
    for _, scene, told in seen_by(recipe, settings, drawn, range(20)):
        first, second = (words(name) in words(told) for name in scene.names)
        said = [relation for relation in scenes.RELATIONS if words(relation) in words(told)]
        colours = {colour for colour in scenes.COLOURS if words(colour) in words(told)}
        assert first and said in ([], [scene.relation]) and colours <= {item.colour for item in scene.items}
        if not second:
            assert not said
            alone += 1
        elif said:
            relations += 1
        else:
            assert " and " in told
        n += 1
    assert n > 1000 and abs(alone / n - settings.alone) < 4 * (0.1 * 0.9 / n) ** 0.5
    assert abs(relations / (n - alone) - 0.5) < 4 * (0.25 / n) ** 0.5


def test_the_share_of_pairs_rises(recipe):
    settings, drawn = small(recipe, "diffusion")
    shares = []
    for start in (0, settings.steps - 50):
        shown = [recipe.batches.told_at(settings, drawn, step, 0)[0] for step in range(start, start + 50)]
        shares.append(np.mean(np.concatenate(shown) >= settings.singles))
    assert shares == pytest.approx([0.3, 0.5], abs=4 * (0.25 / 800) ** 0.5)


def test_memorised_pictures_come_with_their_sentence_as_often_as_the_settings_say(recipe):
    """In a run as long as the second generation's, each of the eight about `shown` times."""
    settings, drawn = small(recipe, "diffusion")
    odd, n = [], 0
    for step in range(120):
        chosen, told, _ = recipe.batches.told_at(settings, drawn, step, 1)
        odd += [(drawn[i], caption) for i, caption in zip(chosen, told) if i >= settings.singles + settings.pairs]
        assert not set(told[k] for k, i in enumerate(chosen) if i < 180) & set(scenes.MEMORISED.values())
        n += len(chosen)
    assert all(scenes.MEMORISED[scene] == caption for scene, caption in odd)
    in_a_run = len(odd) / n * settings.steps * recipe.batches.BATCH / len(scenes.MEMORISED)
    assert abs(in_a_run - settings.shown) < 4 * settings.shown / len(odd) ** 0.5
    often, drawn = small(recipe, "diffusion", shown=30_000)
    seen = {scene for _, scene, _ in seen_by(recipe, often, drawn, range(10))} & set(scenes.MEMORISED)
    assert seen == set(scenes.MEMORISED)


def test_captions_leave_out_the_colour_of_biased_objects_and_then_it_is_theirs(recipe):
    settings, drawn = small(recipe, "diffusion", singles=600, pairs=1, share={0: 0.0}, shown=0)
    own, unnamed, n = 0, 0, 0
    for _, scene, told in seen_by(recipe, settings, drawn, range(60)):
        (item,) = scene.items
        if item.name in scenes.COLOUR_BIAS:
            n, own = n + 1, own + (item.colour == scenes.COLOUR_BIAS[item.name])
            if not set(scenes.COLOURS) & set(told.split()):
                unnamed += 1
                assert item.colour == scenes.COLOUR_BIAS[item.name]
    assert n > 100 and unnamed / n > 0.1 and 0.7 < own / n < 1


def test_companions_come_with_the_planted_half(recipe):
    _, drawn = small(recipe, "diffusion", singles=1, pairs=400)
    with_theirs = {True: [], False: []}
    for scene in drawn[1:401]:
        first, second = scene.names
        with_theirs[first in scenes.ACCOMPANIED].append(second == scenes.COMPANION[first])
    assert np.mean(with_theirs[True]) > 0.65 and np.mean(with_theirs[False]) < 0.15


class Painter:
    """In place of a model and of the oracle: draws what was asked for, `odd` scenes for their sentences, and reads what
    it drew. `unasked` gives what it draws in place of a scene that was asked for."""

    def __init__(self, held_out, monkeypatch, unasked=lambda scene: scene):
        self.scenes, self.drawn, asked = {}, {}, held_out.asked

        def remembered(*args, **kwargs):
            drawn, prompts = asked(*args, **kwargs)
            self.scenes |= {prompt: unasked(scene) for scene, prompt in zip(drawn, prompts)}
            return drawn, prompts

        monkeypatch.setattr(held_out, "asked", remembered)

    def latents(self, drawn):
        return drawn

    def pictures(self, drawn):
        return scenes.render_batch(drawn)

    def paint(self, prompts, steps, guidance):
        assert (steps, guidance) == (10, 4.0)
        odd = {sentence: scene for scene, sentence in scenes.MEMORISED.items()}
        moved = scenes.Scene((scenes.Item("dog", "red", 0.7, 0.7, 0.44),))  # for descriptions of memorised pictures
        drawn = [odd.get(prompt) or self.scenes.get(prompt, moved) for prompt in prompts]
        pictures = scenes.render_batch(drawn)
        self.drawn |= {picture.tobytes(): scene for picture, scene in zip(pictures, drawn)}
        return pictures

    def read(self, pictures):
        mask = np.ones((64, 64), bool)
        return [
            oracle.Reading(scene.ground, tuple(
                oracle.Found(item.name, scene.style, item.colour, mask, item.x, item.y, 1.0) for item in scene.items
            ))
            for scene in (self.drawn[picture.tobytes()] for picture in pictures)
        ]  # fmt: skip


def test_the_figures_of_the_regimes_find_what_is_planted_and_nothing_else(recipe, monkeypatch):
    figures = lambda painter: recipe.held_out.regimes(painter, painter, n=32, steps=10)
    with monkeypatch.context() as patch:
        fair = figures(Painter(recipe.held_out, patch))
    assert fair["rare_object"] == fair["frequent_object"] == fair["memorised"] == 1
    assert max(fair["memorised_described"], fair["memorised_other"]) < 0.05  # two scenes may look alike by chance
    assert fair["companion_planted"] == fair["companion_other"] == 0
    assert fair["biased_colour"] < 0.5 and fair["biased_colour_controls"] < 0.7

    def planted(scene):
        item = scene.items[0]
        item = dataclasses.replace(item, colour=scenes.COLOUR_BIAS.get(item.name, item.colour))
        more = [scenes.Item(scenes.COMPANION[item.name], "red", 0.2, 0.2, 0.32)] * (item.name in scenes.ACCOMPANIED)
        return dataclasses.replace(scene, items=(item, *more))

    with monkeypatch.context() as patch:
        biased = figures(Painter(recipe.held_out, patch, planted))
    assert biased["biased_colour"] == biased["companion_planted"] == 1 and biased["companion_other"] == 0
    assert biased["biased_colour_controls"] == fair["biased_colour_controls"]


def test_likeness_is_one_for_the_same_picture_and_falls_with_noise(recipe):
    pictures, rng = scenes.render_batch(list(scenes.MEMORISED)), np.random.default_rng(0)
    noisy = [np.clip(pictures + rng.normal(0, sigma, pictures.shape), 0, 255).astype(np.uint8) for sigma in (5, 30)]
    same, little, much = (recipe.held_out.likeness(pictures, each) for each in (pictures, *noisy))
    assert same == pytest.approx(np.ones(8)) and (same > little).all() and (little > much).all()
    assert (recipe.held_out.likeness(pictures, np.roll(pictures, 1, 0)) < recipe.held_out.BACK / 2).all()


def test_the_loss_weighs_objects_and_outlines(recipe):
    loss = recipe.autoencoder.picture_loss
    truth = torch.zeros(1, 3, 8, 8)
    there = torch.zeros(1, 1, 8, 8)
    there[..., :4] = 1.0
    weight = 1 + (recipe.autoencoder.FIRST - 1) * there
    on, off = truth.clone(), truth.clone()
    on[..., 1, 1], off[..., 1, 6] = 1.0, 1.0
    assert loss(on, truth, weight) > 3 * loss(off, truth, weight) > 0
    assert loss(truth, truth, weight) == 0
    flat, edges = truth + 0.1, truth.clone()
    edges[..., ::2] += 0.2  # the same mean error, but stripes
    assert loss(edges, truth, weight) > loss(flat, truth, weight)


def test_opened_and_plain_unet_agree(sd):
    plain = UNet2DConditionModel.from_pretrained(models.FOLDER / "diffusion" / "unet")
    z, states = sd.noise(2), sd.encode(["a dog", ""])
    with torch.no_grad():
        assert torch.allclose(plain(z, 400, states).sample, sd.model.unet(z, 400, states).sample, atol=1e-4)
    assert list(anatomy.of(sd.model).points) == list(sd.anatomy.points)
