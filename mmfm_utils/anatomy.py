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

A further family is a further function in `_BUILDERS`, with its own site names over the same words.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfm_utils import UsageError
from mmfm_utils.hooks import Point

ATTENTION_SITES = ("q", "k", "v", "scores", "pattern", "z")  # `heads` is a part of the output projection


def _expose(module: nn.Module, *sites: str) -> None:
    """Submodules for tensors to pass through, where hooks can reach them. They hold no state."""
    for name in sites:
        module.add_module(name, nn.Identity())


def _heard(*sites: nn.Module) -> bool:
    """Whether anybody has a hook at one of these modules. (A plain loop: it runs in every layer of every pass.)"""
    for site in sites:
        if site._forward_hooks or site._forward_pre_hooks or site._backward_hooks or site._backward_pre_hooks:
            return True
    return False


def _step_by_step(
    at: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention on (batch, head, token, head_dim) with scores, pattern and z passing through the sites of `at`.

    `mask` is boolean (true: may attend) or added to the scores, its least number standing for -inf. Returns z
    (batch, token, head, head_dim) and the pattern (batch, head, query, key).
    """
    scores = q @ k.transpose(2, 3) * scale
    if mask is not None:
        if mask.dtype != torch.bool:
            scores, mask = scores + mask, mask > torch.finfo(mask.dtype).min
        scores = scores.masked_fill(~mask, -torch.inf)
    scores = at.scores(scores)
    pattern = at.pattern(scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32)).to(v.dtype))
    mixed = F.dropout(pattern, dropout) @ v
    return at.z(mixed.transpose(1, 2)), pattern


def _through(site: nn.Module, x: Tensor) -> Tensor:
    """(batch, head, token, head_dim) through a site that shows it as (batch, token, head, head_dim)."""
    # Contiguous, whatever an edit returns: how numbers lie in memory can decide the last bit of their product.
    return site(x.transpose(1, 2)).transpose(1, 2).contiguous() if _heard(site) else x


class OpenProjection(nn.Linear):
    """The linear layer behind the heads, (..., head * head_dim) -> (..., width); their sum, where someone listens.

    `open` turns a model's own layer into this class where it stands.
    """

    @classmethod
    def open(cls, linear: nn.Linear, n_heads: int) -> None:
        if not isinstance(linear, cls):
            linear.__class__, linear.n_heads = cls, n_heads
            _expose(linear, "heads")

    def forward(self, z: Tensor) -> Tensor:
        if not _heard(self.heads):
            return super().forward(z)
        # Someone listens to the heads. The value comes from the usual product, so that listening changes no bit of it,
        # plus what an edit changed, which is zero without one; gradients flow through the heads alone.
        by_head = z.unflatten(-1, (self.n_heads, -1))
        heads = torch.einsum("...hd,hdw->...hw", by_head, _heads_of(self.weight, self.n_heads))
        usual = F.linear(z.detach(), self.weight.detach(), self.bias)
        return usual + (self.heads(heads) - heads.detach()).sum(-2)


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
            attention.__class__ = cls
            _expose(attention, *ATTENTION_SITES)
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
        if not _heard(*self.children(), self.out_proj.heads):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = (
            _through(site, F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2))
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
        if need_weights or _heard(self.scores, self.pattern):
            z, pattern = _step_by_step(self, q, k, v, mask, self.head_dim**-0.5, dropout)
        else:
            z = self.z(F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2))
        out = self.out_proj(z.flatten(2))
        weights = (pattern.mean(1) if average_attn_weights else pattern) if need_weights else None
        return (out if self.batch_first else out.transpose(0, 1)), weights


def _to_be_added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of `nn.MultiheadAttention` (boolean: true is blocked) as numbers to add to the scores."""
    return like.new_zeros(mask.shape).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask.to(like.dtype)


def _heads_of(out_weight: Tensor, n_heads: int) -> Tensor:
    return out_weight.T.unflatten(0, (n_heads, -1))  # (head, head_dim, width)


# Where a library keeps the parts of a layer: `sites` holds the attention sites, `attn` and `mlp` give what is added to
# the stream, and the others are linear maps.
_OPEN_CLIP = dict(sites="attn", attn="ls_1", mlp="ls_2", O="attn.out_proj", **{"in": "mlp.c_fc", "out": "mlp.c_proj"})
_QKV = {"sites": "self_attn", "Q": "self_attn.q_proj", "K": "self_attn.k_proj", "V": "self_attn.v_proj", "mlp": "mlp"}
_CLIP = _QKV | dict.fromkeys(("attn", "O"), "self_attn.out_proj") | {"in": "mlp.fc1", "out": "mlp.fc2"}
_LLAMA = (
    _QKV
    | dict.fromkeys(("attn", "O"), "self_attn.o_proj")
    | {"gate": "mlp.gate_proj", "in": "mlp.up_proj", "out": "mlp.down_proj"}
)


@dataclass(frozen=True, eq=False)
class Tower:
    """The facts about one stack of transformer layers.

    Weights are detached views that share the model's memory: writing into one edits the model. They multiply from the
    right, x @ W, and have one slice a head. A bias that the model does not have is zero.
    """

    blocks: nn.ModuleList = field(repr=False)  # the layers themselves, for what has no name here (their norms)
    layout: Mapping[str, str] = field(repr=False)  # where a layer keeps its parts
    n_heads: int
    width: int
    n_tokens: int  # vision: CLS, if there is one, and patches; text, lm: the longest sequence
    grid: tuple[int, int] | None  # (rows, columns) of patches; None for text
    causal: bool
    ln_final: nn.Module = field(repr=False)
    pool: str | None  # the state that is read: "tok" CLS, "avg" mean patch, "argmax"/"eos" end token, "first", "last"
    eos_id: int | None
    proj: nn.Parameter | nn.Linear | None = field(repr=False)  # read it as `projection`

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def head_dim(self) -> int:
        return self._linear(0, "O")[0].shape[1] // self.n_heads

    @property
    def n_kv_heads(self) -> int:
        """The heads of k and v: `n_heads`, or fewer where queries are grouped."""
        return self._linear(0, "K")[0].shape[0] // self.head_dim

    @property
    def n_neurons(self) -> int:
        return self._linear(0, "in")[0].shape[0]

    @property
    def projection(self) -> Tensor:
        """(width, embed); of a language model the unembedding (width, vocabulary). `UsageError` if there is none."""
        if self.proj is None:
            raise UsageError("this tower has no projection")
        # read anew each time: moving the model to another device or precision replaces the data
        return (self.proj.weight.T if isinstance(self.proj, nn.Linear) else self.proj).detach()

    def W_Q(self, layer: int) -> Tensor:
        """(head, width, head_dim)"""
        return self._by_head(layer, "Q")[0]

    def W_K(self, layer: int) -> Tensor:
        """(key head, width, head_dim)"""
        return self._by_head(layer, "K")[0]

    def W_V(self, layer: int) -> Tensor:
        """(key head, width, head_dim)"""
        return self._by_head(layer, "V")[0]

    def W_O(self, layer: int) -> Tensor:
        """(head, head_dim, width)"""
        return _heads_of(self._linear(layer, "O")[0], self.n_heads)

    def b_Q(self, layer: int) -> Tensor:
        """(head, head_dim)"""
        return self._by_head(layer, "Q")[1]

    def b_K(self, layer: int) -> Tensor:
        """(key head, head_dim)"""
        return self._by_head(layer, "K")[1]

    def b_V(self, layer: int) -> Tensor:
        """(key head, head_dim)"""
        return self._by_head(layer, "V")[1]

    def b_O(self, layer: int) -> Tensor:
        """(width,)"""
        return self._linear(layer, "O")[1]

    def W_gate(self, layer: int) -> Tensor:
        """(width, neuron): mlp.hidden is act(x @ W_gate + b_gate) * (x @ W_in + b_in). `UsageError` without a gate."""
        return self._linear(layer, "gate")[0].T

    def b_gate(self, layer: int) -> Tensor:
        """(neuron,)"""
        return self._linear(layer, "gate")[1]

    def W_in(self, layer: int) -> Tensor:
        """(width, neuron)"""
        return self._linear(layer, "in")[0].T

    def b_in(self, layer: int) -> Tensor:
        """(neuron,)"""
        return self._linear(layer, "in")[1]

    def W_out(self, layer: int) -> Tensor:
        """(neuron, width): row i is what one unit of neuron i's activation adds to the residual stream"""
        return self._linear(layer, "out")[0].T

    def b_out(self, layer: int) -> Tensor:
        """(width,)"""
        return self._linear(layer, "out")[1]

    def pooled(self, states: Tensor, ids: Tensor | None = None) -> Tensor:
        """The state that the embedding is projected from: (batch, token, width) -> (batch, width).

        `ids` (batch, token) are the token ids, needed where the end token is looked up (`pool` "argmax", "eos");
        `UsageError` without them, and where the tower pools in a way of its own (`pool` None).
        """
        if self.pool is None:
            raise UsageError("this tower pools its states in a way that anatomy does not know")
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

    def _linear(self, layer: int, part: str) -> tuple[Tensor, Tensor]:
        """Weight (out, in) and bias (out,)."""
        block = self.blocks[layer]
        if part in self.layout:
            linear = block.get_submodule(self.layout[part])
            weight, bias = linear.weight, linear.bias
        elif part in "QKV":  # nn.MultiheadAttention packs the three into one
            weight, bias = (
                packed.chunk(3)["QKV".index(part)] for packed in (block.attn.in_proj_weight, block.attn.in_proj_bias)
            )
        else:
            raise UsageError(f"the MLPs of this tower have no {part}")
        return weight.detach(), weight.new_zeros(len(weight)) if bias is None else bias.detach()

    def _by_head(self, layer: int, part: str) -> tuple[Tensor, Tensor]:
        """Weight (head, width, head_dim) and bias (head, head_dim)."""
        weight, bias = (each.unflatten(0, (-1, self.head_dim)) for each in self._linear(layer, part))
        return weight.transpose(1, 2), bias


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A model opened up: give it to `hooks.record` and `hooks.edit`, and run `module` as always."""

    module: nn.Module = field(repr=False)
    points: Mapping[str, Point] = field(repr=False)  # site name -> place, in the order of the forward pass
    towers: Mapping[str, Tower]


def of(model: Any) -> Anatomy:
    """The anatomy of a model; opens its attention layers in place, once (its outputs and state dict stay the same).

    Knows open_clip's `CLIP`, `CustomTextCLIP` and `VisionTransformer` with standard layers, and of transformers CLIP's
    and SigLIP's towers, the language models Llama, Mistral and Qwen2, and `LlavaForConditionalGeneration` made of them;
    of diffusers `StableDiffusionPipeline`, whose `module` is then a dictionary of its text encoder, U-Net and decoder.
    In transformers the config says how attention is computed, so it now names the opened way; other models that share
    it are computed as before. Raises `UsageError` for a class or variant that it does not know, and then leaves the
    model as it was.
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
    begin, end = _find(text, word, occurrence)
    if hasattr(tokenizer, "bpe") and hasattr(tokenizer, "sot_token_id"):  # SimpleTokenizer never merges across words
        start = 1 + len(tokenizer.encode(text[:begin]))
        return slice(start, start + len(tokenizer.encode(text[begin:end])))
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(f"word_span needs a fast tokenizer, which knows offsets, not {type(tokenizer).__name__}")
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]  # special tokens: (0, 0)
    return _overlap(offsets, begin, end)


def _find(text: str, word: str, occurrence: int) -> tuple[int, int]:
    """Where the characters of a word begin and end."""
    places = list(re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))
    if not -len(places) <= occurrence < len(places):
        times = {0: "not", 1: "once"}.get(len(places), f"{len(places)} times")
        wanted = f" (wanted: occurrence {occurrence})" if places else ""
        raise UsageError(f"{word!r} is {times} in {text!r}{wanted}")
    return places[occurrence].span()


def _overlap(offsets: Sequence[tuple[int, int]], begin: int, end: int) -> slice:
    """The tokens that share characters with begin:end, given where the characters of each begin and end."""
    inside = [i for i, (left, right) in enumerate(offsets) if left < end and right > begin]
    return slice(inside[0], inside[-1] + 1)


@dataclass(frozen=True, eq=False)
class Spans:
    """Which tokens of a prompt are which; each indexes a tensor's token axis."""

    image: slice  # all tokens of the picture, CLS included where the model keeps it; empty without a picture
    objects: tuple[Tensor, ...]  # for each mask the tokens of its patches (long)
    context: Tensor  # the tokens of the patches of no mask (long)
    question: slice  # the text behind the picture (or behind the start token), without the last token
    subject: slice | None  # the last place in that text, the last token included, where the subject stands
    last: int  # the last token, from which the answer is read


def spans(
    tokenizer: Any,
    ids: Any,
    image_token_id: int | None = None,
    grid: tuple[int, int] | None = None,
    masks: Iterable[Any] = (),
    subject: str | None = None,
    share: float = 0.5,
) -> Spans:
    """The parts of one prompt, given as its token ids: a list or tensor (token,), the picture's tokens already in it.

    `masks` are boolean pixel masks (object, height, width), read with `grid` and `share` as in `patch_tokens`. Padding
    on the left is passed over; every index counts from the first id. `tokenizer` is any transformers tokenizer.

    Raises `UsageError` if the prompt does not end in text, has several pictures, or one whose tokens do not fit `grid`
    (its patches, and CLS or not); for masks without a picture; and if the subject does not stand in the text.
    """
    ids = torch.as_tensor(ids).flatten().tolist()
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    if not ids or ids[-1] in special:
        raise UsageError("spans needs a prompt that ends in text: cut the end token or the padding off")
    places = [i for i, token in enumerate(ids) if token == image_token_id]
    image = slice(places[0], places[-1] + 1) if places else slice(0, 0)
    n, patches = len(places), math.prod(grid or ())
    if n and not (grid and n - patches in (0, 1) and n == image.stop - image.start):
        raise UsageError(f"spans takes one picture with the (rows, columns) of its patches, not {grid} for {n} tokens")
    masks = list(masks)
    if masks and not n:
        raise UsageError("spans was given masks, but the prompt has no picture")
    first = image.stop - patches
    objects = tuple(patch_tokens(mask, grid, share, first) for mask in masks)
    free = torch.ones(image.stop, dtype=torch.bool)
    free[:first] = False
    free[torch.cat([torch.empty(0, dtype=torch.long), *objects])] = False
    start = image.stop if n else next(i for i, token in enumerate(ids) if token not in special)
    where = None
    if subject is not None:
        # how far the text of the first tokens reaches tells which characters a token brings, in any tokenizer
        ends = [len(tokenizer.decode(ids[start:stop])) for stop in range(start, len(ids) + 1)]
        span = _overlap(list(zip(ends, ends[1:])), *_find(tokenizer.decode(ids[start:]), subject, -1))
        where = slice(start + span.start, start + span.stop)
    return Spans(image, objects, free.nonzero().flatten(), slice(start, len(ids) - 1), where, len(ids) - 1)


def blocked(queries: Any, keys: Any) -> Callable[[Tensor], Tensor]:
    """A function for `hooks.edit` at `T.L.attn.scores`: query tokens no longer attend to the key tokens.

    `queries` and `keys` are an index, a slice, a list or tensor of indices, or a boolean mask, (token,) or, where the
    rows of a batch differ, (batch, token). After Geva et al. 2023, "Dissecting Recall of Factual Associations"
    (arXiv 2304.14767). All tokens must pass at once: generate with `use_cache=False`.

    The function raises `UsageError` where a query would be left with nothing to attend to, which would give NaN.
    """

    def block(scores: Tensor) -> Tensor:
        n_queries, n_keys = scores.shape[-2:]
        if n_queries == 1 < n_keys:
            raise UsageError("blocked needs all tokens in one pass: run without the key-value cache (use_cache=False)")
        rows, columns = _chosen(queries, scores, n_queries), _chosen(keys, scores, n_keys)
        scores = scores.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], -torch.inf)
        empty = (scores == -torch.inf).all(-1).nonzero()
        if len(empty):
            raise UsageError(
                f"blocked leaves query token {empty[0, 2]} (row {empty[0, 0]} of the batch) nothing to attend to: "
                "leave it out of the queries, or one of its keys (itself, the first token) out of the keys"
            )
        return scores

    return block


def _chosen(tokens: Any, scores: Tensor, n: int) -> Tensor:
    """(batch or 1, token), boolean"""
    chosen = torch.zeros(1, n, dtype=torch.bool, device=scores.device)
    if not isinstance(tokens, slice):
        tokens = torch.as_tensor(tokens, device=scores.device)
        if tokens.dtype == torch.bool:
            if tuple(tokens.shape) not in ((n,), (len(scores), n)):
                raise UsageError(
                    f"blocked was given a mask of shape {tuple(tokens.shape)} for scores {tuple(scores.shape)}"
                )
            return tokens.reshape(-1, n)
        tokens = tokens.long()  # an empty list has none
    chosen[:, tokens] = True
    return chosen


def conditional(change: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function for `hooks.edit`, acting on the conditional half of a guided batch and on nothing else.

    Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) runs the empty prompt and the prompt as one batch,
    (2 * picture, ...), the empty one first: `unconditional, conditional = tensor.chunk(2)`.
    """

    @wraps(change)  # it takes as many arguments as `change`
    def half(tensor: Tensor, *site: str) -> Tensor:
        without, told = tensor.chunk(2)
        return torch.cat([without, change(told, *site)])

    return half


class _Pass(nn.Module):
    def forward(self, states: Tensor, *_: Any, **__: Any) -> Tensor:
        return states


def restart(
    anatomy: Anatomy, layer: int, states: Tensor, attention_mask: Tensor | None = None, keep: int | Tensor = 0
) -> Tensor:
    """Run a language model on from `states` (batch, token, width), its residual stream after `layer`: the logits.

    The same as a pass in which `lm.{layer}.resid` is edited to be `states` (-1: `lm.embed`), without the cost of the
    layers before. Contexts that are open act at the sites behind it, `lm.embed` among them if `layer` is -1.
    `attention_mask` (batch, token) marks padding with 0. `keep` says which tokens to unembed: so many of the last
    (0: all), or a tensor of indices. Returns (batch, token, vocabulary).

    Raises `UsageError` without a language model, and for a layer that it does not have.
    """
    if "lm" not in anatomy.towers or not -1 <= layer < anatomy.towers["lm"].n_layers:
        raise UsageError(
            f"restart needs a language model and a layer from -1 to its last, not {type(anatomy.module).__name__} "
            f"and layer {layer}"
        )
    stack = anatomy.module.get_submodule(anatomy.points["lm.embed"].module.removesuffix(".layers.0"))
    layers = stack.layers
    # The model's own forward pass makes masks and positions; the layers already passed do nothing in it.
    stack.layers = nn.ModuleList([*(_Pass() for _ in range(layer + 1)), *layers[layer + 1 :]])
    try:
        return anatomy.module(
            inputs_embeds=states, attention_mask=attention_mask, use_cache=False, logits_to_keep=keep
        ).logits
    finally:
        stack.layers = layers


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
        points=_open_clip_points("vision", "visual.", model.visual.transformer, "visual.ln_post", "visual")
        | _open_clip_points("text", prefix, text.transformer, f"{prefix}ln_final", "text_out" if flat else "text"),
        towers={"vision": _vision_tower(model.visual), "text": _text_tower(text)},
    )


def _vision_only(model: nn.Module) -> Anatomy:
    _check_vision(model)
    points = _open_clip_points("vision", "", model.transformer, "ln_post", "")
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
        raise UsageError(f"anatomy does not know {what}; use a model with its library's default layers and pooling")


# How to find a tensor, and put it back, where it has other axes than its site.
_SEQUENCE_FIRST = (lambda x: x.transpose(0, 1), lambda _raw, x: x.transpose(0, 1))
_ONE_TOKEN = (lambda x: x[:, None], lambda _raw, x: x[:, 0])


def _open_clip_points(tower: str, prefix: str, transformer: nn.Module, final: str, out: str) -> dict[str, Point]:
    """Opens the attention of an open_clip `Transformer` at `<prefix>transformer` and names its places."""
    for block in transformer.resblocks:
        OpenAttention.open(block.attn)
    axes = () if transformer.batch_first else _SEQUENCE_FIRST
    points = _layer_points(tower, f"{prefix}transformer.resblocks", transformer.resblocks, _OPEN_CLIP, axes)
    return points | {f"{tower}.final": Point(final), f"{tower}.out": Point(out)}


def _layer_points(
    tower: str, path: str, blocks: nn.ModuleList, layout: Mapping[str, str], axes: tuple = ()
) -> dict[str, Point]:
    points = {f"{tower}.embed": Point(f"{path}.0", "in", *axes)}
    for layer in range(len(blocks)):
        site, block = f"{tower}.{layer}", f"{path}.{layer}"
        points |= {f"{site}.attn.{name}": Point(f"{block}.{layout['sites']}.{name}") for name in ATTENTION_SITES}
        points[f"{site}.attn.heads"] = Point(f"{block}.{layout['O']}.heads")
        points[f"{site}.attn"] = Point(f"{block}.{layout['attn']}", "out", *axes)
        points[f"{site}.mlp.hidden"] = Point(f"{block}.{layout['out']}", "in", *axes)
        points[f"{site}.mlp"] = Point(f"{block}.{layout['mlp']}", "out", *axes)
        points[f"{site}.resid"] = Point(block, "out", *axes)
    return points


def _vision_tower(visual: nn.Module) -> Tower:
    blocks = visual.transformer.resblocks
    return Tower(
        blocks=blocks,
        layout=_OPEN_CLIP,
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
        layout=_OPEN_CLIP,
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


# ---- language models, LLaVA, and CLIP and SigLIP in transformers ----

_NAME = "mmfm_open"  # the opened attention in transformers' registry and in a model's config


def _language_model(model: nn.Module) -> Anatomy:
    points, tower = _decoder("model", model.model, model.lm_head)
    return _opened(model, points, lm=tower)


def _llava(model: nn.Module) -> Anatomy:
    parts = model.model
    vision_points, vision = _encoder("model.vision_tower", parts.vision_tower)
    lm_points, lm = _decoder("model.language_model", parts.language_model, model.lm_head)
    projector = "model.multi_modal_projector"
    between = {"projector.hidden": Point(f"{projector}.act"), "projector": Point(projector)}
    return _opened(model, vision_points | between | lm_points, vision=vision, lm=lm)


def _clip_tower(model: nn.Module) -> Anatomy:
    points, tower = _encoder("", model)
    return _opened(model, points, **{"text" if tower.causal else "vision": tower})


def _clip_projected(model: nn.Module) -> Anatomy:
    name, out = ("vision", "visual_projection") if hasattr(model, "visual_projection") else ("text", "text_projection")
    points, tower = _encoder(f"{name}_model", model.get_submodule(f"{name}_model"), model.get_submodule(out))
    return _opened(model, points | {f"{name}.out": Point(out)}, **{name: tower})


def _decoder(path: str, stack: nn.Module, head: nn.Linear) -> tuple[dict[str, Point], Tower]:
    """The places and facts of a language model whose layers are in `stack`, at `path`."""
    _require(type(stack).__name__ in ("LlamaModel", "MistralModel", "Qwen2Model"), f"the {type(stack).__name__}")
    points = _layer_points("lm", f"{path}.layers", stack.layers, _LLAMA)
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
    _require(kind in ("CLIPTextModel", "CLIPVisionModel", "SiglipVisionModel"), f"the tower {kind}")
    name = "text" if kind == "CLIPTextModel" else "vision"
    norm = "final_layer_norm" if name == "text" else "post_layernorm"
    eos = config.eos_token_id if name == "text" else None
    # transformers takes the largest id for the end token where the config has the old, wrong 2
    pool = {"CLIPTextModel": "argmax" if eos == 2 else "eos", "CLIPVisionModel": "tok"}.get(kind)
    axes = _ONE_TOKEN if kind == "CLIPVisionModel" else ()  # it norms CLS alone
    points = _layer_points(name, f"{inside}encoder.layers", stack.encoder.layers, _CLIP)
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


def _opened(model: nn.Module, points: dict[str, Point], **towers: Tower) -> Anatomy:
    """Opens the attention of a transformers model: its layers get the places, its config the way through them."""
    from transformers import AttentionInterface, AttentionMaskInterface  # slow, and open_clip does without

    layers = [(block, tower) for tower in towers.values() for block in tower.blocks]
    for block, tower in layers:
        kind = type(block.get_submodule(tower.layout["O"]))
        _require(kind in (nn.Linear, OpenProjection), f"an output projection of the kind {kind.__name__}")
    AttentionInterface.register(_NAME, partial(_attend, AttentionInterface()["sdpa"]))
    AttentionMaskInterface.register(_NAME, partial(_may_attend, AttentionMaskInterface()["sdpa"]))
    model.set_attn_implementation(_NAME)
    for block, tower in layers:
        if "pattern" not in block.self_attn._modules:
            _expose(block.self_attn, *ATTENTION_SITES)
            OpenProjection.open(block.get_submodule(tower.layout["O"]), tower.n_heads)
    return Anatomy(model, points, towers)


def _attend(
    usual: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention as transformers calls it, on (batch, head, token, head_dim), through the sites of `module`."""
    if "pattern" not in module._modules:  # a model that was not opened, but shares the config of one that was
        return usual(module, query, key, value, mask, **options)
    q, k, v = _through(module.q, query), _through(module.k, key), _through(module.v, value)
    wanted = options.get("output_attentions") or getattr(module.config, "output_attentions", False)
    if not (wanted or _heard(module.scores, module.pattern)):
        return module.z(usual(module, q, k, v, mask, **options)[0]), None
    causal = options.get("is_causal")
    if mask is None and q.shape[2] > 1 and (module.is_causal if causal is None else causal):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return _step_by_step(module, q, k, v, mask, options["scaling"], options.get("dropout", 0.0))


def _may_attend(usual: Callable[..., Any], *args: Any, **options: Any) -> Tensor | None:
    """(batch, 1, query, key), true where a query may attend: as usual, and to itself where that leaves nothing."""
    mask = usual(*args, **options)
    if mask is None:  # no padding: the kernel knows by itself what is causal
        return None
    itself = torch.eye(*mask.shape[-2:], dtype=torch.bool, device=mask.device)
    return mask | (itself & ~mask.any(-1, keepdim=True))


# ---- text-to-image models: diffusers ----


def _text_to_image(pipeline: Any) -> Anatomy:
    from diffusers.models.attention_processor import AttnProcessor2_0  # slow, and the others do without

    unet = pipeline.unet
    _require(type(unet).__name__ == "UNet2DConditionModel", f"the denoiser {type(unet).__name__}")
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
                _expose(attention, *ATTENTION_SITES)
                OpenProjection.open(attention.to_out[0], attention.heads)
                attention.set_processor(_OpenProcessor(AttnProcessor2_0()))
            points |= {f"{site}.{name}.{part}": Point(f"{path}.{part}") for part in ATTENTION_SITES}
            points |= {f"{site}.{name}.heads": Point(f"{path}.to_out.0.heads"), f"{site}.{name}": Point(path)}
        points |= {
            f"{site}.mlp.hidden": Point(f"unet.{block}.ff.net.2", "in"),
            f"{site}.mlp": Point(f"unet.{block}.ff"),
        }
        points[f"{site}.resid"] = Point(f"unet.{transformer}")
    points["unet.out"] = Point("unet.conv_out")
    parts = {"text_encoder": pipeline.text_encoder, "unet": unet, "vae": pipeline.vae}
    return Anatomy(nn.ModuleDict(parts), points, text.towers)


def _unet_places(unet: nn.Module) -> list[tuple[str, str, str | None]]:
    """(site, path of the convolutions, path of the transformer or None), in the order of the forward pass."""
    blocks = [*((f"down.{i}", f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks))]
    blocks += [("mid", "mid_block", unet.mid_block)]
    blocks += [*((f"up.{i}", f"up_blocks.{i}", block) for i, block in enumerate(unet.up_blocks))]
    places = []
    for name, path, block in blocks:
        transformers = getattr(block, "attentions", ())
        for i in range(len(block.resnets)):
            transformer = f"{path}.attentions.{i}" if i < len(transformers) else None
            places.append((f"unet.{name}.{i}", f"{path}.resnets.{i}", transformer))
        for kind in ("downsamplers", "upsamplers"):
            if getattr(block, kind, None):
                places.append((f"unet.{name}.resample", f"{path}.{kind}.0", None))
    return places


def _check_unet(transformer: nn.Module) -> None:
    _require(len(transformer.transformer_blocks) == 1, "a U-Net with several transformer layers in one place")
    block = transformer.transformer_blocks[0]
    for attention in (block.attn1, block.attn2):
        kinds = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "add_k_proj", "residual_connection")
        plain = not any(getattr(attention, kind, None) for kind in kinds) and attention.rescale_output_factor == 1
        _require(plain and isinstance(attention.to_out[0], nn.Linear), "a U-Net whose attention is not the plain one")


class _OpenProcessor:
    """How diffusers computes an attention layer, through the sites of the layer; `usual` where nobody listens."""

    def __init__(self, usual: Callable[..., Tensor]) -> None:
        self.usual = usual

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, **unused: Any,
    ) -> Tensor:  # fmt: skip
        if not _heard(*(getattr(attn, name) for name in ATTENTION_SITES)):
            return self.usual(attn, hidden_states, encoder_hidden_states, attention_mask, **unused)
        told = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            _through(site, linear(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2))  # (batch, head, token, head_dim)
            for site, linear, x in (
                (attn.q, attn.to_q, hidden_states), (attn.k, attn.to_k, told), (attn.v, attn.to_v, told),
            )
        )  # fmt: skip
        if attention_mask is not None:  # to be added
            attention_mask = attn.prepare_attention_mask(attention_mask, told.shape[1], len(told))
            attention_mask = attention_mask.view(len(told), attn.heads, -1, attention_mask.shape[-1])
        if _heard(attn.scores, attn.pattern):
            z, _ = _step_by_step(attn, q, k, v, attention_mask, attn.scale)
        else:
            z = attn.z(F.scaled_dot_product_attention(q, k, v, attention_mask).transpose(1, 2))
        return attn.to_out[1](attn.to_out[0](z.flatten(2)))


_BUILDERS: dict[str, Callable[[Any], Anatomy]] = {
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion.StableDiffusionPipeline": _text_to_image,
    "open_clip.model.CLIP": _contrastive,
    "open_clip.model.CustomTextCLIP": _contrastive,
    "open_clip.transformer.VisionTransformer": _vision_only,
    "transformers.models.llama.modeling_llama.LlamaForCausalLM": _language_model,
    "transformers.models.mistral.modeling_mistral.MistralForCausalLM": _language_model,
    "transformers.models.qwen2.modeling_qwen2.Qwen2ForCausalLM": _language_model,
    "transformers.models.llava.modeling_llava.LlavaForConditionalGeneration": _llava,
    "transformers.models.clip.modeling_clip.CLIPTextModel": _clip_tower,
    "transformers.models.clip.modeling_clip.CLIPTextModelWithProjection": _clip_projected,
    "transformers.models.clip.modeling_clip.CLIPVisionModel": _clip_tower,
    "transformers.models.clip.modeling_clip.CLIPVisionModelWithProjection": _clip_projected,
    "transformers.models.siglip.modeling_siglip.SiglipVisionModel": _clip_tower,
}
