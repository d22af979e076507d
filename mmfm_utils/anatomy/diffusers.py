"""Text-to-image pipelines of diffusers: the text encoders, and the U-Net place by place or the transformer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
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
from mmfm_utils.anatomy.layouts import layout_of, stacks_of
from mmfm_utils.anatomy.passes import read_ids, stack_entry
from mmfm_utils.anatomy.tower import Anatomy, Layout, require, require_own
from mmfm_utils.hooks import Point

# The blocks that `_unet_places` can read.
_BLOCKS = {
    "DownBlock2D", "CrossAttnDownBlock2D", "ResnetDownsampleBlock2D", "UNetMidBlock2D", "UNetMidBlock2DCrossAttn",
    "UpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D",
}  # fmt: skip

_TEXTS = {"text_encoder": "text", "text_encoder_2": "text_2", "text_encoder_3": "text_3"}


@dataclass
class _Plan:
    """What opening a denoiser comes to, before anything is changed."""

    tower: str
    points: dict[str, Point]
    entry: Callable[..., None]
    attentions: list[nn.Module] = field(default_factory=list)

    def carry_out(self) -> None:
        for attention in self.attentions:
            if not isinstance(attention.processor, _OpenProcessor):
                expose(attention, *ATTENTION_SITES)
                OpenProjection.open(attention.to_out[0], attention.heads)
                attention.set_processor(_OpenProcessor(attention.processor))


def text_to_image(pipeline: Any) -> Anatomy | None:
    """A pipeline's denoiser, and those of its text encoders that are known."""
    name = next((name for name in ("unet", "transformer") if getattr(pipeline, name, None) is not None), None)
    plan = _plan(getattr(pipeline, name), f"{name}.") if name else None
    if plan is None:
        return None
    parts = {each: part for each in _TEXTS if (part := getattr(pipeline, each, None)) is not None}
    points, towers, entries = {}, {}, {}
    for path, tower in _TEXTS.items():
        if path in parts and stacks_of(parts[path]):
            text = of(parts[path])
            for site, point in text.points.items():
                points[f"{tower}.{site.partition('.')[2]}"] = replace(point, module=f"{path}.{point.module}")
            towers[tower], entries[tower] = text.towers["text"], stack_entry(tower, path, read_ids)
    plan.carry_out()
    parts |= {name: getattr(pipeline, name), "vae": pipeline.vae}
    return Anatomy(nn.ModuleDict(parts), points | plan.points, towers, entries | {plan.tower: plan.entry})


def denoiser(model: nn.Module) -> Anatomy | None:
    """A U-Net alone, or a transformer with a `Layout`."""
    plan = _plan(model, "")
    if plan is None:
        return None
    plan.carry_out()
    return Anatomy(model, plan.points, {}, {plan.tower: plan.entry})


def _plan(model: nn.Module, prefix: str) -> _Plan | None:
    """Of a denoiser, whose path in the module of the anatomy is `prefix` without its dot; None if it is not known."""
    layout = layout_of(model)
    if layout and layout.tower:
        return _plan_transformer(model, prefix, layout)
    return _plan_unet(model, prefix) if type(model).__name__ == "UNet2DConditionModel" else None


def _plan_unet(unet: nn.Module, prefix: str) -> _Plan:
    plan = _Plan("unet", {"unet.embed": Point(f"{prefix}conv_in")}, partial(_go_on, prefix.removesuffix(".")))
    for site, res, transformer in _unet_places(unet):
        plan.points[site if site.endswith("resample") else f"{site}.res"] = Point(f"{prefix}{res}")
        if transformer is None:
            continue
        layout = layout_of(unet.get_submodule(transformer))
        require(layout is not None, f"a U-Net with a {type(unet.get_submodule(transformer)).__name__}")
        path = f"{transformer}.{layout.layers}"
        n_layers = len(unet.get_submodule(path))
        for layer in range(n_layers):
            name = site if n_layers == 1 else f"{site}.{layer}"
            _plan_block(plan, name, prefix, f"{path}.{layer}", unet, layout)
        plan.points[f"{site}.resid"] = Point(f"{prefix}{transformer}")
    plan.points["unet.out"] = Point(f"{prefix}conv_out")
    return plan


def _plan_transformer(model: nn.Module, prefix: str, layout: Layout) -> _Plan:
    tower, path = layout.tower, layout.layers
    entry = stack_entry(tower, prefix.removesuffix("."), _denoise)
    plan = _Plan(tower, {f"{tower}.embed": Point(f"{prefix}{path}.0", "in")}, entry)
    for layer in range(len(model.get_submodule(path))):
        _plan_block(plan, f"{tower}.{layer}", prefix, f"{path}.{layer}", model, layout)
        plan.points[f"{tower}.{layer}.resid"] = Point(f"{prefix}{path}.{layer}")
    plan.points[f"{tower}.out"] = Point(f"{prefix}{layout.out}")
    return plan


def _plan_block(plan: _Plan, site: str, prefix: str, path: str, model: nn.Module, layout: Layout) -> None:
    """Self-attention, cross-attention and MLP of the block at a path below the model."""
    block = model.get_submodule(path)
    crosses = getattr(block.get_submodule(layout.cross), "is_cross_attention", False)
    require(crosses and not block.only_cross_attention, "a denoiser without self-attention")
    for name, inside in (("self", layout.attention), ("cross", layout.cross)):
        attention, at = model.get_submodule(f"{path}.{inside}"), f"{prefix}{path}.{inside}"
        _check_attention(attention)
        plan.attentions.append(attention)
        plan.points |= {f"{site}.{name}.{part}": Point(f"{at}.{part}") for part in ATTENTION_SITES}
        plan.points |= {f"{site}.{name}.heads": Point(f"{at}.to_out.0.heads"), f"{site}.{name}": Point(at)}
    plan.points[f"{site}.mlp.hidden"] = Point(f"{prefix}{path}.{layout.down}", "in")
    plan.points[f"{site}.mlp"] = Point(f"{prefix}{path}.{layout.mlp}")


def _denoise(model: nn.Module, states: Tensor, timestep: Any, encoder_hidden_states: Tensor, **options: Any) -> Any:
    """The `enter` of a transformer of diffusers: blank latents make way for the states."""
    side = model.config.sample_size
    blank = states.new_zeros(len(states), model.config.in_channels, side, side)
    return model(blank, timestep=timestep, encoder_hidden_states=encoder_hidden_states, **options)


def _go_on(
    path: str, anatomy: Anatomy, states: Mapping[str, Tensor], start: str, timestep: Any, encoder_hidden_states: Tensor,
    **options: Any,
) -> None:  # fmt: skip
    """The U-Net's own forward pass, in which every place up to `start` gives what it gave before."""
    unet, passed = anatomy.module.get_submodule(path), {"unet.embed": "conv_in"}
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


def _check_attention(attention: nn.Module) -> None:
    kinds = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "add_k_proj", "residual_connection")
    plain = not any(getattr(attention, kind, None) for kind in kinds) and attention.rescale_output_factor == 1
    require(plain, "a denoiser whose attention is not the plain one")
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
