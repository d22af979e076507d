"""The embedded text-to-image model, its recipe, and the released architecture."""

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from mmfm_utils import UsageError, anatomy, models, scenes
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
    measured = recipe.evaluate(sd, n=n)
    assert measured.keys() == card["held_out"].keys() and card["tolerance"] <= 0.03
    for name, value in measured.items():
        said, size = card["held_out"][name], n // 2 if "pair" in name else n
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
    clip = models.load("contrastive", device="cpu", name="first")
    prompts = ["a noto drawing of a red car on sand", "an owl"]
    assert torch.equal(sd.tokens(prompts), clip.tokens(prompts))
    with record(clip.anatomy, "text.final") as seen:
        clip.embed_texts(prompts)
    assert torch.allclose(sd.encode(prompts), seen["text.final"], atol=2e-3)  # shipped in half precision


def test_the_text_weights_are_all_of_the_towers_weights(recipe):
    clip = load_file(models.FOLDER / "contrastive_first" / "open_clip_model.safetensors")
    text, _ = recipe.build_text()
    assert recipe.text_weights(clip).keys() == text.state_dict().keys()


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


@pytest.fixture
def quick(recipe, monkeypatch, tmp_path):
    """The recipe with a few scenes and small batches, checkpoints elsewhere, pairs within the first steps."""
    for name, value in dict(
        SINGLES=12, PAIRS=12, BATCH=4, AUTOENCODER_BATCH=4, AUTOENCODER_PARTS=2, PAIRS_SHARE={0: 0.0, 1: 0.9}
    ).items():
        monkeypatch.setattr(recipe, name, value)
    monkeypatch.setattr(recipe, "AUTOENCODER", tmp_path / "autoencoder.safetensors")
    monkeypatch.setattr(recipe, "LATENTS", tmp_path / "latents.safetensors")
    return recipe


def test_the_recipe_resumes_to_the_same_weights(quick, monkeypatch, tmp_path):
    quick.train_autoencoder("cpu", 1, helpers=0)
    resume(quick, monkeypatch, tmp_path, (1, 3), lambda stop: quick.train("cpu", stop, helpers=0), "UNET")


def test_the_autoencoders_recipe_resumes_to_the_same_weights(quick, monkeypatch, tmp_path):
    resume(quick, monkeypatch, tmp_path, (1, 2), lambda stop: quick.train_autoencoder("cpu", stop, 0), "AUTOENCODER")


def test_latents_of_another_autoencoder_are_refused(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(quick, "SHIPPED", tmp_path / "none")
    with pytest.raises(SystemExit, match="Train the autoencoder first"):
        quick.train("cpu", 1, helpers=0)
    quick.train_autoencoder("cpu", 1, helpers=0)
    drawn = quick.drawn_once()
    assert quick.latents_of(drawn, "cpu").shape == (24, 4, 16, 16)
    quick.train_autoencoder("cpu", 2, helpers=0)
    with pytest.raises(SystemExit, match="another autoencoder"):
        quick.latents_of(drawn, "cpu")


def test_without_a_checkpoint_the_shipped_autoencoder_serves(quick, sd):
    drawn = quick.drawn_once()
    theirs = quick.latents_of(drawn, "cpu").float()  # of unit spread over these few scenes
    ours = sd.latents(drawn)
    assert torch.allclose(theirs / theirs.std(), ours / ours.std(), atol=0.05)


def test_it_learns_from_one_side_of_the_split(quick):
    drawn = quick.drawn_once()
    assert [len(scene.items) for scene in drawn] == [1] * 12 + [2] * 12
    for scene in drawn:
        for item in scene.items:
            assert (item.name, item.colour, scene.ground) not in scenes.HELD_OUT and item.size_name != "small"
    asked, prompts = quick.held_out(20, pairs=False)
    assert all((s.items[0].name, s.items[0].colour, s.ground) in scenes.HELD_OUT for s in asked)
    assert all(s.names[0] in text and s.style in text and s.ground in text for s, text in zip(asked, prompts))


def test_the_loss_weighs_objects_and_outlines(quick):
    truth = torch.zeros(1, 3, 8, 8)
    there = torch.zeros(1, 1, 8, 8)
    there[..., :4] = 1.0
    weight = 1 + (quick.FIRST - 1) * there
    on, off = truth.clone(), truth.clone()
    on[..., 1, 1], off[..., 1, 6] = 1.0, 1.0
    assert quick.picture_loss(on, truth, weight) > 3 * quick.picture_loss(off, truth, weight) > 0
    assert quick.picture_loss(truth, truth, weight) == 0
    flat, edges = truth + 0.1, truth.clone()
    edges[..., ::2] += 0.2  # the same mean error, but stripes
    assert quick.picture_loss(edges, truth, weight) > quick.picture_loss(flat, truth, weight)


def test_opened_and_plain_unet_agree(sd):
    plain = UNet2DConditionModel.from_pretrained(models.FOLDER / "diffusion" / "unet")
    z, states = sd.noise(2), sd.encode(["a dog", ""])
    with torch.no_grad():
        assert torch.allclose(plain(z, 400, states).sample, sd.model.unet(z, 400, states).sample, atol=1e-4)
    assert list(anatomy.of(sd.model).points) == list(sd.anatomy.points)
