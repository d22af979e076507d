"""One vocabulary of places over all model families, and the facts about a model that go with it.

    anatomy = of(model)                                    # opens the attention layers, once
    with hooks.record(anatomy, "vision.*.attn.pattern") as patterns:
        anatomy.module.encode_image(images)
    anatomy.towers["vision"].W_O(3)                        # (head, head_dim, width)

Sites of each tower T (`vision`, `text`, `lm`) and layer L, counted from 0; shapes are batch first in every model:

    T.embed            (batch, token, width)          residual stream before layer 0
    T.L.resid          (batch, token, width)          residual stream after layer L
    T.L.attn           (batch, token, width)          what attention adds to the residual stream, output bias included
    T.L.mlp            (batch, token, width)          what the MLP adds to it
    T.L.attn.q, .k, .v (batch, token, head, head_dim)
    T.L.attn.scores    (batch, head, query, key)      before the softmax, scaled and masked (-inf)
    T.L.attn.pattern   (batch, head, query, key)      after it: rows sum to 1
    T.L.attn.z         (batch, token, head, head_dim) values mixed by the pattern
    T.L.attn.heads     (batch, token, head, width)    z @ W_O: each head's share of T.L.attn, which is their sum + b_O
    T.L.mlp.hidden     (batch, token, neuron)         neurons after the nonlinearity (and times W_in, where it is gated)
    T.final            (batch, token, width)          after the tower's last norm
    T.out              (batch, embed)                 projected embedding, before L2 normalisation
    lm.logits          (batch, token, vocabulary)     for the tokens that are unembedded
    projector.hidden   (picture, image token, width)  LLaVA's projector after its nonlinearity
    projector          (picture, image token, width)  the image tokens as they enter the language model

So T.embed plus all T.L.attn and T.L.mlp is the last T.L.resid. Splitting attention by head follows Elhage et al. 2021,
"A Mathematical Framework for Transformer Circuits"; W_Q, b_O, pattern, z are named as in TransformerLens.

In a language model q and k are those after rotary embedding; k and v have the fewer heads of grouped queries (head h
reads key head h // (n_heads // n_kv_heads)). With a key-value cache, k, v and the key axis hold the past as well, and
all else the new tokens alone. Padding attends to itself where nothing else is left to it.

In transformers' CLIP, vision.final is the norm of CLS alone: one token. LLaVA reads the stream after an earlier layer
(`vision_feature_layer`); the vision sites beyond fire and change nothing. LLaVA-OneVision's vision tower has a row for
each tile of a picture. Qwen2-VL's has its patches in the order of the image tokens, each of which takes four in turn (a
square of 2 x 2); where pictures differ in size, the rows of smaller ones end in zeros.

A text-to-image pipeline has the tower `text`, whose `text.final` is what the U-Net reads, and in the U-Net, for every
place P in the order of the forward pass (`down.0.0` is the first of block `down.0`, then `mid.0`, `up.0.0` ...):

    unet.P.res         (batch, channel, row, column)  after the residual block of convolutions
    unet.P.self        (batch, position, channel)     what self-attention adds; unet.P.self.q ... .heads as above
    unet.P.cross       (batch, position, channel)     what cross-attention adds; the keys of unet.P.cross.pattern are
                                                      the prompt's tokens
    unet.P.mlp         (batch, position, channel)     and the MLP; unet.P.mlp.hidden as above
    unet.P.resid       (batch, channel, row, column)  after the transformer of P
    unet.B.resample    (batch, channel, row, column)  where block B changes the resolution
    unet.embed, unet.out                              after the first convolution; what the U-Net predicts

A pipeline with several text encoders has `text_2` beside `text`. Where a place has several transformer layers (SDXL),
they are numbered: unet.P.L.self, .cross, .mlp. A transformer in the U-Net's stead (PixArt) is `dit`, with dit.embed,
dit.L.self, .cross, .mlp and .resid, (batch, position, channel), and dit.out, the prediction patch by patch; self and
mlp are what its gates then scale (adaptive norms, Peebles & Xie 2023, arXiv 2212.09748).

Positions are row by row. A sampler runs the U-Net once a step: `hooks.record(every=True)` keeps all of them, and
`hooks.edit(passes=...)` acts in some. Guidance runs two halves in one batch, the empty prompt first: see `conditional`.

Attention runs through the library's own fused kernel, which never holds the pattern, as long as nobody listens to
`scores` or `pattern` of that layer (hooks of others count). Listening inside attention can thus change the last bits of
what follows, as one kernel differs from another; an edit that changes nothing gives bit by bit what recording the same
sites gives. Listening anywhere else changes no bit.

A further architecture is a further layout: see `register`.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from mmfm_utils import UsageError
from mmfm_utils.anatomy.attention import ATTENTION_SITES, OpenProjection
from mmfm_utils.anatomy.interventions import blocked, conditional, painting
from mmfm_utils.anatomy.layouts import LAYOUTS, name_of
from mmfm_utils.anatomy.open_clip import OpenAttention
from mmfm_utils.anatomy.passes import restart, run_between
from mmfm_utils.anatomy.tokens import Spans, patch_tokens, spans, word_span
from mmfm_utils.anatomy.tower import Anatomy, Layout, Tower, layer_points

__all__ = [
    "ATTENTION_SITES", "Anatomy", "Layout", "OpenAttention", "OpenProjection", "Spans", "Tower", "blocked",
    "conditional", "layer_points", "of", "painting", "patch_tokens", "register", "restart", "run_between", "spans",
    "word_span",
]  # fmt: skip

# class -> its builder, or adapter and name: an adapter and its library are imported when their first model is opened.
_BUILDERS: dict[str, Callable[[Any], Anatomy | None] | str] = {
    "diffusers.models.modeling_utils.ModelMixin": "diffusers.denoiser",
    "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel": "diffusers.denoiser",
    "diffusers.pipelines.pipeline_utils.DiffusionPipeline": "diffusers.text_to_image",
    "open_clip.model.CLIP": "open_clip.contrastive",
    "open_clip.model.CustomTextCLIP": "open_clip.contrastive",
    "open_clip.transformer.VisionTransformer": "open_clip.vision_only",
    "transformers.modeling_utils.PreTrainedModel": "transformers.made_of_stacks",
}


def of(model: Any) -> Anatomy:
    """The anatomy of a model; opens its attention layers in place, once (its outputs and state dict stay the same).

    Knows open_clip's `CLIP`, `CustomTextCLIP` and `VisionTransformer` with standard layers. In transformers it knows
    the towers of CLIP and SigLIP, the language models Llama, Mistral and Qwen2, both parts of Qwen2-VL, and every model
    all of whose layers are in these: `CLIPModel`, `LlavaForConditionalGeneration`, LLaVA-OneVision. In diffusers it
    knows `UNet2DConditionModel` and `PixArtTransformer2DModel`, and pipelines of them; a pipeline's `module` is a
    dictionary of its text encoders, denoiser and decoder, and a text encoder that is not known (T5) has no sites.
    In transformers the config says how attention is computed, so it now names the opened way; other models that share
    it are computed as before. Raises `UsageError` for a class or variant that it does not know, and where somebody has
    replaced what it would replace (an attention processor, a `forward`), and then leaves the model as it was.
    """
    for cls in type(model).__mro__:
        builder = _BUILDERS.get(name_of(cls))
        if isinstance(builder, str):
            adapter, function = builder.split(".")
            builder = getattr(import_module(f"{__name__}.{adapter}"), function)
        anatomy = builder(model) if builder else None
        if anatomy:
            return anatomy
    classes = [name for name in _BUILDERS if "_utils" not in name] + [name for name in LAYOUTS if LAYOUTS[name].tower]
    known = ", ".join(name.rpartition(".")[2] for name in classes)
    raise UsageError(f"anatomy does not know {type(model).__name__}; it knows {known}, and what you `register`")


def register(cls: type | str, how: Layout | Callable[[Any], Anatomy | None]) -> None:
    """Teach `of` a further class, given itself or by its dotted name; its subclasses are known with it.

    A `Layout` is enough for a class that runs a stack of layers by its library's own attention: in transformers each
    class that calls its `AttentionInterface` (GemmaModel, say), in diffusers a transformer of `BasicTransformerBlock`s.
    Models that hold such a stack are then known too, if nothing else in them has layers:

        register("transformers.models.phi.modeling_phi.PhiModel", Layout(
            attention="self_attn", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj",
            o="self_attn.dense", attn="self_attn.dense", mlp="mlp", up="mlp.fc1", down="mlp.fc2",
            tower="lm", layers="layers", norm="final_layernorm", out="lm_head", causal=True, pool="last",
        ))

    For anything else give a function: `how(model)` returns the model's `Anatomy`, its places and, for each stack of
    layers, a `Tower`; `layer_points` makes the places of a stack.
    """
    name = cls if isinstance(cls, str) else name_of(cls)
    if isinstance(how, Layout):
        LAYOUTS[name] = how
    else:
        _BUILDERS[name] = how
