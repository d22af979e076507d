import pytest
import torch
from torch import nn

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
