"""Loading the models: `load(family, profile, device, weights)`.

Three profiles: `tiny` loads the embedded, trained models from data/models; `rehearsal` builds the released models'
architectures from their configs with random weights; `hub` loads released weights from the local cache and never
fetches anything by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    GenerationConfig,
    LlavaProcessor,
)
from transformers.utils import logging as transformers_logging

from . import UsageError, anatomy, scenes, texts

FOLDER = Path(__file__).parent.parent / "data" / "models"
FAMILIES = ("contrastive", "language", "generative", "diffusion")
# The folders of each family's embedded models, by the name that picks them; "" is the one loaded without a name.
EMBEDDED = {
    "contrastive": {"": "contrastive"},
    "language": {"": "language", "half": "language_half"},
    "generative": {"": "generative"},
    "diffusion": {"": "diffusion"},
}
# What the notebooks of a family read besides: the oracle that judges what is painted.
BESIDE = {"diffusion": ("diffusion_oracle",)}
LOADED = set()  # the folders of the embedded models that this process has opened, for the stamp of a notebook
CARD = ("name", "library", "held_out", "chance", "licence", "files")  # what a card must hold
SEEN = (
    "pairs_seen",
    "tokens_seen",
    "pictures_seen",
    "steps",
    "pictures_a_step",
    "trained_on",
)  # how much training, in its words
PROFILES = ("tiny", "rehearsal", "hub")
IMAGE = "<image>"  # stands in a prompt for a picture


@dataclass(frozen=True)
class Release:
    """A released model: its hub repository, the files needed, what they weigh, and the licence.

    An index among the files stands for itself and for the shards that it names. `config` is the architecture in
    transformers' own words, or those of a pipeline's parts (open_clip knows its own by their names).
    """

    repository: str
    files: tuple[str, ...]
    megabytes: int
    licence: str
    config: dict | None = None

    @property
    def fetch(self) -> str:
        """The command that fills the hub cache: never pickles, nor the same weights in other formats."""
        kinds = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")
        whole = "model_type" in (self.config or {})  # a pipeline's repository has each part in several formats
        what = [f"--include '{kind}'" for kind in kinds] if whole else self.files
        return f"hf download {self.repository} {' '.join(what)}"


# Verified: SigLIP's sizes, image token, layer and strategy of the small LLaVA by the script in transformers that
# converted it (convert_llava_weights_to_hf.py), vocabularies as that script pads them; sizes of Qwen1.5-0.5B and of
# Vicuna by configs quoted elsewhere and the published numbers of parameters; file names of llava-1.5-7b and Qwen1.5 by
# download scripts of third parties; licences by model pages. From memory: the files of the small LLaVA, that Qwen1.5
# ties its embeddings, rms_norm_eps of Vicuna, the licence of this size of Qwen1.5; sizes in MB are computed, two bytes
# a parameter. Under `hub` the repository's own config counts.
_QWEN = dict(
    model_type="qwen2", hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16,
    num_key_value_heads=16, max_position_embeddings=32768, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    rms_norm_eps=1e-6, tie_word_embeddings=True, vocab_size=151936,
)  # fmt: skip
_SIGLIP = dict(
    model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304, num_hidden_layers=26,
    num_attention_heads=16, image_size=384, patch_size=14, vision_use_head=False,
)  # fmt: skip
_LLAVA_SMALL = dict(
    model_type="llava", vision_config=_SIGLIP, text_config=_QWEN | {"vocab_size": 152000}, image_token_id=151646,
    vision_feature_layer=-1, vision_feature_select_strategy="full", image_seq_length=729, tie_word_embeddings=True,
)  # fmt: skip
_VICUNA = dict(
    model_type="llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    max_position_embeddings=4096, rms_norm_eps=1e-5, vocab_size=32064,
)  # fmt: skip
_CLIP_L_336 = dict(
    model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
    num_attention_heads=16, image_size=336, patch_size=14, projection_dim=768,
)  # fmt: skip
_LLAVA_7B = dict(
    model_type="llava", vision_config=_CLIP_L_336, text_config=_VICUNA, image_token_id=32000,
    vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=576,
)  # fmt: skip
# Verified: the sizes of Stable Diffusion 1.5's U-Net, autoencoder and noise schedule by other projects' copies of its
# configs. From memory: its files, its licence, and its text tower, that of CLIP ViT-L/14.
_SD_UNET = dict(
    sample_size=64, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, cross_attention_dim=768, attention_head_dim=8,
)  # fmt: skip
_SD_VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=512,
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, scaling_factor=0.18215,
)  # fmt: skip
_SD_TEXT = dict(
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    max_position_embeddings=77, hidden_act="quick_gelu", projection_dim=768,
)  # fmt: skip
_SD_STEPS = dict(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
    steps_offset=1,
)  # fmt: skip
_SD = dict(unet=_SD_UNET, vae=_SD_VAE, text=_SD_TEXT, scheduler=_SD_STEPS)
_SD_FILES = (
    "model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json",
    "tokenizer/merges.txt", "tokenizer/special_tokens_map.json", "text_encoder/config.json",
    "text_encoder/model.safetensors", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
)  # fmt: skip
_TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
_CLIP_FILES = ("open_clip_config.json", "open_clip_model.safetensors")
# The first of each family is the one that is loaded unless `name` says otherwise.
RELEASED: dict[str, dict[str, Release]] = {
    "contrastive": {
        "ViT-B-32": Release("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", _CLIP_FILES, 605, "MIT"),
        "ViT-L-14": Release("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", _CLIP_FILES, 1711, "MIT"),
    },
    # The language model that the small LLaVA was made from. Vicuna, under the large one, is left out: as far as is
    # known, lmsys/vicuna-7b-v1.5 holds pickles only.
    "language": {
        "Qwen1.5-0.5B-Chat": Release(
            "Qwen/Qwen1.5-0.5B-Chat", (*_TEXT_FILES, "model.safetensors"), 1239, "tongyi-qianwen-research", _QWEN
        ),
    },
    "generative": {
        "llava-interleave-qwen-0.5b": Release(
            "llava-hf/llava-interleave-qwen-0.5b-hf", (*_TEXT_FILES, "preprocessor_config.json", "model.safetensors"),
            1728, "tongyi-qianwen-research", _LLAVA_SMALL,
        ),
        "llava-1.5-7b": Release(
            "llava-hf/llava-1.5-7b-hf", (*_TEXT_FILES, "preprocessor_config.json", "model.safetensors.index.json"),
            14127, "Llama 2 Community License", _LLAVA_7B,
        ),
    },
    "diffusion": {
        "stable-diffusion-v1-5": Release(
            "stable-diffusion-v1-5/stable-diffusion-v1-5", _SD_FILES, 4266, "CreativeML Open RAIL-M", _SD
        ),
    },
}  # fmt: skip


@dataclass
class Loaded:
    """A model ready for study: what all families have in common.

    `model` is the library's own object in evaluation mode, its attention opened; `anatomy` names the places in it;
    `tokenizer` is its library's too; `card` holds what is known of it, and is printed by `print`.
    """

    model: torch.nn.Module
    tokenizer: object
    anatomy: anatomy.Anatomy
    device: torch.device
    card: dict

    def __str__(self) -> str:
        lines = [f"{key:12} {value}" for key, value in self.card.items() if not isinstance(value, dict)]
        chance = self.card.get("chance", {})
        for name, value in self.card.get("held_out", {}).items():
            by_chance = f"   chance {chance[name]:.3f}" if name in chance else ""
            lines.append(f"held out     {name:20} {value:.3f}{by_chance}")
        return "\n".join(lines)


@dataclass
class Contrastive(Loaded):
    """A two-tower model of open_clip; `resolution` is the side of its input pictures in pixels."""

    resolution: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def pixels(self, drawn: Sequence[scenes.Scene] | np.ndarray) -> torch.Tensor:
        """Scenes, or pictures (image, height, width, 3) uint8, as the model's normalised input (image, 3, R, R)."""
        pictures = drawn if isinstance(drawn, np.ndarray) else scenes.render_batch(drawn, self.resolution)
        x = torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def tokens(self, texts: Sequence[str]) -> torch.Tensor:
        """Texts as token ids (text, context), padded."""
        return self.tokenizer(list(texts)).to(self.device)

    @torch.no_grad()
    def embed_images(self, drawn: Sequence[scenes.Scene] | np.ndarray, batch: int = 128) -> torch.Tensor:
        """Unit-length image embeddings (image, embed)."""
        parts = (drawn[i : i + batch] for i in range(0, len(drawn), batch))
        return torch.cat([self.model.encode_image(self.pixels(part), normalize=True) for part in parts])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch: int = 256) -> torch.Tensor:
        """Unit-length text embeddings (text, embed)."""
        parts = self.tokens(texts).split(batch)
        return torch.cat([self.model.encode_text(part, normalize=True) for part in parts])


@dataclass
class Writer(Loaded):
    """What language models have in common, whether they see pictures or not.

    Prompts end where the answer begins. Batches are padded on the left: [:, -1] is the token that the answer is read
    from, and a place counted from the end is the same with and without padding.
    """

    def word_id(self, word: str) -> int:
        """The id of a word's first token where the word answers a prompt: the column of `logits` that speaks of it."""
        prompt = self._text("a")
        plain = "" if prompt.endswith("\n") else " "
        heads, whole = self.tokenizer([prompt, prompt + plain + word], add_special_tokens=False).input_ids
        return whole[len(heads)]

    def _text(self, prompt: str, seen: bool = False) -> str:
        """A prompt as this model wants it; `seen` says that pictures come with it."""
        return prompt

    def _open(self, encoded: dict) -> dict[str, torch.Tensor]:
        """A tokenizer's output on the device. Raises UsageError for prompts that are longer than the model reads."""
        longest, n = self.model.config.get_text_config().max_position_embeddings, encoded["input_ids"].shape[1]
        if n > longest:
            raise UsageError(f"A prompt has {n} tokens, and this model reads {longest}: give it fewer examples.")
        return {key: encoded[key].to(self.device) for key in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def _last(self, inputs: dict) -> torch.Tensor:
        return self.model(**inputs, logits_to_keep=1).logits[:, -1].float()

    @torch.no_grad()
    def _write(self, inputs: dict, max_new_tokens: int) -> list[str]:
        ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        written = ids[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]


def _first(text: str) -> str:
    """An answer without what the model wrote behind it: the next sentence, example or line."""
    return re.split(r"[.,\n]", text)[0].strip().lower()


@dataclass
class Language(Writer):
    """A text-only causal language model of transformers. Run `model(**inputs(prompts))` to record or edit it."""

    def inputs(self, prompts: Sequence[str] | str) -> dict[str, torch.Tensor]:
        """Prompts as the model's input: `input_ids` and `attention_mask` (prompt, token), padded on the left."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        return self._open(self.tokenizer(prompts, padding=True, return_tensors="pt"))

    def logits(self, prompts: Sequence[str] | str, batch: int = 64) -> torch.Tensor:
        """What the model expects next at each prompt's end: (prompt, vocabulary), before the softmax, float32."""
        return torch.cat([self._last(self.inputs(part)) for part in _batches(prompts, batch)])

    def answer(self, prompts: Sequence[str] | str, max_new_tokens: int = 8, batch: int = 64) -> list[str]:
        """The likeliest continuation of each prompt, word by word, up to the first "." or "," or the end token."""
        parts = _batches(prompts, batch)
        return [_first(text) for part in parts for text in self._write(self.inputs(part), max_new_tokens)]


def _batches(prompts: Sequence[str] | str, batch: int) -> list[list[str]]:
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    return [prompts[i : i + batch] for i in range(0, len(prompts), batch)]


Drawn = Sequence[scenes.Scene] | np.ndarray | None
_SHORT = "Answer the question using a single word or phrase."  # as LLaVA-1.5 was trained to be asked
# The prompt format of LLaVA-1.5, for a processor that brings no chat template.
_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} ASSISTANT:{% endfor %}"
)


@dataclass
class Generative(Writer):
    """transformers' LLaVA: a vision tower, a projector and a language model. Run `model(**inputs(drawn, prompts))`.

    `processor` is the LlavaProcessor; `resolution` the side of the input pictures in pixels; `grid` the (rows,
    columns) of image tokens, which have the id `model.config.image_token_id`. Where `chat` is true, prompts are put
    into the processor's chat template: "answer :" at their end becomes LLaVA's request for a short answer.
    """

    processor: LlavaProcessor
    resolution: int
    grid: tuple[int, int]
    chat: bool = False

    def pixels(self, drawn: Drawn) -> torch.Tensor:
        """Scenes, or pictures (image, height, width, 3) uint8, as the model's normalised input (image, 3, R, R)."""
        encoded = self.processor.image_processor(self._pictures(drawn), return_tensors="pt")
        return encoded["pixel_values"].to(self.device, self.model.dtype)

    def masks(self, scene: scenes.Scene) -> np.ndarray:
        """The objects' masks (object, row, column) on the pixels that the image tokens cover, for `anatomy.spans`.

        Patches that do not divide the picture leave its last rows and columns out: 6 of 384 pixels in patches of 14.
        """
        covered = self.grid[0] * self.processor.patch_size
        return scenes.masks(scene, self.resolution)[:, :covered, :covered]

    def inputs(self, drawn: Drawn, prompts: Sequence[str] | str) -> dict[str, torch.Tensor]:
        """Pictures and prompts as the model's input.

        `input_ids` and `attention_mask` (prompt, token), padded on the left, an image token for each patch, and
        `pixel_values` (image, 3, R, R). `drawn` are scenes, or pictures (image, height, width, 3) uint8, or None for
        prompts without pictures. Each stands before its prompt, or where the prompt says "<image>"; a prompt may say
        so several times, and pictures are then taken in order. One prompt alone is asked of every picture.

        Raises UsageError where pictures and their places are not as many.
        """
        prompts = _asked(drawn, prompts)
        if drawn is None:
            return self._open(self.tokenizer([self._text(p) for p in prompts], padding=True, return_tensors="pt"))
        asked = [self._text(prompt, seen=True) for prompt in prompts]
        encoded = self.processor(images=self._pictures(drawn), text=asked, padding=True, return_tensors="pt")
        return self._open(encoded) | {"pixel_values": encoded["pixel_values"].to(self.device, self.model.dtype)}

    def logits(self, drawn: Drawn, prompts: Sequence[str] | str, batch: int = 32) -> torch.Tensor:
        """What the model expects next at each prompt's end: (prompt, vocabulary), before the softmax, float32."""
        return torch.cat([self._last(self.inputs(*part)) for part in _shown(drawn, prompts, batch)])

    def answer(self, drawn: Drawn, prompts: Sequence[str] | str, max_new_tokens: int = 8, batch: int = 32) -> list[str]:
        """The likeliest continuation of each prompt, word by word, up to the first "." or "," or the end token."""
        parts = _shown(drawn, prompts, batch)
        return [_first(text) for part in parts for text in self._write(self.inputs(*part), max_new_tokens)]

    def describe(self, drawn: Drawn, max_new_tokens: int = 40, batch: int = 32) -> list[str]:
        """A caption of each picture."""
        prompt = texts.DESCRIBE if self.chat else texts.prompt(texts.DESCRIBE)
        parts = _shown(drawn, prompt, batch)
        return [text for part in parts for text in self._write(self.inputs(*part), max_new_tokens)]

    def _pictures(self, drawn: Drawn) -> list[np.ndarray]:
        return list(drawn if isinstance(drawn, np.ndarray) else scenes.render_batch(drawn, self.resolution))

    def _text(self, prompt: str, seen: bool = False) -> str:
        before = seen and IMAGE not in prompt
        if not self.chat:
            return IMAGE * before + prompt
        question = prompt.removesuffix(" answer :")
        text = question if question == prompt else f"{question}\n{_SHORT}"
        content = [{"type": "image"}] * before + [{"type": "text", "text": text}]
        turn = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)


def _asked(drawn: Drawn, prompts: Sequence[str] | str) -> list[str]:
    """The prompts, one prompt repeated for each picture. Raises UsageError where places and pictures do not match."""
    n = 0 if drawn is None else len(drawn)
    if isinstance(prompts, str):
        prompts = [prompts] * (n if n and IMAGE not in prompts else 1)
    places = sum(_places(drawn, prompt) for prompt in prompts)
    if places != n:
        raise UsageError(
            f"{len(prompts)} prompts have places for {places} pictures, and {n} were given: one picture a prompt, or "
            f"as many as it says {IMAGE}."
        )
    return list(prompts)


def _places(drawn: Drawn, prompt: str) -> int:
    return prompt.count(IMAGE) or int(drawn is not None)


def _shown(drawn: Drawn, prompts: Sequence[str] | str, batch: int) -> Iterator[tuple[Drawn, list[str]]]:
    """Batches of prompts with the pictures that belong to them."""
    begin = 0
    for part in _batches(_asked(drawn, prompts), batch):
        end = begin + sum(_places(drawn, prompt) for prompt in part)
        yield (None if drawn is None else drawn[begin:end]), part
        begin = end


@dataclass
class Diffusion(Loaded):
    """diffusers' StableDiffusionPipeline. Its places: `anatomy.of`; its noise is drawn on the CPU, a seed a picture.

    `resolution` is the side of its pictures in pixels, `side` that of its latents.
    """

    resolution: int
    side: int

    def tokens(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts as token ids (prompt, token), padded to the text tower's length."""
        options = dict(padding="max_length", truncation=True, max_length=self.tokenizer.model_max_length)
        return self.tokenizer(list(prompts), return_tensors="pt", **options).input_ids.to(self.device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """What the U-Net reads of prompts: the text tower's states (prompt, token, width) after its last norm."""
        return self.model.text_encoder(self.tokens(prompts)).last_hidden_state

    def noise(self, n: int, seed: int = 0) -> torch.Tensor:
        """Latents (picture, 4, side, side) to begin from; picture i has the noise of seed + i, whatever n is."""
        shape = (self.model.unet.config.in_channels, self.side, self.side)
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + index)) for index in range(n)]
        return torch.stack(drawn).to(self.device)

    @torch.no_grad()
    def paint(
        self, prompts: Sequence[str] | torch.Tensor, seed: int = 0, steps: int = 30, guidance: float = 4.0,
        batch: int = 32, noise: torch.Tensor | None = None,
    ) -> np.ndarray:  # fmt: skip
        """A picture for each prompt, (prompt, resolution, resolution, 3) uint8.

        Prompts may be given as what the U-Net reads of them (prompt, token, width). Empty prompts and prompts are one
        batch in the text tower too, the empty ones first, so `anatomy.conditional` serves for edits in both.
        `noise` takes the place of `self.noise(len(prompts), seed)`. Raises UsageError without prompts.
        """
        if isinstance(prompts, str) or not len(prompts):
            raise UsageError("paint takes a list of prompts, one for each picture.")
        noise = self.noise(len(prompts), seed) if noise is None else noise
        painted = []
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            if isinstance(part, torch.Tensor):
                without, told = self.encode([""]).expand_as(part), part
            else:
                without, told = self.encode([""] * len(part) + list(part)).chunk(2)
            out = self.model(
                prompt_embeds=told, negative_prompt_embeds=without, latents=noise[start : start + batch],
                guidance_scale=guidance, num_inference_steps=steps, output_type="np",
            )  # fmt: skip
            painted.append((out.images * 255).round().astype(np.uint8))
        return np.concatenate(painted)

    @torch.no_grad()
    def latents(self, drawn: Sequence[scenes.Scene] | np.ndarray, batch: int = 64) -> torch.Tensor:
        """Scenes, or pictures (picture, R, R, 3) uint8, as the U-Net's latents (picture, 4, side, side), no noise."""
        pictures = drawn if isinstance(drawn, np.ndarray) else scenes.render_batch(drawn, self.resolution)
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().to(self.device) / 127.5 - 1
        parts = [self.model.vae.encode(part).latent_dist.mean for part in x.split(batch)]
        return torch.cat(parts) * self.model.vae.config.scaling_factor

    @torch.no_grad()
    def pictures(self, latents: torch.Tensor, batch: int = 64) -> np.ndarray:
        """Latents (picture, 4, side, side) as pictures (picture, R, R, 3) uint8."""
        parts = (latents / self.model.vae.config.scaling_factor).split(batch)
        x = torch.cat([self.model.vae.decode(part).sample for part in parts])
        return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def device_of(device: str) -> torch.device:
    """ "auto" is a GPU where there is one. Raises UsageError for a device that this machine has not."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise UsageError(f"Unknown device {device!r}. Choose one of: auto, cpu, cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("This machine has no CUDA device that PyTorch can use. Choose the device cpu or auto.")
    return torch.device(device)


def load(
    family: str,
    profile: str = "tiny",
    device: str = "auto",
    weights: str = "trained",
    name: str | None = None,
    seed: int = 0,
) -> Contrastive | Language | Generative | Diffusion:
    """A model of a family under a profile.

    `weights="random"` gives the twin of the same architecture as its initialisation left it, drawn from `seed`: the
    control. `name` picks one of the released architectures under `rehearsal` and `hub`. Precision is float32, but
    bfloat16 for released language and generative models on a GPU and for those above 10 GB.
    Raises UsageError for anything unknown, for a missing or damaged weight file, and for an empty hub cache.
    """
    for what, value, choices in (
        ("family", family, FAMILIES),
        ("profile", profile, PROFILES),
        ("weights", weights, ("trained", "random")),
    ):
        if value not in choices:
            raise UsageError(f"Unknown {what} {value!r}. Choose one of: {', '.join(choices)}.")
    known = EMBEDDED[family] if profile == "tiny" else RELEASED[family]
    if name is not None and (not name or name not in known):
        second = "".join(f" or say {name!r}" for name in EMBEDDED[family] if name)
        raise UsageError(
            f"No model {name!r} in family {family} under profile {profile}. Under rehearsal and hub choose one of: "
            f"{', '.join(RELEASED[family])}; under tiny leave the name out{second}."
        )
    name = name or next(iter(known))
    if family in ("contrastive", "diffusion"):
        of_family = _contrastive if family == "contrastive" else _diffusion
        return of_family(profile, device_of(device), weights, name, seed)
    return _writer(family, profile, device_of(device), weights, name, seed)


def _contrastive(profile: str, device: torch.device, weights: str, name: str, seed: int) -> Contrastive:
    card = {"family": "contrastive", "profile": profile, "weights": weights, "precision": "float32"}
    if profile == "tiny":
        source = f"local-dir:{intact('contrastive', need_weights=weights == 'trained')}"
    elif profile == "hub":
        folder, commit = _cached("contrastive", name)
        source = f"local-dir:{folder}"
        card |= {"name": name, "repository": RELEASED["contrastive"][name].repository, "commit": commit}
    else:
        source, weights = name, "random"
        card |= {"name": name, "weights": "random"}
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # the CPU's only: models are drawn there
        model = (
            open_clip.create_model(source, load_weights=weights == "trained").to(device).eval().requires_grad_(False)
        )
        tokenizer = open_clip.get_tokenizer(source)
    card |= _known("contrastive" if profile == "tiny" and weights == "trained" else None, model)
    settings = model.visual.preprocess_cfg
    return Contrastive(
        model=model, tokenizer=tokenizer, anatomy=anatomy.of(model), device=device, card=card,
        resolution=model.visual.image_size[0], mean=tuple(settings["mean"]), std=tuple(settings["std"]),
    )  # fmt: skip


def _writer(
    family: str, profile: str, device: torch.device, weights: str, name: str, seed: int
) -> Language | Generative:
    auto = {"language": AutoModelForCausalLM, "generative": AutoModelForImageTextToText}[family]
    large = profile != "tiny" and (device.type == "cuda" or RELEASED[family][name].megabytes > 10_000)
    dtype = torch.bfloat16 if large else torch.float32
    card = {"family": family, "profile": profile, "weights": weights, "precision": str(dtype).removeprefix("torch.")}
    if profile == "tiny":
        folder = intact(EMBEDDED[family][name], need_weights=weights == "trained")
    elif profile == "hub":
        folder, commit = _cached(family, name)
        card |= {"name": name, "repository": RELEASED[family][name].repository, "commit": commit}
    else:  # the embedded tokenizer: its ids are within any vocabulary
        folder, weights = intact(EMBEDDED[family][""], need_weights=False), "random"
        card |= {"name": name, "weights": weights, "tokenizer": f"that of the embedded {family} model"}
    local = dict(local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **local)
    if profile == "rehearsal":
        image = dict(image_token_id=tokenizer.convert_tokens_to_ids(IMAGE)) if family == "generative" else {}
        config = AutoConfig.for_model(**RELEASED[family][name].config | image)
        tokenizer.model_max_length = config.get_text_config().max_position_embeddings
    else:
        config = AutoConfig.from_pretrained(folder, **local)
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # the CPU's only: models are drawn there
        if weights == "trained":
            model, found = auto.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **local
            )
            if found["missing_keys"]:
                raise UsageError(f"The weights in {folder} do not fit the config beside them: fetch both again.")
        else:
            model = auto.from_config(config, dtype=dtype)
    model = model.to(device).eval().requires_grad_(False)
    end = profile == "hub" and model.generation_config.eos_token_id or tokenizer.eos_token_id
    # Greedy: without the sampling and the penalties that some repositories ask for.
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    card |= _known(EMBEDDED[family][name] if profile == "tiny" and weights == "trained" else None, model)
    parts = dict(model=model, tokenizer=tokenizer, anatomy=anatomy.of(model), device=device, card=card)
    if family == "language":
        return Language(**parts)
    chat = profile == "hub"
    card |= {"prompts": "in the chat template"} if chat else {}
    vision = config.vision_config
    processor = LlavaProcessor.from_pretrained(folder, **local)
    processor.tokenizer = tokenizer
    if profile == "rehearsal":
        side = {"height": vision.image_size, "width": vision.image_size}
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, size=side, crop_size=side, **local)
    processor.patch_size = vision.patch_size  # older repositories leave these three out
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    processor.num_additional_image_tokens = int("siglip" not in vision.model_type)  # SigLIP has no CLS
    if chat and not processor.chat_template:
        processor.chat_template = _TEMPLATE
    return Generative(
        **parts, processor=processor, chat=chat, resolution=vision.image_size,
        grid=(vision.image_size // vision.patch_size,) * 2,
    )  # fmt: skip


def _diffusion(profile: str, device: torch.device, weights: str, name: str, seed: int) -> Diffusion:
    card = {"family": "diffusion", "profile": profile, "weights": weights, "precision": "float32"}
    if profile == "tiny":
        folder = intact("diffusion", need_weights=weights == "trained")
    elif profile == "hub":
        folder, commit = _cached("diffusion", name)
        card |= {"name": name, "repository": RELEASED["diffusion"][name].repository, "commit": commit}
    else:  # the embedded tokenizer: its ids are within any vocabulary
        folder, weights = intact("diffusion", need_weights=False), "random"
        card |= {"name": name, "weights": weights, "tokenizer": "that of the embedded diffusion model"}
    unguarded = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # the CPU's only: models are drawn there
        if weights == "trained":
            pipe = StableDiffusionPipeline.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, **unguarded
            )
        else:
            parts = RELEASED["diffusion"][name].config if profile == "rehearsal" else {
                "vae": AutoencoderKL.load_config(folder / "vae"),
                "unet": UNet2DConditionModel.load_config(folder / "unet"),
                "text": json.loads((folder / "text_encoder" / "config.json").read_text()),
                "scheduler": DDIMScheduler.load_config(folder / "scheduler"),
            }  # fmt: skip
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            text = CLIPTextConfig.from_dict(parts["text"] | {"eos_token_id": tokenizer.eos_token_id})
            tokenizer.model_max_length = text.max_position_embeddings
            pipe = StableDiffusionPipeline(
                vae=AutoencoderKL.from_config(parts["vae"]), unet=UNet2DConditionModel.from_config(parts["unet"]),
                text_encoder=CLIPTextModel(text), tokenizer=tokenizer,
                scheduler=DDIMScheduler.from_config(parts["scheduler"]), **unguarded,
            )  # fmt: skip
    opened = of_pipeline(pipe, device)
    known = "diffusion" if profile == "tiny" and weights == "trained" else None
    opened.card.update(card | _known(known, opened.anatomy.module))
    return opened


def of_pipeline(pipe: StableDiffusionPipeline, device: torch.device) -> Diffusion:
    """A pipeline opened for study, on a device; its card is empty."""
    # one pass of the U-Net a step, and no randomness of its own
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    for part in (pipe.vae, pipe.unet, pipe.text_encoder):
        part.eval().requires_grad_(False)
    side = pipe.unet.config.sample_size
    return Diffusion(
        model=pipe, tokenizer=pipe.tokenizer, anatomy=anatomy.of(pipe), device=device, card={},
        resolution=side * pipe.vae_scale_factor, side=side,
    )  # fmt: skip


def _known(folder: str | None, model: torch.nn.Module) -> dict:
    """What the card of an embedded model says that one wants to see, and the model's size."""
    shown = {}
    if folder:
        known = read_card(folder)
        shown = {key: known[key] for key in (*CARD[:2], *SEEN, *CARD[2:-1]) if key in known}
        shown["sha256"] = next(hash for name, hash in known["files"].items() if name.endswith(".safetensors"))[:16]
    return shown | {"parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"}


@contextlib.contextmanager
def _quiet():
    """open_clip warns through the root logger that a model without weights has random ones: here that is the wish.

    And no progress bars of transformers and diffusers, for what takes a moment.
    """
    level, libraries = logging.getLogger().level, (transformers_logging, diffusers_logging)
    bars = [library for library in libraries if library.is_progress_bar_enabled()]
    logging.getLogger().setLevel(logging.ERROR)
    for library in bars:
        library.disable_progress_bar()
    try:
        yield
    finally:
        logging.getLogger().setLevel(level)
        for library in bars:
            library.enable_progress_bar()


def read_card(folder: str) -> dict:
    """The card of an embedded model: data, steps, seed, machine, held-out figures, licence, sha256 of its files."""
    path = FOLDER / folder / "card.json"
    try:
        card = json.loads(path.read_text())
        return {key: card[key] for key in CARD} | card
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"The card of the {folder} model cannot be read ({type(error).__name__}). "
            f"Restore it: git checkout -- data/models/{folder}"
        ) from None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(folder: str, with_weights: bool = True) -> tuple[str, str]:
    """ "intact", "missing" or "damaged", and the file that is to blame."""
    for name, expected in read_card(folder)["files"].items():
        if name.endswith(".safetensors") and not with_weights:
            continue
        path = FOLDER / folder / name
        if not path.exists():
            return "missing", name
        if sha256(path) != expected:
            return "damaged", name
    return "intact", ""


def intact(folder: str, need_weights: bool) -> Path:
    state, name = _state(folder, need_weights)
    if state != "intact":
        raise UsageError(
            f"The file data/models/{folder}/{name} is {state}. Restore it: git checkout -- data/models/{folder}"
        )
    LOADED.add(folder)
    return FOLDER / folder


def _cached(family: str, name: str) -> tuple[Path, str]:
    """The folder of a released model in the hub cache, and the commit that it holds."""
    release = RELEASED[family][name]
    files, found = list(release.files), []
    for file in files:
        path = try_to_load_from_cache(release.repository, file)
        if not isinstance(path, str | os.PathLike):
            raise UsageError(
                f"{name} is not in the hub cache ({file} is missing). Fetch it ({release.megabytes} MB, licence "
                f"{release.licence}): {release.fetch}"
            )
        found.append(Path(path))
        if file.endswith(".index.json"):
            files += sorted(set(json.loads(found[-1].read_text())["weight_map"].values()))
    return found[0].parent, found[0].parent.name


def inventory() -> list[dict]:
    """One row a model: {family, profile, name, state, path, bytes, hint}; state is intact, missing, damaged,
    from config, cached or not cached."""
    rows = []
    for family in FAMILIES:
        for folder in (*EMBEDDED[family].values(), *BESIDE.get(family, ())):
            try:
                state, _ = _state(folder)
            except UsageError:
                state = "missing"
            size = sum(f.stat().st_size for f in (FOLDER / folder).rglob("*.safetensors"))
            hint = "" if state == "intact" else f"git checkout -- data/models/{folder}"
            rows.append(dict(family=family, profile="tiny", name=folder, state=state,
                             path=f"data/models/{folder}", bytes=size, hint=hint))  # fmt: skip
        for name, release in RELEASED[family].items():
            rows.append(dict(family=family, profile="rehearsal", name=name, state="from config",
                             path="", bytes=0, hint=""))  # fmt: skip
            try:
                path, state, hint = str(_cached(family, name)[0]), "cached", ""
            except UsageError as error:
                path, state, hint = "", "not cached", str(error)
            rows.append(dict(family=family, profile="hub", name=name, state=state,
                             path=path, bytes=release.megabytes * 10**6, hint=hint))  # fmt: skip
    return rows
