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
(`vision_feature_layer`); the vision sites beyond fire and change nothing.

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

Positions are row by row. A sampler runs the U-Net once a step: `hooks.record(every=True)` keeps all of them, and
`hooks.edit(passes=...)` acts in some. Guidance runs two halves in one batch, the empty prompt first: see `conditional`.

Attention runs through the library's own fused kernel, which never holds the pattern, as long as nobody listens to
`scores` or `pattern` of that layer (hooks of others count). Listening inside attention can thus change the last bits of
what follows, as one kernel differs from another; an edit that changes nothing gives bit by bit what recording the same
sites gives. Listening anywhere else changes no bit.

A further family is a further builder: see `register`.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from mmfm_utils import UsageError
from mmfm_utils.anatomy.attention import ATTENTION_SITES, OpenProjection
from mmfm_utils.anatomy.interventions import blocked, conditional, painting
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
_BUILDERS: dict[str, Callable[[Any], Anatomy] | str] = {
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion.StableDiffusionPipeline": "diffusers.text_to_image",
    "open_clip.model.CLIP": "open_clip.contrastive",
    "open_clip.model.CustomTextCLIP": "open_clip.contrastive",
    "open_clip.transformer.VisionTransformer": "open_clip.vision_only",
    "transformers.models.llama.modeling_llama.LlamaForCausalLM": "transformers.language_model",
    "transformers.models.mistral.modeling_mistral.MistralForCausalLM": "transformers.language_model",
    "transformers.models.qwen2.modeling_qwen2.Qwen2ForCausalLM": "transformers.language_model",
    "transformers.models.llava.modeling_llava.LlavaForConditionalGeneration": "transformers.llava",
    "transformers.models.clip.modeling_clip.CLIPTextModel": "transformers.clip_tower",
    "transformers.models.clip.modeling_clip.CLIPTextModelWithProjection": "transformers.clip_projected",
    "transformers.models.clip.modeling_clip.CLIPVisionModel": "transformers.clip_tower",
    "transformers.models.clip.modeling_clip.CLIPVisionModelWithProjection": "transformers.clip_projected",
    "transformers.models.siglip.modeling_siglip.SiglipVisionModel": "transformers.clip_tower",
}


def of(model: Any) -> Anatomy:
    """The anatomy of a model; opens its attention layers in place, once (its outputs and state dict stay the same).

    Knows open_clip's `CLIP`, `CustomTextCLIP` and `VisionTransformer` with standard layers, and of transformers CLIP's
    and SigLIP's towers, the language models Llama, Mistral and Qwen2, and `LlavaForConditionalGeneration` made of them;
    of diffusers `StableDiffusionPipeline`, whose `module` is then a dictionary of its text encoder, U-Net and decoder.
    In transformers the config says how attention is computed, so it now names the opened way; other models that share
    it are computed as before. Raises `UsageError` for a class or variant that it does not know, and where somebody has
    replaced what it would replace (an attention processor, a `forward`), and then leaves the model as it was.
    """
    for cls in type(model).__mro__:
        builder = _BUILDERS.get(f"{cls.__module__}.{cls.__qualname__}")
        if isinstance(builder, str):
            adapter, function = builder.split(".")
            builder = getattr(import_module(f"{__name__}.{adapter}"), function)
        if builder:
            return builder(model)
    known = ", ".join(name.rpartition(".")[2] for name in _BUILDERS)
    raise UsageError(f"anatomy does not know {type(model).__name__}; it knows {known}")


def register(cls: type | str, builder: Callable[[Any], Anatomy]) -> None:
    """Teach `of` a further class of models, given itself or by its dotted name; its subclasses are known with it.

    `builder(model)` returns the model's `Anatomy`: its places and, for each stack of layers, a `Tower`. A stack that
    differs from one that is known by its names alone needs a `Layout`, from which `layer_points` makes the places.
    """
    _BUILDERS[cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"] = builder
