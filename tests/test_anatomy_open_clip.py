"""What is particular to the anatomy of open_clip models; what holds for all families is in test_anatomy.py."""

import copy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn

from mmfm_utils import UsageError, anatomy
from mmfm_utils.anatomy import OpenAttention, OpenProjection
from mmfm_utils.hooks import edit, record
from tests.anatomy_families import EOT, TEXT, VISION, captions, clip, pictures, relative, strengthen

pytestmark = pytest.mark.usefixtures("one_thread")


def build(vision=VISION, text=TEXT, **options):
    torch.manual_seed(0)
    return strengthen(clip(vision, text, **options))


@pytest.fixture(scope="module")
def plain():
    return build()


@pytest.fixture(scope="module")
def opened(plain):
    return anatomy.of(copy.deepcopy(plain))


def run(opened, tower="both"):
    with torch.no_grad():
        image = opened.module.encode_image(pictures()) if tower != "text" else None
        text = opened.module.encode_text(captions()) if tower != "vision" else None
    return image if tower == "vision" else text if tower == "text" else (image, text)


@pytest.fixture(scope="module")
def seen(opened):
    with record(opened, "*") as everything:
        run(opened)
    return everything


# ---- parity with the plain model ----


@pytest.mark.parametrize("grad", [False, True])  # torch takes its native kernel in one case and SDPA in the other
def test_parity(plain, opened, grad):
    with torch.set_grad_enabled(grad):
        for method, batch in (("encode_image", pictures()), ("encode_text", captions())):
            error = relative(getattr(opened.module, method)(batch), getattr(plain, method)(batch))
            print(f"{method} grad={grad}: {error:.1e}")
            assert error < 1e-5  # measured: 0 to 1.2e-6; plain float32 is itself 1.4e-6 from float64
        for ours, theirs in zip(opened.module(pictures(), captions()), plain(pictures(), captions()), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)  # normalised, as the loss sees them


def test_it_is_the_same_function():
    """In double precision rounding no longer covers a small difference."""
    model = build().double()
    with torch.no_grad():
        before = model.encode_image(pictures().double()), model.encode_text(captions())
        anatomy.of(model)
        after = model.encode_image(pictures().double()), model.encode_text(captions())
    assert max(relative(ours, theirs) for ours, theirs in zip(after, before, strict=True)) < 1e-13


def test_parity_at_full_size():
    torch.manual_seed(0)
    model = strengthen(open_clip.create_model("ViT-B-32", pretrained=None))
    images, texts = pictures(1, 224), captions(2, 77, 49407)
    with torch.no_grad():
        before = model.encode_image(images), model.encode_text(texts)
        opened = anatomy.of(model)
        after = model.encode_image(images), model.encode_text(texts)
        with record(opened, ["*.5.attn.pattern", "*.5.attn", "*.5.resid"]) as seen:
            model(images, texts)
    errors = [relative(ours, theirs) for ours, theirs in zip(after, before, strict=True)]
    print("ViT-B-32:", [f"{error:.1e}" for error in errors])
    assert max(errors) < 1e-5
    assert opened.towers["vision"].n_tokens == 50 and opened.towers["text"].n_tokens == 77
    for tower in ("vision", "text"):  # the comparison has power: attention is peaked and weighs in the stream
        assert seen[f"{tower}.5.attn.pattern"].amax(-1).mean() > 0.1
        assert seen[f"{tower}.5.attn"].norm() > 0.2 * seen[f"{tower}.5.resid"].norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_parity_in_half_precision(dtype, tolerance):
    model = build().to(dtype)
    with torch.no_grad():
        before = model.encode_image(pictures().to(dtype)), model.encode_text(captions())
        opened = anatomy.of(model)
        after = model.encode_image(pictures().to(dtype)), model.encode_text(captions())
        with record(opened, "*") as seen:
            model(pictures().to(dtype), captions())
    assert all(tensor.dtype == dtype for tensor in seen.values())
    for ours, theirs in zip(after, before, strict=True):
        error = relative(ours, theirs)
        print(f"{dtype}: {error:.1e}")
        assert error < tolerance


def test_parity_in_autocast_and_training_gradients():
    reference = build().train()
    model = copy.deepcopy(reference)
    anatomy.of(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(model.encode_image(pictures()), reference.encode_image(pictures())) < 0.03
    for each in (model, reference):
        (each.encode_image(pictures()).square().sum() + each.encode_text(captions()).square().sum()).backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not name.endswith("in_proj_bias"):  # key biases have no gradient but noise
            assert relative(parameter.grad, theirs[name].grad) < 1e-4, name


@pytest.mark.parametrize("listened", [None, "z", "pattern"])  # fused, around the kernel, step by step
@pytest.mark.parametrize("mask", [None, "bool", "additive", "per head", "padding"])
def test_masks_and_weights_like_torch(mask, listened):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    ours = copy.deepcopy(theirs)
    OpenAttention.open(ours)
    query, other = torch.randn(2, 5, 24), torch.randn(2, 7, 24)
    blocked = torch.rand(2 * 3, 5, 7) < 0.4
    blocked[..., 0] = False
    masks = {"bool": blocked[0], "additive": torch.randn(5, 7), "per head": blocked.float() * -1e9}
    padding = blocked[:2, 0] if mask == "padding" else None
    with record(ours, listened) if listened else nullcontext():
        for options in (dict(average_attn_weights=True), dict(average_attn_weights=False), dict(need_weights=False)):
            options |= dict(attn_mask=masks.get(mask), key_padding_mask=padding)
            (a, p), (b, r) = (each(query, other, other * 2, **options) for each in (ours, theirs))
            assert torch.allclose(a, b, atol=1e-6)
            assert p is r is None if "need_weights" in options else torch.allclose(p, r, atol=1e-6)


def test_tower_weights_follow_the_model():
    opened = anatomy.of(build())
    opened.module.double()
    assert opened.towers["text"].projection.dtype == opened.towers["text"].W_O(0).dtype == torch.float64


def test_unknown_models():
    with pytest.raises(UsageError, match="does not know Linear; it knows .* CLIP, CustomTextCLIP, VisionTransformer"):
        anatomy.of(nn.Linear(2, 2))
    for change, message in (
        (dict(ls_init_value=1e-5), "LayerScale"),
        (dict(qk_norm=True), "CustomResidualAttentionBlock"),
        (dict(final_ln_after_pool=True), "norm, pool and project"),
    ):
        model = build(dict(VISION, **change), TEXT)
        with pytest.raises(UsageError, match=message):
            anatomy.of(model)
        assert not any(isinstance(module, OpenAttention) for module in model.modules())


class Mine(nn.MultiheadAttention):
    """Somebody's own attention."""


def test_what_others_have_replaced_is_not_replaced_again():
    def of_a_kind(model):
        model.transformer.resblocks[1].attn.__class__ = Mine

    def projection(model):
        projection = model.visual.transformer.resblocks[1].attn.out_proj
        projection.forward = lambda z: 2 * nn.Linear.forward(projection, z)

    def encode(model):
        model.encode_text = lambda ids, normalize=False: 0 * type(model).encode_text(model, ids, normalize)

    for change, message in (
        (of_a_kind, "attention of the kind Mine"),
        (projection, "output projection whose forward was replaced"),
        (encode, "encode_text was replaced"),
    ):
        model = build()
        change(model)
        with pytest.raises(UsageError, match=message):
            anatomy.of(model)
        assert not any(isinstance(module, (OpenAttention, OpenProjection)) for module in model.modules())


# ---- the places and what they hold ----


def test_site_names_and_shapes(opened, seen):
    assert set(seen) == set(opened.points)
    for name, embed in (("vision", 64), ("text", 64)):
        tower = opened.towers[name]
        batch, tokens, heads, dim, width = 3, tower.n_tokens, tower.n_heads, tower.head_dim, tower.width
        expected = {
            "embed": (batch, tokens, width),
            "final": (batch, tokens, width),
            "out": (batch, embed),
        }
        for layer in range(tower.n_layers):
            expected |= {f"{layer}.attn.{x}": (batch, tokens, heads, dim) for x in "qkvz"}
            expected |= {f"{layer}.attn.{x}": (batch, heads, tokens, tokens) for x in ("scores", "pattern")}
            expected |= {f"{layer}.{x}": (batch, tokens, width) for x in ("resid", "attn", "mlp")}
            expected[f"{layer}.attn.heads"] = (batch, tokens, heads, width)
            expected[f"{layer}.mlp.hidden"] = (batch, tokens, tower.n_neurons)
        assert {site: tuple(seen[f"{name}.{site}"].shape) for site in expected} == expected
        assert sum(site.startswith(f"{name}.") for site in seen) == len(expected)


def test_facts(opened):
    vision, text = opened.towers["vision"], opened.towers["text"]
    assert (vision.n_layers, vision.n_heads, vision.head_dim, vision.width, vision.n_neurons) == (3, 6, 16, 96, 192)
    assert (text.n_layers, text.n_heads, text.head_dim, text.width, text.n_neurons) == (3, 6, 12, 72, 288)
    assert (vision.n_tokens, vision.grid, vision.causal) == (65, (8, 8), False)
    assert (text.n_tokens, text.grid, text.causal) == (20, None, True)
    assert not anatomy.of(build(VISION, dict(TEXT, no_causal_mask=True))).towers["text"].causal


def check_output(seen, name, tower):
    last = tower.ln_final(seen[f"{name}.{tower.n_layers - 1}.resid"])
    assert torch.allclose(last, seen[f"{name}.final"], atol=1e-5)
    assert relative(tower.pooled(last, captions()) @ tower.projection, seen[f"{name}.out"]) < 1e-5


def test_text_pooling_needs_ids(opened, seen):
    with pytest.raises(UsageError, match="token ids"):
        opened.towers["text"].pooled(seen["text.final"])


@pytest.mark.parametrize("pool", ["first", "last", "eos"])
def test_other_text_pooling(pool):
    text = dict(TEXT, pool_type=pool, eos_id=EOT)
    opened = anatomy.of(build(VISION, text))
    with record(opened, "text.*") as seen:
        run(opened, "text")
    check_output(seen, "text", opened.towers["text"])


def test_average_vision_pooling():
    opened = anatomy.of(build(dict(VISION, pool_type="avg"), TEXT))
    with record(opened, "vision.*") as seen:
        run(opened, "vision")
    check_output(seen, "vision", opened.towers["vision"])


@pytest.mark.parametrize("name", ["vision", "text"])
def test_weights_rebuild_every_step_of_attention(opened, seen, name):
    tower, layer = opened.towers[name], 1
    site = f"{name}.{layer}.attn"
    x = tower.blocks[layer].ln_1(seen[f"{name}.{layer - 1}.resid"])
    for letter in "QKV":
        weight, bias = getattr(tower, f"W_{letter}")(layer), getattr(tower, f"b_{letter}")(layer)
        assert torch.allclose(
            torch.einsum("btw,hwd->bthd", x, weight) + bias, seen[f"{site}.{letter.lower()}"], atol=1e-4
        )
    z = torch.einsum("bhqk,bkhd->bqhd", seen[f"{site}.pattern"], seen[f"{site}.v"])
    assert torch.allclose(z, seen[f"{site}.z"], atol=1e-5)
    heads = torch.einsum("bthd,hdw->bthw", z, tower.W_O(layer))
    assert torch.allclose(heads, seen[f"{site}.heads"], atol=1e-4)
    assert relative(seen[f"{site}.heads"].sum(2) + tower.b_O(layer), seen[site]) < 1e-5
    hidden = seen[f"{name}.{layer}.mlp.hidden"]
    assert relative(hidden @ tower.W_out(layer) + tower.b_out(layer), seen[f"{name}.{layer}.mlp"]) < 1e-5
    before_gelu = tower.blocks[layer].ln_2(seen[f"{name}.{layer - 1}.resid"] + seen[site])
    pre = before_gelu @ tower.W_in(layer) + tower.b_in(layer)
    assert torch.allclose(torch.nn.functional.gelu(pre), hidden, atol=1e-4)


@pytest.mark.parametrize("name", ["vision", "text"])
def test_patterns_are_those_of_torch(plain, opened, seen, name):
    tower = opened.towers[name]
    reference = (plain.visual if name == "vision" else plain).transformer.resblocks
    mask = plain.attn_mask if name == "text" else None
    for layer in range(1, tower.n_layers):
        x = tower.blocks[layer].ln_1(seen[f"{name}.{layer - 1}.resid"])
        pattern = reference[layer].attn(x, x, x, attn_mask=mask, average_attn_weights=False)[1]
        assert torch.allclose(pattern, seen[f"{name}.{layer}.attn.pattern"], atol=1e-5)
        assert pattern.amax(-1).mean() > 4 / tower.n_tokens  # far from uniform


def test_editing_the_heads_gives_their_sum_and_the_bias(opened, seen):
    tower, site = opened.towers["vision"], "vision.2.attn"
    other = seen[f"{site}.heads"].roll(1, 0) * 2
    with edit(opened, {f"{site}.heads": lambda x: other}), record(opened, site) as edited:
        run(opened, "vision")
    assert relative(edited[site], other.sum(2) + tower.b_O(2)) < 1e-5


def test_editing_the_pattern_and_blocking_scores(opened, seen):
    site, tower = "vision.2.attn", opened.towers["vision"]
    cls_only = torch.zeros_like(seen[f"{site}.pattern"])
    cls_only[..., 0] = 1
    with edit(opened, {f"{site}.pattern": lambda x: cls_only}), record(opened, f"{site}.z") as edited:
        run(opened, "vision")
    assert torch.allclose(edited[f"{site}.z"], seen[f"{site}.v"][:, :1].expand(-1, tower.n_tokens, -1, -1), atol=1e-6)

    def knock_out(x):
        x[..., 0, 5:] = float("-inf")
        return x

    with edit(opened, {f"{site}.scores": knock_out}), record(opened, f"{site}.pattern") as edited:
        run(opened, "vision")
    row = seen[f"{site}.pattern"][:, :, 0, :5]
    assert torch.allclose(edited[f"{site}.pattern"][:, :, 0, :5], row / row.sum(-1, keepdim=True), atol=1e-5)


def test_gradients_at_every_site(opened):
    """Listening to the heads takes another path through the graph; the gradients must not change with it."""
    module = opened.module.requires_grad_(True)
    sites = ["vision.embed", "vision.1.attn.v", "vision.1.attn.pattern", "vision.1.attn.z", "vision.1.attn"]
    parameters = [*module.visual.transformer.resblocks[1].attn.parameters()]
    found = []
    for listened in (sites, [*sites, "vision.1.attn.heads"]):
        with record(opened, listened, grad=True) as seen:
            loss = module.encode_image(pictures()).square().sum()
        found.append(torch.autograd.grad(loss, [*(seen[site] for site in sites), *parameters], retain_graph=True))
    for without, with_heads in zip(*found, strict=True):
        assert relative(with_heads, without) < 1e-4
    by_heads, by_attn = torch.autograd.grad(loss, [seen["vision.1.attn.heads"], seen["vision.1.attn"]])
    assert torch.allclose(by_heads, by_attn[:, :, None].expand_as(by_heads))  # every head adds to the same stream


# ---- the table of builders ----


def test_a_library_is_imported_with_its_first_model():
    code = "import sys, mmfm_utils.anatomy; print({'open_clip', 'transformers', 'diffusers'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_register_teaches_a_further_class(monkeypatch):
    monkeypatch.setattr(anatomy, "_BUILDERS", dict(anatomy._BUILDERS))

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = build().visual

    with pytest.raises(UsageError, match="does not know Mine"):
        anatomy.of(Mine())
    anatomy.register(Mine, lambda model: anatomy.of(model.tower))
    assert anatomy.of(Mine()).towers["vision"].n_layers == 3
    assert anatomy.of(type("Child", (Mine,), {})()).towers["vision"].n_layers == 3
