import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmfm_utils import UsageError, hooks
from mmfm_utils.hooks import Point, edit, record


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    assert hooks.leftover() == []


class Pair(nn.Module):
    """Gives a tuple, and takes its input by name: the two shapes in which libraries hide their tensors."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, hidden):
        return self.inner(hidden), "weights"


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.pair = Pair()
        self.unused = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        for layer in self.layers:
            x = self.relu(layer(x))
        return self.pair(hidden=x)[0]


class Named:
    """What anatomy gives: a module and a vocabulary, here with axes in another order and an input passed by name."""

    def __init__(self, module):
        self.module = module
        self.points = {
            "toy.0.resid": Point("layers.1", "in"),
            "toy.1.flipped": Point("layers.1", "out", lambda x: x.T, lambda raw, x: x.T),
            "toy.pair.in": Point("pair", "in"),
            "toy.pair": Point("pair"),
            "toy.unused": Point("unused"),
        }


def n_hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.fixture
def toy():
    return Toy().eval()


@pytest.fixture
def x():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def test_record_reads_what_the_module_computed(toy, x):
    with record(toy, ["layers.0", "pair"]) as seen:
        out = toy(x)
    # the in-place ReLU behind layers.0 must not reach the recorded copy
    assert torch.equal(seen["layers.0"], toy.layers[0](x)) and (seen["layers.0"] < 0).any()
    assert torch.equal(seen["pair"], out)
    assert not seen["pair"].requires_grad


def test_wildcard_and_names_without_anatomy(toy, x):
    assert hooks.resolve(toy, "layers.*") == ["layers.0", "layers.1"]
    assert hooks.resolve(toy, ["layers.1", "layers.*"]) == ["layers.1", "layers.0"]  # each once
    with record(toy, "layers.*") as seen:
        toy(x)
    assert list(seen) == ["layers.0", "layers.1"]


@pytest.mark.parametrize("site", ["toy.0.resid", "toy.1.flipped", "toy.pair.in", "toy.pair"])
def test_self_edit_is_exact_and_any_other_edit_is_not(toy, x, site):
    named, plain = Named(toy), toy(x)
    with record(named, site) as seen:
        assert torch.equal(toy(x), plain)
    with edit(named, {site: lambda t: seen[site]}):
        assert torch.equal(toy(x), plain)
    with edit(named, {site: lambda t: t + 1}):
        assert not torch.allclose(toy(x), plain)


def test_get_and_put_present_other_axes(toy, x):
    with record(Named(toy), "toy.1.flipped") as seen:
        toy(x)
    assert seen["toy.1.flipped"].shape == (4, 3)


def test_edit_takes_the_site_name_where_the_function_asks_for_it(toy, x):
    called, plain = [], toy(x)
    with edit(toy, {"layers.*": lambda t, site: called.append(site) or t}):
        toy(x)
    assert called == ["layers.0", "layers.1"]
    with edit(toy, {"pair": torch.zeros_like}):  # written in C: no signature to read
        assert torch.equal(toy(x), torch.zeros(3, 4))
    with edit(toy, {"pair": lambda t, scale=2.0: t * scale}):  # a default is not a request for the name
        assert torch.equal(toy(x), 2 * plain)


def test_an_edit_may_work_in_place_without_touching_what_was_recorded(toy, x):
    def zero_first(t):
        t[:, 0] = 0
        return t

    with record(toy, "layers.0", grad=True) as before, edit(toy, {"layers.0": zero_first}):
        with record(toy, "layers.0") as after:
            toy(x)
    assert (after["layers.0"][:, 0] == 0).all()
    assert (before["layers.0"][:, 0] != 0).any()  # contexts act in the order of opening
    named, kept = Named(toy), x.clone()
    named.points["toy.in"] = Point("layers.0", "in")
    with edit(named, {"toy.in": zero_first}):
        toy(x)
    assert torch.equal(x, kept)  # nor what the caller holds


def test_several_functions_at_one_site_act_in_order(toy, x):
    plain = toy(x)
    with edit(toy, {"pair": lambda t: t + 1, "pai*": lambda t: t * 2}):
        hit = toy(x)  # "pai*" also names pair.inner, which comes first
    with edit(toy, {"pair": lambda t: (t * 2 + 1) * 2}):
        assert torch.equal(hit, toy(x))
    assert not torch.equal(hit, plain)


def test_several_passes(toy, x):
    with record(toy, "pair") as last, record(toy, "pair", every=True) as all_of_them:
        first, second = toy(x), toy(2 * x)
    assert torch.equal(last["pair"], second)
    assert len(all_of_them["pair"]) == 2 and torch.equal(all_of_them["pair"][0], first)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("site", ["toy.0.resid", "toy.1.flipped", "toy.pair"])
def test_grad_reaches_the_recorded_tensor(toy, x, site, frozen):
    toy.requires_grad_(not frozen)
    named = Named(toy)
    with record(named, site, grad=True) as seen:
        toy(x).square().sum().backward()
    direction = torch.randn(seen[site].shape, generator=torch.Generator().manual_seed(2)) * 1e-3

    def loss(sign):
        with edit(named, {site: lambda t: t + sign * direction}), torch.no_grad():
            return toy.double()(x.double()).square().sum()

    direction = direction.double()
    expected = (loss(1) - loss(-1)) / 2
    assert torch.allclose((seen[site].grad.double() * direction).sum(), expected, rtol=1e-4)


def test_grad_needs_grad_mode(toy, x):
    with pytest.raises(UsageError, match="no_grad"), torch.no_grad(), record(toy, "pair", grad=True):
        toy(x)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays_hooked(toy, x, error):
    with record(toy, "layers.*"), edit(toy, {"pair": lambda t: t}):
        assert n_hooks(toy) == 3
        assert hooks.active(toy) == ["layers.0", "layers.1", "pair"]
        assert hooks.leftover() == ["record: layers.0, layers.1", "edit: pair"]
        toy(x)
    assert n_hooks(toy) == 0 and hooks.active(toy) == []
    with pytest.raises(error):
        with record(toy, "layers.*"), edit(toy, {"pair": lambda t: t}):
            toy(x)
            raise error
    assert n_hooks(toy) == 0 and hooks.leftover() == []

    def fail(t):
        raise error

    with pytest.raises(error), edit(toy, {"pair": fail}):
        toy(x)
    assert n_hooks(toy) == 0 and hooks.leftover() == []


def test_an_open_context_is_told_as_left_over(toy, x):
    context = record(toy, "*")
    context.__enter__()
    assert hooks.leftover() == ["record: layers, layers.0, layers.1 and 4 more"]
    context.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert hooks.leftover() == [] and n_hooks(toy) == 0


def test_misspelt_site_names_the_nearest_and_hooks_nothing(toy):
    with pytest.raises(UsageError, match=r"'layer\.0'.*nearest are layers\.0"), record(toy, ["pair", "layer.0"]):
        pytest.fail("must not get this far")
    with pytest.raises(UsageError, match=r"toy\.0\.resid"), edit(Named(toy), {"tyo.*.resid": torch.zeros_like}):
        pytest.fail("must not get this far")
    assert n_hooks(toy) == 0


def test_site_that_never_fired(toy, x):
    with pytest.raises(UsageError, match=r"record waited in vain at unused.*reached were pair"):
        with record(toy, ["pair", "unused"]):
            toy(x)
    with (
        pytest.raises(UsageError, match="edit waited in vain at toy.unused"),
        edit(Named(toy), {"toy.un*": torch.relu}),
    ):
        toy(x)
    with pytest.raises(RuntimeError, match="mine"), record(toy, "unused"):  # never hides the true error
        raise RuntimeError("mine")
    assert n_hooks(toy) == 0


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda t: None, "pair returned NoneType"),
        (lambda t: t[:, :2], r"pair returned shape \(3, 2\); it must be \(3, 4\)"),
        (lambda t: t.mean(0), r"shape \(4,\)"),
        (lambda t: t.double(), r"torch.float64; it must be torch.float32"),
    ],
)
def test_wrong_edit_is_a_clear_error(toy, x, function, message):
    with pytest.raises(UsageError, match=message), edit(toy, {"pair": function}):
        toy(x)
    assert n_hooks(toy) == 0


def test_edit_takes_functions_not_tensors(toy, x):
    with pytest.raises(UsageError, match="takes a function"), edit(toy, {"pair": x}):
        pytest.fail("must not get this far")


def test_a_place_that_holds_no_tensor_says_so(toy, x):
    named = Named(toy)
    named.points["toy.weights"] = Point("pair", "out", lambda raw: raw[1])
    with pytest.raises(UsageError, match="toy.weights holds str, not a tensor"), record(named, "toy.weights"):
        toy(x)


# ---- stopping a pass, and many inputs ----


def test_stop_ends_the_pass_behind_the_last_site(toy, x):
    ran = []
    counter = toy.pair.register_forward_hook(lambda *_: ran.append(1))
    with record(toy, "layers.*") as whole:
        toy(x)
    with record(toy, "layers.*", stop=True) as seen:
        toy(x)
        pytest.fail("the rest of the block is passed over")
    assert ran == [1] and all(torch.equal(seen[site], whole[site]) for site in whole)
    with record(toy, "layers.1", stop=True, grad=True) as seen:
        toy(x)
    seen["layers.1"].sum().backward()
    assert toy.layers[0].weight.grad.abs().sum() > 0 and len(ran) == 1
    counter.remove()
    assert n_hooks(toy) == 0
    with pytest.raises(UsageError, match="not both"), record(toy, "pair", every=True, stop=True):
        pytest.fail("must not get this far")


def test_a_stop_that_does_not_come_is_a_site_that_was_not_reached(toy, x):
    with pytest.raises(UsageError, match="waited in vain at unused"), record(toy, ["pair", "unused"], stop=True):
        toy(x)


@pytest.mark.parametrize("around", [True, False])
def test_other_contexts_and_a_stop(toy, x, around):
    """Inside or around: what was reached has acted, what waits behind the end is told so."""

    def passed(other):
        contexts = [other, stopping := record(toy, "layers.1", stop=True)]
        with contexts[not around] as first, contexts[around] as second:
            toy(x)
        return second if contexts[around] is stopping else first

    plain = passed(record(toy, "layers.0"))["layers.1"]
    assert torch.equal(passed(edit(toy, {"layers.0": torch.zeros_like}))["layers.1"], toy.layers[1](0 * x))
    assert not torch.equal(plain, toy.layers[1](0 * x))
    for other in (record(toy, "pair"), edit(toy, {"pair": torch.zeros_like})):
        with pytest.raises(UsageError, match=r"waited in vain at pair: a context with `stop`|no forward pass"):
            passed(other)
    with pytest.raises(UsageError, match="acted in no pass"):
        passed(edit(toy, {"layers.0": torch.zeros_like}, passes=[3]))
    assert n_hooks(toy) == 0
    with record(toy, "pair", stop=True) as far:  # of two that stop, the nearer ends its own block alone
        with record(toy, "layers.0", stop=True) as near:
            toy(x)
        toy(x)
    assert list(near) == ["layers.0"] and list(far) == ["pair"]


def test_until(toy, x):
    x = x.requires_grad_()
    state = hooks.until(toy, "layers.1", lambda: toy(x))
    assert torch.equal(state, toy.layers[1](toy.layers[0](x).relu())) and state.requires_grad
    with pytest.raises(UsageError, match="one site"):
        hooks.until(toy, "layers.*", lambda: toy(x))


@pytest.mark.parametrize("batch", [2, 3, 100])
def test_collect_is_recording_batch_by_batch(toy, batch):
    xs = torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(3), requires_grad=True)  # (item, token, width)
    ran = []
    counter = toy.pair.register_forward_hook(lambda *_: ran.append(1))
    with record(toy, "layers.*") as whole:
        toy(xs)
    got = hooks.collect(toy, "layers.*", toy, xs, batch)
    counter.remove()
    assert len(ran) == 1 and list(got) == list(whole)
    for site, tensor in got.items():
        assert torch.allclose(tensor, whole[site], atol=1e-6) and not tensor.requires_grad
    of = {"x": xs, "rows": list(range(7))}
    for keep, expected in (
        (-1, lambda t: t[:, -1]),
        (slice(1, 3), lambda t: t[:, 1:3]),
        (torch.tensor([4, 0]), lambda t: t[:, [4, 0]]),
        (lambda t: t.mean(1), lambda t: t.mean(1)),
    ):
        got = hooks.collect(toy, ["layers.1"], lambda part: toy(part["x"]), of, batch, keep)["layers.1"]
        assert torch.allclose(got, expected(whole["layers.1"]), atol=1e-6)
    named = hooks.collect(toy, "layers.*", toy, xs, batch, lambda t, site: t[..., int(site[-1])])
    assert torch.allclose(named["layers.1"], whole["layers.1"][..., 1], atol=1e-6)
    by_index = hooks.collect(toy, "pair", lambda rows: toy(xs[rows.start : rows.stop]), range(7), batch, stop=False)
    assert torch.allclose(by_index["pair"], toy(xs), atol=1e-6)


def test_collect_keeps_a_copy_of_what_stays_and_no_more(toy):
    xs = torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(3))
    got = hooks.collect(toy, "layers.0", toy, xs, keep=0, to=None, stop=False)["layers.0"]
    assert torch.equal(got, toy.layers[0](xs)[:, 0])  # the in-place ReLU behind has not reached it
    assert got.untyped_storage().nbytes() == got.nbytes


def test_collect_refuses(toy):
    xs = [torch.zeros(4), torch.zeros(5, 4)]
    for message, items in (("no items", []), ("no items", {}), ("unlike shapes", xs)):
        with pytest.raises(UsageError, match=message):
            hooks.collect(toy, "layers.0", lambda part: toy(part[0][None]), items, batch=1)
    with pytest.raises(UsageError, match="collect waited in vain at unused"):
        hooks.collect(toy, "unused", toy, torch.zeros(2, 4))
    assert n_hooks(toy) == 0


# ---- every way of running a model ----


class RunAgain(torch.autograd.Function):
    """Checkpointing as other libraries write it, and reversible layers: a function that runs its layer in backward."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run(x)
        out.backward(gradient)
        return None, x.grad


class RunAgainWithoutContext(RunAgain):
    @staticmethod
    def forward(run, x):
        return run(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.run = inputs[0]
        ctx.save_for_backward(inputs[1])


def ways(toy):
    """How a layer can be run again."""

    def layers(x):
        return toy.layers[1](toy.layers[0](x).tanh())

    return {
        "kept": lambda x: toy.pair(hidden=checkpoint(layers, x, use_reentrant=False))[0],
        "re-entrant": lambda x: toy.pair(hidden=checkpoint(layers, x, use_reentrant=True))[0],
        "somebody's own": lambda x: toy.pair(hidden=RunAgain.apply(layers, x))[0],
        "without context": lambda x: toy.pair(hidden=RunAgainWithoutContext.apply(layers, x))[0],
    }


def gradients(toy, out):
    toy.zero_grad()
    out.square().sum().backward()
    return [p.grad.clone() for p in toy.parameters() if p.grad is not None]


@pytest.mark.parametrize("way", ["kept", "re-entrant", "somebody's own", "without context"])
def test_a_layer_that_backward_runs_again(toy, x, way):
    """Never the gradient of another function: an edit there is refused, and what backward runs is no pass."""
    x = x.requires_grad_()
    run, plain = ways(toy)[way], toy.pair(hidden=toy.layers[1](toy.layers[0](x).tanh()))[0]
    expected = gradients(toy, plain)
    with pytest.raises(UsageError, match="layers.0 is in a layer that backward runs again"):
        with edit(toy, {"layers.0": torch.zeros_like}):
            run(x)
    with record(toy, "layers.*", every=True) as seen, edit(toy, {"pair": lambda t: 2 * t}):
        doubled = gradients(toy, run(x))
    assert [len(found) for found in seen.values()] == [1, 1]
    assert all(torch.allclose(a, 4 * b) for a, b in zip(doubled, expected, strict=True))
    out = run(x)
    with pytest.raises(UsageError, match="in vain"), edit(toy, {"layers.1": torch.zeros_like}):
        found = gradients(toy, out)  # of the pass that was not edited
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
    if way == "kept":  # without gradients nothing is run again
        with torch.no_grad(), edit(toy, {"layers.0": torch.zeros_like}):
            assert not torch.equal(run(x), out)
        with record(toy, "layers.0", grad=True) as seen:
            gradients(toy, run(x))
        assert seen["layers.0"].grad.abs().sum() > 0
        toy.requires_grad_(False)
        with pytest.raises(UsageError, match="runs again"), record(toy, "layers.0", grad=True):
            run(x.detach())


@pytest.mark.parametrize("way", ["forward", "call", "wrapped", "layer", "closure"])
def test_compiled_models(toy, x, way):
    """Compiled before a context or in it, all of it or one layer: contexts act on all, and on nothing behind them."""
    with torch.no_grad():
        plain, edited = toy(x), toy.pair(hidden=toy.layers[1](0 * x).relu())[0]
        model = toy
        if way == "forward":
            toy.forward = torch.compile(toy.forward, backend="eager")
        elif way == "call":
            toy.compile(backend="eager")
        elif way == "layer":
            toy.layers[1].compile(backend="eager")
        else:
            model = torch.compile(toy if way == "wrapped" else lambda x: toy(x), backend="eager")
        for first in (False, True):
            torch._dynamo.reset()
            if not first:
                assert torch.allclose(model(x), plain)
            with edit(toy, {"layers.0": torch.zeros_like}), record(toy, "layers.*") as seen:
                for batch in (x, torch.cat([x, x]), x):  # another shape would be compiled anew
                    out = model(batch)
                    assert torch.allclose(out, edited[:1].expand_as(out))
            assert not seen["layers.0"].any() and seen["layers.1"].any()
            assert torch.allclose(model(x), plain)
    torch._dynamo.reset()


def test_a_copy_made_inside_a_context_is_not_edited_behind_it(toy, x):
    plain = toy(x)
    with edit(toy, {"pair": torch.zeros_like}):
        twin = copy.deepcopy(toy)
        assert not toy(x).any()
    assert torch.equal(twin(x), plain)


def test_a_part_of_the_batch_on_each_device_is_refused(toy, x):
    replica = toy.pair._replicate_for_data_parallel  # as `nn.DataParallel` makes them
    for context in (record(toy, "pair"), edit(toy, {"pair": torch.zeros_like})):
        with pytest.raises(UsageError, match="pair would see a part of the batch"), context:
            replica()(hidden=x)


def test_an_index_that_is_not_there_names_the_site(toy, x):
    """Generation with a cache: the prompt first, then one token at a time."""

    def third(t):
        t[2] = 0
        return t

    with pytest.raises(UsageError, match=r"edit at pair: index 2 .*\(1, 4\).*passes=\[0\]") as raised:
        with edit(toy, {"pair": third}):
            toy(x)
            toy(x[:1])
    assert isinstance(raised.value.__cause__, IndexError)
    with edit(toy, {"pair": third}, passes=[0]):
        toy(x)
        toy(x[:1])
    with pytest.raises(UsageError, match=r"collect at pair: index 7 .*\(3, 4\)"):
        hooks.collect(toy, "pair", toy, x, keep=7)


def test_passes_are_counted_anew_in_each_batch(toy, x):
    hit = []
    with edit(toy, {"pair": lambda t: hit.append(len(t)) or t}, passes=[1]):
        for n in hooks.runs([1, 2, 3]):
            for _ in range(4):
                toy(x[:n])
    assert hit == [1, 2, 3]
    with edit(toy, {"layers.0": lambda t: hit.append(len(t)) or t}, passes=[0]):
        hooks.collect(toy, "pair", toy, x, batch=2)
    assert hit == [1, 2, 3, 2, 1]
    with pytest.raises(UsageError, match="reached 1 times"), edit(toy, {"pair": torch.relu}, passes=[1]):
        for n in hooks.runs([1, 2]):
            toy(x[:n])
