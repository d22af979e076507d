"""What the recipes share: a training loop, processes that divide its work, checkpoints, and weights by other names."""

import os
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import optimisation
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

# Where recipes keep their checkpoints: outside git.
CHECKPOINTS = Path(os.environ.get("MMFM_CHECKPOINTS") or Path(__file__).parents[2] / "checkpoints")


class Crew:
    """Several processes that share a model's weights and divide a step's work among them, for recipes on a CPU.

    A step has `parts`; each process takes the next part that is left and adds the gradients of `loss_of(step, part)`,
    one thread a process. Two busy processes slow each other far less than two threads that wait for each other.
    After `losses = crew.step(step)` the parameters' gradients are the mean over the parts.
    """

    def __init__(self, model: nn.Module, loss_of: Callable[[int, int], Tensor], parts: int, helpers: int):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.loss_of, self.parts, self.pipes, self.sums = loss_of, parts, [], []
        context = torch.multiprocessing.get_context("fork")
        self.taken = context.Value("i", 0)
        if helpers:
            torch.set_num_threads(1)
            model.share_memory()
        for _ in range(helpers):
            sums = [torch.zeros_like(p).share_memory_() for p in self.params]
            mine, theirs = context.Pipe()
            context.Process(target=self._help, args=(theirs, sums), daemon=True).start()
            self.pipes.append(mine)
            self.sums.append(sums)

    def step(self, step: int) -> list[float]:
        """Compute the gradients of a step; gives the loss of every part that was done here and elsewhere."""
        self.taken.value = 0
        for pipe in self.pipes:
            pipe.send(step)
        losses = self._work(step)
        for pipe, sums in zip(self.pipes, self.sums, strict=True):
            theirs, touched = pipe.recv()
            losses += theirs
            for index in touched:
                p, grad = self.params[index], sums[index]
                p.grad = grad.clone() if p.grad is None else p.grad.add_(grad)
        for p in self.params:
            if p.grad is not None:
                p.grad /= self.parts
        return losses

    def _work(self, step: int) -> list[float]:
        losses = []
        for p in self.params:
            p.grad = None
        while True:
            with self.taken.get_lock():
                part = self.taken.value
                self.taken.value += 1
            if part >= self.parts:
                return losses
            loss = self.loss_of(step, part)
            loss.backward()
            losses.append(loss.item())

    def _help(self, pipe, sums: list[Tensor]) -> None:
        os.setsid()  # so that the system shares a core between this process and others fairly
        while True:
            losses = self._work(pipe.recv())
            touched = [index for index, p in enumerate(self.params) if p.grad is not None]
            for index in touched:
                sums[index].copy_(self.params[index].grad)
            pipe.send((losses, touched))


def run(
    model: nn.Module,
    opts: list[torch.optim.Optimizer],
    loss_of: Callable[[int, int], Tensor],
    parts: int,
    path: Path,
    steps: int,
    warm_up_and_decay: tuple[int, float],
    helpers: int,
    kept: nn.Module | None = None,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Train to `steps`, going on from the checkpoint at `path`, with a new one every 100 steps and a progress bar.

    The checkpoint holds `kept` (the model, if left out). `helpers` are further processes, on a CPU; `after(step)` is
    called with the number of steps done. Interrupting loses what was done since the last checkpoint.
    """
    kept = model if kept is None else kept
    step, seconds, _ = restore(path, kept, opts)
    crew = Crew(model, loss_of, parts, helpers if next(model.parameters()).device.type == "cpu" else 0)
    bar = tqdm(total=steps, initial=step, unit="step", mininterval=10)
    began, losses = time.time(), []
    while step < steps:
        optimisation.set_rate(opts, optimisation.schedule(step, steps, *warm_up_and_decay))
        losses = [*losses[-100 * parts :], *crew.step(step)]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in opts:
            optimiser.step()
        step += 1
        after(step)
        bar.update()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{sum(losses) / len(losses):.4f}")
        if step % 100 == 0 or step == steps:
            save(path, kept, opts, step, seconds + time.time() - began)
    bar.close()


class _Made(torch.utils.data.Dataset):
    """What `make` gives for each of some steps."""

    def __init__(self, make: Callable[[int], object], steps: range):
        self.make, self.steps = make, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> object:
        return self.make(self.steps[index])


def ahead(make: Callable[[int], object], steps: range, workers: int) -> Iterable:
    """`make(step)` for each step in order, made ahead by so many processes (0: here, when it is asked for)."""
    return torch.utils.data.DataLoader(
        _Made(make, steps), batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
    )


def save(path: Path, model: nn.Module, opts: list[torch.optim.Optimizer], step: int, seconds: float) -> None:
    """One safetensors file with weights and optimiser state; moved into place when whole, so a kill leaves the old."""
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in weights(model).items()}
    for index, optimiser in enumerate(opts):
        for key, state in optimiser.state_dict()["state"].items():
            tensors |= {
                f"opt.{index}.{key}.{name}": torch.as_tensor(value).contiguous() for name, value in state.items()
            }
    device = next(model.parameters()).device
    cpu = f"{torch.get_num_threads()} CPU threads, {platform.machine()}"
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    number = "bfloat16" if optimisation.half(device.type) else "float32"
    machine += f", {number}, torch {torch.__version__}"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    save_file(tensors, beside, {"step": str(step), "seconds": str(seconds), "machine": machine})
    beside.replace(path)


def restore(path: Path, model: nn.Module, opts: list[torch.optim.Optimizer]) -> tuple[int, float, str]:
    """Load a checkpoint into a model and its optimisers: (step, seconds, machine), or (0, 0.0, "") where none is."""
    if not path.exists():
        return 0, 0.0, ""
    tensors = load_file(path)
    own = weights(model)
    found = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    if found.keys() != own.keys():
        raise SystemExit(f"{path} holds another architecture; move it away to begin anew.")
    model.load_state_dict(found, strict=False)  # all but tied weights, which follow
    for index, optimiser in enumerate(opts):
        whole = optimiser.state_dict()
        for name, tensor in tensors.items():
            if name.startswith(f"opt.{index}."):
                key, field = name.split(".")[2:]
                whole["state"].setdefault(int(key), {})[field] = tensor
        optimiser.load_state_dict(whole)
    with safe_open(path, "pt") as file:
        known = file.metadata()
    return int(known["step"]), float(known["seconds"]), known.get("machine", "not recorded")


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each tensor once: tied weights are one tensor under two names."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            kept[name] = tensor
        seen.add(tensor.data_ptr())
    return kept


def from_open_clip(clip: dict[str, Tensor], blocks: str, outside: dict[str, str]) -> dict[str, Tensor]:
    """The weights of a tower of open_clip under transformers' names, float32.

    `blocks` is how the names of the tower's layers begin; `outside` maps the names of what is not in a layer.
    """
    inside = {
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }  # fmt: skip
    out = {ours: clip[theirs].float() for theirs, ours in outside.items()}
    for name, tensor in clip.items():
        if not name.startswith(blocks):
            continue
        layer, part = name.removeprefix(blocks).split(".", 1)
        part, _, kind = part.replace("in_proj_", "in_proj.").rpartition(".")
        if part == "attn.in_proj":
            for letter, piece in zip("qkv", tensor.float().chunk(3), strict=True):
                out[f"encoder.layers.{layer}.self_attn.{letter}_proj.{kind}"] = piece
        else:
            out[f"encoder.layers.{layer}.{inside[part]}.{kind}"] = tensor.float()
    return out


@torch.no_grad()
def exact(
    forward: Callable[[Tensor, slice], Tensor], tokenizer, prompts: list[str], answers: list[str], batch: int = 128
) -> list[bool]:
    """Whether greedy decoding gives each answer, token by token; one pass over prompt and answer finds the same.

    `forward(ids, part)` gives the logits (prompt, token, vocabulary) of the padded ids of `prompts[part]`.
    """
    right = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        heads = tokenizer(prompts[part]).input_ids
        tails = tokenizer(answers[part], add_special_tokens=False).input_ids
        longest = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
        ids = torch.full((len(heads), longest), tokenizer.pad_token_id)
        for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
            ids[row, : len(head) + len(tail)] = torch.tensor(head + tail)
        guess = forward(ids, part).argmax(-1).cpu()  # (prompt, token); causal, so the padding behind is not seen
        for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
            right.append(guess[row, len(head) - 1 : len(head) + len(tail) - 1].tolist() == tail)
    return right
