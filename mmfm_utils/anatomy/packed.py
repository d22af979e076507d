"""Vision towers that take the pictures of a pass as one sequence, packed one behind the other (Qwen2-VL).

Each picture (of a film each frame) is a row of a site's tensor. Rows of smaller pictures end in padding: zeros, which
nobody attends to but the padding itself, and whose edits are lost.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmfm_utils import UsageError
from mmfm_utils.anatomy.passes import stack_entry
from mmfm_utils.anatomy.tower import Anatomy


def lengths_of(sizes: Tensor) -> list[int]:
    """(picture, 3): frames, rows and columns of patches -> patches of each frame"""
    return (sizes[:, 1] * sizes[:, 2]).repeat_interleave(sizes[:, 0]).tolist()


def rows(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """(token, ...) -> (picture, longest, ...)"""
    return pad_sequence(x.split(list(lengths)), batch_first=True)


def packed(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """(picture, longest, ...) -> (token, ...)"""
    return torch.cat([row[:n] for row, n in zip(x, lengths)])


def _lengths(stack: nn.Module, raw: Tensor) -> list[int]:
    merged = sum(stack.pictures) // len(raw)  # behind the tower several patches make one token
    return [n // merged for n in stack.pictures]


@dataclass(frozen=True)
class ToRows:
    """`get` of a `Point` in such a stack."""

    stack: nn.Module = field(compare=False)

    def __call__(self, raw: Tensor) -> Tensor:
        return rows(raw, _lengths(self.stack, raw))


@dataclass(frozen=True)
class FromRows:
    """`put` of a `Point` in such a stack."""

    stack: nn.Module = field(compare=False)

    def __call__(self, raw: Tensor, x: Tensor) -> Tensor:
        return packed(x, _lengths(self.stack, raw))


def _note(stack: nn.Module, args: tuple, kwargs: dict) -> None:
    stack.pictures = lengths_of(kwargs[stack.sizes_name] if stack.sizes_name in kwargs else args[1])


def _together(_attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    ends = kwargs["cu_seqlens"]
    return args, kwargs | dict(cu_seqlens=ends[[0, -1]], pictures=ends.diff().tolist())


def unpack(stack: nn.Module, attentions: Sequence[nn.Module], sizes_name: str) -> None:
    """Lets a stack note its pictures, and attention take all of them at once: `each` and `may_attend` keep them apart.

    `sizes_name` is the argument of the stack that holds the sizes of the pictures (see `lengths_of`).
    """
    if not hasattr(stack, "sizes_name"):
        stack.sizes_name = sizes_name
        stack.register_forward_pre_hook(_note, with_kwargs=True)
        for attention in attentions:
            attention.register_forward_pre_hook(_together, with_kwargs=True)


def each(usual: Callable[..., Any], lengths: Sequence[int]) -> Callable[..., Any]:
    """Attention of transformers on (picture, head, token, head_dim), picture by picture, as a packed tower calls it."""

    def attend(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, _mask: Tensor, **options: Any
    ) -> tuple[Tensor, None]:
        parts = [
            usual(module, *(x[i : i + 1, :, :n] for x in (q, k, v)), None, **options)[0][0]
            for i, n in enumerate(lengths)
        ]
        return pad_sequence(parts, batch_first=True), None

    return attend


def may_attend(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(picture, 1, query, key): a picture's own tokens, and padding itself"""
    n = torch.arange(max(lengths), device=device)
    real = n < torch.tensor(lengths, device=device)[:, None]  # (picture, token)
    return ((real[:, :, None] & real[:, None]) | (n[:, None] == n))[:, None]


def packed_entry(path: str, sizes_name: str) -> Callable[..., Any]:
    """The entry (see `Anatomy`) of the stack at `path`: it needs the pictures' sizes again."""
    return partial(_run, stack_entry("vision", path, partial(_enter, sizes_name)))


def _run(
    run: Callable[..., Any], anatomy: Anatomy, states: Tensor, start: int, image_grid_thw: Tensor | None = None
) -> Any:
    if image_grid_thw is None:
        raise UsageError("run_between needs image_grid_thw=... here: frames, rows and columns of each picture")
    return run(anatomy, packed(states, lengths_of(image_grid_thw)), start, sizes=image_grid_thw)


def _enter(sizes_name: str, stack: nn.Module, states: Tensor, sizes: Tensor) -> Any:
    config = stack.config
    blank = states.new_zeros(len(states), config.in_channels * config.temporal_patch_size * config.patch_size**2)
    return stack(blank, **{sizes_name: sizes})
