"""Places in a model, their names, and the hooks that a context puts there for as long as it is open."""

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, autograd, nn
from torch.autograd.function import FunctionCtx

from mmfm_utils import UsageError


def _first(raw: Any) -> Any:
    """The tensor in what a module takes or gives: itself, or the first entry of a tuple or list."""
    return raw[0] if isinstance(raw, (tuple, list)) else raw


def _replace_first(raw: Any, tensor: Tensor) -> Any:
    return type(raw)((tensor, *raw[1:])) if isinstance(raw, (tuple, list)) else tensor


@dataclass(frozen=True)
class Point:
    """Where a tensor lives: the output (`"out"`) or the first argument (`"in"`) of the module at a dotted path.

    `get(raw)` finds the tensor in that output or argument, and `put(raw, tensor)` gives it back in the same form.
    Left out, they take the value itself, or the first entry of a tuple or list. Give both where the tensor sits
    elsewhere or has its axes in another order.
    """

    module: str
    side: str = "out"
    get: Callable[[Any], Tensor] = _first
    put: Callable[[Any, Tensor], Any] = _replace_first


_OPEN: list[str] = []  # one line for every context that is open now


def leftover() -> list[str]:
    """The contexts that were opened and not yet closed, one line each. The runner calls it when a notebook ends."""
    return list(_OPEN)


def active(module: nn.Module) -> list[str]:
    """The sites at which this module's hooks are alive somewhere in `module`, read from the hooks themselves."""
    placed = (hook for m in module.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values()))
    return [hook.site for hook in placed if hasattr(hook, "site")]


def resolve(model: Any, sites: str | Iterable[str]) -> list[str]:
    """The full names that `sites` (a name or several, wildcards allowed) stand for, each once, in the model's order.

    Raises `UsageError` with the nearest names where one matches nothing.
    """
    points = _vocabulary(model)[1]
    found = []
    for pattern in [sites] if isinstance(sites, str) else sites:
        matches = [pattern] if pattern in points else [name for name in points if fnmatchcase(name, pattern)]
        if not matches:
            near = difflib.get_close_matches(pattern, points, n=3, cutoff=0.4) or list(points)[:3]
            raise UsageError(f"no site is called {pattern!r}; the nearest are {', '.join(near)}")
        found += matches
    return list(dict.fromkeys(found))


def _vocabulary(model: Any) -> tuple[nn.Module, Mapping[str, Point]]:
    if isinstance(model, nn.Module):
        return model, {name: Point(name) for name, _ in model.named_modules() if name}
    return model.module, model.points


Step = Callable[[Tensor, str], Tensor | None]  # (tensor, site) -> tensor to go on with, or None to leave it


def runs_again() -> bool:
    """Whether backward will run again what runs now: inside gradient checkpointing, or inside an `autograd.Function`,
    as reversible layers and other libraries' checkpointing are. No hook may be there any more by then.
    """
    frame = sys._getframe()
    while frame := frame.f_back:
        checkpoint = frame.f_globals.get("__name__") == "torch.utils.checkpoint" and torch.is_grad_enabled()
        if checkpoint or (frame.f_code.co_name == "forward" and _of_autograd(frame)):
            return True
    return False


def _of_autograd(frame: FrameType) -> bool:
    first = frame.f_locals.get(next(iter(frame.f_code.co_varnames), None))
    if isinstance(first, nn.Module):
        return False
    kinds = [autograd.Function]
    for kind in kinds:
        kinds += kind.__subclasses__()
    # the class is told by what its forward pass is given, or by its code where it is given no context
    return isinstance(first, FunctionCtx) or any(frame.f_code is getattr(k.forward, "__code__", None) for k in kinds)


class Stop(BaseException):
    """Ends a pass for the context whose set of reached sites it carries. No library may take it for an error."""


@contextmanager
def attached(
    model: Any, verb: str, steps: list[tuple[str, Step]], stop: bool = False, check: Callable[[], None] = lambda: None
) -> Iterator[None]:
    root, points = _vocabulary(model)
    label = f"{verb}: {listed([site for site, _ in steps])}"
    wanted, fired, handles = len({site for site, _ in steps}), set(), []

    def reached(site: str) -> None:
        fired.add(site)
        if stop and len(fired) == wanted:
            raise Stop(fired)

    def visit(site: str, step: Step, module: nn.Module, tensor: Tensor) -> Tensor | None:
        # A copy of the model that is made in here keeps the hooks: they end with the context all the same. And what
        # backward runs again is no further pass.
        if not handles or torch._C._current_graph_task_id() != -1:
            return None
        if getattr(module, "_is_replica", False):
            raise UsageError(
                f"{verb} at {site} would see a part of the batch on each device: run the module inside DataParallel"
            )
        try:
            new = step(tensor, site)
        except IndexError as error:
            raise UsageError(
                f"{verb} at {site}: {error}. The tensor there is {tuple(tensor.shape)}; with a key-value cache all "
                "passes but the first hold one new token: use edit(passes=[0]) for the prompt alone"
            ) from error
        reached(site)
        return new

    def leave(cause: str) -> None:
        silent = [site for site, _ in steps if site not in fired]
        if silent:
            others = f"; reached were {listed(sorted(fired))}" if fired else ""
            raise UsageError(
                f"{verb} waited in vain at {listed(silent)}: {cause}"
                f"{others}. Run the part of the model it belongs to, or name another site"
            )
        check()

    _OPEN.append(label)
    try:
        for site, step in steps:
            module = root.get_submodule(points[site].module)
            handles.append(_place(module, site, points[site], partial(visit, site, step)))
        try:
            # compiled code would not run hooks that came after it, and would go on running those it was compiled with
            with torch.compiler.set_stance("force_eager"):
                yield
            leave("no forward pass inside the `with` block reached it")
        except Stop as end:
            if end.args[0] is not fired:
                leave("a context with `stop` ended the pass before")
                raise
    finally:
        while handles:
            handles.pop().remove()
        _OPEN.remove(label)


def _place(module: nn.Module, site: str, point: Point, visit: Callable[[nn.Module, Tensor], Tensor | None]) -> Any:
    """Put one hook on `module`; the returned handle removes it."""

    def pass_through(at: nn.Module, raw: Any) -> Any:
        tensor = point.get(raw)
        if not isinstance(tensor, Tensor):
            raise UsageError(f"{site} holds {type(tensor).__name__}, not a tensor; give its Point a `get` and a `put`")
        new = visit(at, tensor)
        return raw if new is None else point.put(raw, new)

    def before(at: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (pass_through(at, args[0]), *args[1:]), kwargs
        first = next(iter(kwargs))  # libraries differ in whether they pass the hidden states by name
        return args, kwargs | {first: pass_through(at, kwargs[first])}

    def after(at: nn.Module, _args: tuple, output: Any) -> Any:
        return pass_through(at, output)

    hook = before if point.side == "in" else after
    hook.site = site
    if point.side == "in":
        return module.register_forward_pre_hook(hook, with_kwargs=True)
    handle = module.register_forward_hook(hook)
    # Whoever else listens here is given the edited tensor: transformers collects by hooks the states that LLaVA reads.
    for key, other in list(module._forward_hooks.items()):
        if not hasattr(other, "site"):
            module._forward_hooks.move_to_end(key)
    return handle


def listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
