"""Parts of a forward pass: from a residual state on, and no further than wanted."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmfm_utils import UsageError
from mmfm_utils.anatomy.tower import Anatomy
from mmfm_utils.hooks import until
from mmfm_utils.hooks.attach import runs_again


def run_between(
    anatomy: Anatomy,
    tower: str,
    states: Tensor | Mapping[str, Tensor],
    start: int | str,
    stop: int | str | None = None,
    **inputs: Any,
) -> Tensor:
    """Run a stack of layers from `states`, its residual stream after layer `start`, to that after layer `stop`.

    `states` is (batch, token, width), and `start` -1 means `T.embed`. The result is what a whole pass gives in which
    `T.{start}.resid` is edited to be `states`: `T.{stop}.resid`, or without `stop` the tower's last site (`lm.logits`,
    else `T.out`, else `T.final`). The layers before and behind are not computed (of what comes before them, the
    embedding of one blank picture is). Contexts that are open act at the sites in between, and at `T.embed` if `start`
    is -1. TransformerLens calls the two `start_at_layer` and `stop_at_layer` (and counts from the input of a layer).

    `inputs` are what else the stack reads. "lm": `attention_mask` (batch, token), 0 at padding, `keep`, the tokens to
    unembed: so many of the last (0: all), or a tensor of indices, and `position_ids`, which Qwen2-VL needs, as those of
    a picture are of three parts. "text": `ids` (batch, token), needed where the embedding is read at the end token, and
    in transformers `attention_mask`. "vision" takes nothing; in Qwen2-VL `image_grid_thw`, as the model does. "dit"
    takes `timestep`, `encoder_hidden_states` and others of the transformer's own.

    "unet" goes on from a place P (`"down.0.1"`, `"mid.0"`, `"up.1.resample"`; `"embed"` for `unet.embed`), to a place
    or to `unet.out`. Its skip connections read earlier places too, so `states` is {site: tensor} with what `unet.embed`
    and every place up to `start` gave: of a pass that recorded `["unet.embed", "unet.*.res", "unet.*.resid",
    "unet.*.resample"]` all that is needed is taken. Its inputs are `timestep` and `encoder_hidden_states`, and others
    of the U-Net's own. It starts behind a place as a whole, not between its convolutions and its transformer.

    To stop a pass that starts from the model's own inputs: `hooks.until`, or `hooks.record(stop=True)`. Where LLaVA's
    language model reads an earlier layer of the vision tower, stop there.

    Raises `UsageError` for a tower or place that the model does not have, where `stop` is not behind `start`, without
    the inputs that are needed, for states of a U-Net that are missing, and from -1 under gradient checkpointing.
    """
    if tower not in anatomy.entries:
        raise UsageError(
            f"{type(anatomy.module).__name__} has no {tower!r} to run; it has {', '.join(anatomy.entries) or 'none'}"
        )
    end = next(site for site in (f"{tower}.logits", f"{tower}.out", f"{tower}.final") if site in anatomy.points)
    facts = anatomy.towers.get(tower)
    last = sum(re.fullmatch(rf"{tower}\.\d+\.resid", site) is not None for site in anatomy.points) - 1
    if last >= 0:
        if not -1 <= start <= last or (stop is not None and not start < stop <= last):
            raise UsageError(
                f"run_between goes from a layer (-1 to {last}) to a later one, not from layer {start} to {stop}"
            )
        if stop is not None:
            end = f"{tower}.{stop}.resid"
        elif end == f"{tower}.out" and facts and facts.pool in ("argmax", "eos") and inputs.get("ids") is None:
            raise UsageError("run_between needs the token ids here, to find the end token: pass ids=...")
    else:
        places = list(anatomy.points)
        first, end = place_output(anatomy, start), end if stop is None else place_output(anatomy, stop)
        if places.index(end) <= places.index(first):
            raise UsageError(f"run_between goes from a place to a later one, not from {start} to {stop}")
    return until(anatomy, end, lambda: anatomy.entries[tower](anatomy, states, start, **inputs))


def restart(
    anatomy: Anatomy, layer: int, states: Tensor, attention_mask: Tensor | None = None, keep: int | Tensor = 0
) -> Tensor:
    """A language model's logits from its residual stream after `layer`: `run_between` for "lm", to the end."""
    return run_between(anatomy, "lm", states, layer, attention_mask=attention_mask, keep=keep)


def place_output(anatomy: Anatomy, place: str) -> str:
    """The site at which a place of the U-Net gives its result on. `UsageError` if there is no such place."""
    whole = place == "embed" or str(place).endswith(".resample")
    for site in [f"unet.{place}"] if whole else (f"unet.{place}.resid", f"unet.{place}.res"):
        if site in anatomy.points:
            return site
    known = [site.split(".", 1)[1].removesuffix(".res") for site in anatomy.points if site.endswith((".res", "sample"))]
    raise UsageError(f"the U-Net has no place {place!r}; it has embed, {', '.join(known)}")


class _Passed(nn.Module):
    """Stands for a layer that is passed over: it gives on what it is given, and has the layer's attributes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: no hook of its inside is reached through here

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, states: Tensor, *_: Any, **__: Any) -> Tensor:
        return states


def as_given(states: Tensor) -> Tensor:
    return states


def stack_entry(
    tower: str, path: str, enter: Callable[..., Any], put: Callable[[Tensor], Tensor] = as_given
) -> Callable[..., Any]:
    """The entry (see `Anatomy`) of a stack of layers. `enter(module, states, **inputs)` runs the library's own forward
    pass, which makes masks and positions, of the module at `path` on any input of the right shape; there the layers up
    to `start` are passed over, and the states come in, in the layers' own axes after `put`. All four can be pickled if
    the two functions are named ones.
    """
    return partial(_run, tower, path, enter, put)


def _run(
    tower: str, path: str, enter: Callable[..., Any], put: Callable[[Tensor], Tensor],
    anatomy: Anatomy, states: Tensor, start: int, **inputs: Any,
) -> Any:  # fmt: skip
    def bring(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if start < 0 and runs_again():  # in backward it would run on what it was given itself
            raise UsageError("run_between goes from -1 without gradient checkpointing only: switch that off")
        if args:
            return (put(states), *args[1:]), kwargs
        return args, kwargs | {next(iter(kwargs)): put(states)}

    blocks = anatomy.module.get_submodule(anatomy.points[f"{tower}.embed"].module.rpartition(".")[0])
    kept = dict(blocks._modules)
    blocks._modules.update({str(i): _Passed(blocks[i]) for i in range(start + 1)})
    handle = blocks[0].register_forward_pre_hook(bring, prepend=True, with_kwargs=True)
    try:
        return enter(anatomy.module.get_submodule(path), states, **inputs)
    finally:
        handle.remove()
        blocks._modules.update(kept)


def read_ids(
    model: nn.Module, states: Tensor, ids: Tensor | None = None, attention_mask: Tensor | None = None
) -> Any:  # fmt: skip
    """The `enter` of a text tower of transformers."""
    if ids is None:
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
    # a model of two towers has a way of its own to run one, and to project its states
    return getattr(model, "get_text_features", model)(input_ids=ids, attention_mask=attention_mask)
