"""What the recipes share: optimisers, schedule, checkpoints, attention, the crew."""

import optimisation
import pytest
import torch
import training
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def small(attention: str = "eager") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation=attention)


def test_plain_attention_gives_the_same_result_and_gradients():
    ids = torch.randint(0, 30, (3, 9), generator=torch.Generator().manual_seed(1))
    grads = []
    for attention in ("eager", "plain"):
        model = small(attention)
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_muon_follows_torchs():
    """Torch's works in bfloat16, so the two agree to its rounding: far closer than a step is long."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((64, 32), (32, 64), (64, 32))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    mine = optimisation.Muon(ours, lr=2e-3, weight_decay=0.05)
    torchs = torch.optim.Muon(theirs, lr=2e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        torchs.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.03 * (b - before).norm()


def test_muon_takes_a_kernel_for_the_matrix_that_it_is():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    opts = [optimisation.Muon([p], lr=2e-3, weight_decay=0.05) for p in (kernel, matrix)]
    before = matrix.detach().clone()
    for _ in range(3):
        kernel.grad = torch.randn_like(kernel)
        matrix.grad = kernel.grad.flatten(1).clone()
        for optimiser in opts:
            optimiser.step()
    assert torch.allclose(kernel.flatten(1), matrix, atol=1e-6) and not torch.allclose(matrix, before, atol=1e-4)


def test_a_checkpoint_brings_everything_back(tmp_path):
    model = small()
    opts = optimisation.optimisers(model, blocks=".layers.")
    ids = torch.randint(0, 30, (3, 9))
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        for optimiser in opts:
            optimiser.step()
    training.save(tmp_path / "last.safetensors", model, opts, 2, 1.5)
    again = small()
    fresh = optimisation.optimisers(again, blocks=".layers.")
    step, seconds, machine = training.restore(tmp_path / "last.safetensors", again, fresh)
    assert (step, seconds) == (2, 1.5) and "torch" in machine
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(opts, fresh, strict=True):
        for key, state in one.state_dict()["state"].items():
            for name, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state_dict()["state"][key][name]))
    assert training.restore(tmp_path / "none.safetensors", again, fresh) == (0, 0.0, "")
    with pytest.raises(SystemExit, match="another architecture"):
        training.restore(tmp_path / "last.safetensors", nn.Linear(2, 2), [])


def test_the_schedule_rises_stays_and_falls():
    rates = [optimisation.schedule(step, 100, 10, 0.4) for step in range(100)]
    assert rates[0] == 0.05 and max(rates) == 1 and rates[30] == 1 and rates[-1] < 0.02
    assert rates[:10] == sorted(rates[:10]) and rates[60:] == sorted(rates[60:], reverse=True)


def test_a_crew_computes_what_one_process_computes():
    model = small()
    batches = torch.randint(0, 30, (4, 2, 9))

    def loss_of(step: int, part: int) -> torch.Tensor:
        model.lm_head.weight.requires_grad_(step > 0)  # frozen weights must be left without a gradient
        return model(batches[part], labels=batches[part]).loss

    threads = torch.get_num_threads()
    try:
        alone = training.Crew(model, loss_of, 4, helpers=0)
        together = training.Crew(model, loss_of, 4, helpers=1)
        for step in (0, 1):
            expected = sorted(alone.step(step))
            grads = [None if p.grad is None else p.grad.clone() for p in alone.params]
            assert sum(grad is None for grad in grads) == (step == 0)
            for _ in range(3):  # who takes which part is a matter of chance
                assert sorted(together.step(step)) == pytest.approx(expected)
                for grad, p in zip(grads, together.params, strict=True):
                    assert p.grad is None if grad is None else torch.allclose(grad, p.grad, atol=1e-6)
    finally:
        torch.set_num_threads(threads)
