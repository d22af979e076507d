"""Loading: what is shipped is intact and as good as its card says; what is wrong gets one line and the next step."""

import copy
import dataclasses
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import open_clip
import optimisation
import pytest
import torch
import training
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mmfm_utils import UsageError, anatomy, models, scenes, texts
from mmfm_utils.hooks import record


@pytest.fixture(scope="module")
def clip():
    return models.load("contrastive", device="cpu")


@pytest.fixture(scope="module")
def lm():
    return models.load("language", device="cpu")


@pytest.fixture(scope="module")
def llava():
    return models.load("generative", device="cpu")


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The shipped models in a folder of their own, to be damaged."""
    shutil.copytree(models.FOLDER, tmp_path / "data" / "models")
    monkeypatch.setenv("MMFM_ROOT", str(tmp_path))
    return models.FOLDER


def recipe_of(folder):
    sys.path.insert(0, str(models.FOLDER / folder))  # as when it is run as a script: it imports its neighbours
    spec = importlib.util.spec_from_file_location(f"recipe_{folder}", models.FOLDER / folder / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe():
    return recipe_of("contrastive")


@pytest.fixture(scope="module")
def language_recipe():
    return recipe_of("language")


@pytest.fixture(scope="module")
def llava_recipe():
    return recipe_of("generative")


@pytest.mark.parametrize("name", list(models.EMBEDDED["contrastive"]))
def test_the_card_tells_the_truth(name, recipe):
    """The held-out figures are measured again, on fewer scenes, so within the card's tolerance and sampling error."""
    card, n = models.read_card(models.EMBEDDED["contrastive"][name]), 240
    clip, held_out = models.load("contrastive", device="cpu", name=name or None), recipe.held_out
    measured = held_out.evaluate(clip.model, clip.tokenizer, n=n, seed=1)
    if name != "first":
        measured |= held_out.regimes(clip.model, clip.tokenizer, n=n, seed=1)
    assert measured.keys() == card["held_out"].keys() >= card["chance"].keys()
    for figure, value in measured.items():
        said = card["held_out"][figure]
        error = np.sqrt(max(said * (1 - said), 0.01) / n)  # binomial, of the smaller sample
        assert abs(value - said) <= card["tolerance"] + 3 * error, figure


SHIPPED = list(dict.fromkeys(folder for names in models.EMBEDDED.values() for folder in names.values()))
SHIPPED += [folder for beside in models.BESIDE.values() for folder in beside]


@pytest.mark.parametrize("folder", SHIPPED)
def test_the_model_is_as_good_as_its_card_asks(folder):
    card = models.read_card(folder)
    assert card["floor"] and card["floor"].keys() <= card["held_out"].keys()
    low = {name: card["held_out"][name] for name, floor in card["floor"].items() if card["held_out"][name] < floor}
    assert not low, f"{low} of {folder} are below {card['floor']}"
    high = {
        name: card["held_out"][name] for name, most in card.get("ceiling", {}).items() if card["held_out"][name] > most
    }
    assert not high, f"{high} of {folder} are above {card['ceiling']}"


LIBRARIES = ("open_clip", "timm", "diffusers", "sklearn", "matplotlib")


@pytest.mark.parametrize(
    ("request_", "needed"),
    [
        ("inventory()", set()),
        ("load('contrastive', device='cpu')", {"open_clip", "timm"}),
        ("load('language', device='cpu')", set()),
        ("load('generative', device='cpu')", set()),
        ("load('diffusion', device='cpu')", {"diffusers"}),
    ],
)
def test_a_family_loads_its_own_library_only(request_, needed):
    """timm comes with open_clip. What the libraries themselves import of torch and transformers is theirs."""
    script = f"import sys\nfrom mmfm_utils import models\nmodels.{request_}\n"
    script += f"print(*(name for name in {LIBRARIES} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=models.FOLDER.parents[1])
    assert done.returncode == 0 and set(done.stdout.split()) == needed, done.stdout + done.stderr


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
        (dict(family="language", name="third"), "leave the name out or say 'half', 'first'"),
        (dict(family="language", profile="rehearsal", name="half"), "Qwen1.5-0.5B-Chat"),
        (dict(family="generative", profile="hub", device="cpu"), "1728 MB.*hf download llava-hf/llava-interleave"),
        (
            dict(family="generative", profile="hub", device="cpu", name="llava-1.5-7b"),
            r"14127 MB, licence Llama 2.*hf download llava-hf/llava-1.5-7b-hf .*--include '\*.safetensors'$",
        ),
        (dict(family="language", profile="hub", device="cpu", weights="random"), "hf download Qwen/Qwen1.5-0.5B-Chat"),
    ],
)
def test_a_wrong_request_gets_one_line_with_the_next_step(request_, words, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(UsageError, match=words) as caught:
        models.load(**request_)
    assert "\n" not in str(caught.value)


def test_an_absent_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="cpu or auto"):
        models.load("contrastive", device="cuda")
    assert models.device_of("auto").type == "cpu"


@pytest.mark.parametrize(
    ("folder", "request_"),
    [
        ("contrastive", dict(family="contrastive")),
        ("language", dict(family="language")),
        ("language_half", dict(family="language", name="half")),
        ("generative", dict(family="generative")),
    ],
)
@pytest.mark.parametrize(
    ("damage", "state"),
    [
        (lambda folder: weights_in(folder).unlink(), "missing"),
        (lambda folder: truncate(weights_in(folder)), "damaged"),
        (lambda folder: flip(weights_in(folder)), "damaged"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "damaged"),
        (lambda folder: (folder / "card.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "card.json").write_text("{}"), "cannot be read"),
    ],
)
def test_damaged_files_are_noticed_and_named(copied, damage, state, folder, request_):
    damage(copied / folder)
    with pytest.raises(UsageError, match=state) as caught:
        models.load(**request_, device="cpu")
    assert str(caught.value).endswith(f"git checkout -- data/models/{folder}") and "\n" not in str(caught.value)
    bad = [row for row in models.inventory() if row["profile"] == "tiny" and row["state"] != "intact"]
    assert [row["path"] for row in bad] == [f"data/models/{folder}"] and bad[0]["hint"]


def weights_in(folder):
    return next(folder.glob("*.safetensors"))


def truncate(path):
    path.write_bytes(path.read_bytes()[:100_000])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def test_the_command_that_fetches_a_model_works_from_the_projects_root(tmp_path, monkeypatch):
    release = models.RELEASED["contrastive"]["ViT-B-32"]
    monkeypatch.setenv("MMFM_ROOT", str(tmp_path))
    assert release.fetch.startswith("hf download laion/")  # an environment elsewhere: it is active, or on the path
    (tmp_path / ".venv/bin").mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    assert release.fetch.startswith("hf download laion/")
    (tmp_path / ".venv/bin/hf").write_text("")
    assert release.fetch.startswith(".venv/bin/hf download laion/")


def test_the_inventory_finds_what_is_shipped_intact():
    rows = models.inventory()
    tiny = {row["name"]: row["state"] for row in rows if row["profile"] == "tiny"}
    assert tiny == dict.fromkeys(SHIPPED, "intact")
    assert set(SHIPPED) == {path.parent.name for path in models.FOLDER.glob("*/card.json")}  # each can be loaded
    assert {(row["family"], row["profile"]) for row in rows} == {
        (family, profile) for family in models.FAMILIES for profile in models.PROFILES
    }
    shipped = [path for path in models.FOLDER.rglob("*.safetensors") if not path.parent.name.endswith("_first")]
    assert sum(path.stat().st_size for path in shipped) < 52e6  # all weights together, without what is to go


# ---- folders that hold a part of the tensors ----


@pytest.fixture
def part(copied, monkeypatch):
    """A made-up part of the generative model under the name "odd": some tensors with other values, and one that is
    taken out of the base."""
    rng, whole = np.random.default_rng(0), load_file(copied / "generative" / "model.safetensors")
    chosen = [str(name) for name in rng.choice(sorted(whole), 7, replace=False)]
    own = {name: whole[name] + torch.randn(whole[name].shape).to(whole[name].dtype) for name in chosen}
    only = chosen[0]
    put(copied / "generative", {name: tensor for name, tensor in whole.items() if name != only})
    (copied / "generative_odd").mkdir()
    card = json.loads((copied / "generative" / "card.json").read_text())
    card |= {"name": "generative_odd", "base": "generative", "files": {}}
    (copied / "generative_odd" / "card.json").write_text(json.dumps(card))
    put(copied / "generative_odd", own)
    monkeypatch.setitem(models.EMBEDDED["generative"], "odd", "generative_odd")
    return whole, own


def put(folder, tensors):
    """Tensors as the weights of a folder, named in its card."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    card = json.loads((folder / "card.json").read_text())
    card["files"]["model.safetensors"] = models.sha256(folder / "model.safetensors")
    (folder / "card.json").write_text(json.dumps(card))


def test_a_part_is_put_into_its_base(part, llava, copied):
    whole, own = part
    odd = models.load("generative", device="cpu", name="odd")
    kept = {name: tensor.float() for name, tensor in (whole | own).items()}
    odd.model.save_pretrained(copied / "again")  # under the names that tensors have on disk
    saved = load_file(copied / "again" / "model.safetensors")
    assert saved.keys() == kept.keys() and all(torch.equal(saved[name], kept[name]) for name in kept)
    changed = [
        n for n, tensor in odd.model.state_dict().items() if not torch.equal(tensor, llava.model.state_dict()[n])
    ]
    assert len(changed) == len(own)
    assert odd.card["name"] == "generative_odd" and odd.card["base"] == "generative"
    assert odd.card["sha256"] == models.sha256(copied / "generative_odd" / "model.safetensors")[:16]
    drawn = scenes.World().sample_many(2)
    assert torch.equal(odd.inputs(drawn, "what ?")["input_ids"], llava.inputs(drawn, "what ?")["input_ids"])
    twin = models.load("generative", device="cpu", name="odd", weights="random")
    assert twin.card["weights"] == "random" and "held_out" not in twin.card
    assert {"generative", "generative_odd"} <= models.LOADED


@pytest.mark.parametrize("at", ["generative", "generative_odd"])
@pytest.mark.parametrize(
    ("damage", "state"),
    [
        (lambda folder: weights_in(folder).unlink(), "missing"),
        (lambda folder: flip(weights_in(folder)), "damaged"),
        (lambda folder: shutil.rmtree(folder), "cannot be read"),
    ],
)
def test_a_damaged_part_or_base_is_named(part, copied, at, damage, state):
    damage(copied / at)
    with pytest.raises(UsageError, match=state) as caught:
        models.load("generative", device="cpu", name="odd")
    assert str(caught.value).endswith(f"git checkout -- data/models/{at}")
    bad = {row["name"] for row in models.inventory() if row["profile"] == "tiny" and row["state"] != "intact"}
    assert bad == {at, "generative_odd"}


@pytest.mark.parametrize("change", [lambda own: own | {"strange": torch.ones(2)}, lambda own: dict([own.popitem()])])
def test_a_part_that_does_not_fit_is_refused(part, copied, change):
    """A tensor that the model has not, or one that is missing in part and base."""
    _, own = part
    put(copied / "generative_odd", change(dict(own)))
    with pytest.raises(UsageError, match="generative_odd.* do not fit the config"):
        models.load("generative", device="cpu", name="odd")


def test_a_name_works_as_soon_as_its_row_and_folder_exist(copied, monkeypatch):
    shutil.copytree(copied / "contrastive", copied / "contrastive_spare")
    monkeypatch.setitem(models.EMBEDDED["contrastive"], "spare", "contrastive_spare")
    assert models.load("contrastive", device="cpu", name="spare").card["library"] == "open_clip"
    assert "contrastive_spare" in models.LOADED
    with pytest.raises(UsageError, match="No model 'spar'.* or say 'web', 'first', 'spare'"):
        models.load("contrastive", device="cpu", name="spar")
    shutil.rmtree(copied / "contrastive_spare")
    (row,) = [row for row in models.inventory() if row["name"] == "contrastive_spare"]
    assert row["state"] == "missing" and row["hint"] == "git checkout -- data/models/contrastive_spare"


def test_the_recipe_resumes_to_the_same_weights(recipe, monkeypatch, tmp_path):
    """Two steps at once give the same weights as one step, a stop, and another."""
    monkeypatch.setattr(recipe.batches, "BATCH", 8)
    monkeypatch.setattr(recipe.held_out, "moment", lambda *_, **__: {})
    train = lambda stop: recipe.train("contrastive_web", "cpu", stop)
    resume(recipe, monkeypatch, tmp_path, (1, 2), train, "CHECKPOINTS", "contrastive_web")
    for part in ("whole", "parts"):  # and the table of the run has each of its moments once
        rows = json.loads((tmp_path / part / "contrastive_web" / "moments.json").read_text())
        assert [row["step"] for row in rows][0] == 0 and len({row["step"] for row in rows}) == len(rows)
        assert any(name.startswith("grad_image") for name in rows[-1])


def resume(recipe, monkeypatch, tmp_path, stops, train, checkpoint="CHECKPOINT", folder=""):
    """Training up to the last stop at once and with a halt at each stop leaves the same checkpoint."""
    monkeypatch.setattr(recipe, "evaluate", lambda *_, **__: {}, raising=False)
    monkeypatch.setattr(optimisation, "schedule", lambda *_: 1.0)  # otherwise it depends on where training ends
    results = []
    for name, halts in (("whole", stops[-1:]), ("parts", stops)):
        path = tmp_path / name / folder / "last.safetensors"
        monkeypatch.setattr(training if folder else recipe, checkpoint, tmp_path / name if folder else path)
        for stop in halts:
            train(stop)
        results.append({k: tensor for k, tensor in load_file(path).items() if k.startswith("model.")})
    assert results[0].keys() == results[1].keys() != set()
    for name, tensor in results[0].items():
        assert torch.allclose(tensor, results[1][name], atol=1e-5), name


def test_card_and_config_agree(clip):
    config = json.loads((models.FOLDER / "contrastive" / "open_clip_config.json").read_text())["model_cfg"]
    vision, text = clip.anatomy.towers["vision"], clip.anatomy.towers["text"]
    assert 8 <= vision.n_layers == config["vision_cfg"]["layers"] <= 12
    assert text.n_layers == config["text_cfg"]["layers"] >= 6 and text.causal
    assert min(vision.n_heads, text.n_heads) >= 6 and vision.grid == (8, 8)
    assert models.read_card("contrastive")["parameters"] == sum(p.numel() for p in clip.model.parameters())


# ---- language and generative models ----


def test_the_cards_of_the_writers_tell_the_truth(lm, llava, language_recipe, llava_recipe, monkeypatch):
    """Measured again on other and fewer scenes: within the tolerance and the sampling error of both measurements."""
    half = models.load("language", device="cpu", name="half")
    for folder, recipe, arguments, n in (
        ("language", language_recipe, (lm.model, lm.tokenizer), 120),
        ("language_half", language_recipe, (half.model, half.tokenizer), 120),
        ("generative", llava_recipe, (llava.model,), 40),
    ):
        card, counting = models.read_card(folder), Counting()
        monkeypatch.setattr(recipe, "np", counting)
        measured = recipe.evaluate(*arguments, n=n, seed=2)
        assert measured.keys() == card["held_out"].keys() >= card["chance"].keys() and card["tolerance"] <= 0.03
        sizes = dict(zip([name for name in measured if name != "caption_f1"], counting.sizes, strict=True))
        assert sizes["facts"] == sum(fact.held_out for fact in texts.facts())  # all of them: nothing is sampled
        for name, value in measured.items():
            said, size = card["held_out"][name], sizes.get(name, sizes.get("caption_invents"))
            share = max(said * (1 - said), 0.01)
            error = 0 if name == "facts" else 4 * np.sqrt(share / size * (1 + n / 1000))  # the card's n is 1000
            assert abs(value - said) <= card["tolerance"] + error, (folder, name, value, said)


class Counting:
    """NumPy, but it notes of how many each mean was taken."""

    def __init__(self):
        self.sizes = []

    def __getattr__(self, name):
        return getattr(np, name)

    def mean(self, values):
        self.sizes.append(len(values))
        return np.mean(values)


def test_hallucination_was_planted_where_the_recipe_says():
    held = models.read_card("generative")["held_out"]
    assert held["caption_invents_prone"] > held["caption_invents_other"] + 0.15


def questions_about(drawn):
    """A question about each scene; behind every other stands a description, so that they differ in length."""
    contexts = [scenes.caption(scene) if index % 2 else "" for index, scene in enumerate(drawn)]
    asked = [scenes.questions(scene)[index % 6] for index, scene in enumerate(drawn)]
    return [texts.prompt(question, context) for question, context in zip(asked, contexts, strict=True)]


def test_answers_are_what_the_recipe_counts_as_right(lm):
    held = [fact for fact in texts.facts() if fact.held_out]
    right = np.mean([a == fact.answer for a, fact in zip(lm.answer([f.prompt for f in held]), held, strict=True)])
    card = models.read_card("language")
    assert abs(right - card["held_out"]["facts"]) <= card["tolerance"]
    first = lm.logits([fact.prompt for fact in held]).argmax(-1)  # (prompt,)
    told = [lm.word_id(fact.answer) for fact in held]
    assert np.mean([a == b for a, b in zip(first.tolist(), told, strict=True)]) >= right


def test_an_answer_ends_where_the_next_sentence_begins(lm):
    context = scenes.caption(scenes.World(counts=(1.0,)).sample_many(1)[0])
    prompt = texts.prompt("what is the ground ?", context)
    ids = lm.inputs(prompt)["input_ids"]
    for _ in range(8):  # greedy, by hand
        ids = torch.cat([ids, lm.model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    written = lm.tokenizer.decode(ids[0, lm.inputs(prompt)["input_ids"].shape[1] :])
    (answer,) = lm.answer(prompt)
    assert answer == re.split(r"<end>|[.,]", written)[0].strip() != ""
    assert lm.answer(["dog -> animal , tulip -> plant , crab ->"])[0].count(" ") <= 1


def test_a_prompt_alone_and_in_a_batch_gives_the_same(lm, llava):
    drawn = scenes.World(words=0.5).sample_many(6)
    asked = questions_about(drawn)
    assert len({len(ids) for ids in lm.tokenizer(asked).input_ids}) > 2  # else nothing would be padded
    pairs = [(lm.logits(asked), torch.cat([lm.logits(prompt) for prompt in asked]))]
    alone = [llava.logits([scene], [prompt]) for scene, prompt in zip(drawn, asked, strict=True)]
    pairs.append((llava.logits(drawn, asked, batch=4), torch.cat(alone)))
    several = ["<image> -> red , <image> ->", "<image> ->", "<image> -> sea , <image> -> grass , <image> ->"]
    alone = [llava.logits(drawn[a:b], p) for (a, b), p in zip(((0, 2), (2, 3), (3, 6)), several, strict=True)]
    pairs.append((llava.logits(drawn, several, batch=2), torch.cat(alone)))
    pairs.append((llava.logits(None, asked), torch.cat([llava.logits(None, [prompt]) for prompt in asked])))
    for together, alone in pairs:
        assert together.shape == alone.shape and torch.allclose(together, alone, atol=1e-3)
    assert lm.answer(asked) == [lm.answer(prompt)[0] for prompt in asked]
    one = [llava.answer([scene], prompt)[0] for scene, prompt in zip(drawn, asked, strict=True)]
    assert llava.answer(drawn, asked, batch=4) == one
    assert llava.describe(drawn, batch=4) == [llava.describe([scene])[0] for scene in drawn]


def test_padding_is_on_the_left_and_prompts_end_in_text(lm, llava):
    ids, mask = lm.inputs(["what is this ?", "red"]).values()
    assert mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert ids[1].tolist() == [0, 0, 0, 1, lm.word_id("red")]
    assert lm.word_id("polar bear") == lm.tokenizer.convert_tokens_to_ids("polar")
    drawn = scenes.World(counts=(1.0,)).sample_many(2)
    ids = llava.inputs(drawn, ["what is this ? answer :", "is there a dog ? answer :"])["input_ids"]
    for row, scene in zip(ids, drawn, strict=True):
        image = llava.model.config.image_token_id
        spans = anatomy.spans(llava.tokenizer, row, image, llava.grid, llava.masks(scene))
        assert spans.last == len(row) - 1 and spans.image.stop - spans.image.start == 64 and len(spans.objects[0])


def test_the_first_token_of_an_answer_depends_on_what_stands_before_it(monkeypatch):
    """Most released tokenizers write " red" as one token, and "red" behind a line's end as others."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u0120", "r"), ("\u0120r", "e"), ("\u0120re", "d")]  # \u0120 is the space
    vocabulary = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    lm = models.Language(model=None, tokenizer=tokenizer, anatomy=None, device=None, card={})
    assert lm.word_id("red") == vocabulary["\u0120red"]
    monkeypatch.setattr(models.Language, "_text", lambda *_: "assistant\n")
    assert lm.word_id("red") == vocabulary["r"]


def test_the_processor_alone_gives_the_same_inputs(llava, llava_recipe):
    drawn = scenes.World(words=0.5).sample_many(3)
    pictures = [Image.fromarray(scenes.render(scene)) for scene in drawn]
    for asked in ("what is this ? answer :", "a <image> b"):
        text = asked if "<image>" in asked else f"<image> {asked}"
        theirs = llava.processor(images=pictures[0], text=text, return_tensors="pt")
        ours = llava.inputs(drawn[:1], asked)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for pixels in (llava.pixels(drawn), llava.inputs(drawn, "what is this ?")["pixel_values"]):
        assert (pixels - llava_recipe.pixels(drawn)).abs().max() <= 1e-6
    assert torch.equal(llava.pixels(scenes.render_batch(drawn)), llava.pixels(drawn))
    assert llava.pixels(scenes.render_batch(drawn, 200)).shape == (3, 3, 64, 64)
    # the same ids as training puts together by hand
    asked = texts.prompt(texts.DESCRIBE)
    ids = llava.tokenizer(llava_recipe.IMAGE + asked).input_ids
    assert llava.inputs(drawn[:1], asked)["input_ids"][0].tolist() == ids
    again = LlavaProcessor.from_pretrained(models.FOLDER / "generative")
    assert again(images=pictures[0], text=f"<image>{asked}").input_ids[0] == ids


@pytest.mark.parametrize(
    ("n", "prompts"), [(2, ["a"]), (1, ["a", "b"]), (3, "<image> -> red , <image> ->"), (None, ["<image> what ?"])]
)
def test_pictures_and_their_places_are_counted(llava, n, prompts):
    drawn = scenes.World().sample_many(n) if n else None
    with pytest.raises(UsageError, match=f"places for . pictures, and {n or 0} were given"):
        llava.answer(drawn, prompts)


def test_a_prompt_too_long_is_said(lm):
    with pytest.raises(UsageError, match="A prompt has 601 tokens, and this model reads 512"):
        lm.logits("red " * 600)


def test_the_writers_twins_are_untrained_reproducible_and_of_the_same_shape(lm, llava, copied):
    for folder in ("language", "generative"):
        weights_in(copied / folder).unlink()  # a twin needs none
    held = [fact for fact in texts.facts() if fact.held_out][::2]
    drawn = scenes.World(counts=(1.0,), natural=0.0).sample_many(60)
    for model, ask, truth, chance in (
        (lm, lambda m: m.answer([f.prompt for f in held]), [f.answer for f in held], 0.1),
        (llava, lambda m: m.answer(drawn, "what colour is this ? answer :"), [s.items[0].colour for s in drawn], 1 / 8),
    ):
        family = model.card["family"]
        twin, again, other = (models.load(family, device="cpu", weights="random", seed=s) for s in (0, 0, 1))
        state, same, different = (m.model.state_dict() for m in (twin, again, other))
        trained = model.model.state_dict()
        assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in trained.items()}
        for name, tensor in state.items():
            assert torch.equal(tensor, same[name]), name
            if tensor.ndim >= 2:  # biases and norms begin as constants
                assert not torch.allclose(tensor, different[name], atol=1e-3), name
                assert not torch.allclose(tensor, trained[name], atol=1e-3), name  # also in LLaVA's vision tower
        error = 4 * np.sqrt(chance / len(truth))
        right = [np.mean([a == b for a, b in zip(ask(m), truth, strict=True)]) for m in (model, twin)]
        assert right[0] > 0.7 and right[1] <= chance + error and twin.card["weights"] == "random"
        assert "held_out" not in twin.card and "sha256" not in twin.card


def test_the_half_is_another_model_of_the_same_words(lm):
    half = models.load("language", device="cpu", name="half")
    assert half.card["name"] == "language_half" and half.tokenizer.get_vocab() == lm.tokenizer.get_vocab()
    small, large = half.anatomy.towers["lm"], lm.anatomy.towers["lm"]
    assert small.n_layers < large.n_layers and small.width < large.width
    assert models.read_card("language_half")["seed"] != models.read_card("language")["seed"]
    twin = models.load("language", device="cpu", name="half", weights="random")
    assert twin.anatomy.towers["lm"].width == small.width


def test_llava_sees_through_the_contrastive_models_vision_tower(llava, llava_recipe):
    clip = models.load("contrastive", device="cpu", name="first")
    tower = llava.model.model.vision_tower.state_dict()
    expected = llava_recipe.vision_weights(
        load_file(models.FOLDER / "contrastive_first" / "open_clip_model.safetensors")
    )
    assert expected.keys() == {name for name in tower if not name.endswith("position_ids")}
    assert all(torch.equal(tensor, tower[name]) for name, tensor in expected.items())
    drawn, config = scenes.World(words=0.5).sample_many(8), llava.model.config
    n_layers = clip.anatomy.towers["vision"].n_layers
    read = f"vision.{n_layers + config.vision_feature_layer}.resid"  # hidden_states[0] is before layer 0
    with torch.no_grad(), record(clip.anatomy, read) as seen:
        clip.model.encode_image(clip.pixels(drawn))
    with torch.no_grad(), record(llava.anatomy, "projector") as entered:
        inside = llava.model.model.vision_tower(llava.pixels(drawn), output_hidden_states=True).hidden_states
        llava.model(**llava.inputs(drawn, "what is this ? answer :"))
        expected = llava.model.model.multi_modal_projector(seen[read][:, 1:])
    scale = seen[read].abs().max()
    assert torch.allclose(inside[config.vision_feature_layer], seen[read], atol=1e-5 * scale)
    assert torch.allclose(entered["projector"], expected, atol=1e-5 * expected.abs().max())


def test_transformers_loads_the_folders_by_itself(lm, llava):
    """What is on disk is the library's own format: no code of ours is needed to use it."""
    drawn, prompt = scenes.World().sample_many(2), "what is this ? answer :"
    plain = AutoModelForCausalLM.from_pretrained(models.FOLDER / "language", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(models.FOLDER / "language")(prompt, return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(plain(**ids).logits[:, -1], lm.logits(prompt), atol=1e-4)
        plain = AutoModelForImageTextToText.from_pretrained(models.FOLDER / "generative", dtype=torch.float32)
        assert torch.allclose(
            plain(**llava.inputs(drawn, prompt)).logits[:, -1], llava.logits(drawn, prompt), atol=1e-4
        )


@pytest.mark.parametrize("folder", ["language", "language_half", "generative"])
def test_card_and_config_agree_on_the_writers(folder, lm, llava):
    card, config = (json.loads((models.FOLDER / folder / f"{name}.json").read_text()) for name in ("card", "config"))
    text = config.get("text_config", config)
    model = {"language": lm, "generative": llava}.get(folder) or models.load("language", device="cpu", name="half")
    tower = model.anatomy.towers["lm"]
    assert 8 <= text["num_hidden_layers"] == tower.n_layers and text["vocab_size"] == len(model.tokenizer)
    assert card["parameters"] == sum(p.numel() for p in model.model.parameters())
    assert card["steps"] > 0 and {"seed", "machine", "data", "repeat"} <= card.keys()
    assert str(model).startswith("family") and "held out     facts" in str(model)


# ---- released architectures ----


def shrunk(monkeypatch, family, name, text=None, vision=None, **both):
    """The released architecture with fewer layers, or narrower: the same code in less time."""
    release = models.RELEASED[family][name]
    config = copy.deepcopy(release.config)
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if part and "num_hidden_layers" in part:
            part |= both
    config.get("text_config", config).update(text or {})
    config.get("vision_config", {}).update(vision or {})
    monkeypatch.setitem(models.RELEASED[family], name, dataclasses.replace(release, config=config))


def test_released_configs_have_the_published_number_of_parameters():
    """Qwen1.5 says 464 M (620 M with the embedding counted twice), LLaVA-1.5 7.06 billion."""
    sizes = {}
    for family, auto in (("language", AutoModelForCausalLM), ("generative", AutoModelForImageTextToText)):
        for name, release in models.RELEASED[family].items():
            with torch.device("meta"):
                model = auto.from_config(AutoConfig.for_model(**release.config))
            sizes[name] = sum(p.numel() for p in model.parameters())
            anatomy.of(model)
    assert sizes["Qwen1.5-0.5B-Chat"] == 463_987_712 and sizes["llava-1.5-7b"] == 7_063_427_072
    for name, release in models.RELEASED["generative"].items():  # two bytes each
        assert release.megabytes == pytest.approx(2 * sizes[name] / 1e6, rel=0.01)


@pytest.mark.parametrize(
    ("name", "side", "tokens"), [("llava-interleave-qwen-0.5b", 384, 729), ("llava-1.5-7b", 336, 576)]
)
def test_released_llavas_go_through_the_same_code(name, side, tokens, monkeypatch):
    small = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2)
    text = small if name == "llava-1.5-7b" else small | {"num_key_value_heads": 2}
    shrunk(monkeypatch, "generative", name, text, small, num_hidden_layers=2)
    llava = models.load("generative", "rehearsal", "cpu", name=name)
    assert llava.resolution == side and llava.grid[0] * llava.grid[1] == tokens
    assert llava.card["weights"] == "random" and not llava.chat
    dtype = torch.bfloat16 if name == "llava-1.5-7b" else torch.float32
    assert llava.model.dtype == dtype and llava.card["precision"] == str(dtype).removeprefix("torch.")
    drawn, prompt = scenes.World(counts=(1.0,)).sample_many(1), "what is this ? answer :"
    inputs = llava.inputs(drawn, prompt)
    ids, image = inputs["input_ids"][0], llava.model.config.image_token_id
    assert (ids == image).sum() == tokens and inputs["pixel_values"].shape == (1, 3, side, side)
    spans = anatomy.spans(llava.tokenizer, ids, image, llava.grid, llava.masks(drawn[0]))
    assert spans.last == len(ids) - 1 and len(spans.objects[0]) >= tokens // 30  # of a drawing
    assert llava.logits(drawn, prompt).shape == (1, llava.model.config.text_config.vocab_size)
    assert isinstance(llava.answer(drawn, prompt, max_new_tokens=2)[0], str)


def test_the_released_language_model_goes_through_the_same_code(monkeypatch):
    shrunk(monkeypatch, "language", "Qwen1.5-0.5B-Chat", num_hidden_layers=2)
    lm = models.load("language", "rehearsal", "cpu")
    with record(lm.anatomy, "lm.1.resid") as cache:
        assert lm.logits(["dog -> animal , crab ->", "dog ->"]).shape == (2, 151936)
    assert cache["lm.1.resid"].shape == (2, 7, 1024) and lm.word_id("animal") < 455


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache that holds the embedded LLaVA in place of the released ones, in one file and in several."""
    folder = tmp_path / "snapshots" / "0123abcd"
    model = AutoModelForImageTextToText.from_pretrained(models.FOLDER / "generative")
    model.generation_config.update(do_sample=True, temperature=0.7, repetition_penalty=3.0)
    model.save_pretrained(folder, max_shard_size="4MB")
    shutil.copy(models.FOLDER / "generative" / "model.safetensors", folder)
    processor = LlavaProcessor.from_pretrained(models.FOLDER / "generative")
    processor.patch_size = processor.vision_feature_select_strategy = None  # as older repositories have it
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    found = lambda _, file: str(folder / file) if (folder / file).exists() else None
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", found)
    return folder


def test_the_hub_cache_is_read(hub, llava):
    shards = sorted(hub.glob("model-0*.safetensors"))
    assert len(shards) > 1
    drawn = scenes.World(counts=(1.0,)).sample_many(4)
    cached = models.load("generative", "hub", "cpu")
    assert cached.card["commit"] == "0123abcd" and cached.card["repository"].startswith("llava-hf/")
    for name, tensor in llava.model.state_dict().items():
        assert torch.equal(tensor, cached.model.state_dict()[name]), name
    asked = cached.tokenizer.decode(cached.inputs(drawn[:1], "what is this ? answer :")["input_ids"][0])
    assert re.fullmatch(
        r"<start> user : (<image> ?){64} ?what is this ?\? answer the question using a single word or phrase ?\. "
        r"assistant :",
        asked,
    ), asked
    assert cached.model.generation_config.repetition_penalty in (None, 1.0)
    assert len(cached.describe(drawn)) == 4 and len(cached.answer(None, ["what is a dog ?"])) == 1
    large = models.load("generative", "hub", "cpu", name="llava-1.5-7b")
    assert large.model.dtype == torch.bfloat16
    twin = models.load("generative", "hub", "cpu", weights="random")
    assert twin.card["weights"] == "random" and twin.card["commit"] == "0123abcd"
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(twin.model.state_dict()[name], cached.model.state_dict()[name], atol=1e-3)


def test_a_chat_template_in_the_cache_is_used(hub):
    template = "{% for message in messages %}ask{% for part in message['content'] %}"
    template += "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}\n{% endfor %}"
    (hub / "chat_template.jinja").write_text(template)
    llava = models.load("generative", "hub", "cpu")
    drawn = scenes.World().sample_many(2)
    ids = llava.inputs(drawn, "<image> and <image>")["input_ids"][0]
    assert llava.tokenizer.decode(ids[ids != 3], skip_special_tokens=True) == "ask and"
    assert (ids == 3).sum() == 128 and llava.word_id("red") == llava.tokenizer.convert_tokens_to_ids("red")


def test_an_incomplete_cache_is_as_good_as_none(hub):
    next(hub.glob("model-00002-*")).unlink()
    with pytest.raises(UsageError, match="model-00002-of.* is missing.*hf download llava-hf/llava-1.5-7b-hf"):
        models.load("generative", "hub", "cpu", name="llava-1.5-7b")
    states = {row["name"]: row["state"] for row in models.inventory() if row["profile"] == "hub"}
    assert states["llava-1.5-7b"] == "not cached" and states["llava-interleave-qwen-0.5b"] == "cached"
    (hub / "model.safetensors").rename(hub / "pytorch_model.bin")
    with pytest.raises(UsageError, match="model.safetensors is missing"):
        models.load("generative", "hub", "cpu")


def test_weights_that_do_not_fit_are_not_filled_up_at_random(hub):
    config = json.loads((hub / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (hub / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="do not fit the config"):
        models.load("generative", "hub", "cpu")


# ---- their recipes ----


def test_the_language_recipe_resumes_to_the_same_weights(language_recipe, monkeypatch, tmp_path):
    recipe = language_recipe
    monkeypatch.setattr(recipe, "BATCH", 4)
    train = lambda stop: recipe.train("language_half", "cpu", stop, helpers=0)
    resume(recipe, monkeypatch, tmp_path, (1, 3), train, "CHECKPOINTS", "language_half")


@pytest.fixture
def quick(llava_recipe, monkeypatch):
    """The generative recipe with small batches, and with every kind of batch within the first steps."""
    for name, value in dict(BATCH=8, PARTS=2, PROJECTOR_ALONE=1, TEXT_EVERY=3, EPISODES_EVERY=5).items():
        monkeypatch.setattr(llava_recipe, name, value)
    monkeypatch.setattr(llava_recipe, "EPISODES_FROM", 0.0)
    return llava_recipe


def test_the_generative_recipe_resumes_to_the_same_weights(quick, monkeypatch, tmp_path):
    resume(quick, monkeypatch, tmp_path, (1, 4), lambda stop: quick.train("cpu", stop, helpers=0, from_shipped=False))


def test_batches_are_functions_of_the_step(quick, language_recipe, lm, monkeypatch):
    monkeypatch.setattr(language_recipe, "BATCH", 4)
    first, second = "language", "language_half"
    which = ((first, 0, 0), (first, 1, 0), (first, 0, 1), (second, 0, 0), (first, 0, 0))
    made = [language_recipe.batch_at(name, step, part, lm.tokenizer)[0] for name, step, part in which]
    assert torch.equal(made[0], made[-1])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(made[:-1], 2))
    kinds = {quick.kind_at(step, 10) for step in range(1, 5)}
    assert kinds == {"picture", "text", "episode"}
    for step in range(5):
        one, same, part = (quick.batch_at(step, part, 10, lm.tokenizer) for part in (0, 0, 1))
        assert one.keys() == same.keys() and all(torch.equal(one[key], same[key]) for key in one)
        assert one["ids"].shape != part["ids"].shape or not torch.equal(one["ids"], part["ids"])


def test_turns_do_not_see_each_other(quick, lm):
    """The loss of a packed batch is that of every turn in a sequence of its own, plainly causal."""
    batch = quick.picture_batch(3, 0, lm.tokenizer)
    model, head = quick.build().eval(), 1 + quick.IMAGE_TOKENS
    rows = []
    for row, (ids, target, position) in enumerate(zip(batch["ids"], batch["target"], batch["position"], strict=True)):
        starts = (position == head).nonzero().flatten().tolist()
        end = int((ids != lm.tokenizer.pad_token_id).sum())
        for begin, stop in zip(starts, [*starts[1:], end], strict=True):
            rows.append([torch.cat([x[:head], x[begin:stop]]) for x in (ids, target)] + [row])
    assert len(rows) > 3 * len(batch["ids"])
    pad = lambda i, fill: torch.nn.utils.rnn.pad_sequence([r[i] for r in rows], batch_first=True, padding_value=fill)
    alone = dict(
        ids=pad(0, lm.tokenizer.pad_token_id), target=pad(1, -100), pixels=batch["pixels"][[r[2] for r in rows]]
    )
    with torch.no_grad():
        packed, single = quick.loss_of(model, batch), quick.loss_of(model, alone)
        mingled = quick.loss_of(model, batch | {"mask": torch.ones_like(batch["mask"]).tril()})
    assert abs(packed - single) < 1e-5 and abs(mingled - single) > 1e-3


def test_training_sees_one_side_of_the_split_and_asks_knowledge_of_some_objects_only(quick, lm, monkeypatch):
    seen, asked = [], []
    pixels, questions = quick.pixels, quick.questions
    monkeypatch.setattr(quick, "pixels", lambda drawn: seen.extend(drawn) or pixels(drawn))
    noted = lambda scene, rng: [asked.append((scene, q)) or q for q in questions(scene, rng)]
    monkeypatch.setattr(quick, "questions", noted)
    for step in range(12):
        for part in range(quick.PARTS):
            quick.batch_at(step, part, 12, lm.tokenizer)
    items = [(item.name, item.colour, scene.ground) for scene in seen for item in scene.items]
    assert len(items) > 80 and not scenes.HELD_OUT & set(items) and texts.WORLD.split == "train"
    known = [scene.names[0] for scene, question in asked if question.kind in quick.KNOWLEDGE]
    assert len(known) > 10 and set(known) <= set(quick.TAUGHT) and len(quick.TAUGHT) == len(scenes.OBJECTS) * 3 / 4
    others = {scene.names[0] for scene, question in asked if question.kind == "this_object"}
    assert others - set(quick.TAUGHT)  # they are asked after, but not what one would have to know


def test_episodes_over_pictures_ask_knowledge_of_taught_objects_only(llava_recipe):
    rng = np.random.default_rng(0)
    for task in llava_recipe.IMAGE_TASKS:
        shown = {scene.names[0] for _ in range(6) for scene in llava_recipe.image_episode(task, rng, 5, "train")[0]}
        assert bool(shown - set(llava_recipe.TAUGHT)) == (task not in texts.TASKS), task


def test_an_invented_companion_is_no_held_out_combination(llava_recipe):
    rng = np.random.default_rng(0)
    alone = [scene for scene in scenes.World(counts=(1.0,), split="train").sample_many(300, 0)]
    invented = 0
    for scene in alone:
        told, companion = llava_recipe.caption(scene, rng), scenes.COMPANION[scene.names[0]]
        if companion in llava_recipe.named_in(told):
            invented += 1
            colour = next(word for word in told.split(f" {companion}")[0].split()[::-1] if word in scenes.COLOURS)
            assert (companion, colour, scene.ground) not in scenes.HELD_OUT, told
    assert 0.15 < invented / len(alone) < 0.4  # 0.6 of a third, 0.1 of the others


def test_questions_follow_the_weights_of_their_kinds(llava_recipe):
    rng, asked = np.random.default_rng(0), []
    for scene in scenes.World(split="train").sample_many(400, 0):
        chosen = llava_recipe.questions(scene, rng)
        assert len({question.text for question in chosen}) == len(chosen) <= llava_recipe.TURNS
        asked += chosen
    kinds = [question.kind for question in asked]
    assert kinds.count("position") > 3 * kinds.count("count") and set(kinds) <= set(llava_recipe.ASKED)
    answers = [question.answer for question in asked if question.kind == "presence"]
    assert 0.35 < answers.count("yes") / len(answers) < 0.75


def test_what_is_at_a_place_is_one_object(llava_recipe):
    for scene in scenes.World(counts=(0.0, 0.0, 0.5, 0.5)).sample_many(100, 0):
        at = {f"what is {scenes.place(item)} ?": item.name for item in scene.items}
        asked = {question.text: question.answer for question in llava_recipe.places(scene)}
        assert asked.items() <= at.items()
        assert (len(asked) == len(scene.items)) == (len(at) == len(scene.items))
