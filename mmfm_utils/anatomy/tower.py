"""The facts about a model: where its layers keep their parts, and one `Tower` for each stack of them."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmfm_utils import UsageError
from mmfm_utils.anatomy.attention import ATTENTION_SITES, heads_of
from mmfm_utils.hooks import Point


@dataclass(frozen=True)
class Layout:
    """Where an architecture keeps a stack of layers, and where a layer keeps its parts. See `register`.

    The first paths lie below a layer, the others below the module that runs the stack. `out` and `sites` are looked for
    there and then below the modules around it, so that a tower serves alone and as a part of a model.
    """

    attention: str  # the module that has the attention sites
    attn: str  # the modules whose outputs are added to the residual stream
    mlp: str
    o: str  # the linear maps, named as in `Tower.W_O`; up is W_in, down is W_out
    up: str
    down: str
    q: str | None = None  # None: one map gives the three, one behind the other
    k: str | None = None
    v: str | None = None
    qkv: str | None = None  # that map; None: it is the attention itself, an `nn.MultiheadAttention`
    gate: str | None = None  # None: the MLP has no gate
    cross: str | None = None  # the module of cross-attention (diffusers)

    tower: str = ""  # what its sites begin with: "vision", "text", "lm"; in diffusers "dit"
    layers: str = ""
    norm: str = ""  # the last norm
    out: str | None = None  # what makes T.out (or lm.logits) of the states after that norm
    sites: Mapping[str, str] = field(default_factory=dict)  # what stands behind the stack: site -> module
    n_heads: str = "num_attention_heads"  # under which name the config has their number
    causal: bool = False
    pool: str | None = None  # as `Tower.pool`
    packed: str | None = None  # the argument with each picture's (frames, rows, columns) where pictures are packed


@dataclass(frozen=True, eq=False)
class Tower:
    """The facts about one stack of transformer layers.

    Weights are detached views that share the model's memory: writing into one edits the model. They multiply from the
    right, x @ W, and have one slice a head. A bias that the model does not have is zero. Weights that accelerate keeps
    on the CPU or the disk are fetched for the call, and are then no views.
    """

    blocks: nn.ModuleList = field(repr=False)  # the layers themselves, for what has no name here (their norms)
    layout: Layout = field(repr=False)
    n_heads: int
    width: int
    n_tokens: int | None  # vision: CLS, if there is one, and patches; text, lm: the longest sequence
    grid: tuple[int, int] | None  # (rows, columns) of patches; both None where they depend on the picture
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
        return self._linear(0, "o")[0].shape[1] // self.n_heads

    @property
    def n_kv_heads(self) -> int:
        """The heads of k and v: `n_heads`, or fewer where queries are grouped."""
        return self._linear(0, "k")[0].shape[0] // self.head_dim

    @property
    def n_neurons(self) -> int:
        return self._linear(0, "up")[0].shape[0]

    @property
    def projection(self) -> Tensor:
        """(width, embed); of a language model the unembedding (width, vocabulary). `UsageError` if there is none."""
        if self.proj is None:
            raise UsageError("this tower has no projection")
        # read anew each time: moving the model to another device or precision replaces the data
        return _fetched(self.proj, "weight")[0].T if isinstance(self.proj, nn.Linear) else _present(self.proj)

    @property
    def projection_bias(self) -> Tensor:
        """What is added to states @ `projection`: (embed,) or (vocabulary,), zero where there is none."""
        bias = _fetched(self.proj, "bias")[0] if isinstance(self.proj, nn.Linear) else None
        return self.projection.new_zeros(self.projection.shape[1]) if bias is None else bias

    def W_Q(self, layer: int) -> Tensor:
        """(head, width, head_dim)"""
        return self._by_head(layer, "q")[0]

    def W_K(self, layer: int) -> Tensor:
        """(key head, width, head_dim)"""
        return self._by_head(layer, "k")[0]

    def W_V(self, layer: int) -> Tensor:
        """(key head, width, head_dim)"""
        return self._by_head(layer, "v")[0]

    def W_O(self, layer: int) -> Tensor:
        """(head, head_dim, width)"""
        return heads_of(self._linear(layer, "o")[0], self.n_heads)

    def b_Q(self, layer: int) -> Tensor:
        """(head, head_dim)"""
        return self._by_head(layer, "q")[1]

    def b_K(self, layer: int) -> Tensor:
        """(key head, head_dim)"""
        return self._by_head(layer, "k")[1]

    def b_V(self, layer: int) -> Tensor:
        """(key head, head_dim)"""
        return self._by_head(layer, "v")[1]

    def b_O(self, layer: int) -> Tensor:
        """(width,)"""
        return self._linear(layer, "o")[1]

    def W_gate(self, layer: int) -> Tensor:
        """(width, neuron): mlp.hidden is act(x @ W_gate + b_gate) * (x @ W_in + b_in). `UsageError` without a gate."""
        return self._linear(layer, "gate")[0].T

    def b_gate(self, layer: int) -> Tensor:
        """(neuron,)"""
        return self._linear(layer, "gate")[1]

    def W_in(self, layer: int) -> Tensor:
        """(width, neuron)"""
        return self._linear(layer, "up")[0].T

    def b_in(self, layer: int) -> Tensor:
        """(neuron,)"""
        return self._linear(layer, "up")[1]

    def W_out(self, layer: int) -> Tensor:
        """(neuron, width): row i is what one unit of neuron i's activation adds to the residual stream"""
        return self._linear(layer, "down")[0].T

    def b_out(self, layer: int) -> Tensor:
        """(width,)"""
        return self._linear(layer, "down")[1]

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
        block, path = self.blocks[layer], getattr(self.layout, part)
        if path is not None:
            weight, bias = _fetched(block.get_submodule(path), "weight", "bias")
        elif part in "qkv":
            packed, n = block.get_submodule(self.layout.qkv or self.layout.attention), self.head_dim * self.n_heads
            names = ("weight", "bias") if self.layout.qkv else ("in_proj_weight", "in_proj_bias")
            weight, bias = (
                None if x is None else x.split([n, (len(x) - n) // 2, (len(x) - n) // 2])["qkv".index(part)]
                for x in _fetched(packed, *names)
            )
        else:
            raise UsageError(f"the MLPs of this tower have no {part}")
        return weight, weight.new_zeros(len(weight)) if bias is None else bias

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
    # tower -> how its pass goes on from a place, for `run_between`: entry(anatomy, states, start, **what else it reads)
    entries: Mapping[str, Callable[..., Any]] = field(default_factory=dict, repr=False)


def layer_points(tower: str, path: str, blocks: nn.ModuleList, layout: Layout, axes: tuple = ()) -> dict[str, Point]:
    """The places of a stack of layers at `path`, in the order of the forward pass. `axes` are `get` and `put`."""
    points = {f"{tower}.embed": Point(f"{path}.0", "in", *axes)}
    for layer in range(len(blocks)):
        site, block = f"{tower}.{layer}", f"{path}.{layer}"
        points |= {f"{site}.attn.{name}": Point(f"{block}.{layout.attention}.{name}") for name in ATTENTION_SITES}
        points[f"{site}.attn.heads"] = Point(f"{block}.{layout.o}.heads")
        points[f"{site}.attn"] = Point(f"{block}.{layout.attn}", "out", *axes)
        points[f"{site}.mlp.hidden"] = Point(f"{block}.{layout.down}", "in", *axes)
        points[f"{site}.mlp"] = Point(f"{block}.{layout.mlp}", "out", *axes)
        points[f"{site}.resid"] = Point(block, "out", *axes)
    return points


def _fetched(module: nn.Module, *names: str) -> list[Tensor | None]:
    """Parameters of a module, from where accelerate keeps them if they are not here."""
    here = nullcontext()
    if hasattr(module, "_hf_hook"):
        from accelerate.utils import align_module_device

        here = align_module_device(module)
    with here:
        return [None if (found := getattr(module, name)) is None else _present(found) for name in names]


def _present(weight: Tensor) -> Tensor:
    if weight.is_meta:
        raise UsageError("this weight is not in memory: load the model without offloading to read it")
    return weight.detach()


def require_own(module: nn.Module, what: str, *kinds: type[nn.Module]) -> None:
    """`UsageError` where a module computes something else than its kind does: another kind, or another `forward`."""
    require(type(module) in kinds, f"{what} of the kind {type(module).__name__}")
    replaced = "forward" in vars(module) and not hasattr(module, "_old_forward")  # but for accelerate, see `turn`
    require(not replaced, f"{what} whose forward was replaced (open the model before)")


def require(known: bool, what: str) -> None:
    if not known:
        raise UsageError(f"anatomy does not know {what}; use a model with its library's default layers and pooling")
