"""What is particular to the architectures that a layout opens, and how a stranger is made known. What holds for all
families is in test_anatomy.py."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers

from mmfm_utils import UsageError, anatomy, hooks
from mmfm_utils.hooks import edit, record
from tests.anatomy_families import (
    FAMILIES,
    LM,
    TIMES,
    dit,
    embeddings,
    inputs,
    latents,
    llama,
    relative,
    strengthen,
    unet,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def seen_in(opened, run, sites="*"):
    with torch.no_grad(), record(opened, sites) as seen:
        run()
    return seen


# ---- parts and wholes ----


def test_the_towers_of_clip_open_one_by_one_and_act_in_the_whole():
    model, batch = FAMILIES["clip"].build(), inputs("clip")
    with torch.no_grad():
        plain = embeddings(model(**batch))
        vision, text = anatomy.of(model.vision_model), anatomy.of(model.text_model)
        assert torch.equal(embeddings(model(**batch)), plain)
        with record(vision, "vision.*.pattern") as seen, record(text, "text.*.pattern") as read:
            model(**batch)
        assert len(seen) == 4 and len(read) == 3 and "vision.out" not in vision.points
        with edit(vision, {"vision.0.attn.heads": torch.zeros_like}):
            changed = embeddings(model(**batch))
        whole = anatomy.of(model)  # the same places, and the projections beside the towers
        with edit(whole, {"vision.0.attn.heads": torch.zeros_like}):
            assert torch.equal(embeddings(model(**batch)), changed)
    assert relative(changed[:, :32], plain[:, :32]) > 1e-3 and torch.equal(changed[:, 32:], plain[:, 32:])
    assert {"vision.out", "text.out"} <= set(whole.points)


def test_a_stack_without_its_head_ends_at_its_norm():
    model = strengthen(llama())
    opened, ids = anatomy.of(model.model), inputs("llama")["input_ids"]
    seen = seen_in(opened, lambda: model.model(ids), ["lm.1.resid", "lm.final"])
    assert "lm.logits" not in opened.points and opened.towers["lm"].proj is None
    with torch.no_grad():
        assert torch.equal(anatomy.run_between(opened, "lm", seen["lm.1.resid"], 1), seen["lm.final"])


def test_a_layout_from_outside_serves_alone_and_as_a_part_and_for_subclasses():
    """The language model of a LLaVA, in a class that no table names."""

    class Mine(transformers.GemmaModel):
        pass

    model = strengthen(FAMILIES["llava"].make())
    config = transformers.GemmaConfig(**LM, head_dim=12, num_key_value_heads=2)
    model.model.language_model, batch = Mine(config).eval(), inputs("llava")
    with pytest.raises(UsageError, match="the layers at model.language_model.layers of Llava.*: register a Layout"):
        anatomy.of(model)
    with torch.no_grad():
        plain = model(**batch).logits
    anatomy.register(transformers.GemmaModel, anatomy.layouts.layout_of(llama().model))
    try:
        opened = anatomy.of(model)
        seen = seen_in(opened, lambda: model(**batch))
    finally:
        anatomy.layouts.LAYOUTS.pop(anatomy.layouts.name_of(transformers.GemmaModel))
    assert relative(seen["lm.logits"], plain) < 1e-5
    assert seen["lm.1.attn.k"].shape == (2, 29, 2, 12) and set(seen) == set(opened.points)


def test_towers_of_names_that_it_cannot_run_are_refused():
    layout = anatomy.layouts.layout_of(llama().model)
    for tower, message in (("audio", "towers by the name of audio"), ("vision", "two towers of one name")):
        name = "transformers.models.mistral.modeling_mistral.MistralModel"
        anatomy.register(name, replace(layout, tower=tower))
        try:
            with pytest.raises(UsageError, match=message):
                anatomy.of(FAMILIES["llava full"].build())
        finally:
            anatomy.register(name, layout)


# ---- Qwen2-VL ----


@pytest.fixture(scope="module")
def qwen():
    """(the model as it was, opened, a batch whose pictures differ in size: 4 x 6, 2 x 2 and 4 x 4 patches)"""
    plain = FAMILIES["qwen2-vl"].build()
    grid = torch.tensor([[1, 4, 6], [1, 2, 2], [1, 4, 4]])
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 58, (3, 14), generator=generator)
    for row, n in enumerate((6, 1, 4)):
        ids[row, 1 : 1 + n] = plain.config.image_token_id
    batch = dict(
        input_ids=ids, mm_token_type_ids=(ids == plain.config.image_token_id).int(), image_grid_thw=grid,
        pixel_values=torch.randn(44, 384, generator=generator),
    )  # fmt: skip
    return plain, anatomy.of(copy.deepcopy(plain)), batch


def test_pictures_of_unlike_sizes_stand_in_rows_of_their_own(qwen):
    plain, opened, batch = qwen
    with torch.no_grad():
        expected = plain(**batch).logits
        assert torch.equal(opened.module(**batch).logits, expected)
    seen = seen_in(opened, lambda: opened.module(**batch))
    assert relative(seen["lm.logits"], expected) < 1e-5
    assert seen["vision.1.resid"].shape == (3, 24, 48) and seen["projector"].shape == (3, 6, 48)
    assert seen["vision.1.attn.z"].shape == (3, 24, 6, 8) and seen["vision.1.attn.heads"].shape == (3, 24, 6, 48)
    starts = [0, 24, 28, 44]
    for row, n in enumerate((24, 4, 16)):
        alone = dict(pixel_values=batch["pixel_values"][starts[row] : starts[row + 1]])
        alone |= {key: batch[key][row : row + 1] for key in batch if key != "pixel_values"}
        own = seen_in(opened, lambda alone=alone: opened.module(**alone))
        for site in hooks.resolve(opened, ["vision.*", "projector*"]):
            if site.endswith(("scores", "pattern")):
                assert torch.allclose(seen[site][row, :, :n, :n], own[site][0], atol=1e-4), site
            else:
                assert torch.allclose(seen[site][row, : own[site].shape[1]], own[site][0], atol=1e-4), site
        pattern, tokens = seen["vision.1.attn.pattern"][row], seen["projector"].shape[1]
        assert not pattern[:, :n, n:].any() and torch.allclose(pattern[:, n:], torch.eye(24)[n:], atol=1e-6)
        assert torch.equal(seen["lm.embed"][row, 1 : 1 + n // 4], seen["projector"][row, : n // 4]) and tokens == 6
        assert not seen["vision.1.resid"][row, n:].any()


def test_an_edit_of_a_picture_changes_its_own_prompt_alone(qwen):
    _, opened, batch = qwen
    sites = ["vision.0.attn.heads", "vision.1.attn.scores", "vision.1.resid", "projector"]
    seen = seen_in(opened, lambda: opened.module(**batch), [*sites, "lm.logits"])
    for site in sites:

        def change(x):
            x[1] = x[1].roll(1, -1) if x.shape[1:] != (6, 24, 24) else x[1] + torch.arange(24.0)
            return x

        with edit(opened, {site: change}), torch.no_grad(), record(opened, sites[1:2]):
            logits = opened.module(**batch).logits
        assert relative(logits[1], seen["lm.logits"][1]) > 1e-4, site
        assert relative(logits[[0, 2]], seen["lm.logits"][[0, 2]]) < 1e-5, site


def test_qkv_in_one_map_are_taken_apart(qwen):
    _, opened, batch = qwen
    seen, tower = seen_in(opened, lambda: opened.module(**batch), "vision.*"), opened.towers["vision"]
    assert (tower.n_heads, tower.n_kv_heads, tower.head_dim, tower.grid, tower.n_tokens) == (6, 6, 8, None, None)
    x = tower.blocks[1].norm1(seen["vision.0.resid"])
    v = torch.einsum("btw,hwd->bthd", x, tower.W_V(1)) + tower.b_V(1)
    assert torch.allclose(v[0], seen["vision.1.attn.v"][0], atol=1e-4)
    for weight, bias, site in ((tower.W_Q(1), tower.b_Q(1), "q"), (tower.W_K(1), tower.b_K(1), "k")):
        turned = seen[f"vision.1.attn.{site}"][0]  # rotated, which keeps the length of each head's vector
        assert torch.allclose((x @ weight[2] + bias[2])[0].norm(dim=-1), turned[:, 2].norm(dim=-1), atol=1e-3)


def test_generating_with_a_cache_is_as_in_the_plain_model(qwen):
    plain, opened, batch = qwen
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    expected = plain.generate(**batch, **options)
    with record(opened, ["vision.0.attn.pattern", "lm.0.attn.pattern"], every=True) as steps:
        assert torch.equal(opened.module.generate(**batch, **options), expected)
    assert len(steps["vision.0.attn.pattern"]) == 1 and len(steps["lm.0.attn.pattern"]) == 4


def test_run_between_says_what_a_packed_tower_and_three_positions_need(qwen):
    _, opened, batch = qwen
    seen = seen_in(opened, lambda: opened.module(**batch), ["vision.1.resid", "vision.final", "lm.0.resid"])
    with pytest.raises(UsageError, match="image_grid_thw"):
        anatomy.run_between(opened, "vision", seen["vision.1.resid"], 1)
    with pytest.raises(UsageError, match="position_ids.*get_rope_index"):
        anatomy.run_between(opened, "lm", seen["lm.0.resid"], 0)
    grid = batch["image_grid_thw"]
    seen_in(opened, lambda: opened.module(**inputs("qwen2-vl")), "lm.embed")  # pictures of another pass do not linger
    with torch.no_grad():
        final = anatomy.run_between(opened, "vision", seen["vision.1.resid"], 1, image_grid_thw=grid)
    assert torch.equal(final, seen["vision.final"])


# ---- diffusers ----


@pytest.fixture(scope="module")
def transformer():
    model = strengthen(dit())
    told = torch.randn(2, 12, 24, generator=torch.Generator().manual_seed(2))
    return anatomy.of(model), dict(encoder_hidden_states=told, timestep=TIMES)


def test_a_denoiser_opens_without_its_pipeline(transformer):
    opened, given = transformer
    seen = seen_in(opened, lambda: opened.module(latents(), **given))
    assert list(seen)[0] == "dit.embed" and list(seen)[-1] == "dit.out" and set(seen) == set(opened.points)
    assert seen["dit.1.cross.pattern"].shape == (2, 4, 16, 12) and seen["dit.1.resid"].shape == (2, 16, 24)
    model = strengthen(unet())
    bare, told = anatomy.of(model), given["encoder_hidden_states"]
    run = lambda: model(latents(), TIMES, told)
    seen = seen_in(bare, run)
    assert set(seen) == set(bare.points) and seen["unet.mid.0.cross.pattern"].shape == (2, 4, 16, 12)
    seen = seen_in(bare, run, ["unet.embed", "unet.*.res", "unet.*.resid", "unet.*.resample", "unet.out"])
    with torch.no_grad():
        out = anatomy.run_between(bare, "unet", seen, "mid.0", timestep=TIMES, encoder_hidden_states=told)
    assert torch.equal(out, seen["unet.out"])


@pytest.mark.parametrize("start", [-1, 0, 1, 2])
def test_a_transformer_goes_on_from_a_layer(transformer, start):
    opened, given = transformer
    site = "dit.embed" if start < 0 else f"dit.{start}.resid"
    run = lambda: opened.module(latents(), **given)
    seen = seen_in(opened, run, [site, "dit.2.resid", "dit.out"])
    other = seen[site].flip(0) * 1.5
    with edit(opened, {site: lambda x: other}):
        changed = seen_in(opened, run, ["dit.2.resid", "dit.out"])
    assert relative(changed["dit.out"], seen["dit.out"]) > 1e-3
    with torch.no_grad():
        assert torch.equal(anatomy.run_between(opened, "dit", other, start, **given), changed["dit.out"])
        if start < 2:
            assert torch.equal(anatomy.run_between(opened, "dit", other, start, 2, **given), changed["dit.2.resid"])
    with pytest.raises(UsageError, match="from layer 3 to None"):
        anatomy.run_between(opened, "dit", other, 3, **given)


def test_the_gates_stand_behind_what_a_layer_of_the_transformer_gives(transformer):
    """Adaptive norms: shift, scale and gate of self-attention, then of the MLP, from the time step."""
    opened, given = transformer
    seen, block = seen_in(opened, lambda: opened.module(latents(), **given)), opened.module.transformer_blocks[1]
    with torch.no_grad():
        time, _ = opened.module.adaln_single(TIMES, batch_size=2, hidden_dtype=torch.float32)
        gates = (block.scale_shift_table[None] + time.reshape(2, 6, -1)).chunk(6, 1)
        total = seen["dit.0.resid"] + gates[2] * seen["dit.1.self"] + seen["dit.1.cross"] + gates[5] * seen["dit.1.mlp"]
    assert relative(total, seen["dit.1.resid"]) < 1e-5
