"""What is particular to the anatomy of text-to-image pipelines; what holds for all families is in test_anatomy.py."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0, SlicedAttnProcessor

from mmfm_utils import UsageError, anatomy, hooks, models
from mmfm_utils.hooks import edit, record
from tests.anatomy_families import FAMILIES, N_TOKENS, pipeline, relative


@pytest.fixture(scope="module")
def opened():
    return models.of_pipeline(FAMILIES["stable diffusion"].build(), torch.device("cpu"))


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([900, 20]), torch.randn(
        2, N_TOKENS, 24, generator=generator
    )  # fmt: skip


def predict(opened, inputs):
    with torch.no_grad():
        return opened.model.unet(*inputs).sample


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
    with edit(opened.anatomy, {"unet.mid.0.cross": anatomy.conditional(note)}, passes=[0]):
        opened.paint(["a red dog", "a bus", "a cat"], steps=4, batch=2)
    assert steps[2:] == [2, 1]  # the first step of each batch
    with edit(opened.anatomy, {"unet.*.cross": anatomy.conditional(lambda x, site: 0 * x)}):
        changed = opened.paint(["a red dog", "a bus"], steps=4)
    assert not (changed == plain).all()


def test_conditional_leaves_the_other_half():
    x, change = torch.arange(8.0).view(4, 2), anatomy.conditional(torch.zeros_like)
    with anatomy.painting(2):
        assert torch.equal(change(x), torch.tensor([[0.0, 1], [2, 3], [0, 0], [0, 0]]))
    with anatomy.painting(4):  # without guidance there is no other half
        assert not change(x).any()
    for n in (1, 3, 5):
        with pytest.raises(UsageError, match="which of 4 rows"), anatomy.painting(n):
            change(x)
    with pytest.raises(UsageError, match="use Diffusion.paint"):
        change(x)


@pytest.mark.parametrize("guidance", [4.0, 1.0, 0.0])
@pytest.mark.parametrize("n, batch", [(4, 32), (3, 2), (1, 32)])
def test_conditional_acts_on_every_picture(opened, guidance, n, batch):
    prompts = ["a red dog", "a blue cat", "a bus", "a tree"][:n]
    read = opened.encode(prompts)
    for given in (prompts, read):
        plain = opened.paint(given, steps=2, guidance=guidance, batch=batch)
        with edit(opened.anatomy, {"unet.*.cross": anatomy.conditional(torch.zeros_like)}):
            changed = opened.paint(given, steps=2, guidance=guidance, batch=batch)
        assert [(a != b).any() for a, b in zip(changed, plain)] == [True] * n
    with edit(opened.anatomy, {"text.final": anatomy.conditional(lambda x: x.flip(1))}):
        changed = opened.paint(prompts, steps=2, guidance=guidance, batch=batch)
        with pytest.raises(UsageError, match="which of 1 rows"):  # the empty prompt alone
            opened.paint(read, steps=2, guidance=guidance, batch=batch)
    assert (changed == opened.paint(read.flip(1), steps=2, guidance=guidance, batch=batch)).all()


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
    other = pipeline()
    other.unet.mid_block.attentions[0].transformer_blocks[0].attn2.rescale_output_factor = 2.0
    before = copy.deepcopy(other.unet.attn_processors)
    with pytest.raises(UsageError, match="not the plain one"):
        anatomy.of(other)
    assert {type(p) for p in other.unet.attn_processors.values()} == {type(p) for p in before.values()}
    assert other.text_encoder.config._attn_implementation == "sdpa"
    with pytest.raises(UsageError, match="does not know AutoencoderKL"):
        anatomy.of(other.vae)


SIMPLE = ("SimpleCrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "SimpleCrossAttnUpBlock2D")


@pytest.mark.parametrize(
    "shape, message",
    [
        (dict(dual_cross_attention=True), "a DualTransformer2DModel"),
        (dict(down_block_types=SIMPLE[0], up_block_types=SIMPLE[1]), "a SimpleCrossAttnDownBlock2D"),
        (dict(mid_block_type="UNetMidBlock2DSimpleCrossAttn"), "a UNetMidBlock2DSimpleCrossAttn"),
        (dict(down_block_types=("CrossAttnDownBlock2D", "AttnDownBlock2D")), "a AttnDownBlock2D"),
        (dict(only_cross_attention=True), "without self-attention"),
    ],
)
def test_unets_of_another_make_are_refused(shape, message):
    pipe = pipeline(**shape)
    before = [type(module) for module in pipe.unet.modules()]
    with pytest.raises(UsageError, match=message):
        anatomy.of(pipe)
    assert [type(module) for module in pipe.unet.modules()] == before


@pytest.mark.parametrize("shape", [dict(layers_per_block=1), dict(mid_block_type="UNetMidBlock2D")])
def test_unets_of_fewer_parts_are_opened(shape, inputs):
    pipe = pipeline(**shape)
    pipe.unet.eval()
    with torch.no_grad():
        before = pipe.unet(*inputs).sample
        with record(anatomy.of(pipe), "unet.*") as seen:
            assert relative(pipe.unet(*inputs).sample, before) < 1e-5
    assert "unet.mid.0.res" in seen


class Muted(AttnProcessor2_0):
    """Somebody's own: cross-attention at half strength."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **more):
        out = super().__call__(attn, hidden_states, encoder_hidden_states=encoder_hidden_states, **more)
        return out if encoder_hidden_states is None else out / 2


def test_attention_of_somebody_s_own_is_not_replaced(inputs):
    for make in (lambda attn: Muted(), lambda attn: IPAdapterAttnProcessor2_0(attn.to_q.in_features, 24)):
        pipe = pipeline()
        attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
        mine = make(attention)
        attention.set_processor(mine)
        with pytest.raises(UsageError, match=f"the attention processor {type(mine).__name__}"):
            anatomy.of(pipe)
        assert attention.processor is mine and not hasattr(attention, "pattern")
    pipe = pipeline()
    pipe.unet.eval().set_attn_processor(SlicedAttnProcessor(2))  # the same function, computed in slices
    with torch.no_grad():
        before = pipe.unet(*inputs).sample
        anatomy.of(pipe)
        assert torch.equal(pipe.unet(*inputs).sample, before)
    late = pipeline()
    opened = anatomy.of(late)
    late.unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(Muted())
    with pytest.raises(UsageError, match="in vain at unet.mid.0.cross.pattern"), torch.no_grad():
        with edit(opened, {"unet.*.cross.pattern": torch.zeros_like}):
            late.unet(*inputs)


PLACES = ["down.0.0", "down.0.1", "down.0.resample", "down.1.1", "mid.0", "mid.1", "up.0.0", "up.0.resample", "up.1.2"]


@pytest.mark.parametrize("start", ["embed", *PLACES])
def test_run_between_places_of_the_unet(opened, inputs, start):
    """From what earlier places gave, skip states included; edited there or not, to a later place or the end."""
    opened, (sample, timestep, told) = opened.anatomy, inputs
    given = dict(timestep=timestep, encoder_hidden_states=told)
    output = anatomy.passes.place_output(opened, start)
    kinds = ["unet.embed", "unet.*.res", "unet.*.resid", "unet.*.resample", "unet.out"]

    def whole():
        with record(opened, kinds) as seen, torch.no_grad():
            opened.module["unet"](sample, timestep, told)
        return seen

    seen = whole()
    with edit(opened, {output: lambda x: x.flip(0) * 1.5}):
        changed = whole()
    assert relative(changed["unet.out"], seen["unet.out"]) > 1e-3
    behind = [place for place in PLACES[PLACES.index(start) + 1 if start in PLACES else 0 :]]
    for states in (seen, dict(seen, **{output: seen[output].flip(0) * 1.5})):
        expected = seen if states is seen else changed
        with torch.no_grad():
            assert torch.equal(anatomy.run_between(opened, "unet", states, start, **given), expected["unet.out"])
            for stop in behind[:2]:
                site = anatomy.passes.place_output(opened, stop)
                assert torch.equal(anatomy.run_between(opened, "unet", states, start, stop, **given), expected[site])
    for silent, stop in (("unet.embed", None), ("unet.out", behind[0] if behind else None)):
        if silent == "unet.embed" or stop:
            with pytest.raises(UsageError, match="in vain"), record(opened, silent), torch.no_grad():
                anatomy.run_between(opened, "unet", seen, start, stop, **given)
    assert torch.equal(whole()["unet.out"], seen["unet.out"])


def test_run_between_places_refuses(opened, inputs):
    given = dict(timestep=inputs[1], encoder_hidden_states=inputs[2])
    for start, stop, message in (
        ("mid.0", None, "too"),
        ("mid.7", None, "no place 'mid.7'; it has embed, down.0.0"),
        ("mid.0.cross", None, "no place"),
        ("out", None, "no place"),
        ("mid.0", "down.0.1", "to a later one"),
    ):
        with pytest.raises(UsageError, match=message):
            anatomy.run_between(opened.anatomy, "unet", {"unet.embed": inputs[0]}, start, stop, **given)
