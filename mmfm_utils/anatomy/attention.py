"""Attention layers with a place for each intermediate result, around the library's fused kernel or step by step."""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION_SITES = ("q", "k", "v", "scores", "pattern", "z")  # `heads` is a part of the output projection


def expose(module: nn.Module, *sites: str) -> None:
    """Submodules for tensors to pass through, where hooks can reach them. They hold no state."""
    for name in sites:
        module.add_module(name, nn.Identity())


def turn(module: nn.Module, cls: type[nn.Module]) -> None:
    """Make a module of a model's own one of the class `cls`, where it stands."""
    module.__class__ = cls
    if hasattr(module, "_old_forward"):  # accelerate's offloading wraps the forward pass that it found, and calls it
        module._old_forward = MethodType(cls.forward, module)


def heard(*sites: nn.Module) -> bool:
    """Whether anybody has a hook at one of these modules. (A plain loop: it runs in every layer of every pass.)"""
    for site in sites:
        if site._forward_hooks or site._forward_pre_hooks or site._backward_hooks or site._backward_pre_hooks:
            return True
    return False


def step_by_step(
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


def through(site: nn.Module, x: Tensor) -> Tensor:
    """(batch, head, token, head_dim) through a site that shows it as (batch, token, head, head_dim)."""
    # Contiguous, whatever an edit returns: how numbers lie in memory can decide the last bit of their product.
    return site(x.transpose(1, 2)).transpose(1, 2).contiguous() if heard(site) else x


class OpenProjection(nn.Linear):
    """The linear layer behind the heads, (..., head * head_dim) -> (..., width); their sum, where someone listens.

    `open` turns a model's own layer into this class where it stands.
    """

    @classmethod
    def open(cls, linear: nn.Linear, n_heads: int) -> None:
        if not isinstance(linear, cls):
            turn(linear, cls)
            linear.n_heads = n_heads
            expose(linear, "heads")

    def forward(self, z: Tensor) -> Tensor:
        if not heard(self.heads):
            return super().forward(z)
        # Someone listens to the heads. The value comes from the usual product, so that listening changes no bit of it,
        # plus what an edit changed, which is zero without one; gradients flow through the heads alone.
        by_head = z.unflatten(-1, (self.n_heads, -1))
        heads = torch.einsum("...hd,hdw->...hw", by_head, heads_of(self.weight, self.n_heads))
        usual = F.linear(z.detach(), self.weight.detach(), self.bias)
        return usual + (self.heads(heads) - heads.detach()).sum(-2)


def heads_of(out_weight: Tensor, n_heads: int) -> Tensor:
    return out_weight.T.unflatten(0, (n_heads, -1))  # (head, head_dim, width)
