"""Contrastive models of open_clip. Nothing here imports open_clip: its models bring what is needed."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from mmfm_utils.anatomy.attention import ATTENTION_SITES, OpenProjection, expose, heard, step_by_step, through, turn
from mmfm_utils.anatomy.passes import as_given, stack_entry
from mmfm_utils.anatomy.tower import Anatomy, Layout, Tower, layer_points, require, require_own
from mmfm_utils.hooks import Point

LAYOUT = Layout(attention="attn", attn="ls_1", mlp="ls_2", o="attn.out_proj", up="mlp.c_fc", down="mlp.c_proj")


class OpenAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with each intermediate result passing through a submodule that can be hooked.

    `of` turns a model's own attention modules into this class where they stand, so parameters, state dict, hooks and
    optimisers stay the same objects. Without a hook inside, it is `nn.MultiheadAttention` itself; queries, keys,
    values, z and heads pass their sites around the fused kernel; scores and pattern take the same mathematics step by
    step. Arguments are those of `nn.MultiheadAttention.forward`.
    """

    @classmethod
    def open(cls, attention: nn.MultiheadAttention) -> None:
        """Turn a plain `nn.MultiheadAttention` into this class, in place; do nothing if it is one already."""
        if not isinstance(attention, cls):
            turn(attention, cls)
            expose(attention, *ATTENTION_SITES)
            OpenProjection.open(attention.out_proj, attention.num_heads)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not heard(*self.children(), self.out_proj.heads):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = (
            through(site, F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2))
            for site, x, weight, bias in zip(
                (self.q, self.k, self.v),
                (query, key, value),
                self.in_proj_weight.chunk(3),
                self.in_proj_bias.chunk(3),
                strict=True,
            )
        )  # (batch, head, token, head_dim)
        mask, pattern, dropout = None, None, self.dropout if self.training else 0.0
        if attn_mask is not None:
            mask = attn_mask.view(-1, self.num_heads, *attn_mask.shape[1:]) if attn_mask.ndim == 3 else attn_mask
            mask = _to_be_added(mask, q)
        if key_padding_mask is not None:
            padding = _to_be_added(key_padding_mask, q)[:, None, None]
            mask = padding if mask is None else mask + padding
        if need_weights or heard(self.scores, self.pattern):
            z, pattern = step_by_step(self, q, k, v, mask, self.head_dim**-0.5, dropout)
        else:
            z = self.z(F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2))
        out = self.out_proj(z.flatten(2))
        weights = (pattern.mean(1) if average_attn_weights else pattern) if need_weights else None
        return (out if self.batch_first else out.transpose(0, 1)), weights


def _to_be_added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of `nn.MultiheadAttention` (boolean: true is blocked) as numbers to add to the scores."""
    return like.new_zeros(mask.shape).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask.to(like.dtype)


def contrastive(model: nn.Module) -> Anatomy:
    # The built-in CLIP class keeps its text tower flat, as `transformer`, `ln_final` ... of the model itself.
    flat = not hasattr(model, "text")
    text = model if flat else model.text
    _check_vision(model.visual)
    _check_text(text)
    if flat and not hasattr(model, "text_out"):
        require("encode_text" not in vars(model), "a model whose encode_text was replaced (open the model before)")
        # There the projection is a bare product inside encode_text; give it a place to be hooked.
        model.text_out = nn.Identity()
        model.encode_text = partial(_encode_text, model)  # a bound method would be pickled as the class's own
    prefix = "" if flat else "text."
    return Anatomy(
        module=model,
        points=_points("vision", "visual.", model.visual.transformer, "visual.ln_post", "visual")
        | _points("text", prefix, text.transformer, f"{prefix}ln_final", "text_out" if flat else "text"),
        towers={"vision": _vision_tower(model.visual), "text": _text_tower(text)},
        entries={
            "vision": stack_entry("vision", "visual", _look, _put(model.visual)),
            "text": stack_entry("text", "" if flat else "text", _read, _put(text)),
        },
    )


def vision_only(model: nn.Module) -> Anatomy:
    _check_vision(model)
    points = _points("vision", "", model.transformer, "ln_post", "")
    return Anatomy(
        model, points, {"vision": _vision_tower(model)}, {"vision": stack_entry("vision", "", _look, _put(model))}
    )


def _look(visual: nn.Module, states: Tensor) -> Tensor:
    return visual(states.new_zeros(1, 3, *visual.image_size))  # a blank picture makes way for the states


def _read(text: nn.Module, states: Tensor, ids: Tensor | None = None) -> Tensor:
    if ids is None:
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
    return text.encode_text(ids) if hasattr(text, "encode_text") else text(ids)


def _put(tower: nn.Module) -> Callable[[Tensor], Tensor]:
    """States (batch, token, width) in the axes of the layers."""
    return as_given if tower.transformer.batch_first else _swapped


def _encode_text(model: nn.Module, text: Tensor, normalize: bool = False) -> Tensor:
    out = model.text_out(type(model).encode_text(model, text))
    return F.normalize(out, dim=-1) if normalize else out


def _check_vision(visual: nn.Module) -> None:
    require(type(visual).__name__ == "VisionTransformer", f"the vision tower {type(visual).__name__}")
    plain = visual.attn_pool is None and not visual.final_ln_after_pool and visual.pool_type in ("tok", "avg")
    require(plain and visual.proj is not None, "a vision tower that does not norm, pool and project in this order")
    _check_layers(visual.transformer)


def _check_text(text: nn.Module) -> None:
    require(hasattr(text, "text_projection"), f"the text tower {type(text).__name__}")
    require(getattr(text, "cls_emb", None) is None, "a text tower with a class token")
    linear = text.text_projection is not None and getattr(text.text_projection, "bias", None) is None
    require(linear, "a text tower without a projection, or with a bias in it")
    _check_layers(text.transformer)


def _check_layers(transformer: nn.Module) -> None:
    for block in transformer.resblocks:
        require(type(block).__name__ == "ResidualAttentionBlock", f"layers of the kind {type(block).__name__}")
        # it would come between the heads and what they add to the residual stream
        require(isinstance(block.ls_1, nn.Identity), "layers with LayerScale")
        require_own(block.attn, "attention", nn.MultiheadAttention, OpenAttention)
        require_own(block.attn.out_proj, "an output projection", NonDynamicallyQuantizableLinear, OpenProjection)


def _swapped(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def _put_swapped(_raw: Tensor, x: Tensor) -> Tensor:
    return x.transpose(0, 1)


# How to find a tensor, and put it back, where it has other axes than its site.
_SEQUENCE_FIRST = (_swapped, _put_swapped)


def _points(tower: str, prefix: str, transformer: nn.Module, final: str, out: str) -> dict[str, Point]:
    """Opens the attention of an open_clip `Transformer` at `<prefix>transformer` and names its places."""
    for block in transformer.resblocks:
        OpenAttention.open(block.attn)
    axes = () if transformer.batch_first else _SEQUENCE_FIRST
    points = layer_points(tower, f"{prefix}transformer.resblocks", transformer.resblocks, LAYOUT, axes)
    return points | {f"{tower}.final": Point(final), f"{tower}.out": Point(out)}


def _vision_tower(visual: nn.Module) -> Tower:
    blocks = visual.transformer.resblocks
    return Tower(
        blocks=blocks,
        layout=LAYOUT,
        n_heads=blocks[0].attn.num_heads,
        width=blocks[0].attn.embed_dim,
        n_tokens=visual.positional_embedding.shape[0],
        grid=tuple(visual.grid_size),
        causal=False,
        ln_final=visual.ln_post,
        pool=visual.pool_type,
        eos_id=None,
        proj=visual.proj,
    )


def _text_tower(text: nn.Module) -> Tower:
    blocks = text.transformer.resblocks
    # the flat model and the tower of its own name the same two facts differently
    pool, eos = ("text_pool_type", "text_eos_id") if hasattr(text, "text_pool_type") else ("pool_type", "eos_id")
    return Tower(
        blocks=blocks,
        layout=LAYOUT,
        n_heads=blocks[0].attn.num_heads,
        width=blocks[0].attn.embed_dim,
        n_tokens=text.positional_embedding.shape[0],
        grid=None,
        causal=text.attn_mask is not None,
        ln_final=text.ln_final,
        pool=getattr(text, pool),
        eos_id=getattr(text, eos),
        proj=text.text_projection,
    )
