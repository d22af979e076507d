"""Read and change tensors inside a running model: `record` and `edit`, two context managers over any `nn.Module`.
`collect` records over many inputs, batch by batch; `until` runs up to a site and no further; `runs` goes over batches.

A *site* is the name of a place, for example `vision.3.attn`. The names come from `mmfm_utils.anatomy`; a bare
`nn.Module` has names too: those of its submodules, each meaning that submodule's output. Names may hold wildcards
(`fnmatch`: `*` also crosses dots), so `vision.*.attn` is the attention of every vision layer.

    with record(model, "vision.*.attn") as clean:                       # {site: tensor}
        model.module.encode_image(images)
    with edit(model, {"vision.3.attn": lambda x: 0 * x}):
        ablated = model.module.encode_image(images)

Hooks live exactly as long as their `with` block, whatever ends it (the idea of ROME's `nethook`, Meng et al. 2022,
arXiv 2202.05262). Contexts act on a tensor in the order in which they were opened: a `record` opened inside an `edit`
sees the edited value, one opened around it sees the value before. Hooks of others at the same module come after them.

While a context is open, all that `torch.compile` has compiled runs uncompiled. Backward is no pass: contexts do not act
on what it runs again (gradient checkpointing).

A pass that needs to go no further can be ended (`stop`, as in `nethook`): the rest of the block of the context that
asked for it is then passed over. Any other context that waits for a site behind the end raises its `UsageError`, be it
inside or around: what it was opened for did not happen.
"""

import inspect
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmfm_utils import UsageError
from mmfm_utils.hooks.attach import Point, active, attached, leftover, listed, resolve, runs_again

__all__ = ["Point", "active", "collect", "edit", "leftover", "record", "resolve", "runs", "until"]

_run = 0  # how many batches `runs` has given out


@contextmanager
def record(
    model: Any, sites: str | Iterable[str], grad: bool = False, every: bool = False, stop: bool = False
) -> Iterator[dict[str, Tensor | list[Tensor]]]:
    """Collect the tensors at `sites` in a dictionary {site: tensor}, filled as the forward pass reaches them.

    `model` is an `nn.Module`, or an object with `.module` and `.points` (an `anatomy.Anatomy`). Where a site is
    reached more than once the last tensor stays, or with `every=True` the list of all (a sampler's steps).

    Recording never changes the result. The tensors are cut from the graph; with `grad=True` they are part of it (also
    where all parameters are frozen), and after `loss.backward()` hold their gradient in `.grad`. With gradient
    checkpointing, call `backward` inside the block, so that attention runs the same way twice.

    With `stop` the forward pass, and with it the `with` block, ends as soon as each site was reached once: nothing
    behind the last of them is computed. What reads the tensors stands after the block.

    Raises `UsageError` on entry if a name is not known or both `every` and `stop` are asked for; during the pass with
    `grad=True` where gradients are off, or have to begin in a layer that backward runs again; and on leaving if a site
    was never reached.
    """
    if every and stop:
        raise UsageError("record can keep every pass or stop the first one, not both")
    kept: dict[str, Any] = {}

    def keep(tensor: Tensor, site: str) -> Tensor | None:
        # a copy stays or goes on: a later in-place operation must not reach what was recorded
        if not grad:
            tensor, on = tensor.detach().clone(), None
        elif not torch.is_grad_enabled():
            raise UsageError(f"record(grad=True) at {site} needs gradients: leave torch.no_grad() for this pass")
        elif not tensor.requires_grad and runs_again():
            raise UsageError(f"record(grad=True) at {site} {_AGAIN}")
        else:
            tensor = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
            tensor.retain_grad()
            on = tensor.clone()
        if every:
            kept.setdefault(site, []).append(tensor)
        else:
            kept[site] = tensor
        return on

    with attached(model, "record", [(site, keep) for site in resolve(model, sites)], stop):
        yield kept


def until(model: Any, site: str, run: Callable[[], Any]) -> Tensor:
    """Call `run()`, end it at `site` and return the tensor there: itself, a part of the graph where there is one.

    Raises `UsageError` if the name is not known or stands for several sites, and if the site is not reached.
    """
    sites, found = resolve(model, site), []
    if len(sites) > 1:
        raise UsageError(f"until takes one site, not {listed(sites)}")
    with attached(model, "until", [(sites[0], lambda tensor, _: found.append(tensor))], stop=True):
        run()
    return found[0]


@torch.no_grad()
def collect(
    model: Any,
    sites: str | Iterable[str],
    run: Callable[[Any], Any],
    items: Sequence[Any] | Mapping[str, Any],
    batch: int = 32,
    keep: Any = None,
    to: str | torch.device | None = "cpu",
    stop: bool = True,
) -> dict[str, Tensor]:
    """The tensors at `sites` over many inputs, `batch` of them at a time: {site: (item, ...)}.

        collect(clip.anatomy, "vision.*.resid", lambda some: clip.model.encode_image(clip.pixels(some)), drawn, keep=0)

    `run(part)` runs the model on a part of `items`: a list, a tensor, an array, `range(n)` for indices, or a dictionary
    of such (a tokenizer's output), of which each value is cut. `keep` says what stays of a batch's tensor, first axis
    first the items: None all of it; an index, slice or tensor for the second axis (`-1`: the last token); or a function
    of the tensor, with a second required argument also of the site. What stays is copied to the device `to` (None: it
    stays where it is), and nothing else is held. Each site gives its last tensor of a call of `run`; by default a pass
    ends where all were reached. No gradients.

    Raises `UsageError` without items, for a site that a batch does not reach, and where what stays of two batches has
    unlike shapes beyond the first axis (pad all prompts to one length, or keep a part that all have).
    """
    names, cut = resolve(model, sites), items.values() if isinstance(items, Mapping) else [items]
    n, parts = max((len(each) for each in cut), default=0), {}
    if not n:
        raise UsageError("collect was given no items")
    if keep is not None and not callable(keep):
        keep = lambda tensor, at=keep: tensor[:, at]
    with_site = keep is not None and _n_required(keep) > 1
    for start in runs(range(0, n, batch)):
        here = slice(start, start + batch)
        kept = {}

        def step(tensor: Tensor, site: str, kept: dict[str, Tensor] = kept) -> None:
            stays = tensor if keep is None else keep(tensor, site) if with_site else keep(tensor)
            kept[site] = stays.to(tensor.device if to is None else to, copy=True)

        with attached(model, "collect", [(name, step) for name in names], stop):
            run({key: x[here] for key, x in items.items()} if isinstance(items, Mapping) else items[here])
        for name in names:
            parts.setdefault(name, []).append(kept[name])
    for name in names:
        shapes = {tuple(part.shape[1:]) for part in parts[name]}
        if len(shapes) > 1:
            raise UsageError(f"collect: the batches at {name} have unlike shapes, (item, *{sorted(shapes)})")
    return {name: torch.cat(parts.pop(name)) for name in names}


@contextmanager
def edit(
    model: Any, changes: Mapping[str, Callable[..., Tensor]], passes: Container[int] | None = None
) -> Iterator[None]:
    """Replace the tensors at sites by what a function makes of them: {site: function(tensor) -> tensor}.

    A function with two required arguments is called as `function(tensor, site)`: useful with wildcards, and in loops,
    where a closure over the loop variable would see only its last value. It is handed a copy, so that it may work in
    place, and must return a tensor of the same shape and dtype. Where several names meet at one site, their functions
    act in the order given. `model` is as for `record`. With `passes` they act only then: a site's passes are counted
    from 0 since the context was opened (a sampler's steps), and from 0 again in each batch of `runs`. While text is
    generated with a key-value cache, pass 0 holds the prompt and every later one a single new token.

    Raises `UsageError` on entry if a name is not known; during the pass if a function returns anything else or takes an
    index that is not there, and in a layer that backward would run again without the edit; and on leaving if a site was
    never reached, or in none of the `passes`.
    """
    pairs, counts, acted = [], {}, set()
    for pattern, function in changes.items():
        if not callable(function):
            raise UsageError(f"edit at {pattern} takes a function(tensor) -> tensor, not {type(function).__name__}")
        pairs += [(site, _checked(function, passes, counts, acted)) for site in resolve(model, pattern)]

    def check() -> None:
        for site, n in counts.items():
            if site not in acted:
                raise UsageError(
                    f"edit acted in no pass: {site} was reached {n} times, counted from 0, never in {passes}"
                )

    with attached(model, "edit", pairs, check=check):
        yield


def _checked(
    function: Callable[..., Tensor], passes: Container[int] | None, counts: dict[str, int], acted: set[str]
) -> Callable[[Tensor, str], Tensor | None]:
    required = _n_required(function)
    run, index = _run, -1  # of one site: each gets a function of its own

    def change(tensor: Tensor, site: str) -> Tensor | None:
        nonlocal run, index
        run, index = _run, index + 1 if run == _run else 0
        counts[site] = max(counts.get(site, 0), index + 1)
        if passes is not None and index not in passes:
            return None
        acted.add(site)
        if runs_again():
            raise UsageError(f"edit at {site} {_AGAIN}")
        new = function(tensor.clone(), site) if required > 1 else function(tensor.clone())
        if not isinstance(new, Tensor):
            raise UsageError(f"edit at {site} returned {type(new).__name__}; it must return the tensor to go on with")
        if new.shape != tensor.shape:
            raise UsageError(f"edit at {site} returned shape {tuple(new.shape)}; it must be {tuple(tensor.shape)}")
        if new.dtype != tensor.dtype:
            raise UsageError(f"edit at {site} returned {new.dtype}; it must be {tensor.dtype}: add .to(tensor.dtype)")
        return new

    return change


_AGAIN = (
    "is in a layer that backward runs again, without it: switch gradient checkpointing off "
    "(gradient_checkpointing_disable, set_grad_checkpointing(False)), or leave gradients out with torch.no_grad()"
)


def runs(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, one after the other; in each, every open `edit` counts its `passes` from 0 again.

    For loops that cut their input into batches: an edit of the first step then acts on all of them.
    """
    global _run
    for batch in batches:
        _run += 1
        yield batch


def _n_required(function: Callable[..., Any]) -> int:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # functions written in C, such as torch.zeros_like, do not tell their signature
        parameters = ()
    return sum(p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD for p in parameters)
