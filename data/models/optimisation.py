"""How the recipes optimise: Muon and AdamW, the schedule of their rates, precision, and an attention for the CPU."""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_unused,
) -> tuple[Tensor, None]:
    """Attention of transformers' models as two batched products, the softmax in the precision of autocast.

    In bfloat16 PyTorch's fused kernel takes more than half of a training step on a CPU, nearly all of it backward.
    `query`, `key`, `value` are (batch, head, token, head_dim); gives (batch, token, head, head_dim).
    """
    groups = query.shape[1] // key.shape[1]  # grouped-query attention shares keys and values
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    scaling = scaling or query.shape[-1] ** -0.5
    with torch.autocast(query.device.type, enabled=False):
        key, value = key.to(query.dtype), value.to(query.dtype)
        scores = (query * scaling) @ key.transpose(-1, -2)
        if attention_mask is not None:
            scores = scores + attention_mask.to(scores.dtype)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("plain", plain_attention)
AttentionMaskInterface.register("plain", eager_mask)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) as torch.optim.Muon with adjust_lr_fn="match_rms_adamw", for a CPU.

    Matrices of one shape are one batched product, in float32 where bfloat16 is only emulated (torch's own would take
    longer there than the rest of the step), and kernels of convolutions may be among them: (out, in * row * column).
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        newton_schulz = dict(ns_coefficients=(3.4445, -4.775, 2.0315), eps=1e-7, ns_steps=5)
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, **newton_schulz))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[tuple, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, ps in shapes.items():
                moments = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in ps]
                torch._foreach_lerp_(moments, [p.grad for p in ps], 1 - group["momentum"])
                updates = torch.stack(torch._foreach_lerp([p.grad for p in ps], moments, group["momentum"])).flatten(2)
                rate = group["lr"] * 0.2 * max(updates.shape[1:]) ** 0.5
                torch._foreach_mul_(ps, 1 - group["lr"] * group["weight_decay"])
                updates = _orthogonal(updates, group, torch.bfloat16 if half(ps[0].device.type) else torch.float32)
                torch._foreach_add_(ps, list(updates.unflatten(2, shape[1:])), alpha=-rate)


def _orthogonal(x: Tensor, group: dict, number: torch.dtype) -> Tensor:
    """Newton-Schulz iteration: (matrix, row, column) with all singular values brought near 1."""
    a, b, c = group["ns_coefficients"]
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    kept = x.dtype
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])).to(number)
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(kept)


def optimisers(
    model: nn.Module, blocks: str, muon_rate: float = 2e-3, adam_rate: float = 1e-3
) -> list[torch.optim.Optimizer]:
    """Muon for the trainable matrices, and kernels of convolutions, whose names contain `blocks`; AdamW for the rest.

    Each group keeps its rate as `peak`, for `set_rate`.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trainable if blocks in name and p.ndim >= 2]
    rest = [p for name, p in trainable if not (blocks in name and p.ndim >= 2)]
    decayed, plain = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
    opts: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
            lr=adam_rate,
            betas=(0.9, 0.98),
        )
    ]
    if matrices:
        opts.append(Muon(matrices, lr=muon_rate, weight_decay=0.05))
    for optimiser in opts:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return opts


def half(device: str) -> bool:
    """Whether a device computes in bfloat16; a CPU that only emulates it is ten times slower than in float32."""
    return device == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def precision(device: str) -> torch.autocast:
    """Autocast to bfloat16 where that is faster."""
    return torch.autocast(device, torch.bfloat16, enabled=half(device))


def attention(device: str) -> str:
    """The attention implementation that trains fastest: see `plain_attention`."""
    return "plain" if device == "cpu" and half(device) else "sdpa"


def set_rate(opts: list[torch.optim.Optimizer], share: float) -> None:
    """Every group's rate becomes this share of its peak."""
    for optimiser in opts:
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * share


def schedule(step: int, steps: int, warm_up: int, decay: float) -> float:
    """Warm-up over `warm_up` steps, plateau at 1, linear fall to zero over the last share `decay` of training."""
    return min(1.0, (step + 0.5) / warm_up, (1 - (step + 0.5) / steps) / decay)
