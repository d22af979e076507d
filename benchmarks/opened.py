"""What opening a model costs: ratios to the bare model's forward pass, measured in one run. `make bench`

Each model stands here twice, bare and opened, with the same weights. The passes are interleaved, on one thread, and
timed by the processor's clock, which other programs disturb least. The table gives the ratio of the fastest passes and,
in brackets, the median of the ratios of neighbours: where the two differ, the machine was noisy.
"""

import argparse
import copy
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

import open_clip
import torch
import transformers
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from mmfm_utils import anatomy, models
from mmfm_utils.hooks import record

Case = tuple[str, anatomy.Anatomy, str, Callable[[], Any], Callable[[], Any]]


def cases(batch: int) -> Iterator[Case]:
    """(name, anatomy, residual states, bare pass, the same pass of the opened model)"""
    torch.manual_seed(0)
    folder = models.FOLDER / "contrastive"
    clip = open_clip.CLIP(**json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]).eval()
    clip.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
    yield case("vision, embedded", clip, "vision.*.resid", "encode_image", torch.randn(batch, 3, 64, 64))

    language = transformers.AutoModelForCausalLM.from_pretrained(models.FOLDER / "language").eval()
    ids = torch.randint(5, language.config.vocab_size, (batch, 48))
    yield case("language, embedded", language, "lm.*.resid", "forward", input_ids=ids, use_cache=False)

    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=4096,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(5, 4096, (max(batch // 8, 1), 48))
    yield case("language, 30 layers of 576", llama, "lm.*.resid", "forward", input_ids=ids, use_cache=False)

    pipeline = StableDiffusionPipeline.from_pretrained(models.FOLDER / "diffusion", safety_checker=None)
    bare = copy.deepcopy(pipeline.unet).eval()
    opened = anatomy.of(pipeline)
    pipeline.unet.eval()
    side, width = bare.config.sample_size, bare.config.cross_attention_dim
    given = torch.randn(max(batch // 8, 1), 4, side, side), 500, torch.randn(max(batch // 8, 1), 24, width)
    yield "U-Net, embedded", opened, "unet.*.resid", lambda: bare(*given), lambda: pipeline.unet(*given)


def case(name: str, bare: torch.nn.Module, sites: str, method: str, *args: Any, **kwargs: Any) -> Case:
    opened = anatomy.of(copy.deepcopy(bare))
    passes = (lambda model=model: getattr(model, method)(*args, **kwargs) for model in (bare, opened.module))
    return name, opened, sites, *passes


@torch.no_grad()
def ratios(case: Case, seconds: float) -> list[str]:
    """Opened and unheard, and with all residual states recorded, as ratios to the bare pass."""
    _, opened, sites, bare, run = case
    kinds = [(bare, nullcontext), (run, nullcontext), (run, lambda: record(opened, sites))]
    rounds, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds) < 5:
        taken = [0.0] * len(kinds)
        for kind in random.sample(range(len(kinds)), len(kinds)):  # no kind always follows the same other
            go, context = kinds[kind]
            start = time.thread_time()
            with context():
                go()
            taken[kind] = time.thread_time() - start
        rounds.append(taken)
    rows = list(zip(*rounds[2:]))  # the first ones warm up
    fastest = min(rows[0])
    found = [f"{fastest * 1000:8.2f} ms"]
    for row in rows[1:]:
        found.append(f"{min(row) / fastest:.3f} ({statistics.median(b / a for a, b in zip(rows[0], row)):.3f})")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20, help="for each model")
    parser.add_argument("--batch", type=int, default=16, help="pictures or texts (the two largest models: an eighth)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    libraries = ("torch", "open_clip_torch", "transformers", "diffusers")
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    print(f"{platform.node()}, {platform.processor() or platform.machine()}, one thread; {versions}\n")
    print(f"{'':28}{'bare':>11}{'opened, unheard':>18}{'residual states':>18}")
    for each in cases(options.batch):
        bare, *others = ratios(each, options.seconds)
        print(f"{each[0]:28}{bare}{''.join(f'{other:>18}' for other in others)}", flush=True)


if __name__ == "__main__":
    main()
