"""Language models, LLaVA, and CLIP and SigLIP in transformers, whose config says how attention is computed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from mmfm_utils.anatomy.attention import ATTENTION_SITES, OpenProjection, expose, heard, step_by_step, through
from mmfm_utils.anatomy.passes import read_ids, stack_entry
from mmfm_utils.anatomy.tower import Anatomy, Layout, Tower, layer_points, require, require_own
from mmfm_utils.hooks import Point

_QKV = dict(attention="self_attn", mlp="mlp", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj")
_CLIP = Layout(**_QKV, attn="self_attn.out_proj", o="self_attn.out_proj", up="mlp.fc1", down="mlp.fc2")
_LLAMA = Layout(
    **_QKV, attn="self_attn.o_proj", o="self_attn.o_proj", gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj"
)
_NAME = "mmfm_open"  # the opened attention in transformers' registry and in a model's config
# The ways to compute attention that give what "sdpa" gives.
_KNOWN = (_NAME, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


class _Projection(OpenProjection):
    """A class of this module, so that unpickling an opened model elsewhere registers its attention there."""


def _one_token(x: Tensor) -> Tensor:
    return x[:, None]


def _put_one_token(_raw: Tensor, x: Tensor) -> Tensor:
    return x[:, 0]


# How to find a tensor, and put it back, where it has other axes than its site.
_ONE_TOKEN = (_one_token, _put_one_token)


def language_model(model: nn.Module) -> Anatomy:
    points, tower = _decoder("model", model.model, model.lm_head)
    return _opened(model, points, dict(lm=tower), dict(lm=""))


def llava(model: nn.Module) -> Anatomy:
    parts = model.model
    vision_points, vision = _encoder("model.vision_tower", parts.vision_tower)
    lm_points, lm = _decoder("model.language_model", parts.language_model, model.lm_head)
    projector = "model.multi_modal_projector"
    between = {"projector.hidden": Point(f"{projector}.act"), "projector": Point(projector)}
    paths = dict(vision="model.vision_tower", lm="")
    return _opened(model, vision_points | between | lm_points, dict(vision=vision, lm=lm), paths)


def clip_tower(model: nn.Module) -> Anatomy:
    points, tower = _encoder("", model)
    name = "text" if tower.causal else "vision"
    return _opened(model, points, {name: tower}, {name: ""})


def clip_projected(model: nn.Module) -> Anatomy:
    name, out = ("vision", "visual_projection") if hasattr(model, "visual_projection") else ("text", "text_projection")
    points, tower = _encoder(f"{name}_model", model.get_submodule(f"{name}_model"), model.get_submodule(out))
    return _opened(model, points | {f"{name}.out": Point(out)}, {name: tower}, {name: ""})


def _decoder(path: str, stack: nn.Module, head: nn.Linear) -> tuple[dict[str, Point], Tower]:
    """The places and facts of a language model whose layers are in `stack`, at `path`."""
    require(type(stack).__name__ in ("LlamaModel", "MistralModel", "Qwen2Model"), f"the {type(stack).__name__}")
    points = layer_points("lm", f"{path}.layers", stack.layers, _LLAMA)
    return points | {"lm.final": Point(f"{path}.norm"), "lm.logits": Point("lm_head")}, Tower(
        blocks=stack.layers,
        layout=_LLAMA,
        n_heads=stack.config.num_attention_heads,
        width=stack.config.hidden_size,
        n_tokens=stack.config.max_position_embeddings,
        grid=None,
        causal=True,
        ln_final=stack.norm,
        pool="last",
        eos_id=None,
        proj=head,
    )


def _encoder(path: str, stack: nn.Module, proj: nn.Linear | None = None) -> tuple[dict[str, Point], Tower]:
    """The places and facts of a tower of CLIP or SigLIP at `path`."""
    kind, config, inside = type(stack).__name__, stack.config, f"{path}." if path else ""
    require(kind in ("CLIPTextModel", "CLIPVisionModel", "SiglipVisionModel"), f"the tower {kind}")
    name = "text" if kind == "CLIPTextModel" else "vision"
    norm = "final_layer_norm" if name == "text" else "post_layernorm"
    eos = config.eos_token_id if name == "text" else None
    # transformers takes the largest id for the end token where the config has the old, wrong 2
    pool = {"CLIPTextModel": "argmax" if eos == 2 else "eos", "CLIPVisionModel": "tok"}.get(kind)
    axes = _ONE_TOKEN if kind == "CLIPVisionModel" else ()  # it norms CLS alone
    points = layer_points(name, f"{inside}encoder.layers", stack.encoder.layers, _CLIP)
    return points | {f"{name}.final": Point(f"{inside}{norm}", "out", *axes)}, Tower(
        blocks=stack.encoder.layers,
        layout=_CLIP,
        n_heads=config.num_attention_heads,
        width=config.hidden_size,
        n_tokens=stack.embeddings.position_embedding.num_embeddings,
        grid=None if name == "text" else (config.image_size // config.patch_size,) * 2,
        causal=name == "text",
        ln_final=stack.get_submodule(norm),
        pool=pool,
        eos_id=eos,
        proj=proj,
    )


def _opened(model: nn.Module, points: dict[str, Point], towers: dict[str, Tower], paths: dict[str, str]) -> Anatomy:
    """Opens the attention of a transformers model: its layers get the places, its config the way through them.

    `paths` say which module runs a tower by a forward pass of its own.
    """
    layers = [(block, tower) for tower in towers.values() for block in tower.blocks]
    for block, tower in layers:
        require_own(block.get_submodule(tower.layout.o), "an output projection", nn.Linear, _Projection)
        way = block.self_attn.config._attn_implementation
        require(way in _KNOWN, f"attention as {way!r} computes it")
    model.set_attn_implementation(_NAME)
    for block, tower in layers:
        if "pattern" not in block.self_attn._modules:
            expose(block.self_attn, *ATTENTION_SITES)
            _Projection.open(block.get_submodule(tower.layout.o), tower.n_heads)
    ways = {"lm": _go_on, "text": read_ids, "vision": _look}
    entries = {name: stack_entry(name, path, ways[name]) for name, path in paths.items()}
    return Anatomy(model, points, towers, entries)


def _go_on(model: nn.Module, states: Tensor, attention_mask: Tensor | None = None, keep: int | Tensor = 0) -> Any:
    return model(inputs_embeds=states, attention_mask=attention_mask, use_cache=False, logits_to_keep=keep)


def _look(model: nn.Module, states: Tensor) -> Any:
    side = model.config.image_size
    return model(pixel_values=states.new_zeros(1, 3, side, side))  # a blank picture makes way for the states


def _attend(
    usual: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention as transformers calls it, on (batch, head, token, head_dim), through the sites of `module`."""
    if "pattern" not in module._modules:  # a model that was not opened, but shares the config of one that was
        return usual(module, query, key, value, mask, **options)
    q, k, v = through(module.q, query), through(module.k, key), through(module.v, value)
    wanted = options.get("output_attentions") or getattr(module.config, "output_attentions", False)
    if not (wanted or heard(module.scores, module.pattern)):
        return module.z(usual(module, q, k, v, mask, **options)[0]), None
    causal = options.get("is_causal")
    if mask is None and q.shape[2] > 1 and (module.is_causal if causal is None else causal):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return step_by_step(module, q, k, v, mask, options["scaling"], options.get("dropout", 0.0))


def _may_attend(usual: Callable[..., Any], *args: Any, **options: Any) -> Tensor | None:
    """(batch, 1, query, key), true where a query may attend: as usual, and to itself where that leaves nothing."""
    mask = usual(*args, **options)
    if mask is None:  # no padding: the kernel knows by itself what is causal
        return None
    itself = torch.eye(*mask.shape[-2:], dtype=torch.bool, device=mask.device)
    return mask | (itself & ~mask.any(-1, keepdim=True))


AttentionInterface.register(_NAME, partial(_attend, AttentionInterface()["sdpa"]))
AttentionMaskInterface.register(_NAME, partial(_may_attend, AttentionMaskInterface()["sdpa"]))
