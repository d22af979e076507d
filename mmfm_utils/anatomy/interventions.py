"""Functions for `hooks.edit`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from mmfm_utils import UsageError


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


_PICTURES: ContextVar[int | None] = ContextVar("pictures", default=None)


@contextmanager
def painting(n: int) -> Iterator[None]:
    """Says that what runs in this block paints n pictures, for `conditional`; `Diffusion.paint` says so by itself."""
    before = _PICTURES.set(n)
    try:
        yield
    finally:
        _PICTURES.reset(before)


def conditional(change: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function for `hooks.edit`, acting on the rows of a batch that were told the prompt and on nothing else.

    Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) runs the empty prompt and the prompt as one batch,
    (2 * picture, ...), the empty one first: `unconditional, conditional = tensor.chunk(2)`. Without guidance (Turbo and
    LCM models) the batch is (picture, ...), and all of it is changed.

    The function raises `UsageError` where it cannot tell: outside `Diffusion.paint` and `painting`, and in a batch that
    is neither.
    """

    @wraps(change)  # it takes as many arguments as `change`
    def on_told(tensor: Tensor, *site: str) -> Tensor:
        n, rows = _PICTURES.get(), len(tensor)
        if n is None or rows not in (n, 2 * n):
            raise UsageError(
                f"conditional cannot tell which of {rows} rows were told a prompt: use Diffusion.paint, or "
                "`with anatomy.painting(n):` around a run for n pictures, the empty prompts first"
            )
        without, told = tensor.split([rows - n, n])
        return torch.cat([without, change(told, *site)])

    return on_told
