"""Loading: what is shipped is intact and as good as its card says; what is wrong gets one line and the next step."""

import importlib.util
import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from mmfm_utils import UsageError, models, scenes
from mmfm_utils.hooks import record


@pytest.fixture(scope="module")
def clip():
    return models.load("contrastive", device="cpu")


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The shipped models in a folder of their own, to be damaged."""
    shutil.copytree(models.FOLDER, tmp_path / "models")
    monkeypatch.setattr(models, "FOLDER", tmp_path / "models")
    return tmp_path / "models" / "contrastive"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("recipe", models.FOLDER / "contrastive" / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_card_tells_the_truth(clip, recipe):
    """The held-out figures are measured again, on fewer scenes, so within the card's tolerance and sampling error."""
    card = models.read_card("contrastive")
    n = 300
    measured = recipe.evaluate(clip.model, clip.tokenizer, n=n, seed=1)
    assert measured.keys() == card["held_out"].keys() == card["chance"].keys()
    for name, value in measured.items():
        said = card["held_out"][name]
        error = np.sqrt(max(said * (1 - said), 0.01) / n)  # binomial, of the smaller sample
        assert abs(value - said) <= card["tolerance"] + 3 * error, name


TARGETS = {"object": 0.95, "style": 0.95, "ground": 0.95, "colour": 0.95, "recall_at_1": 0.85, "word": 0.80}


@pytest.mark.parametrize("name", TARGETS)
def test_the_model_is_as_good_as_it_should_be(name):
    assert models.read_card("contrastive")["held_out"][name] >= TARGETS[name]


def test_the_recipes_attention_gives_the_same_result(recipe):
    torch.manual_seed(0)
    plain, x = torch.nn.MultiheadAttention(48, 6, batch_first=True), torch.randn(3, 7, 48)
    mask = torch.full((7, 7), float("-inf")).triu(1)
    expected = [plain(x, x, x, need_weights=False, attn_mask=m)[0] for m in (None, mask)]
    plain.__class__ = recipe.PlainAttention
    for m, wanted in zip((None, mask), expected, strict=True):
        assert torch.allclose(plain(x, x, x, attn_mask=m)[0], wanted, atol=1e-5)


def test_the_twin_is_untrained_reproducible_and_of_the_same_shape(clip):
    twin, again, other = (models.load("contrastive", device="cpu", weights="random", seed=s) for s in (0, 0, 1))
    drawn = scenes.World().sample_many(4)
    first, same, different = (model.embed_images(drawn) for model in (twin, again, other))
    assert torch.equal(first, same) and not torch.allclose(first, different, atol=1e-2)
    shapes = [{name: tensor.shape for name, tensor in m.model.state_dict().items()} for m in (clip, twin)]
    assert shapes[0] == shapes[1]
    assert not torch.allclose(first, clip.embed_images(drawn), atol=1e-2)


def test_open_clip_loads_the_folder_by_itself(clip):
    """What is on disk is open_clip's own format: no code of ours is needed to use it."""
    path = f"local-dir:{models.FOLDER / 'contrastive'}"
    model, preprocess = open_clip.create_model_from_pretrained(path)
    drawn = scenes.World().sample_many(3)
    from PIL import Image

    images = torch.stack([preprocess(Image.fromarray(scenes.render(scene))) for scene in drawn])
    assert torch.allclose(images, clip.pixels(drawn), atol=1e-5)
    with torch.no_grad():
        ours = model.eval().encode_image(images, normalize=True)
        words = model.encode_text(open_clip.get_tokenizer(path)(["a red dog", "milo on grass"]), normalize=True)
    assert torch.allclose(ours, clip.embed_images(drawn), atol=1e-4)
    assert torch.allclose(words, clip.embed_texts(["a red dog", "milo on grass"]), atol=1e-4)


def test_the_text_tower_agrees_with_its_transformers_conversion(clip):
    """CLIPTextModel pools by a legacy rule when the end token has id 2; ours has the largest id, so both agree."""
    state, text = clip.model.state_dict(), clip.anatomy.towers["text"]
    tokenizer = clip.tokenizer.tokenizer
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=text.width, intermediate_size=text.n_neurons,
        num_hidden_layers=text.n_layers, num_attention_heads=text.n_heads, max_position_embeddings=text.n_tokens,
        hidden_act="gelu", projection_dim=128, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    names = {
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    converted = {
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_model.final_layer_norm.weight": state["ln_final.weight"],
        "text_model.final_layer_norm.bias": state["ln_final.bias"],
        "text_projection.weight": state["text_projection"].T,
    }
    for layer in range(text.n_layers):
        ours, theirs = f"transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            converted |= {f"{theirs}.{b}.{kind}": state[f"{ours}.{a}.{kind}"] for a, b in names.items()}
            for part, tensor in zip("qkv", state[f"{ours}.attn.in_proj_{kind}"].chunk(3), strict=True):
                converted[f"{theirs}.self_attn.{part}_proj.{kind}"] = tensor
    model = CLIPTextModelWithProjection(config).eval()
    missing, unexpected = model.load_state_dict(converted, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing)
    tokens = clip.tokens(
        ["a red dog", "a noto drawing of a small blue polar bear left of milo with the word sale", "2 b"]
    )
    with torch.no_grad():
        theirs, ours = model(tokens).text_embeds, clip.model.encode_text(tokens)
    assert torch.allclose(theirs, ours, atol=1e-4 * ours.abs().max().item())


def test_words_are_single_tokens_and_unknown_words_are_spelt(clip):
    tokenizer = clip.tokenizer.tokenizer
    for word in [*scenes.COLOURS, *scenes.GROUNDS, *scenes.STYLES, *scenes.CHARACTERS, *scenes.WORDS, "->"]:
        assert len(tokenizer.tokenize(word)) == 1, word
    assert tokenizer.tokenize("Zebra") == ["z", "##e", "##b", "##r", "##a"]
    assert tokenizer.tokenize("a <image> b") == ["a", "<image>", "b"]
    assert tokenizer.eos_token_id == len(tokenizer) - 1 != 2
    assert tokenizer.decode(tokenizer("a hot dog on sea").input_ids, skip_special_tokens=True) == "a hot dog on sea"


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14"])
def test_released_architectures_go_through_the_same_code(name):
    clip = models.load("contrastive", "rehearsal", "cpu", name=name)
    vision = clip.anatomy.towers["vision"]
    assert clip.resolution == 224 and vision.n_layers == {"ViT-B-32": 12, "ViT-L-14": 24}[name]
    drawn = scenes.World().sample_many(2)
    with record(clip.anatomy, ["vision.0.attn.pattern", "text.*.resid"]) as cache:
        assert clip.embed_images(drawn).shape == (2, vision.projection.shape[1])
        clip.embed_texts(["a red dog"])
    assert cache["vision.0.attn.pattern"].shape == (2, vision.n_heads, vision.n_tokens, vision.n_tokens)
    assert len(cache) == 1 + clip.anatomy.towers["text"].n_layers


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (dict(family="generativ"), "contrastive"),
        (dict(family="contrastive", profile="large"), "rehearsal"),
        (dict(family="contrastive", device="tpu"), "cuda"),
        (dict(family="contrastive", weights="best"), "random"),
        (dict(family="contrastive", profile="rehearsal", name="ViT-Z"), "ViT-B-32"),
        (dict(family="contrastive", profile="tiny", name="ViT-B-32"), "leave the name out"),
        (dict(family="contrastive", profile="hub", device="cpu"), "hf download laion/"),
    ],
)
def test_a_wrong_request_gets_one_line_with_the_next_step(request_, words, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *_: None)
    with pytest.raises(UsageError, match=words) as caught:
        models.load(**request_)
    assert "\n" not in str(caught.value)


def test_an_absent_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="cpu or auto"):
        models.load("contrastive", device="cuda")
    assert models.device_of("auto").type == "cpu"


@pytest.mark.parametrize(
    ("damage", "state"),
    [
        (lambda folder: (folder / "open_clip_model.safetensors").unlink(), "missing"),
        (lambda folder: truncate(folder / "open_clip_model.safetensors"), "damaged"),
        (lambda folder: flip(folder / "open_clip_model.safetensors"), "damaged"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "damaged"),
        (lambda folder: (folder / "card.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "card.json").write_text("{}"), "cannot be read"),
    ],
)
def test_damaged_files_are_noticed_and_named(copied, damage, state):
    damage(copied)
    with pytest.raises(UsageError, match=state) as caught:
        models.load("contrastive", device="cpu")
    assert "git checkout -- data/models/contrastive" in str(caught.value) and "\n" not in str(caught.value)
    row = next(row for row in models.inventory() if row["profile"] == "tiny")
    assert row["state"] != "intact" and row["hint"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:100_000])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def test_the_inventory_finds_what_is_shipped_intact():
    rows = models.inventory()
    assert [row["state"] for row in rows if row["profile"] == "tiny"] == ["intact"]
    assert {row["profile"] for row in rows} == set(models.PROFILES)
    shipped = sum(path.stat().st_size for path in models.FOLDER.rglob("*.safetensors"))
    assert shipped < 40e6  # all weights together


def test_the_recipe_resumes_to_the_same_weights(recipe, monkeypatch, tmp_path):
    """Two steps at once give the same weights as one step, a stop, and another."""
    monkeypatch.setattr(recipe, "BATCH", 8)
    monkeypatch.setattr(recipe, "evaluate", lambda *_, **__: {})
    monkeypatch.setattr(recipe, "learning_rate", lambda *_: 1.0)  # otherwise it depends on where training ends
    results = []
    for name, stops in (("whole", (2,)), ("parts", (1, 2))):
        monkeypatch.setattr(recipe, "CHECKPOINTS", tmp_path / name)
        for stop in stops:
            recipe.train("cpu", 8 * stop)
        model = open_clip.create_model(f"local-dir:{recipe.HERE}", load_weights=False)
        assert recipe.restore(model, [])[0] == 2
        results.append(model.state_dict())
    for name, tensor in results[0].items():
        assert torch.allclose(tensor, results[1][name], atol=1e-5), name


def test_card_and_config_agree(clip):
    config = json.loads((models.FOLDER / "contrastive" / "open_clip_config.json").read_text())["model_cfg"]
    vision, text = clip.anatomy.towers["vision"], clip.anatomy.towers["text"]
    assert 8 <= vision.n_layers == config["vision_cfg"]["layers"] <= 12
    assert text.n_layers == config["text_cfg"]["layers"] >= 6 and text.causal
    assert min(vision.n_heads, text.n_heads) >= 6 and vision.grid == (8, 8)
    assert models.read_card("contrastive")["parameters"] == sum(p.numel() for p in clip.model.parameters())
