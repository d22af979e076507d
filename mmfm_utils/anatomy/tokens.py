"""Which tokens are which: patches that an object covers, words of a text, parts of a prompt with a picture."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfm_utils import UsageError


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


def _offsets(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Where the characters of each token begin and end, given the text of no token, of the first, the first two ...

    This tells them in any tokenizer. A text may end within a character (in one that splits them into bytes) and does
    not agree with the whole one then: the character belongs to all the tokens that it takes.
    """
    agreed = [len(os.path.commonprefix([text, texts[-1]])) for text in texts]
    ends = [end if end == len(text) else None for end, text in zip(agreed, texts)]
    for i in reversed(range(len(ends) - 1)):
        ends[i] = ends[i + 1] if ends[i] is None else ends[i]
    return list(zip(agreed, ends[1:]))


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
    grid: tuple[int, int] | Sequence[tuple[int, ...]] | None = None,
    masks: Iterable[Any] = (),
    subject: str | None = None,
    share: float = 0.5,
) -> Spans:
    """The parts of one prompt, given as its token ids: a list or tensor (token,), the picture's tokens already in it.

    `masks` are boolean pixel masks (object, height, width), read with `grid` and `share` as in `patch_tokens`. Where a
    model is shown the picture at several scales, one behind the other, `grid` lists them: (rows, columns), or with a
    third number for the tokens behind each row that are no patches (`models.Generative.grids` tells them). An object
    then has tokens at each. Padding on the left is passed over; every index counts from the first id. `tokenizer` is
    any transformers tokenizer.

    Raises `UsageError` if the prompt does not end in text, has several pictures, or one whose tokens do not fit `grid`
    (its patches, and CLS or not); for masks without a picture; and if the subject does not stand in the text.
    """
    ids = torch.as_tensor(ids).flatten().tolist()
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    if not ids or ids[-1] in special:
        raise UsageError("spans needs a prompt that ends in text: cut the end token or the padding off")
    places = [i for i, token in enumerate(ids) if token == image_token_id]
    image = slice(places[0], places[-1] + 1) if places else slice(0, 0)
    scales = [(*scale, 0)[:3] for scale in ([grid] if grid and isinstance(grid[0], int) else grid or ())]
    n, known = len(places), sum(rows * (columns + behind) for rows, columns, behind in scales)
    if n and not (scales and n - known in (0, 1) and n == image.stop - image.start):
        raise UsageError(f"spans takes one picture with the (rows, columns) of its patches, not {grid} for {n} tokens")
    masks = list(masks)
    if masks and not n:
        raise UsageError("spans was given masks, but the prompt has no picture")
    objects, free = [[] for _ in masks], [torch.empty(0, dtype=torch.long)]
    first = image.stop - known
    for rows, columns, behind in scales if n else ():
        tokens = torch.arange(first, first + rows * (columns + behind)).view(rows, -1)[:, :columns].flatten()
        covered = [patch_tokens(mask, (rows, columns), share, first=0) for mask in masks]
        uncovered = torch.ones(len(tokens), dtype=torch.bool)
        for parts, patches in zip(objects, covered):
            parts.append(tokens[patches])
            uncovered[patches] = False
        free.append(tokens[uncovered])
        first += rows * (columns + behind)
    start = image.stop if n else next(i for i, token in enumerate(ids) if token not in special)
    where = None
    if subject is not None:
        texts = [tokenizer.decode(ids[start:stop]) for stop in range(start, len(ids) + 1)]
        span = _overlap(_offsets(texts), *_find(texts[-1], subject, -1))
        where = slice(start + span.start, start + span.stop)
    objects = tuple(map(torch.cat, objects))
    return Spans(image, objects, torch.cat(free), slice(start, len(ids) - 1), where, len(ids) - 1)
