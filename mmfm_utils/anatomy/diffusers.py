"""Text-to-image pipelines of diffusers: the text encoder, and the U-Net place by place."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor, nn

from mmfm_utils import UsageError
from mmfm_utils.anatomy import of
from mmfm_utils.anatomy.attention import ATTENTION_SITES, OpenProjection, expose, heard, step_by_step, through
from mmfm_utils.anatomy.passes import read_ids, stack_entry
from mmfm_utils.anatomy.tower import Anatomy, require, require_own
from mmfm_utils.hooks import Point

# The blocks that `_unet_places` can read.
_BLOCKS = {
    "DownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D", "UNetMidBlock2D", "UNetMidBlock2DCrossAttn",
    "UpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D",
}  # fmt: skip


def text_to_image(pipeline: Any) -> Anatomy:
    unet = pipeline.unet
    require(type(unet).__name__ == "UNet2DConditionModel", f"the denoiser {type(unet).__name__}")
    places = _unet_places(unet)
    for _, _, transformer in places:
        if transformer is not None:
            _check_unet(unet.get_submodule(transformer))
    text = of(pipeline.text_encoder)
    points = {site: replace(point, module=f"text_encoder.{point.module}") for site, point in text.points.items()}
    points["unet.embed"] = Point("unet.conv_in")
    for site, res, transformer in places:
        points[site if site.endswith("resample") else f"{site}.res"] = Point(f"unet.{res}")
        if transformer is None:
            continue
        block = f"{transformer}.transformer_blocks.0"
        for name, inside in (("self", "attn1"), ("cross", "attn2")):
            attention, path = unet.get_submodule(f"{block}.{inside}"), f"unet.{block}.{inside}"
            if not isinstance(attention.processor, _OpenProcessor):
                expose(attention, *ATTENTION_SITES)
                OpenProjection.open(attention.to_out[0], attention.heads)
                attention.set_processor(_OpenProcessor(attention.processor))
            points |= {f"{site}.{name}.{part}": Point(f"{path}.{part}") for part in ATTENTION_SITES}
            points |= {f"{site}.{name}.heads": Point(f"{path}.to_out.0.heads"), f"{site}.{name}": Point(path)}
        points |= {
            f"{site}.mlp.hidden": Point(f"unet.{block}.ff.net.2", "in"),
            f"{site}.mlp": Point(f"unet.{block}.ff"),
        }
        points[f"{site}.resid"] = Point(f"unet.{transformer}")
    points["unet.out"] = Point("unet.conv_out")
    parts = {"text_encoder": pipeline.text_encoder, "unet": unet, "vae": pipeline.vae}
    entries = {"text": stack_entry("text", "text_encoder", read_ids), "unet": _go_on}
    return Anatomy(nn.ModuleDict(parts), points, text.towers, entries)


def _go_on(
    anatomy: Anatomy, states: Mapping[str, Tensor], start: str, timestep: Any, encoder_hidden_states: Tensor,
    **options: Any,
) -> None:  # fmt: skip
    """The U-Net's own forward pass, in which every place up to `start` gives what it gave before."""
    unet, passed = anatomy.module["unet"], {"unet.embed": "conv_in"}
    for site, res, transformer in _unet_places(unet):
        if start == "embed":
            break
        if transformer:
            passed |= {f"{site}.res": res, f"{site}.resid": transformer}
        else:
            passed[site if site.endswith("resample") else f"{site}.res"] = res
        if site == f"unet.{start}":
            break
    # where a transformer follows, what it gave is all that is read of the place
    outputs = {site: site.removesuffix(".res") + ".resid" if f"{site}id" in passed else site for site in passed}
    missing = sorted(set(outputs.values()) - set(states))
    if missing:
        raise UsageError(f"the U-Net can go on from {start} only with the states at {', '.join(missing)} too")
    kept = {}
    try:
        for site, path in passed.items():
            parent, _, name = path.rpartition(".")
            modules = unet.get_submodule(parent)._modules
            kept[path] = modules, name, modules[name]
            modules[name] = _Given(states[outputs[site]], as_tuple=site.endswith(".resid"))
        embed = states["unet.embed"]
        blank = embed.new_zeros(len(embed), unet.config.in_channels, *embed.shape[2:])
        unet(blank, timestep, encoder_hidden_states, **options)
    finally:
        for modules, name, module in kept.values():
            modules[name] = module


class _Given(nn.Module):
    """Stands for a part of the U-Net whose result is known."""

    def __init__(self, result: Tensor, as_tuple: bool) -> None:
        super().__init__()
        self.result = (result,) if as_tuple else result

    def forward(self, *_: Any, **__: Any) -> Tensor | tuple[Tensor]:
        return self.result


def _unet_places(unet: nn.Module) -> list[tuple[str, str, str | None]]:
    """(site, path of the convolutions, path of the transformer or None), in the order of the forward pass."""
    blocks = [*((f"down.{i}", f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks))]
    blocks += [("mid", "mid_block", unet.mid_block)] if unet.mid_block is not None else []  # small ones have none
    blocks += [*((f"up.{i}", f"up_blocks.{i}", block) for i, block in enumerate(unet.up_blocks))]
    places = []
    for name, path, block in blocks:
        require(type(block).__name__ in _BLOCKS, f"a U-Net with a {type(block).__name__}")
        transformers = getattr(block, "attentions", ())
        for i in range(len(block.resnets)):
            transformer = f"{path}.attentions.{i}" if i < len(transformers) else None
            places.append((f"unet.{name}.{i}", f"{path}.resnets.{i}", transformer))
        for kind in ("downsamplers", "upsamplers"):
            if getattr(block, kind, None):
                places.append((f"unet.{name}.resample", f"{path}.{kind}.0", None))
    return places


def _check_unet(transformer: nn.Module) -> None:
    kind = type(transformer).__name__
    require(kind == "Transformer2DModel", f"a U-Net with a {kind}")
    require(len(transformer.transformer_blocks) == 1, "a U-Net with several transformer layers in one place")
    block = transformer.transformer_blocks[0]
    require(
        not block.only_cross_attention and getattr(block.attn2, "is_cross_attention", False),
        "a U-Net without self-attention",
    )
    for attention in (block.attn1, block.attn2):
        kinds = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "add_k_proj", "residual_connection")
        plain = not any(getattr(attention, kind, None) for kind in kinds) and attention.rescale_output_factor == 1
        require(plain, "a U-Net whose attention is not the plain one")
        require_own(attention.to_out[0], "an output projection", nn.Linear, OpenProjection)
        processor = type(attention.processor)
        require(processor in _PROCESSORS, f"the attention processor {processor.__name__}")


class _OpenProcessor:
    """How diffusers computes an attention layer, through the sites of the layer; `usual` where nobody listens."""

    def __init__(self, usual: Callable[..., Tensor]) -> None:
        self.usual = usual

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, **unused: Any,
    ) -> Tensor:  # fmt: skip
        if not heard(*(getattr(attn, name) for name in ATTENTION_SITES)):
            return self.usual(attn, hidden_states, encoder_hidden_states, attention_mask, **unused)
        told = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            through(site, linear(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2))  # (batch, head, token, head_dim)
            for site, linear, x in (
                (attn.q, attn.to_q, hidden_states), (attn.k, attn.to_k, told), (attn.v, attn.to_v, told),
            )
        )  # fmt: skip
        if attention_mask is not None:  # to be added
            attention_mask = attn.prepare_attention_mask(attention_mask, told.shape[1], len(told))
            attention_mask = attention_mask.view(len(told), attn.heads, -1, attention_mask.shape[-1])
        if heard(attn.scores, attn.pattern):
            z, _ = step_by_step(attn, q, k, v, attention_mask, attn.scale)
        else:
            z = attn.z(F.scaled_dot_product_attention(q, k, v, attention_mask).transpose(1, 2))
        return attn.to_out[1](attn.to_out[0](z.flatten(2)))


# They compute the same function, each in its way.
_PROCESSORS = (_OpenProcessor, AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)
