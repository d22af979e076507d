"""One vocabulary of places over all model families, and the facts about a model that go with it.

    anatomy = of(model)                                    # opens the attention layers, once
    with hooks.record(anatomy, "vision.*.attn.pattern") as patterns:
        anatomy.module.encode_image(images)
    anatomy.towers["vision"].W_O(3)                        # (head, head_dim, width)

Sites of each tower T (`vision`, `text`) and layer L, counted from 0; shapes are batch first in every model:

    T.embed            (batch, token, width)          residual stream before layer 0
    T.L.resid          (batch, token, width)          residual stream after layer L
    T.L.attn           (batch, token, width)          what attention adds to the residual stream, output bias included
    T.L.mlp            (batch, token, width)          what the MLP adds to it
    T.L.attn.q, .k, .v (batch, token, head, head_dim)
    T.L.attn.scores    (batch, head, query, key)      before the softmax, scaled and masked (-inf)
    T.L.attn.pattern   (batch, head, query, key)      after it: rows sum to 1
    T.L.attn.z         (batch, token, head, head_dim) values mixed by the pattern
    T.L.attn.heads     (batch, token, head, width)    z @ W_O: each head's share of T.L.attn, which is their sum + b_O
    T.L.mlp.hidden     (batch, token, neuron)         neurons after the nonlinearity
    T.final            (batch, token, width)          after the tower's last LayerNorm
    T.out              (batch, embed)                 projected embedding, before L2 normalisation

So T.embed plus all T.L.attn and T.L.mlp is the last T.L.resid. Splitting attention by head follows Elhage et al. 2021,
"A Mathematical Framework for Transformer Circuits"; W_Q, b_O, pattern, z are named as in TransformerLens.

A further family is a further function in `_BUILDERS`, with its own site names over the same words.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfm_utils import UsageError
from mmfm_utils.hooks import Point

ATTENTION_SITES = ("q", "k", "v", "scores", "pattern", "z", "heads")


class OpenAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with each intermediate result passing through a submodule that can be hooked.

    The same mathematics without the fused kernel, which never holds the pattern. `of` turns a model's own attention
    modules into this class where they stand, so parameters, state dict, hooks and optimisers stay the same objects.
    Queries, keys and values may come from different sequences; `attn_mask` is boolean (true: blocked) or additive, of
    shape (query, key) or (batch * head, query, key). `key_padding_mask` is not supported.
    """

    @classmethod
    def open(cls, attention: nn.MultiheadAttention) -> None:
        """Turn a plain `nn.MultiheadAttention` into this class, in place; do nothing if it is one already."""
        if not isinstance(attention, cls):
            attention.__class__ = cls
            for name in ATTENTION_SITES:
                attention.add_module(name, nn.Identity())

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
        if key_padding_mask is not None:
            raise NotImplementedError("OpenAttention: put the padding into attn_mask")
        if not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = (
            site(F.linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim)))  # (batch, token, head, dim)
            for site, x, weight, bias in zip(
                (self.q, self.k, self.v),
                (query, key, value),
                self.in_proj_weight.chunk(3),
                self.in_proj_bias.chunk(3),
                strict=True,
            )
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", q * self.head_dim**-0.5, k)
        if attn_mask is not None:
            mask = attn_mask.view(-1, self.num_heads, *attn_mask.shape[1:]) if attn_mask.ndim == 3 else attn_mask
            scores = scores.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        pattern = self.pattern(self.scores(scores).softmax(-1))  # (batch, head, query, key)
        mixed = torch.einsum("bhqk,bkhd->bqhd", F.dropout(pattern, self.dropout, self.training), v)
        out = self._project(self.z(mixed))
        weights = (pattern.mean(1) if average_attn_weights else pattern) if need_weights else None
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _project(self, z: Tensor) -> Tensor:
        """(batch, token, head, head_dim) -> (batch, token, width)"""
        if not (self.heads._forward_hooks or self.heads._forward_pre_hooks):
            return self.out_proj(z.flatten(2))
        # Someone listens to the heads. The value comes from the usual product, so that listening changes no bit of it,
        # plus what an edit changed, which is zero without one; gradients flow through the heads alone.
        heads = torch.einsum("bqhd,hdw->bqhw", z, _heads_of(self.out_proj.weight, self.num_heads))
        usual = F.linear(z.flatten(2).detach(), self.out_proj.weight.detach(), self.out_proj.bias)
        return usual + (self.heads(heads) - heads.detach()).sum(2)


def _heads_of(out_weight: Tensor, n_heads: int) -> Tensor:
    return out_weight.T.unflatten(0, (n_heads, -1))  # (head, head_dim, width)


@dataclass(frozen=True, eq=False)
class Tower:
    """The facts about one stack of transformer layers.

    Weights are detached views that share the model's memory: writing into one edits the model. They multiply from the
    right, x @ W, and have one slice a head.
    """

    blocks: nn.ModuleList = field(repr=False)  # the layers themselves, for what has no name here (ln_1, ln_2)
    n_heads: int
    width: int
    n_tokens: int  # vision: CLS and patches; text: context length
    grid: tuple[int, int] | None  # (rows, columns) of patches; None for text
    causal: bool
    ln_final: nn.Module = field(repr=False)
    pool: str  # the state that is projected: "tok" CLS, "avg" mean patch, "argmax"/"eos" end token, "first", "last"
    eos_id: int | None
    proj: nn.Parameter | nn.Linear = field(repr=False)  # read it as `projection`

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def head_dim(self) -> int:
        return self.width // self.n_heads

    @property
    def n_neurons(self) -> int:
        return self.blocks[0].mlp.c_fc.out_features

    @property
    def projection(self) -> Tensor:
        """(width, embed)"""
        # read anew each time: moving the model to another device or precision replaces the data
        return (self.proj.weight.T if isinstance(self.proj, nn.Linear) else self.proj).detach()

    def W_Q(self, layer: int) -> Tensor:
        """(head, width, head_dim)"""
        return self._in_weight(layer, 0)

    def W_K(self, layer: int) -> Tensor:
        """(head, width, head_dim)"""
        return self._in_weight(layer, 1)

    def W_V(self, layer: int) -> Tensor:
        """(head, width, head_dim)"""
        return self._in_weight(layer, 2)

    def W_O(self, layer: int) -> Tensor:
        """(head, head_dim, width)"""
        return _heads_of(self.blocks[layer].attn.out_proj.weight.detach(), self.n_heads)

    def b_Q(self, layer: int) -> Tensor:
        """(head, head_dim)"""
        return self._in_bias(layer, 0)

    def b_K(self, layer: int) -> Tensor:
        """(head, head_dim)"""
        return self._in_bias(layer, 1)

    def b_V(self, layer: int) -> Tensor:
        """(head, head_dim)"""
        return self._in_bias(layer, 2)

    def b_O(self, layer: int) -> Tensor:
        """(width,)"""
        return self.blocks[layer].attn.out_proj.bias.detach()

    def W_in(self, layer: int) -> Tensor:
        """(width, neuron)"""
        return self.blocks[layer].mlp.c_fc.weight.detach().T

    def b_in(self, layer: int) -> Tensor:
        """(neuron,)"""
        return self.blocks[layer].mlp.c_fc.bias.detach()

    def W_out(self, layer: int) -> Tensor:
        """(neuron, width): row i is what one unit of neuron i's activation adds to the residual stream"""
        return self.blocks[layer].mlp.c_proj.weight.detach().T

    def b_out(self, layer: int) -> Tensor:
        """(width,)"""
        return self.blocks[layer].mlp.c_proj.bias.detach()

    def pooled(self, states: Tensor, ids: Tensor | None = None) -> Tensor:
        """The state that the embedding is projected from: (batch, token, width) -> (batch, width).

        `ids` (batch, token) are the token ids, needed where the end token is looked up (`pool` "argmax", "eos");
        without them `UsageError`.
        """
        if self.pool == "avg":
            return states[:, 1:].mean(1)
        if self.pool in ("tok", "first"):
            return states[:, 0]
        if self.pool == "last":
            return states[:, -1]
        if ids is None:
            raise UsageError("pooled(states, ids) needs the token ids here, to find the end token")
        end = ids.argmax(-1) if self.pool == "argmax" else (ids == self.eos_id).int().argmax(-1)
        return states[torch.arange(len(states), device=states.device), end]

    def _in_weight(self, layer: int, part: int) -> Tensor:
        weight = self.blocks[layer].attn.in_proj_weight.detach().chunk(3)[part]  # (head * head_dim, width)
        return weight.unflatten(0, (self.n_heads, -1)).transpose(1, 2)

    def _in_bias(self, layer: int, part: int) -> Tensor:
        return self.blocks[layer].attn.in_proj_bias.detach().chunk(3)[part].unflatten(0, (self.n_heads, -1))


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A model opened up: give it to `hooks.record` and `hooks.edit`, and run `module` as always."""

    module: nn.Module = field(repr=False)
    points: Mapping[str, Point] = field(repr=False)  # site name -> place, in the order of the forward pass
    towers: Mapping[str, Tower]


def of(model: nn.Module) -> Anatomy:
    """The anatomy of a model; opens its attention layers in place, once (its outputs and state dict stay the same).

    Knows open_clip's `CLIP`, `CustomTextCLIP` and `VisionTransformer` with standard layers. Raises `UsageError` for a
    class or variant that it does not know, and then leaves the model as it was.
    """
    for cls in type(model).__mro__:
        builder = _BUILDERS.get(f"{cls.__module__}.{cls.__name__}")
        if builder:
            return builder(model)
    known = ", ".join(name.rpartition(".")[2] for name in _BUILDERS)
    raise UsageError(f"anatomy does not know {type(model).__name__}; it knows {known}")


def patch_tokens(mask: Any, grid: tuple[int, int], share: float = 0.5, first: int = 1) -> Tensor:
    """The tokens whose patch is covered by an object: their indices, ascending (long tensor, may be empty).

    `mask` is the object's boolean pixel mask (height, width), array or tensor; `grid` the (rows, columns) of patches.
    A patch counts where the mask covers at least `share` of its pixels. `first` is the index of the first patch token:
    1 behind CLS.

    Raises `UsageError` if the mask does not divide into the grid or `share` is not above 0 and at most 1.
    """
    mask = mask if isinstance(mask, Tensor) else torch.from_numpy(np.ascontiguousarray(mask))
    if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[0] % grid[0] or mask.shape[1] % grid[1]:
        raise UsageError(
            f"patch_tokens needs a boolean mask (height, width) that divides into a grid of {grid[0]} x {grid[1]}, "
            f"not {mask.dtype} of shape {tuple(mask.shape)}"
        )
    if not 0 < share <= 1:
        raise UsageError(f"patch_tokens needs a share above 0 and at most 1, not {share}")
    rows, columns = mask.shape[0] // grid[0], mask.shape[1] // grid[1]  # pixels a patch
    covered = mask.reshape(grid[0], rows, grid[1], columns).sum((1, 3))  # (row, column)
    return (covered.flatten() >= share * rows * columns).nonzero().flatten() + first


def word_span(tokenizer: Any, text: str, word: str, occurrence: int = 0) -> slice:
    """The tokens of a word in a text, special tokens counted, as a slice: `states[:, word_span(...)]`.

    `.stop - 1` is the word's last token. The word may be several words; it is matched whole (`car` is not in
    `carrot`) and whatever its case. `occurrence` 1 takes the second place where it stands, -1 the last.
    `tokenizer` is a transformers fast tokenizer, a thing that carries one as `.tokenizer` (open_clip's `HFTokenizer` in
    its default mode, a processor), or open_clip's `SimpleTokenizer`.

    Raises `UsageError` if the word does not stand there, or the tokenizer cannot tell where its tokens come from.
    """
    text = getattr(tokenizer, "clean_fn", str)(text)  # open_clip's tokenizers tidy the text first
    places = list(re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))
    if not -len(places) <= occurrence < len(places):
        times = {0: "not", 1: "once"}.get(len(places), f"{len(places)} times")
        wanted = f" (wanted: occurrence {occurrence})" if places else ""
        raise UsageError(f"{word!r} is {times} in {text!r}{wanted}")
    begin, end = places[occurrence].span()
    if hasattr(tokenizer, "bpe") and hasattr(tokenizer, "sot_token_id"):  # SimpleTokenizer never merges across words
        start = 1 + len(tokenizer.encode(text[:begin]))
        return slice(start, start + len(tokenizer.encode(text[begin:end])))
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(f"word_span needs a fast tokenizer, which knows offsets, not {type(tokenizer).__name__}")
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]  # special tokens: (0, 0)
    inside = [i for i, (left, right) in enumerate(offsets) if left < end and right > begin]
    return slice(inside[0], inside[-1] + 1)


# ---- contrastive models: open_clip ----


def _contrastive(model: nn.Module) -> Anatomy:
    # The built-in CLIP class keeps its text tower flat, as `transformer`, `ln_final` ... of the model itself.
    flat = not hasattr(model, "text")
    text = model if flat else model.text
    _check_vision(model.visual)
    _check_text(text)
    if flat and not hasattr(model, "text_out"):
        # There the projection is a bare product inside encode_text; give it a place to be hooked.
        model.text_out = nn.Identity()
        model.encode_text = MethodType(_encode_text, model)
    prefix = "" if flat else "text."
    return Anatomy(
        module=model,
        points=_layer_points("vision", "visual.", model.visual.transformer, "visual.ln_post", "visual")
        | _layer_points("text", prefix, text.transformer, f"{prefix}ln_final", "text_out" if flat else "text"),
        towers={"vision": _vision_tower(model.visual), "text": _text_tower(text)},
    )


def _vision_only(model: nn.Module) -> Anatomy:
    _check_vision(model)
    points = _layer_points("vision", "", model.transformer, "ln_post", "")
    return Anatomy(model, points, {"vision": _vision_tower(model)})


def _encode_text(self: nn.Module, text: Tensor, normalize: bool = False) -> Tensor:
    out = self.text_out(type(self).encode_text(self, text))
    return F.normalize(out, dim=-1) if normalize else out


def _check_vision(visual: nn.Module) -> None:
    _require(type(visual).__name__ == "VisionTransformer", f"the vision tower {type(visual).__name__}")
    plain = visual.attn_pool is None and not visual.final_ln_after_pool and visual.pool_type in ("tok", "avg")
    _require(plain and visual.proj is not None, "a vision tower that does not norm, pool and project in this order")
    _check_layers(visual.transformer)


def _check_text(text: nn.Module) -> None:
    _require(hasattr(text, "text_projection"), f"the text tower {type(text).__name__}")
    _require(getattr(text, "cls_emb", None) is None, "a text tower with a class token")
    linear = text.text_projection is not None and getattr(text.text_projection, "bias", None) is None
    _require(linear, "a text tower without a projection, or with a bias in it")
    _check_layers(text.transformer)


def _check_layers(transformer: nn.Module) -> None:
    for block in transformer.resblocks:
        _require(type(block).__name__ == "ResidualAttentionBlock", f"layers of the kind {type(block).__name__}")
        # it would come between the heads and what they add to the residual stream
        _require(isinstance(block.ls_1, nn.Identity), "layers with LayerScale")


def _require(known: bool, what: str) -> None:
    if not known:
        raise UsageError(f"anatomy does not know {what}; use a model with open_clip's default layers and pooling")


def _swap(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def _put_swapped(_raw: Tensor, x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def _layer_points(tower: str, prefix: str, transformer: nn.Module, final: str, out: str) -> dict[str, Point]:
    """Opens the attention of an open_clip `Transformer` at `<prefix>transformer` and names its places."""
    axes = () if transformer.batch_first else (_swap, _put_swapped)  # else sequence first inside the layers
    points = {f"{tower}.embed": Point(f"{prefix}transformer.resblocks.0", "in", *axes)}
    for layer, block in enumerate(transformer.resblocks):
        OpenAttention.open(block.attn)
        site, path = f"{tower}.{layer}", f"{prefix}transformer.resblocks.{layer}"
        points |= {f"{site}.attn.{name}": Point(f"{path}.attn.{name}") for name in ATTENTION_SITES}
        points[f"{site}.attn"] = Point(f"{path}.ls_1", "out", *axes)
        points[f"{site}.mlp.hidden"] = Point(f"{path}.mlp.gelu", "out", *axes)
        points[f"{site}.mlp"] = Point(f"{path}.ls_2", "out", *axes)
        points[f"{site}.resid"] = Point(path, "out", *axes)
    return points | {f"{tower}.final": Point(final), f"{tower}.out": Point(out)}


def _vision_tower(visual: nn.Module) -> Tower:
    blocks = visual.transformer.resblocks
    return Tower(
        blocks=blocks,
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


_BUILDERS: dict[str, Callable[[nn.Module], Anatomy]] = {
    "open_clip.model.CLIP": _contrastive,
    "open_clip.model.CustomTextCLIP": _contrastive,
    "open_clip.transformer.VisionTransformer": _vision_only,
}
