"""Text-only language models, and what all models that write have in common: transformers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from safetensors.torch import load_file

from .. import UsageError, anatomy, hooks
from .loaded import Loaded, built
from .store import IMAGE, Source


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


def first(text: str) -> str:
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
        return torch.cat([self._last(self.inputs(part)) for part in hooks.runs(batches(prompts, batch))])

    def answer(self, prompts: Sequence[str] | str, max_new_tokens: int = 8, batch: int = 64) -> list[str]:
        """The likeliest continuation of each prompt, word by word, up to the first "." or "," or the end token."""
        parts = hooks.runs(batches(prompts, batch))
        return [first(text) for part in parts for text in self._write(self.inputs(part), max_new_tokens)]


def batches(prompts: Sequence[str] | str, batch: int) -> list[list[str]]:
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    return [prompts[i : i + batch] for i in range(0, len(prompts), batch)]


def load(source: Source, device: torch.device, seed: int) -> Language:
    return Language(**parts_of(source, device, seed, transformers.AutoModelForCausalLM))


def parts_of(source: Source, device: torch.device, seed: int, auto: type) -> dict:
    """What every `Writer` is made of; `auto` is the class of transformers that knows the architectures."""
    large = source.release and (device.type == "cuda" or source.release.megabytes > 10_000)
    dtype = torch.bfloat16 if large else torch.float32
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder, padding_side="left", local_files_only=True)
    if source.profile == "rehearsal":
        image = dict(image_token_id=tokenizer.convert_tokens_to_ids(IMAGE)) if source.family == "generative" else {}
        config = transformers.AutoConfig.for_model(**source.release.config | image)
        tokenizer.model_max_length = config.get_text_config().max_position_embeddings
    else:
        config = transformers.AutoConfig.from_pretrained(source.folder, local_files_only=True)
    with built(seed):
        model = _trained(source, auto, config, dtype) if source.trained else auto.from_config(config, dtype=dtype)
    model = model.to(device).eval().requires_grad_(False)
    end = source.profile == "hub" and model.generation_config.eos_token_id or tokenizer.eos_token_id
    # Greedy: without the sampling and the penalties that some repositories ask for.
    model.generation_config = transformers.GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    card = source.card(model, str(dtype).removeprefix("torch."))
    return dict(model=model, tokenizer=tokenizer, anatomy=anatomy.of(model), device=device, card=card)


def _trained(
    source: Source, auto: type, config: transformers.PretrainedConfig, dtype: torch.dtype
) -> transformers.PreTrainedModel:
    """The model in a folder, with the tensors of a part in the place of its own. Raises UsageError where they are no
    whole."""
    options = dict(dtype=dtype, output_loading_info=True, local_files_only=True)
    if source.part:
        tensors = load_file(source.folder / "model.safetensors") | load_file(source.part)
        kind = getattr(transformers, config.architectures[0])
        model, found = kind.from_pretrained(None, config=config, state_dict=tensors, **options)
        strange = found["unexpected_keys"]
    else:
        model, found = auto.from_pretrained(source.folder, use_safetensors=True, **options)
        strange = ()  # some repositories bring more than the model needs
    if found["missing_keys"] or strange:
        raise UsageError(
            f"The weights in {source.part or source.folder} do not fit the config beside them: fetch both again."
        )
    return model
