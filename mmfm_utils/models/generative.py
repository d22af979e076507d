"""Generative vision-language models: transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers

from .. import UsageError, hooks, scenes, texts
from .language import Writer, batches, first, parts_of
from .store import IMAGE, Source

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

    `processor` is the library's own; `resolution` the side of the input pictures in pixels; `grid` the (rows,
    columns) of image tokens, which have the id `model.config.image_token_id`. Where `chat` is true, prompts are put
    into the processor's chat template: "answer :" at their end becomes LLaVA's request for a short answer.
    """

    processor: transformers.ProcessorMixin
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
        return [first(text) for part in parts for text in self._write(self.inputs(*part), max_new_tokens)]

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
    for part in hooks.runs(batches(_asked(drawn, prompts), batch)):
        end = begin + sum(_places(drawn, prompt) for prompt in part)
        yield (None if drawn is None else drawn[begin:end]), part
        begin = end


def load(source: Source, device: torch.device, seed: int) -> Generative:
    parts = parts_of(source, device, seed, transformers.AutoModelForImageTextToText)
    chat, config = source.profile == "hub", parts["model"].config
    parts["card"] |= {"prompts": "in the chat template"} if chat else {}
    vision = config.vision_config
    processor = transformers.AutoProcessor.from_pretrained(source.folder, local_files_only=True)
    processor.tokenizer = parts["tokenizer"]
    if source.profile == "rehearsal":
        side = {"height": vision.image_size, "width": vision.image_size}
        processor.image_processor = transformers.AutoImageProcessor.from_pretrained(
            source.folder, size=side, crop_size=side, local_files_only=True
        )
    processor.patch_size = vision.patch_size  # older repositories leave these three out
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    processor.num_additional_image_tokens = int("siglip" not in vision.model_type)  # SigLIP has no CLS
    if chat and not processor.chat_template:
        processor.chat_template = _TEMPLATE
    return Generative(
        **parts, processor=processor, chat=chat, resolution=vision.image_size,
        grid=(vision.image_size // vision.patch_size,) * 2,
    )  # fmt: skip
