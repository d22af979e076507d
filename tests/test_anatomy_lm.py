"""What is particular to the anatomy of transformers models: language models, LLaVA, the towers of CLIP and SigLIP.
What holds for all families is in test_anatomy.py."""

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import CLIPVisionConfig, LlavaConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mmfm_utils import UsageError, anatomy, hooks
from mmfm_utils.anatomy import OpenProjection, blocked, restart
from mmfm_utils.hooks import edit, record
from tests.anatomy_families import FAMILIES, LANGUAGE, PICTURE, answer, clip_text, inputs, llama, relative, strengthen
from tests.anatomy_families import TRANSFORMERS as MODELS


def build(name):
    return FAMILIES[name].build()


def run(opened, name, **options):
    with torch.no_grad():
        return answer(opened.module(**inputs(name), **options))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models():
    """{name: (the model as it was, opened, all that a pass holds)}, each made when it is first asked for."""

    class Made(dict):
        def __missing__(self, name):
            plain = build(name)
            opened = anatomy.of(copy.deepcopy(plain))
            with record(opened, "*") as seen:
                run(opened, name)
            self[name] = plain, opened, seen
            return self[name]

    return Made()


every_model = pytest.mark.parametrize("name", MODELS)
every_language_model = pytest.mark.parametrize("name", LANGUAGE)


# ---- parity with the plain model ----


@every_model
def test_parity(models, name):
    plain, opened, seen = models[name]
    assert plain.config._attn_implementation == "sdpa"
    with torch.no_grad():
        theirs = plain(**inputs(name), output_hidden_states=True)
        ours = opened.module(**inputs(name), output_hidden_states=True)
    error = max(relative(answer(ours), answer(theirs)), relative(ours.hidden_states[-1], theirs.hidden_states[-1]))
    print(f"{name}: {error:.1e}")
    assert error < 1e-5
    for site in hooks.resolve(opened, "*.pattern"):  # the comparison has power: attention is peaked
        assert seen[site].amax(-1).mean() > 3 / seen[site].shape[-1], site


@pytest.mark.parametrize("name", ["clip vision", "qwen2"])
def test_it_is_the_same_function(name):
    """In double precision rounding no longer covers a small difference. (Llama's norms and angles stay in single.)"""
    model = build(name).double()
    batch = {key: x.double() if x.is_floating_point() else x for key, x in inputs(name).items()}
    with torch.no_grad():
        before = answer(model(**batch))
        after = answer(anatomy.of(model).module(**batch))
    assert relative(after, before) < (1e-13 if name == "clip vision" else 1e-7)


@every_model
def test_patterns_are_those_of_transformers(models, name):
    plain, opened, seen = models[name]
    eager = copy.deepcopy(plain)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = eager(**inputs(name), output_attentions=True).attentions
        ours = opened.module(**inputs(name), output_attentions=True).attentions
    sites = hooks.resolve(opened, "lm.*.pattern" if "lm" in opened.towers else "*.pattern")
    if name == "siglip vision":  # SigLIP does not tell its attention that somebody asked
        ours = [seen[site] for site in sites]
    assert len(theirs) == len(sites) == len(ours)
    for site, a, b in zip(sites, theirs, ours):
        assert torch.allclose(a, seen[site], atol=1e-5) and torch.allclose(b, seen[site], atol=1e-5)


def test_parity_at_the_shape_of_llava_1_5():
    """The released model's counts of heads, patches and words, in a narrow stream of two layers."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=16, image_size=336,
            patch_size=14, projection_dim=96, vocab_size=32000,
        ),
        text_config=transformers.LlamaConfig(
            hidden_size=256, intermediate_size=688, num_hidden_layers=2, num_attention_heads=32, vocab_size=32064,
            max_position_embeddings=4096, rms_norm_eps=1e-5,
        ),
        image_token_id=32000, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, 3148, 1001, 29901, *[32000] * 576, 29871, 13, 5618, 338, 29973]])
    batch = dict(input_ids=ids, pixel_values=torch.randn(1, 3, 336, 336), logits_to_keep=1)
    with torch.no_grad():
        before = model(**batch).logits
        opened = anatomy.of(model)
        with record(opened, ["projector", "lm.0.attn.pattern", "vision.*.attn.pattern"]) as seen:
            after = model(**batch).logits
    assert relative(after, before) < 1e-5
    assert seen["projector"].shape == (1, 576, 256) and seen["lm.0.attn.pattern"].shape == (1, 32, 585, 585)
    assert seen["vision.1.attn.pattern"].shape == (1, 16, 577, 577) and opened.towers["vision"].grid == (24, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llava", "qwen2"])
def test_half_precision_is_as_good_as_the_plain_model_s(name, dtype):
    model = build(name).to(dtype)
    batch = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs(name).items()}
    exact = copy.deepcopy(model).float()(**{k: x.float() if x.is_floating_point() else x for k, x in batch.items()})
    with torch.no_grad():
        theirs = relative(model(**batch).logits, exact.logits)
        opened = anatomy.of(model)
        with record(opened, "*") as seen:
            logits = model(**batch).logits
        with edit(opened, {"*.attn.*": lambda x, site: seen[site].contiguous()}):
            assert torch.equal(model(**batch).logits, logits)  # whichever way the numbers lie in memory
    ours = relative(logits, exact.logits)
    print(f"{name} {dtype}: plain {theirs:.1e}, opened {ours:.1e}")
    assert all(tensor.dtype == dtype for tensor in seen.values())
    assert 0 < theirs < 0.3 and ours < 3 * theirs  # scores are rounded too, as in transformers' eager attention


def test_gradients():
    """Those of the plain model, listened to or not: listening to the heads takes another path through the graph."""
    plain = build("llava").train()
    opened = anatomy.of(copy.deepcopy(plain))
    plain(**inputs("llava")).logits.square().mean().backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for sites in (["lm.1.attn"], ["lm.1.attn", "*.attn.heads"]):
        opened.module.zero_grad()
        with record(opened, sites, grad=True) as seen:
            opened.module(**inputs("llava")).logits.square().mean().backward()
        for name, parameter in opened.module.named_parameters():
            if parameter.grad is not None and not name.endswith("k_proj.bias"):  # which has no gradient but noise
                assert relative(parameter.grad, expected[name]) < 1e-4, name
    assert torch.allclose(seen["lm.1.attn.heads"].grad[:, :, 2], seen["lm.1.attn"].grad)


def test_a_saved_model_is_a_plain_one(tmp_path):
    opened = anatomy.of(build("llava"))
    opened.module.save_pretrained(tmp_path)
    assert "mmfm" not in (tmp_path / "config.json").read_text()
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.model.language_model.config._attn_implementation == "sdpa"
    assert relative(again(**inputs("llava")).logits, run(opened, "llava")) < 1e-5


def test_an_opened_model_is_read_in_another_process(tmp_path):
    """Which has opened nothing yet: what is read brings the way attention is computed."""
    model = build("llama")
    opened = anatomy.of(model)
    torch.save((model, opened, run(opened, "llama")), tmp_path / "model.pt")
    code = (
        "import sys, torch; from tests.anatomy_families import inputs; torch.set_num_threads(1)\n"
        "model, opened, logits = torch.load(sys.argv[1], weights_only=False)\n"
        "from mmfm_utils.hooks import record\n"
        "with torch.no_grad(), record(opened, 'lm.1.attn.pattern') as seen:\n"
        "    out = model(**inputs('llama')).logits\n"
        "assert torch.allclose(out, logits, atol=1e-4) and 'lm.1.attn.pattern' in seen\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", ["opened", "offloaded"])
def test_weights_that_wait_elsewhere(first):
    """accelerate's offloading, as `device_map="auto"` uses it: the model's tensors are on the device "meta"."""
    plain, model = anatomy.of(build("llava")), build("llava")
    if first == "opened":
        anatomy.of(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    opened = anatomy.of(model)
    assert opened.towers["lm"].proj.weight.is_meta
    with record(opened, "*") as found, record(plain, "*") as expected:
        assert torch.equal(run(opened, "llava"), run(plain, "llava"))
    for site in expected:
        assert torch.equal(found[site], expected[site]), site
    with edit(opened, {"lm.1.attn.heads": torch.zeros_like}):
        assert not torch.equal(run(opened, "llava"), run(plain, "llava"))
    for tower in ("vision", "lm"):
        for weight in ("W_Q", "W_K", "W_V", "W_O", "b_O", "W_in", "W_out", "b_out"):
            read = [getattr(each.towers[tower], weight)(1) for each in (opened, plain)]
            assert torch.equal(*read), (tower, weight)
    assert torch.equal(opened.towers["lm"].projection, plain.towers["lm"].projection)
    assert opened.towers["lm"].n_neurons == 80 and opened.towers["lm"].proj.weight.is_meta  # and wait again
    nowhere = anatomy.of(MODELS["llama"]().to("meta")).towers["lm"]
    for read in (lambda: nowhere.W_O(0), lambda: nowhere.projection):
        with pytest.raises(UsageError, match="not in memory"):
            read()


def test_attention_of_somebody_s_own_is_not_replaced():
    transformers.AttentionInterface.register("muted", lambda *_, **__: None)
    muted, replaced = build("llama"), build("llama")
    muted.set_attn_implementation("muted")
    with pytest.raises(UsageError, match="attention as 'muted' computes it"):
        anatomy.of(muted)
    assert muted.config._attn_implementation == "muted"
    projection = replaced.model.layers[1].self_attn.o_proj
    projection.forward = lambda z: 2 * nn.Linear.forward(projection, z)
    before = run(SimpleNamespace(module=replaced), "llama")
    with pytest.raises(UsageError, match="output projection whose forward was replaced"):
        anatomy.of(replaced)
    assert torch.equal(run(SimpleNamespace(module=replaced), "llama"), before)
    eager = build("llama")
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        before = answer(eager(**inputs("llama")))
    assert relative(run(anatomy.of(eager), "llama"), before) < 1e-5


def test_a_model_that_shares_the_config_stays_as_it_was():
    model = build("qwen2")
    twin = transformers.Qwen2ForCausalLM(model.config).eval()
    padded = dict(inputs("qwen2"), attention_mask=torch.tensor([[1] * 12, [0] * 3 + [1] * 9]))
    with torch.no_grad():
        before = twin(**padded).logits
        anatomy.of(model)
        assert relative(twin(**padded).logits[:, 3:], before[:, 3:]) < 1e-6
    assert not any(isinstance(module, OpenProjection) for module in twin.modules())


def test_unknown_models():
    with pytest.raises(UsageError, match="does not know GPT2Model; it knows .*LlamaModel.*CLIPTextModel.*register"):
        anatomy.of(transformers.GPT2Model(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)))
    model = build("llava")
    model.model.vision_tower = transformers.ViTModel(transformers.ViTConfig(**PICTURE))
    with pytest.raises(UsageError, match="the layers at model.vision_tower.* of Llava.*: register a Layout"):
        anatomy.of(model)  # not the language model alone: an edit of "*" would miss half of it
    other = build("llama")
    other.model.layers[2].self_attn.o_proj = type("Int8Linear", (nn.Linear,), {})(48, 48, bias=False)
    with pytest.raises(UsageError, match="output projection of the kind Int8Linear"):
        anatomy.of(other)
    for each in (model, other):
        assert each.config._attn_implementation == "sdpa"
        assert not any(isinstance(module, (nn.Identity, OpenProjection)) for module in each.modules())


# ---- the places and what they hold ----


@every_model
def test_site_names_and_shapes(models, name):
    _, opened, seen = models[name]
    assert set(seen) == set(opened.points)
    text = inputs(name).get("input_ids", torch.empty(2, 0)).shape[1]
    expected = {}
    for site, tower in opened.towers.items():
        tokens = tower.n_tokens if site == "vision" else text
        heads, kv, dim, width = tower.n_heads, tower.n_kv_heads, tower.head_dim, tower.width
        shapes = {"embed": (2, tokens, width), "final": (2, tokens, width)}
        for layer in range(tower.n_layers):
            shapes |= {f"{layer}.attn.{x}": (2, tokens, heads if x in "qz" else kv, dim) for x in "qkvz"}
            shapes |= {f"{layer}.attn.{x}": (2, heads, tokens, tokens) for x in ("scores", "pattern")}
            shapes |= {f"{layer}.{x}": (2, tokens, width) for x in ("resid", "attn", "mlp")}
            shapes |= {f"{layer}.attn.heads": (2, tokens, heads, width), f"{layer}.mlp.hidden": (2, tokens, 80)}
        if site == "lm":
            shapes["logits"] = (2, tokens, 61)
        if site == "vision" and "siglip" not in name:
            shapes["final"] = (2, 1, width)  # CLS alone
        if "projected" in name or name == "siglip vision":
            shapes["out"] = (2, 32 if "projected" in name else width)
        expected |= {f"{site}.{place}": shape for place, shape in shapes.items()}
    if "llava" in name:
        expected |= dict.fromkeys(("projector", "projector.hidden"), (2, 17 if name == "llava full" else 16, 48))
    assert {site: tuple(tensor.shape) for site, tensor in seen.items()} == expected


def test_facts(models):
    qwen, mistral = models["qwen2"][1].towers["lm"], models["mistral"][1].towers["lm"]
    assert (qwen.n_layers, qwen.n_heads, qwen.n_kv_heads, qwen.head_dim, qwen.width) == (3, 6, 2, 8, 48)
    assert (qwen.n_neurons, qwen.n_tokens, qwen.grid, qwen.causal) == (80, 128, None, True)
    assert (mistral.n_heads, mistral.n_kv_heads, mistral.head_dim, mistral.width) == (6, 3, 12, 48)
    clip, siglip = models["llava"][1].towers["vision"], models["llava siglip qwen2"][1].towers["vision"]
    assert (clip.n_layers, clip.grid, clip.n_tokens, siglip.grid, siglip.n_tokens) == (4, (4, 4), 17, (4, 4), 16)
    assert not clip.causal and models["clip text"][1].towers["text"].causal
    assert mistral.b_Q(0).shape == (6, 12) and mistral.b_K(0).shape == (3, 12) and mistral.b_O(0).shape == (48,)
    assert not any(bias.any() for bias in (mistral.b_Q(0), mistral.b_V(0), mistral.b_O(0), mistral.b_gate(0)))
    assert qwen.b_Q(0).any() and not qwen.b_O(0).any()
    for message, fact in (
        ("no projection", lambda: clip.projection),
        ("have no gate", lambda: clip.W_gate(0)),
        ("does not know", lambda: siglip.pooled(torch.zeros(1, 16, 48))),
    ):
        with pytest.raises(UsageError, match=message):
            fact()


def test_tower_weights_are_the_model_s_own_memory():
    for name in ("qwen2", "clip text"):
        opened = anatomy.of(build(name))
        (tower,), before = opened.towers.values(), run(opened, name)
        for weight in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", *(["W_gate"] if name == "qwen2" else [])):
            view = getattr(tower, weight)(1)
            saved = view.clone()
            view[0].mul_(-1)
            assert relative(run(opened, name), before) > 1e-3, weight
            view.copy_(saved)
        assert torch.equal(run(opened, name), before)


@pytest.mark.parametrize("eos", [2, 40])
def test_text_is_pooled_where_transformers_pools_it(eos):
    model = strengthen(clip_text(eos=eos))
    opened, ids = anatomy.of(model), torch.tensor([[1, 5, 2, 9, 40, 60, 8], [1, 2, 40, 7, 40, 9, 60]])
    with torch.no_grad(), record(opened, "text.final") as seen:
        pooled = model(input_ids=ids).pooler_output
    assert torch.equal(opened.towers["text"].pooled(seen["text.final"], ids), pooled)


@every_model
def test_weights_rebuild_every_step(models, name):
    plain, opened, seen = models[name]
    for site, tower in opened.towers.items():
        block, here = tower.blocks[1], f"{site}.1.attn"
        norms = ("input_layernorm", "post_attention_layernorm") if site == "lm" else ("layer_norm1", "layer_norm2")
        x = block.get_submodule(norms[0])(seen[f"{site}.0.resid"])
        q, k, v = (
            torch.einsum("btw,hwd->bthd", x, getattr(tower, f"W_{c}")(1)) + getattr(tower, f"b_{c}")(1) for c in "QKV"
        )
        if site == "lm":  # q and k are those after rotary embedding
            stack = opened.module.get_submodule(opened.points["lm.final"].module.removesuffix(".norm"))
            angles = stack.rotary_emb(x, torch.arange(x.shape[1])[None])
            assert not torch.allclose(q, seen[f"{here}.q"], atol=1e-2)
            q, k = apply_rotary_pos_emb(q, k, *angles, unsqueeze_dim=2)
        for letter, rebuilt in zip("qkv", (q, k, v)):
            assert torch.allclose(rebuilt, seen[f"{here}.{letter}"], atol=1e-4), letter
        group = tower.n_heads // tower.n_kv_heads
        of_head = [head // group for head in range(tower.n_heads)]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k[:, :, of_head]) * tower.head_dim**-0.5
        masked = seen[f"{here}.scores"]
        assert torch.allclose(scores[masked.isfinite()], masked[masked.isfinite()], atol=1e-4)
        z = torch.einsum("bhqk,bkhd->bqhd", seen[f"{here}.pattern"], seen[f"{here}.v"][:, :, of_head])
        assert torch.allclose(z, seen[f"{here}.z"], atol=1e-5)
        heads = torch.einsum("bthd,hdw->bthw", z, tower.W_O(1))
        assert torch.allclose(heads, seen[f"{here}.heads"], atol=1e-4)
        assert relative(seen[f"{here}.heads"].sum(2) + tower.b_O(1), seen[here]) < 1e-5
        x = block.get_submodule(norms[1])(seen[f"{site}.0.resid"] + seen[here])
        hidden = x @ tower.W_in(1) + tower.b_in(1)
        if site == "lm":
            hidden = hidden * torch.nn.functional.silu(x @ tower.W_gate(1) + tower.b_gate(1))
        else:
            hidden = block.mlp.activation_fn(hidden)
        assert torch.allclose(hidden, seen[f"{site}.1.mlp.hidden"], atol=1e-4)
        assert relative(hidden @ tower.W_out(1) + tower.b_out(1), seen[f"{site}.1.mlp"]) < 1e-5


@every_model
def test_patterns_are_distributions_and_masked_scores_are_minus_infinity(models, name):
    _, opened, seen = models[name]
    for site in hooks.resolve(opened, "*.pattern"):
        pattern, scores = seen[site], seen[site.replace("pattern", "scores")]
        assert torch.allclose(pattern.sum(-1), torch.ones(()), atol=1e-5)
        tokens = pattern.shape[-1]
        allowed = torch.ones(tokens, tokens, dtype=torch.bool)
        if opened.towers[site.partition(".")[0]].causal:
            allowed = allowed.tril()
        if name == "mistral":
            allowed = allowed.triu(-5)
        assert torch.equal(scores > -torch.inf, allowed.expand_as(scores))
        assert torch.equal(pattern > 0, allowed.expand_as(scores))


def test_the_image_tokens_are_the_projector_s(models):
    """With CLS dropped and kept, and without one: the projector reads what vision_feature_layer says."""
    for name, first, layer in (("llava", 1, 2), ("llava full", 0, 2), ("llava siglip qwen2", 0, 3)):
        _, opened, seen = models[name]
        n = seen["projector"].shape[1]
        assert torch.equal(seen["lm.embed"][:, 1 : 1 + n], seen["projector"])
        projector = opened.module.model.multi_modal_projector
        assert torch.allclose(projector(seen[f"vision.{layer}.resid"][:, first:]), seen["projector"], atol=1e-5)
        assert torch.allclose(projector.linear_2(seen["projector.hidden"]), seen["projector"], atol=1e-5)


def test_llava_reads_the_edited_stream_and_not_what_lies_beyond(models):
    """transformers collects the hidden states by hooks of its own, which stand since an earlier pass."""
    _, opened, seen = models["llava"]
    other, plain = torch.randn_like(seen["vision.2.resid"]), run(opened, "llava")
    with edit(opened, {"vision.2.resid": lambda x: other}), record(opened, "projector") as edited:
        changed = run(opened, "llava")
    expected = opened.module.model.multi_modal_projector(other[:, 1:])
    assert torch.allclose(edited["projector"], expected, atol=1e-5)
    with edit(opened, {"vision.embed": lambda x: x * 0}):
        assert not torch.equal(run(opened, "llava"), changed)
    beyond = [*hooks.resolve(opened, "vision.3.*"), "vision.final"]
    with edit(opened, dict.fromkeys(beyond, torch.zeros_like)):
        assert torch.equal(run(opened, "llava"), plain)
    with edit(opened, {"lm.0.resid": torch.zeros_like}), torch.no_grad():
        assert not opened.module(**inputs("llava"), output_hidden_states=True).hidden_states[1].any()


def test_contexts_act_in_their_order_whoever_else_listens(models):
    _, opened, _ = models["llava"]
    with record(opened, "vision.1.resid") as seen:
        run(opened, "llava")
    with record(opened, "vision.1.resid") as outside, edit(opened, {"vision.1.resid": lambda x: x + 1}):
        with edit(opened, {"vision.1.resid": lambda x: x * 2}), record(opened, "vision.1.resid") as inside:
            run(opened, "llava")
    assert torch.equal(outside["vision.1.resid"], seen["vision.1.resid"])
    assert torch.equal(inside["vision.1.resid"], (seen["vision.1.resid"] + 1) * 2)


def test_dropout_in_training():
    opened = anatomy.of(llama(attention_dropout=1.0))
    for training in (True, False):
        opened.module.train(training)
        for listened in ("lm.*.attn.z", "lm.*.attn.*"):  # the fused kernel, and step by step
            with record(opened, listened) as seen:
                run(opened, "llama")
            assert all(bool(seen[f"lm.{layer}.attn.z"].any()) != training for layer in range(3))


# ---- masks, caches, batches ----


@every_language_model
def test_generate_with_a_cache(models, name):
    plain, opened, seen = models[name]
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    expected = plain.generate(**inputs(name), **options)
    with record(opened, ["lm.0.attn.k", "lm.0.attn.pattern", "lm.logits"], every=True) as steps:
        assert torch.equal(opened.module.generate(**inputs(name), **options), expected)
    assert len(set(expected[0, -6:].tolist())) > 1
    n, past = inputs(name)["input_ids"].shape[1], [k.shape[1] for k in steps["lm.0.attn.k"]]
    assert past == ([12, 6, 6, 6, 6, 6] if name == "mistral" else list(range(n, n + 6)))  # Mistral's window
    assert [p.shape[2] for p in steps["lm.0.attn.pattern"]] == [n, 1, 1, 1, 1, 1]
    assert torch.allclose(steps["lm.logits"][0][:, -1], seen["lm.logits"][:, -1], atol=1e-5)


@every_language_model
def test_left_padding(models, name):
    plain, opened, seen = models[name]
    batch = inputs(name)
    ids, n = batch["input_ids"], batch["input_ids"].shape[1]
    batch["input_ids"] = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    with torch.no_grad(), record(opened, ["lm.1.attn.pattern", "lm.1.attn.scores", "lm.2.resid"]) as padded:
        logits = opened.module(**batch).logits
        assert relative(logits[:, 3:], plain(**batch).logits[:, 3:]) < 1e-5
    assert relative(logits[:, 3:], seen["lm.logits"]) < 1e-4
    pattern = padded["lm.1.attn.pattern"]
    assert padded["lm.2.resid"].isfinite().all()
    assert torch.equal(pattern[:, :, :3], torch.eye(3, n + 3).expand(2, 6, 3, n + 3))  # padding sees itself alone
    assert not pattern[:, :, 3:, :3].any() and torch.allclose(pattern.sum(-1), torch.ones(()), atol=1e-5)
    assert (padded["lm.1.attn.scores"][:, :, 3:, :3] == -torch.inf).all()
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    fresh = opened.module.generate(**batch, **options)[:, -4:]
    assert torch.equal(fresh, plain.generate(**inputs(name), **options)[:, -4:])


def test_right_padding_is_as_in_the_plain_model(models):
    plain, opened, _ = models["clip text projected"]
    batch = dict(inputs("clip text"), attention_mask=torch.tensor([[1] * 12, [1] * 7 + [0] * 5]))
    with torch.no_grad():
        assert relative(opened.module(**batch).last_hidden_state, plain(**batch).last_hidden_state) < 1e-5


def test_a_mask_of_one_s_own(models):
    """Of shape (batch, 1, query, key), boolean (true: may attend) or added to the scores."""
    plain, opened, _ = models["llama"]
    may = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, 12, 12).clone()
    may[:, :, 8:, 2:5] = False
    added = torch.zeros(may.shape).masked_fill(~may, torch.finfo(torch.float32).min)
    added[:, :, 10, 1] = 2
    with torch.no_grad():
        expected = [plain(**inputs("llama"), attention_mask=mask).logits for mask in (may, added)]
        for mask, logits in zip((may, added), expected):
            with record(opened, "lm.0.attn.scores") as seen:
                assert relative(opened.module(**inputs("llama"), attention_mask=mask).logits, logits) < 1e-5
            assert torch.equal(seen["lm.0.attn.scores"] > -torch.inf, may.expand(2, 6, 12, 12))
    assert relative(expected[1], expected[0]) > 1e-3


# ---- blocked ----


@pytest.mark.parametrize("name", ["llava", "qwen2"])
def test_blocked_takes_out_exactly_the_chosen_entries(models, name):
    _, opened, _ = models[name]
    with record(opened, "lm.*") as seen:
        run(opened, name)
    n = seen["lm.logits"].shape[1]
    with edit(opened, {"lm.1.attn.scores": blocked([-1, 7], slice(2, 6))}), record(opened, "lm.*") as cut:
        run(opened, name)
    site = "lm.1.attn.pattern"
    gone = torch.zeros(n, n, dtype=torch.bool)
    gone[7, 2:6] = gone[n - 1, 2:6] = True
    assert torch.equal(cut[site] == 0, (seen[site] == 0) | gone)
    left = seen[site].masked_fill(gone, 0)
    assert torch.allclose(cut[site], left / left.sum(-1, keepdim=True), atol=1e-5)
    others = [t for t in range(n) if t not in (7, n - 1)]
    assert torch.equal(cut[site][:, :, others], seen[site][:, :, others])
    for before in ("lm.0.resid", "lm.1.attn.q", "lm.1.attn.v"):
        assert torch.equal(cut[before], seen[before])
    assert torch.equal(cut["lm.2.resid"][:, :7], seen["lm.2.resid"][:, :7])
    assert not torch.allclose(cut["lm.2.resid"][:, 7], seen["lm.2.resid"][:, 7], atol=1e-3)


def test_blocked_names_tokens_in_every_way(models):
    _, opened, seen = models["llama"]
    scores = seen["lm.0.attn.scores"]
    expected = blocked([6, 7], [1, 2, 3])(scores)
    assert not torch.equal(expected, scores)
    mask = torch.zeros(12, dtype=torch.bool)
    mask[1:4] = True
    indices = (slice(1, 4), torch.tensor([1, 2, 3]), range(1, 4), np.array([1, 2, 3]), (-11, 2, 3))
    for keys in (*indices, mask, mask.tolist(), mask.numpy(), mask.expand(2, 12)):
        assert torch.equal(blocked(slice(6, 8), keys)(scores), expected)
    assert torch.equal(blocked(7, 1)(scores), blocked([7], [1])(scores))
    assert torch.equal(blocked([], [1])(scores), scores) and torch.equal(blocked([7], torch.tensor([]))(scores), scores)
    rows = torch.zeros(2, 12, dtype=torch.bool)
    rows[0, 1:4] = rows[1, 5] = True
    differ = blocked([6, 7], rows)(scores)
    assert torch.equal(differ[:1], blocked([6, 7], [1, 2, 3])(scores[:1]))
    assert torch.equal(differ[1:], blocked([6, 7], 5)(scores[1:]))
    per_row = blocked(rows, [0])(scores)
    assert torch.equal(per_row[1:], blocked(5, 0)(scores[1:]))


def test_blocked_refuses(models):
    _, opened, seen = models["llama"]
    for queries, keys, message in (
        (slice(None), 0, "leaves query token 0 "),
        ([5], range(6), r"token 5 \(row 0 of the batch\) nothing to attend to"),
        (torch.ones(11, dtype=torch.bool), 0, "mask of shape"),
        (torch.ones(3, 12, dtype=torch.bool), 0, "mask of shape"),
    ):
        with pytest.raises(UsageError, match=message), edit(opened, {"lm.1.attn.scores": blocked(queries, keys)}):
            run(opened, "llama")
    with edit(opened, {"lm.1.attn.scores": blocked(-1, [2])}):
        with pytest.raises(UsageError, match="use_cache=False"):
            opened.module.generate(**inputs("llama"), max_new_tokens=2, min_new_tokens=2)
    with edit(opened, {"lm.1.attn.scores": blocked(-1, [2])}):
        opened.module.generate(**inputs("llama"), max_new_tokens=2, min_new_tokens=2, use_cache=False)


def test_restart_keeps_the_tokens_that_are_asked_for(models):
    _, opened, _ = models["qwen2"]
    with record(opened, ["lm.0.resid", "lm.logits"]) as seen:
        run(opened, "qwen2")
    with torch.no_grad():
        assert torch.equal(restart(opened, 0, seen["lm.0.resid"]), seen["lm.logits"])
        last = restart(opened, 0, seen["lm.0.resid"], keep=1)
        chosen = restart(opened, 0, seen["lm.0.resid"], keep=torch.tensor([4, 2]))
    assert relative(last, seen["lm.logits"][:, -1:]) < 1e-6 and last.shape == (2, 1, 61)
    assert relative(chosen, seen["lm.logits"][:, [4, 2]]) < 1e-6
    final = opened.towers["lm"].ln_final(seen["lm.0.resid"])
    assert torch.equal(opened.towers["lm"].pooled(final), final[:, -1])


def test_restart_keeps_padding_and_open_contexts(models):
    _, opened, _ = models["qwen2"]
    batch = dict(inputs("qwen2"), attention_mask=torch.tensor([[1] * 12, [0] * 4 + [1] * 8]))
    cut = {"lm.2.attn.scores": blocked(-1, slice(5, 9)), "lm.0.resid": torch.zeros_like}
    with (
        torch.no_grad(),
        record(opened, "lm.1.resid") as seen,
        edit(opened, {"lm.2.attn.scores": blocked(-1, slice(5, 9))}),
    ):
        expected = opened.module(**batch).logits
    with torch.no_grad():
        without = restart(opened, 1, seen["lm.1.resid"], batch["attention_mask"])
        unpadded = restart(opened, 1, seen["lm.1.resid"])
        cut.pop("lm.0.resid")  # a site before the layer is not reached
        with edit(opened, cut), record(opened, "lm.2.attn.pattern") as again:
            assert torch.equal(restart(opened, 1, seen["lm.1.resid"], batch["attention_mask"]), expected)
    assert not again["lm.2.attn.pattern"][:, :, -1, 5:9].any()
    assert not torch.allclose(without, expected, atol=1e-2) and not torch.allclose(without, unpadded, atol=1e-2)
    with pytest.raises(UsageError, match="waited in vain at lm.1.resid"), record(opened, "lm.1.resid"):
        restart(opened, 1, seen["lm.1.resid"])


def test_restart_has_gradients_and_leaves_the_model_whole_after_an_error(models):
    _, opened, seen = models["llama"]
    states, plain = seen["lm.1.resid"].clone().requires_grad_(), run(opened, "llama")
    restart(opened, 1, states, keep=1).sum().backward()
    assert states.grad.abs().sum(-1).gt(0).all()
    with pytest.raises(RuntimeError):
        restart(opened, 1, states[..., :5])
    assert torch.equal(run(opened, "llama"), plain)
    for layer in (-2, 3):
        with pytest.raises(UsageError, match=f"layer {layer} to None"):
            restart(opened, layer, states)
    with pytest.raises(UsageError, match="CLIPVisionModel has no 'lm'"):
        restart(models["clip vision"][1], 0, states)
