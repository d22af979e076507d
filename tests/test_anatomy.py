"""What holds for the anatomy of every family, each at a small size with random weights (tests/anatomy_families.py)."""

import copy
import io
import pickle
from functools import cache

import pytest
import torch
from torch import nn

from mmfm_utils import UsageError, anatomy, hooks
from mmfm_utils.anatomy.attention import heads_of
from mmfm_utils.hooks import edit, record
from tests.anatomy_families import FAMILIES, parts_of, relative


@cache
def made(name):
    """(opened, the result of a pass to which nobody listens, all that a pass holds)"""
    opened = FAMILIES[name].opened()
    return opened, opened.run(), opened.seen()


pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.parametrize("name", FAMILIES)]


def modules(model):
    return model if isinstance(model, nn.Module) else nn.ModuleList(parts_of(model))


# ---- opening changes nothing ----


def test_parity(name):
    opened, ours, seen = made(name)
    with torch.no_grad():
        theirs = FAMILIES[name].run(FAMILIES[name].build())
    with record(opened.anatomy, "*"):  # step by step
        listened = opened.run()
    print(f"{name}: fused {relative(ours, theirs):.1e}, step by step {relative(listened, theirs):.1e}")
    assert torch.equal(ours, theirs)  # the library's own kernels, called as it calls them
    assert relative(listened, theirs) < 1e-5
    for site in hooks.resolve(opened.anatomy, "*.pattern"):  # the comparison has power: attention is peaked
        assert seen[site].amax(-1).mean() > 1.5 / seen[site].shape[-1], site


def test_state_dict_stays_and_of_twice_is_of_once(name):
    family = FAMILIES[name]
    model = family.build()
    whole = modules(model)
    before, parameters = copy.deepcopy(whole.state_dict()), {n: id(p) for n, p in whole.named_parameters()}
    first = anatomy.of(model)
    assert list(whole.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in whole.state_dict().items())
    assert {n: id(p) for n, p in whole.named_parameters()} == parameters  # an optimiser keeps its grip
    ids = [id(module) for module in whole.modules()]
    second = anatomy.of(model)
    assert [id(module) for module in whole.modules()] == ids and second.points == first.points
    with torch.no_grad():
        assert torch.equal(family.run(model), made(name)[1])


def test_a_copy_is_its_own_model(name):
    opened, plain, _ = made(name)
    twin = copy.deepcopy(opened.model)
    family, site = opened.family, f"{opened.family.inner[-1]}.resid"
    with edit(anatomy.of(twin), {site: torch.zeros_like}), torch.no_grad():
        assert not torch.equal(family.run(twin), plain) and torch.equal(opened.run(), plain)
    with torch.no_grad():
        assert torch.equal(family.run(twin), plain)


def test_an_opened_model_is_saved_whole(name):
    """As `torch.save` and worker processes do it: the model, the anatomy, and the two as one."""
    plain, opened = made(name)[1], FAMILIES[name].opened()  # which has not run: transformers leaves hooks in LLaVA
    file = io.BytesIO()
    torch.save(opened.model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    site = f"{opened.family.inner[-1]}.resid"
    with torch.no_grad():
        assert torch.equal(opened.family.run(again), plain)
        with edit(anatomy.of(again), {site: torch.zeros_like}):
            assert not torch.equal(opened.family.run(again), plain)
    alone = pickle.loads(pickle.dumps(opened.anatomy))
    assert alone.points == opened.anatomy.points and alone.towers.keys() == opened.anatomy.towers.keys()
    model, whole = pickle.loads(pickle.dumps((opened.model, opened.anatomy)))
    with torch.no_grad(), record(whole, "*") as seen:
        opened.family.run(model)
    assert set(seen) == set(opened.anatomy.points)
    for tower in whole.towers:
        states, given = seen[f"{tower}.0.resid"], opened.family.inputs.get(tower, {})
        parts = [anatomy.run_between(each, tower, states, 0, 1, **given) for each in (whole, opened.anatomy)]
        assert torch.equal(*parts)


# ---- the places and what they hold ----


def test_every_site_is_reached(name):
    opened, _, seen = made(name)
    assert list(seen) and set(seen) == set(opened.anatomy.points)


def test_residual_stream_and_output(name):
    opened, _, seen = made(name)
    for tower, facts in opened.anatomy.towers.items():
        total = seen[f"{tower}.embed"].clone()
        for layer in range(facts.n_layers):
            assert seen[f"{tower}.{layer}.attn"].norm() > 0.02 * seen[f"{tower}.{layer}.resid"].norm()
            total += seen[f"{tower}.{layer}.attn"] + seen[f"{tower}.{layer}.mlp"]
        last = seen[f"{tower}.{facts.n_layers - 1}.resid"]
        assert relative(total, last) < 1e-5
        final, kept = facts.ln_final(last), seen[f"{tower}.final"]
        assert torch.allclose(final[:, : kept.shape[1]], kept, atol=1e-5)
        for end in (f"{tower}.out", f"{tower}.logits"):
            if end in seen and facts.proj is not None:
                ids = opened.family.inputs.get(tower, {}).get("ids")
                read = final if end == "lm.logits" else facts.pooled(final, ids)
                assert relative(read @ facts.projection + facts.projection_bias, seen[end]) < 1e-5


def test_attention_adds_up(name):
    """From the pattern to what attention adds, with the weights of the output projection itself; and the MLP."""
    opened, _, seen = made(name)
    points = opened.anatomy.points
    for site in (site.removesuffix(".heads") for site in points if site.endswith(".heads")):
        pattern, v, z, heads = (seen[f"{site}.{part}"] for part in ("pattern", "v", "z", "heads"))
        assert torch.allclose(pattern.sum(-1), torch.ones(()), atol=1e-5)
        v = v.repeat_interleave(pattern.shape[1] // v.shape[2], 2)
        assert torch.allclose(torch.einsum("bhqk,bkhd->bqhd", pattern, v), z, atol=1e-5)
        linear = opened.anatomy.module.get_submodule(points[f"{site}.heads"].module.removesuffix(".heads"))
        weight, bias = heads_of(linear.weight.detach(), linear.n_heads), linear.bias
        assert relative(torch.einsum("bthd,hdw->bthw", z, weight), heads) < 1e-5
        assert relative(heads.sum(2) + (0 if bias is None else bias), seen[site]) < 1e-5
        scores = seen[f"{site}.scores"]
        assert torch.allclose(scores.softmax(-1), pattern, atol=1e-6)
        assert torch.equal(scores > -torch.inf, pattern > 0)
        if site.split(".")[0] in opened.anatomy.towers and opened.anatomy.towers[site.split(".")[0]].causal:
            assert not pattern.triu(1).any()
        elif "cross" not in site:
            assert pattern.triu(1).any()
    for tower, facts in opened.anatomy.towers.items():
        rebuilt = seen[f"{tower}.1.mlp.hidden"] @ facts.W_out(1) + facts.b_out(1)
        assert relative(rebuilt, seen[f"{tower}.1.mlp"]) < 1e-5


# ---- edits ----


def test_recording_and_editing_with_itself_change_no_bit(name):
    """Inside attention against a pass that listens to the same sites, as another kernel may have other last bits."""
    opened, plain, seen = made(name)
    inside = tuple(f".{part}" for part in (*anatomy.ATTENTION_SITES, "heads"))
    for site in opened.sites:
        with record(opened.anatomy, site) as own:
            listened = opened.run()
        if site.endswith(inside):  # here it does not matter either how the numbers lie in memory
            own[site] = own[site].contiguous()
            assert relative(listened, plain) < 1e-5, f"recording {site}"
        else:
            assert torch.equal(listened, plain), f"recording {site}"
        with edit(opened.anatomy, {site: lambda x, site, own=own: own[site]}):
            assert torch.equal(opened.run(), listened), f"self-edit of {site}"
    with record(opened.anatomy, "*"):
        listened = opened.run()
    with edit(opened.anatomy, {"*": lambda x, site: seen[site]}):
        assert torch.equal(opened.run(), listened)


def test_editing_reaches_the_output(name):
    opened, plain, _ = made(name)
    for site in opened.sites:
        # along the last axis rolled: a constant shift would be lost in the softmax
        with edit(opened.anatomy, {site: lambda x: x.roll(1, -1)}):
            assert relative(opened.run().nan_to_num(), plain) > 1e-5, site


def test_removing_a_head_is_zeroing_its_rows_of_W_O(name):
    opened, plain, _ = made(name)
    head = 2

    def remove(x):
        x[:, :, head] = 0
        return x

    for site in (site.removesuffix(".heads") for site in opened.sites if site.endswith(".heads")):
        by_edit = []
        for part in ("heads", "z"):
            with edit(opened.anatomy, {f"{site}.{part}": remove}):
                by_edit.append(opened.run())
        path = opened.anatomy.points[f"{site}.heads"].module.removesuffix(".heads")
        linear = opened.anatomy.module.get_submodule(path)
        rows = heads_of(linear.weight.detach(), linear.n_heads)[head]  # the view is the model's own memory
        saved = rows.clone()
        try:
            rows.zero_()
            by_hand = opened.run()
        finally:
            rows.copy_(saved)
        assert relative(by_edit[0], by_hand) < 1e-5 and relative(by_edit[1], by_hand) < 1e-5, site
        assert relative(by_hand, plain) > 1e-4, site


def test_nothing_more_is_computed_than_is_listened_to(name, monkeypatch):
    opened, _, _ = made(name)
    monkeypatch.setattr(anatomy.attention, "heads_of", lambda *args: pytest.fail("computed the heads"))
    for site in hooks.resolve(opened.anatomy, "*.scores"):
        scores = opened.anatomy.module.get_submodule(opened.anatomy.points[site].module)
        monkeypatch.setattr(scores, "forward", lambda x: pytest.fail("computed the scores"))
    patterns = [site.removesuffix("pattern") for site in opened.anatomy.points if site.endswith(".pattern")]
    with record(opened.anatomy, [*(f"{site}{part}" for site in patterns for part in "qkvz")]):
        opened.run()


def test_a_stranger_s_hook_is_heard_too(name):
    opened, _, seen = made(name)
    site, found = next(site for site in opened.sites if site.endswith(".pattern")), []
    module = opened.anatomy.module.get_submodule(opened.anatomy.points[site].module)
    handle = module.register_forward_pre_hook(lambda _module, args: found.append(args[0].clone()))
    try:
        opened.run()
    finally:
        handle.remove()
    assert torch.allclose(found[0], seen[site], atol=1e-5)


# ---- gradients ----


def test_gradients_do_not_depend_on_who_listens(name):
    """Fused, around the kernel, with the heads, step by step: other paths through the graph, the same gradients."""
    opened, _, _ = made(name)
    inner, whole = opened.family.inner[-1], modules(opened.model)
    block = hooks.resolve(opened.anatomy, f"{inner}.*heads")[-1].removesuffix(".heads")
    parameters = [p for n, p in whole.named_parameters() if "vae" not in n and not n.endswith("bias")]
    weights = torch.randn(opened.run().shape, generator=torch.Generator().manual_seed(4))
    found = []
    for parts in ((), ("v",), ("z", "heads"), ("scores", "pattern")):
        with record(opened.anatomy, [block, *(f"{block}.{part}" for part in parts)], grad=True) as seen:
            loss = (opened.family.run(opened.model) * weights).sum()
        found.append(torch.autograd.grad(loss, [seen[block], *parameters], retain_graph=True, allow_unused=True))
        for part in parts:
            assert torch.autograd.grad(loss, seen[f"{block}.{part}"], retain_graph=True)[0].abs().sum() > 0
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, rtol=1e-3, atol=1e-4 * one.abs().max().item() + 1e-7)


def checkpointed(model):
    """A copy of which backward runs the layers again."""
    twin = copy.deepcopy(model)
    for part in modules(twin).train().modules():
        for way in ("activation_checkpointing_enable", "enable_gradient_checkpointing", "set_grad_checkpointing"):
            if hasattr(part, way):
                getattr(part, way)()
    return twin


def test_gradient_checkpointing(name):
    """What is listened to has the gradient that it has without; an edit, which backward would not know, is refused."""
    opened, plain, _ = made(name)
    inner = opened.family.inner[-1]
    heads, mlps = (hooks.resolve(opened.anatomy, f"{inner}.{end}") for end in ("*heads", "*mlp"))
    sites = [heads[-1].removesuffix(".heads"), mlps[-1]]
    weights = torch.randn(plain.shape, generator=torch.Generator().manual_seed(4))
    twin, found = checkpointed(opened.model), []
    for model in (opened.model, twin):
        with record(anatomy.of(model), sites, grad=True, every=True) as seen:
            (opened.family.run(model) * weights).sum().backward()
        assert all(len(tensors) == 1 for tensors in seen.values())  # what backward runs again is no pass
        found.append([seen[site][0].grad for site in sites])
        modules(model).zero_grad()
    for one, other in zip(*found):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * one.abs().max().item())
    for site in sites:
        with edit(anatomy.of(twin), {site: torch.zeros_like}):
            with pytest.raises(UsageError, match=f"{site} is in a layer that backward runs again"):
                opened.family.run(twin)
            with torch.no_grad():
                assert not torch.equal(opened.family.run(twin), plain)


# ---- parts of a pass ----


def ends(opened, tower):
    return next(
        site for site in (f"{tower}.logits", f"{tower}.out", f"{tower}.final") if site in opened.anatomy.points
    )  # fmt: skip


def test_run_between_is_the_whole_pass(name):
    opened, plain, _ = made(name)
    between = anatomy.run_between
    for tower, facts in opened.anatomy.towers.items():
        last, end, given = facts.n_layers - 1, ends(opened, tower), opened.family.inputs.get(tower, {})
        streams = {-1: f"{tower}.embed"} | {layer: f"{tower}.{layer}.resid" for layer in range(last + 1)}
        seen = opened.seen([*streams.values(), end])
        with torch.no_grad():
            for start, site in streams.items():
                assert torch.equal(between(opened.anatomy, tower, seen[site], start, **given), seen[end])
                other = seen[site].flip(0) * 1.5
                with edit(opened.anatomy, {site: lambda x, _site, other=other: other}):
                    changed = opened.seen([end, streams[last]])
                assert torch.equal(between(opened.anatomy, tower, other, start, **given), changed[end])
                assert not torch.equal(changed[end], seen[end])
                if start < last:
                    assert torch.equal(
                        between(opened.anatomy, tower, other, start, last, **given), changed[streams[last]]
                    )
            with edit(opened.anatomy, {f"{tower}.{last}.mlp": torch.zeros_like}):  # contexts act in between
                changed = opened.seen([end])[end]
                assert torch.equal(between(opened.anatomy, tower, seen[streams[0]], 0, **given), changed)
            for silent, start, stop in ((f"{tower}.0.mlp", 0, None), (f"{tower}.{last}.mlp", -1, 0)):
                with pytest.raises(UsageError, match="in vain"), record(opened.anatomy, silent):
                    between(opened.anatomy, tower, seen[streams[start]], start, stop, **given)
        states = seen[streams[0]].clone().requires_grad_()
        between(opened.anatomy, tower, states, 0, last, **given).square().sum().backward()
        assert states.grad.abs().sum() > 0
        with pytest.raises(RuntimeError):
            between(opened.anatomy, tower, states[..., :5], 0, **given)
        for start, stop in ((-2, None), (last + 1, None), (1, 1), (0, last + 1)):
            with pytest.raises(UsageError, match=f"from layer {start} to {stop}"):
                between(opened.anatomy, tower, states, start, stop, **given)
    with pytest.raises(UsageError, match="has no 'audio'"):
        between(opened.anatomy, "audio", plain, 0)
    assert torch.equal(opened.run(), plain)


def test_run_between_under_gradient_checkpointing(name):
    """The gradients that it has without, or an error: backward knows nothing of the states that came in."""
    opened, _, seen = made(name)
    twin = anatomy.of(checkpointed(opened.model))
    for tower in opened.anatomy.towers:
        for start, site in ((-1, f"{tower}.embed"), (0, f"{tower}.0.resid")):
            found = []
            for each in (opened.anatomy, twin):
                each.module.zero_grad()
                states = (1.5 * seen[site]).requires_grad_()
                facts, given = each.towers[tower], opened.family.inputs.get(tower, {})
                try:
                    anatomy.run_between(each, tower, states, start, **given).square().sum().backward()
                except UsageError as error:
                    assert each is twin and start == -1 and "without gradient checkpointing" in str(error)
                    continue
                found.append((states.grad, facts.blocks[1].get_submodule(facts.layout.down).weight.grad))
                if start == -1:
                    found[-1] += (facts.blocks[0].get_submodule(facts.layout.down).weight.grad,)
            for one, other in zip(found[0], found[-1]):
                assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * one.abs().max().item())


def test_until_ends_a_pass_of_the_model(name):
    opened, _, _ = made(name)
    for layer in opened.family.inner:
        site = f"{layer}.resid"
        seen, after = opened.seen(site), list(opened.anatomy.points)
        behind = after[after.index(site) + 1]
        assert torch.equal(hooks.until(opened.anatomy, site, opened.run), seen[site])
        with pytest.raises(UsageError, match="in vain"), record(opened.anatomy, behind):
            hooks.until(opened.anatomy, site, opened.run)


def test_collect_is_record(name):
    opened, _, _ = made(name)
    sites = [f"{layer}.resid" for layer in opened.family.inner]
    got, seen = hooks.collect(opened.anatomy, sites, lambda _: opened.run(), [0], keep=0), opened.seen(sites)
    assert list(got) == sites and all(torch.equal(got[site], seen[site][:, 0]) for site in sites)
