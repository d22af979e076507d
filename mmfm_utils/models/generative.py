"""Generative vision-language models: transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from transformers.image_processing_utils import select_best_resolution

from .. import UsageError, anatomy, hooks, scenes, texts
from .language import Writer, batches, first, parts_of
from .store import IMAGE, Source

Drawn = Sequence[scenes.Scene] | Sequence[np.ndarray] | np.ndarray | None
_SHORT = "Answer the question using a single word or phrase."  # as LLaVA-1.5 was trained to be asked
# The prompt format of LLaVA-1.5, for a processor that brings no chat template.
_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} ASSISTANT:{% endfor %}"
)


@dataclass
class Generative(Writer):
    """A vision-language model of transformers: a vision tower, a projector and a language model, and their processor.

    Run `model(**inputs(drawn, prompts))`. `resolution` is the side in pixels at which scenes are drawn for it; `grid`
    the (rows, columns) of their image tokens, which have the id `model.config.image_token_id`; for pictures of other
    sizes see `grids`. Where `chat` is true, prompts are put into the processor's chat template: "answer :" at their end
    becomes LLaVA's request for a short answer. `picture` is what stands for a picture in the model's own prompts.
    """

    processor: transformers.ProcessorMixin
    resolution: int
    grid: tuple[int, int]
    chat: bool = False
    picture: str = IMAGE

    def pixels(self, drawn: Drawn) -> torch.Tensor:
        """Scenes, or pictures (image, height, width, 3) uint8, as the model's normalised input: `pixel_values`.

        (image, 3, R, R), or what else the processor makes of them: LLaVA-OneVision's (image, tile, 3, R, R), Qwen2-VL's
        patches of all pictures, (patch, values).
        """
        encoded = self.processor.image_processor(self._pictures(drawn), return_tensors="pt")
        return encoded["pixel_values"].to(self.device, self.model.dtype)

    def grids(self, drawn: Drawn) -> list[list[tuple[int, ...]]]:
        """For each picture, alone in its prompt, the grids of its image tokens, as `anatomy.spans` takes them.

        One (rows, columns); of LLaVA-OneVision two: the whole, and the tiles with a token behind each row.
        """
        encoded = self.processor.image_processor(self._pictures(drawn), return_tensors="pt")
        return _grids(self.model.config.vision_config, self.processor, encoded)

    def masks(self, scene: scenes.Scene) -> np.ndarray:
        """The objects' masks (object, row, column) on the pixels that the image tokens cover, for `anatomy.spans`.

        Patches that do not divide the picture leave its last rows and columns out: 6 of 384 pixels in patches of 14.
        """
        covered = self.grid[0] * _cell(self.model.config.vision_config)
        return scenes.masks(scene, self.resolution)[:, :covered, :covered]

    def inputs(self, drawn: Drawn, prompts: Sequence[str] | str) -> dict[str, torch.Tensor]:
        """Pictures and prompts as the model's input.

        `input_ids` and `attention_mask` (prompt, token), padded on the left, as many image tokens as a picture has,
        `pixel_values` (see `pixels`), and what else the processor gives (the pictures' sizes). `drawn` are scenes, or
        pictures (image, height, width, 3) uint8 or a list of such, or None for prompts without pictures. Each stands
        before its prompt, or where the prompt says "<image>"; a prompt may say so several times, and pictures are then
        taken in order. One prompt alone is asked of every picture.

        Raises UsageError where pictures and their places are not as many.
        """
        prompts = _asked(drawn, prompts)
        if drawn is None:
            return self._open(self.tokenizer([self._text(p) for p in prompts], padding=True, return_tensors="pt"))
        asked = [self._text(prompt, seen=True) for prompt in prompts]
        pictures, counts = iter(self._pictures(drawn)), (_places(drawn, prompt) for prompt in prompts)
        shown = [[next(pictures) for _ in range(count)] for count in counts]
        encoded = self.processor(images=shown, text=asked, padding=True, return_tensors="pt")
        dtypes = {True: self.model.dtype, False: None}
        others = {key: x.to(self.device, dtype=dtypes[x.is_floating_point()]) for key, x in encoded.items()}
        return others | self._open(encoded)

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
        given = isinstance(drawn, np.ndarray) or any(isinstance(each, np.ndarray) for each in drawn)
        return list(drawn if given else scenes.render_batch(drawn, self.resolution))

    def _text(self, prompt: str, seen: bool = False) -> str:
        before = seen and IMAGE not in prompt
        if not self.chat:
            return (IMAGE * before + prompt).replace(IMAGE, self.picture)
        question = prompt.removesuffix(" answer :")
        text = question if question == prompt else f"{question}\n{_SHORT}"
        content = [{"type": "image"}] * before + [{"type": "text", "text": text.replace(IMAGE, self.picture)}]
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


def _cell(vision: transformers.PretrainedConfig) -> int:
    """The side in pixels of what an image token stands for."""
    return vision.patch_size * getattr(vision, "spatial_merge_size", 1)


def _grids(vision: transformers.PretrainedConfig, processor: transformers.ProcessorMixin, encoded: dict) -> list:
    """The grids of the pictures that an image processor has `encoded`: what it says of their sizes tells which."""
    if "image_grid_thw" in encoded:  # Qwen2-VL: as many patches as the picture needs, some of which make a token
        merged = vision.spatial_merge_size
        return [[(rows // merged, columns // merged)] for _, rows, columns in encoded["image_grid_thw"].tolist()]
    side = vision.image_size // vision.patch_size
    if "image_sizes" not in encoded:
        return [[(side, side)]] * len(encoded["pixel_values"])
    found = []
    for size in encoded["image_sizes"].tolist():  # LLaVA-OneVision: the whole picture, and tiles
        best = select_best_resolution(size, processor.image_processor.image_grid_pinpoints)
        tiles = [length // vision.image_size for length in best]
        cells, rows = processor._get_unpadded_features(*size, side, side, *tiles)
        found.append([(side, side), (rows, cells // rows, 1)])
    return found


def of_processor(
    model: transformers.PreTrainedModel, processor: transformers.ProcessorMixin, device: torch.device | str = "cpu"
) -> Generative:
    """A vision-language model and its processor, opened for study; its card is empty.

    LLaVA, LLaVA-OneVision, Qwen2-VL and others whose stacks `anatomy.of` knows. Prompts are put into the processor's
    chat template if it has one. Raises `UsageError` for a model that is not known.
    """
    model, tokenizer = model.to(device).eval().requires_grad_(False), processor.tokenizer
    tokenizer.padding_side = "left"
    parts = dict(model=model, tokenizer=tokenizer, anatomy=anatomy.of(model), device=torch.device(device), card={})
    return _of(parts, processor, bool(processor.chat_template))


def _of(parts: dict, processor: transformers.ProcessorMixin, chat: bool) -> Generative:
    config, tokenizer = parts["model"].config, parts["tokenizer"]
    vision = config.vision_config
    resolution = getattr(vision, "image_size", None) or 16 * _cell(vision)  # any will do: as many tokens as scenes need
    blank = processor.image_processor([np.zeros((resolution, resolution, 3), np.uint8)], return_tensors="pt")
    ends = [getattr(config, f"vision_{end}_token_id", None) for end in ("start", "end")]
    before, after = ("" if end is None else tokenizer.convert_ids_to_tokens(end) for end in ends)
    return Generative(
        **parts, processor=processor, chat=chat, resolution=resolution, grid=_grids(vision, processor, blank)[0][0],
        picture=before + processor.image_token + after,
    )  # fmt: skip


def load(source: Source, device: torch.device, seed: int) -> Generative:
    parts = parts_of(source, device, seed, transformers.AutoModelForImageTextToText)
    chat, config = source.profile == "hub", parts["model"].config
    parts["card"] |= {"prompts": "in the chat template"} if chat else {}
    processor = transformers.AutoProcessor.from_pretrained(source.folder, local_files_only=True)
    processor.tokenizer = parts["tokenizer"]
    if source.profile == "rehearsal":
        side = dict.fromkeys(("height", "width"), config.vision_config.image_size)
        processor.image_processor = transformers.AutoImageProcessor.from_pretrained(
            source.folder, size=side, crop_size=side, local_files_only=True
        )
    if isinstance(processor, transformers.LlavaProcessor):  # older repositories leave these three out
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = int("siglip" not in config.vision_config.model_type)  # it has no CLS
    if chat and not processor.chat_template:
        processor.chat_template = _TEMPLATE
    return _of(parts, processor, chat)
