"""The architectures that are known by their names alone: for each class that runs a stack of layers, its `Layout`."""

from dataclasses import replace

from torch import nn

from mmfm_utils.anatomy.tower import Layout

_QKV = dict(attention="self_attn", mlp="mlp", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj")
_LLAMA = Layout(
    **_QKV, attn="self_attn.o_proj", o="self_attn.o_proj", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj",
    tower="lm", layers="layers", norm="norm", out="lm_head", causal=True, pool="last",
)  # fmt: skip
_CLIP = Layout(
    **_QKV, attn="self_attn.out_proj", o="self_attn.out_proj", up="mlp.fc1", down="mlp.fc2", layers="encoder.layers"
)
_TEXT = replace(_CLIP, tower="text", norm="final_layer_norm")
_VISION = replace(
    _CLIP, tower="vision", norm="post_layernorm",
    sites={"projector.hidden": "multi_modal_projector.act", "projector": "multi_modal_projector"},
)  # fmt: skip
_QWEN2_VL = Layout(
    attention="attn", attn="attn.proj", mlp="mlp", o="attn.proj", qkv="attn.qkv", up="mlp.fc1", down="mlp.fc2",
    tower="vision", layers="blocks", norm="merger.ln_q", n_heads="num_heads", packed="grid_thw",
    sites={"projector.hidden": "merger.mlp.1", "projector": "merger"},
)  # fmt: skip
# diffusers' BasicTransformerBlock, in the places of a U-Net and as the layers of a transformer
_BASIC = Layout(
    attention="attn1", attn="attn1", cross="attn2", mlp="ff", q="attn1.to_q", k="attn1.to_k", v="attn1.to_v",
    o="attn1.to_out.0", up="ff.net.0.proj", down="ff.net.2", layers="transformer_blocks",
)  # fmt: skip

LAYOUTS: dict[str, Layout] = {
    "transformers.models.llama.modeling_llama.LlamaModel": _LLAMA,
    "transformers.models.mistral.modeling_mistral.MistralModel": _LLAMA,
    "transformers.models.qwen2.modeling_qwen2.Qwen2Model": _LLAMA,
    "transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLTextModel": _LLAMA,
    "transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel": _QWEN2_VL,
    "transformers.models.clip.modeling_clip.CLIPTextModel": replace(
        _TEXT, out="text_projection", causal=True, pool="eos"
    ),
    "transformers.models.clip.modeling_clip.CLIPVisionModel": replace(_VISION, out="visual_projection", pool="tok"),
    "transformers.models.siglip.modeling_siglip.SiglipTextModel": replace(_TEXT, out="head", pool="last"),
    "transformers.models.siglip.modeling_siglip.SiglipVisionModel": replace(_VISION, out="head"),
    "diffusers.models.transformers.transformer_2d.Transformer2DModel": _BASIC,
    "diffusers.models.transformers.pixart_transformer_2d.PixArtTransformer2DModel": replace(
        _BASIC, tower="dit", out="proj_out"
    ),
}


def name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a module that runs a stack of layers, by its class or one that it is derived from."""
    return next((LAYOUTS[name] for name in map(name_of, type(module).__mro__) if name in LAYOUTS), None)


def stacks_of(model: nn.Module) -> dict[str, Layout]:
    """The stacks of layers in a model that are known: path -> layout."""
    modules = model.named_modules() if vars(model).get("_modules") else ()
    return {path: layout for path, module in modules if (layout := layout_of(module))}
