"""Models of transformers, whose config says how attention is computed: whatever is made of stacks with a `Layout`."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from mmfm_utils import UsageError
from mmfm_utils.anatomy.attention import ATTENTION_SITES, OpenProjection, expose, heard, step_by_step, through
from mmfm_utils.anatomy.layouts import stacks_of
from mmfm_utils.anatomy.packed import FromRows, ToRows, each, may_attend, packed, packed_entry, rows, unpack
from mmfm_utils.anatomy.passes import read_ids, stack_entry
from mmfm_utils.anatomy.tower import Anatomy, Layout, Tower, layer_points, require, require_own
from mmfm_utils.hooks import Point

_NAME = "mmfm_open"  # the opened attention in transformers' registry and in a model's config
# The ways to compute attention that give what "sdpa" gives.
_KNOWN = (_NAME, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


class _Projection(OpenProjection):
    """A class of this module, so that unpickling an opened model elsewhere registers its attention there."""


def made_of_stacks(model: nn.Module) -> Anatomy | None:
    """All stacks of layers in a model, and what stands behind them; nothing where none is known."""
    stacks = stacks_of(model)
    if not stacks:
        return None
    paths = {layout.tower: path for path, layout in stacks.items()}
    kind = type(model).__name__
    strange = set(paths) - set(_WAYS)
    require(not strange, f"towers by the name of {', '.join(strange)} (it takes {', '.join(_WAYS)})")
    require(len(paths) == len(stacks), f"{kind}, which has two towers of one name")
    known = tuple(_join(path, layout.layers) for path, layout in stacks.items())
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not f"{path}.".startswith(tuple(f"{at}." for at in known)):
            raise UsageError(
                f"anatomy does not know the layers at {path} of {kind}: register a Layout for what runs them"
            )
    points, towers, entries = {}, {}, {}
    for name in (name for name in _WAYS if name in paths):
        path, layout = paths[name], stacks[paths[name]]
        stack, out = model.get_submodule(path), _around(model, path, layout.out)
        towers[name] = _tower(stack, layout, None if out is None else model.get_submodule(out))
        points |= _points(model, path, layout, out)
        # the pass of a tower ends with its last site, which may lie beside it
        outside = out is not None and not out.startswith(_join(path, ""))
        runs = "" if name == "lm" else out.rpartition(".")[0] if outside else path
        entries[name] = packed_entry(path, layout.packed) if layout.packed else stack_entry(name, runs, _WAYS[name])
    _open(model, [(model.get_submodule(paths[name]), tower) for name, tower in towers.items()])
    return Anatomy(model, points, towers, entries)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _around(model: nn.Module, path: str, name: str | None) -> str | None:
    """The path of what is called `name` below the module at `path`, or below one around it; None if nothing is."""
    at = _join(path, name or "")
    try:
        return at if name and model.get_submodule(at) is not None else None
    except AttributeError:
        return _around(model, path.rpartition(".")[0], name) if path else None


def _points(model: nn.Module, path: str, layout: Layout, out: str | None) -> dict[str, Point]:
    name, stack = layout.tower, model.get_submodule(path)
    points = layer_points(name, _join(path, layout.layers), stack.get_submodule(layout.layers), layout)
    points[f"{name}.final"] = Point(_join(path, layout.norm), "out", _states, _put_states)
    found = {site: _around(model, path, at) for site, at in layout.sites.items()}
    points |= {site: Point(at) for site, at in found.items() if at is not None}
    if layout.packed:
        inside = tuple(f".attn.{part}" for part in ATTENTION_SITES)  # opened attention shows rows by itself
        axes = dict(get=ToRows(stack), put=FromRows(stack))
        points = {site: at if site.endswith(inside) else replace(at, **axes) for site, at in points.items()}
    return points | ({} if out is None else {f"{name}.{'logits' if name == 'lm' else 'out'}": Point(out)})


# CLIP's vision tower norms CLS alone
def _states(raw: Tensor) -> Tensor:
    return raw[:, None] if raw.ndim == 2 else raw


def _put_states(raw: Tensor, x: Tensor) -> Tensor:
    return x[:, 0] if raw.ndim == 2 else x


def _tower(stack: nn.Module, layout: Layout, out: nn.Module | None) -> Tower:
    config, blocks, grid = stack.config, stack.get_submodule(layout.layers), None
    vision = layout.tower == "vision"
    if vision and not layout.packed:
        grid = (config.image_size // config.patch_size,) * 2
    of_picture = grid and math.prod(grid) + (layout.pool == "tok")
    eos = config.eos_token_id if layout.pool == "eos" else None
    return Tower(
        blocks=blocks,
        layout=layout,
        n_heads=getattr(config, layout.n_heads),
        width=blocks[0].get_submodule(layout.o).out_features,
        n_tokens=of_picture if vision else config.max_position_embeddings,
        grid=grid,
        causal=layout.causal,
        ln_final=stack.get_submodule(layout.norm),
        # transformers takes the largest id for the end token where the config has the old, wrong 2
        pool="argmax" if eos == 2 else layout.pool,
        eos_id=eos,
        proj=out if isinstance(out, nn.Linear) else None,
    )


def _open(model: nn.Module, stacks: list[tuple[nn.Module, Tower]]) -> None:
    """Opens attention: its layers get the places, the config the way through them."""
    layers = [(block, tower) for _, tower in stacks for block in tower.blocks]
    for stack, _ in stacks:
        way = stack.config._attn_implementation
        require(way in _KNOWN, f"attention as {way!r} computes it")
    for block, tower in layers:
        require_own(block.get_submodule(tower.layout.o), "an output projection", nn.Linear, _Projection)
    model.set_attn_implementation(_NAME)
    for block, tower in layers:
        attention = block.get_submodule(tower.layout.attention)
        if "pattern" not in attention._modules:
            expose(attention, *ATTENTION_SITES)
            _Projection.open(block.get_submodule(tower.layout.o), tower.n_heads)
    for stack, tower in stacks:
        if tower.layout.packed:
            unpack(stack, [block.get_submodule(tower.layout.attention) for block in tower.blocks], tower.layout.packed)


def _go_on(
    model: nn.Module, states: Tensor, attention_mask: Tensor | None = None, keep: int | Tensor = 0,
    position_ids: Tensor | None = None,
) -> Any:  # fmt: skip
    inner = getattr(model, "model", model)
    if position_ids is None and hasattr(inner, "get_rope_index"):  # where a picture's tokens are is no longer known
        raise UsageError("run_between needs position_ids=... here: model.model.get_rope_index(...) makes them")
    options = {} if inner is model else dict(logits_to_keep=keep)
    return model(
        inputs_embeds=states, attention_mask=attention_mask, position_ids=position_ids, use_cache=False, **options
    )


def _look(model: nn.Module, states: Tensor) -> Any:
    side = getattr(model.config, "vision_config", model.config).image_size
    # a blank picture makes way for the states
    return getattr(model, "get_image_features", model)(pixel_values=states.new_zeros(1, 3, side, side))


_WAYS = dict(vision=_look, text=read_ids, lm=_go_on)  # in the order of a forward pass


def _attend(
    usual: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None, pictures: list[int] | None = None, **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention as transformers calls it, on (batch, head, token, head_dim), through the sites of `module`."""
    if "pattern" not in module._modules:  # a model that was not opened, but shares the config of one that was
        return usual(module, query, key, value, attention_mask, **options)
    if pictures is not None:  # all in one row: each in a row of its own
        by_row = (rows(x[0].transpose(0, 1), pictures).transpose(1, 2) for x in (query, key, value))
        attention_mask = may_attend(pictures, query.device)
        z, _ = _attend(each(usual, pictures), module, *by_row, attention_mask, **options)
        return packed(z, pictures)[None], None
    q, k, v = through(module.q, query), through(module.k, key), through(module.v, value)
    wanted = options.get("output_attentions") or getattr(module.config, "output_attentions", False)
    if not (wanted or heard(module.scores, module.pattern)):
        return module.z(usual(module, q, k, v, attention_mask, **options)[0]), None
    causal, mask = options.get("is_causal"), attention_mask
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
