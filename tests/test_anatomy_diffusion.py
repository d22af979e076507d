"""The anatomy of text-to-image pipelines, on Stable Diffusion's architecture at a small size with random weights."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from mmfm_utils import UsageError, anatomy, hooks, models
from mmfm_utils.hooks import edit, record

N_TOKENS = 12


def pipeline(**unet):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(models.FOLDER / "contrastive", local_files_only=True)
    tokenizer.model_max_length = N_TOKENS
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=N_TOKENS, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    layout = dict(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4,
        ),
        unet=UNet2DConditionModel(**layout | unet), tokenizer=tokenizer, text_encoder=CLIPTextModel(text),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def opened():
    return models.of_pipeline(pipeline(), torch.device("cpu"))


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([900, 20]), torch.randn(
        2, N_TOKENS, 24, generator=generator
    )  # fmt: skip


def predict(opened, inputs):
    with torch.no_grad():
        return opened.model.unet(*inputs).sample


def test_opening_changes_neither_output_nor_weights(opened, inputs):
    plain = pipeline().unet.eval()
    plain.set_attn_processor(AttnProcessor2_0())
    with torch.no_grad():
        expected = plain(*inputs).sample
    assert torch.allclose(predict(opened, inputs), expected, atol=1e-5)
    assert opened.model.unet.state_dict().keys() == plain.state_dict().keys()


def test_opening_twice_is_opening_once(opened, inputs):
    before = predict(opened, inputs)
    again = anatomy.of(opened.model)
    assert list(again.points) == list(opened.anatomy.points)
    assert torch.equal(predict(opened, inputs), before)


def test_every_unet_site_fires_in_the_order_of_its_name(opened, inputs):
    order = []
    sites = hooks.resolve(opened.anatomy, "unet.*")
    with edit(opened.anatomy, {"unet.*": lambda x, site: order.append(site) or x}):
        predict(opened, inputs)
    outputs = [site for site in order if site.count(".") < 5 and not site.endswith(("heads", "hidden"))]
    wanted = [site for site in sites if site in outputs]
    assert sorted(order) == sorted(sites) and outputs == wanted
    crosses = [site for site in sites if site.endswith(".cross")]
    blocks = ["down.0.0", "down.0.1", "mid.0", "up.1.0", "up.1.1", "up.1.2"]
    assert crosses == [f"unet.{block}.cross" for block in blocks]
    assert {"unet.down.0.resample", "unet.up.0.resample", "unet.down.1.0.res", "unet.mid.1.res"} <= set(sites)


@pytest.mark.parametrize(
    "site", ["res", "self", "cross.pattern", "cross.heads", "self.scores", "mlp", "resid", "embed"]
)
def test_editing_with_the_recorded_value_changes_no_bit(opened, inputs, site):
    sites = f"unet.*.{site}" if site != "embed" else "unet.embed"
    plain = predict(opened, inputs)
    with record(opened.anatomy, sites) as seen:
        before = predict(opened, inputs)
    if any(part in site for part in ("pattern", "scores", "heads")):  # another kernel has other last bits
        assert torch.allclose(before, plain, atol=1e-5)
    else:
        assert torch.equal(before, plain)
    with edit(opened.anatomy, {sites: lambda x, site: seen[site]}):
        assert torch.equal(predict(opened, inputs), before)


def test_an_attention_mask_is_heeded_on_every_path(opened, inputs):
    told = torch.ones(2, N_TOKENS, dtype=torch.bool)
    told[:, 5:] = False
    with torch.no_grad():
        masked = opened.model.unet(*inputs, encoder_attention_mask=told).sample
        for part in ("z", "pattern"):
            with record(opened.anatomy, f"unet.*.cross.{part}") as seen:
                assert torch.allclose(opened.model.unet(*inputs, encoder_attention_mask=told).sample, masked, atol=1e-5)
    assert not torch.allclose(masked, predict(opened, inputs), atol=1e-3)
    assert all(pattern[..., 5:].max() < 1e-6 for pattern in seen.values())


def test_pattern_is_what_diffusers_computes(opened, inputs):
    attn = opened.model.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    with record(opened.anatomy, ["unet.mid.0.cross.pattern", "unet.mid.0.cross.q", "unet.mid.0.cross.k"]) as seen:
        predict(opened, inputs)
    q, k, pattern = (seen[f"unet.mid.0.cross.{part}"] for part in ("q", "k", "pattern"))
    assert pattern.shape == (2, attn.heads, 16, N_TOKENS)  # (batch, head, 4 x 4 positions, token)
    by_head = (x.transpose(1, 2).flatten(0, 1) for x in (q, k))
    assert torch.allclose(attn.get_attention_scores(*by_head), pattern.flatten(0, 1), atol=1e-6)


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_heads_sum_to_what_attention_adds(opened, inputs, kind):
    with record(opened.anatomy, [f"unet.up.1.0.{kind}", f"unet.up.1.0.{kind}.heads"]) as seen:
        predict(opened, inputs)
    heads, whole = seen[f"unet.up.1.0.{kind}.heads"], seen[f"unet.up.1.0.{kind}"]
    block = opened.model.unet.up_blocks[1].attentions[0].transformer_blocks[0]
    bias = (block.attn1 if kind == "self" else block.attn2).to_out[0].bias
    assert torch.allclose(heads.sum(-2) + bias, whole, atol=1e-5)


def test_text_final_is_what_the_unet_reads(opened):
    with record(opened.anatomy, "text.final") as seen:
        states = opened.encode(["a red dog", ""])
    assert torch.equal(seen["text.final"], states) and states.shape == (2, N_TOKENS, 24)


def test_a_picture_depends_on_its_own_seed_alone(opened):
    prompts = ["a red dog", "a cat on sand", "a bus"]
    whole = opened.paint(prompts, seed=5, steps=3)
    assert whole.shape == (3, 16, 16, 3) and whole.dtype.name == "uint8"
    assert abs(opened.paint(prompts, seed=5, steps=3, batch=1).astype(int) - whole).max() <= 1
    assert abs(opened.paint(prompts[2:], seed=7, steps=3).astype(int) - whole[2:]).max() <= 1
    assert abs(opened.paint(opened.encode(prompts), seed=5, steps=3).astype(int) - whole).max() <= 1
    assert not (opened.paint(prompts, seed=6, steps=3) == whole).all()


@pytest.mark.parametrize("prompts", ["a red dog", []])
def test_paint_wants_a_list(opened, prompts):
    with pytest.raises(UsageError, match="list of prompts"):
        opened.paint(prompts)


def test_steps_are_passes_and_halves_are_told_apart(opened):
    steps = []
    with record(opened.anatomy, ["unet.mid.0.cross.pattern", "text.final"], every=True) as seen:
        plain = opened.paint(["a red dog", "a bus"], steps=4)
    assert len(seen["unet.mid.0.cross.pattern"]) == 4 and len(seen["text.final"]) == 1
    without, told = seen["text.final"][0].chunk(2)
    assert torch.equal(without[0], without[1]) and not torch.equal(told[0], told[1])

    def note(x):
        steps.append(len(x))
        return x

    with edit(opened.anatomy, {"unet.mid.0.cross": anatomy.conditional(note)}, passes=range(1, 3)):
        assert (opened.paint(["a red dog", "a bus"], steps=4) == plain).all()
    assert steps == [2, 2]  # two of four steps, two of four rows
    with edit(opened.anatomy, {"unet.*.cross": anatomy.conditional(lambda x, site: 0 * x)}):
        changed = opened.paint(["a red dog", "a bus"], steps=4)
    assert not (changed == plain).all()


def test_conditional_leaves_the_other_half(opened):
    x = torch.arange(8.0).view(4, 2)
    assert torch.equal(anatomy.conditional(torch.zeros_like)(x), torch.tensor([[0.0, 1], [2, 3], [0, 0], [0, 0]]))


def test_an_edit_whose_passes_never_come_is_an_error(opened):
    with (
        pytest.raises(UsageError, match="reached 2 times"),
        edit(opened.anatomy, {"unet.embed": lambda x: x}, passes=[5]),
    ):
        opened.paint(["a dog"], steps=2)


def test_latents_and_pictures_are_each_others_inverse_in_shape(opened):
    pictures = torch.randint(0, 256, (2, 16, 16, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    z = opened.latents(pictures)
    assert z.shape == (2, 4, 8, 8) and opened.pictures(z).shape == pictures.shape


def test_what_it_does_not_know_is_said():
    deep = pipeline(transformer_layers_per_block=2)
    before = copy.deepcopy(deep.unet.attn_processors)
    with pytest.raises(UsageError, match="several transformer layers"):
        anatomy.of(deep)
    assert {type(p) for p in deep.unet.attn_processors.values()} == {type(p) for p in before.values()}
