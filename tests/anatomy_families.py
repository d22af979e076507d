"""The models that the contract of tests/test_anatomy.py holds for: a new architecture is a new entry in `FAMILIES`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import open_clip
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextConfig, CLIPVisionConfig, LlavaConfig, SiglipVisionConfig

from mmfm_utils import anatomy, hooks, models
from mmfm_utils.hooks import record


@dataclass
class Family:
    """A small model of one architecture with random weights.

    `run(model)` runs all of it that has sites, bare or opened, and gives one tensor, (batch, ...). `inner` are layers
    from the middle, whose sites are each listened to and edited. `ends` are further sites that the result depends on.
    `inputs` is what `run_between` needs besides the states: {tower: arguments}.
    """

    make: Callable[[], Any]
    run: Callable[[Any], torch.Tensor]
    inner: tuple[str, ...]
    ends: tuple[str, ...]
    inputs: dict[str, dict] = field(default_factory=dict)

    def build(self, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return strengthen(self.make())

    def opened(self) -> "Opened":
        model = self.build()
        return Opened(model, anatomy.of(model), self)


@dataclass
class Opened:
    model: Any
    anatomy: anatomy.Anatomy
    family: Family

    def run(self) -> torch.Tensor:
        with torch.no_grad():
            return self.family.run(self.model)

    def seen(self, sites: Any = "*") -> dict[str, torch.Tensor]:
        with record(self.anatomy, sites) as found:
            self.run()
        return found

    @property
    def sites(self) -> list[str]:
        """The inner layers' sites and the ends: on each of them the result depends."""
        inner = [site for layer in self.family.inner for site in hooks.resolve(self.anatomy, f"{layer}.*")]
        return [*inner, *self.family.ends]


def strengthen(model: Any) -> Any:
    """At random initialisation attention is nearly uniform and adds little: a wrong pattern would hardly show."""
    parts = (model.text_encoder, model.unet) if hasattr(model, "unet") else (model,)
    with torch.no_grad():
        for name, parameter in (pair for part in parts for pair in part.named_parameters()):
            if parameter.ndim == 2 and "embed" not in name and "time" not in name:
                peaked = name.endswith(
                    ("q_proj.weight", "k_proj.weight", "in_proj_weight", "to_q.weight", "to_k.weight")
                )
                parameter.normal_(std=(2 if peaked else 1) / parameter.shape[1] ** 0.5)
            elif "embed" in name and parameter.ndim <= 2 and "time" not in name:
                parameter.normal_(std=0.5)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for part in parts:
            part.eval()
    return model


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()


# ---- open_clip ----

VISION = dict(image_size=64, patch_size=8, layers=3, width=96, head_width=16, mlp_ratio=2.0)
TEXT = dict(context_length=20, vocab_size=600, width=72, heads=6, layers=3)
EOT = 599  # the largest id, as open_clip's "argmax" pooling wants it


def clip(vision: dict = VISION, text: dict = TEXT, kind: type = open_clip.CLIP, **options: Any) -> Any:
    return kind(64, dict(vision), dict(text), **options)


def sequence_first() -> Any:
    """A model whose layers run sequence first, as open_clip did before version 2.25."""
    model = clip()
    for tower in (model.visual, model):
        old = tower.transformer
        block = old.resblocks[0]
        ratio = block.mlp.c_fc.out_features / old.width
        tower.transformer = open_clip.transformer.Transformer(
            old.width, old.layers, block.attn.num_heads, ratio, batch_first=False
        )
    return model


def linear_projection() -> Any:
    model = clip()
    width, embed = model.text_projection.shape
    del model.text_projection
    model.text_projection = torch.nn.Linear(width, embed, bias=False)
    return model


def pictures(n: int = 3, size: int = 64) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def captions(n: int = 3, length: int = 20, eot: int = EOT) -> torch.Tensor:
    ids = torch.randint(1, eot, (n, length), generator=torch.Generator().manual_seed(2))
    for row, end in enumerate(torch.arange(n) * 3 + 9):
        ids[row, end], ids[row, end + 1 :] = eot, 0
    return ids


def contrastive(make: Callable[[], Any] = clip) -> Family:
    return Family(
        make,
        lambda model: torch.cat([model.encode_image(pictures()), model.encode_text(captions())], 1),
        ("vision.1", "text.1"),
        ("vision.embed", "vision.final", "vision.out", "text.embed", "text.final", "text.out"),
        {"text": dict(ids=captions())},
    )


# ---- transformers ----

SIZES = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6)
LM = dict(SIZES, vocab_size=61, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=60)
IMAGE = 3  # the id of the image token
PICTURE = dict(SIZES, image_size=32, patch_size=8, num_hidden_layers=4)  # 4 x 4 patches


def llama(**options: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LM | options))


def qwen2() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LM, num_key_value_heads=2))


def mistral() -> Any:
    """Heads wider than their share of the stream, and a window shorter than the prompts."""
    config = transformers.MistralConfig(**LM, num_key_value_heads=3, head_dim=12, sliding_window=6)
    return transformers.MistralForCausalLM(config)


def llava(kind: str = "clip") -> Any:
    if kind == "clip":  # as llava-hf/llava-1.5-7b-hf: the CLS token dropped, the last layer but one
        vision, text = CLIPVisionConfig(**PICTURE), transformers.LlamaConfig(**LM)
        choice = dict(vision_feature_layer=-2, vision_feature_select_strategy="default")
    elif kind == "full":
        vision, text = CLIPVisionConfig(**PICTURE), transformers.MistralConfig(**LM, num_key_value_heads=2)
        choice = dict(vision_feature_layer=-2, vision_feature_select_strategy="full")
    else:  # as llava-hf/llava-interleave-qwen-0.5b-hf: no CLS token, the last layer
        vision = SiglipVisionConfig(**PICTURE, vision_use_head=False)
        text = transformers.Qwen2Config(**LM, num_key_value_heads=2)
        choice = dict(vision_feature_layer=-1, vision_feature_select_strategy="full")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, **choice)
    return transformers.LlavaForConditionalGeneration(config)


def clip_text(projected: bool = False, eos: int = 60) -> Any:
    config = CLIPTextConfig(
        **SIZES, vocab_size=61, max_position_embeddings=20, projection_dim=32, bos_token_id=1, eos_token_id=eos
    )
    return transformers.CLIPTextModelWithProjection(config) if projected else transformers.CLIPTextModel(config)


def clip_vision(projected: bool = False) -> Any:
    config = CLIPVisionConfig(**PICTURE, projection_dim=32)
    return transformers.CLIPVisionModelWithProjection(config) if projected else transformers.CLIPVisionModel(config)


def inputs(name: str, n: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """What the transformers model of this name is given."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 60, (n, length), generator=generator)
    ids[:, -1] = 60
    pixels = torch.randn(n, 3, 32, 32, generator=generator)
    if "vision" in name:
        return dict(pixel_values=pixels)
    if "llava" not in name:
        return dict(input_ids=ids)
    pictured = torch.full((n, 17 if name == "llava full" else 16), IMAGE)
    return dict(input_ids=torch.cat([torch.ones(n, 1, dtype=torch.long), pictured, ids], 1), pixel_values=pixels)


def answer(output: Any) -> torch.Tensor:
    kinds = ("logits", "text_embeds", "image_embeds", "last_hidden_state")
    return next(output[kind] for kind in kinds if kind in output)


def of_transformers(name: str, make: Callable[[], Any]) -> Family:
    towers = [tower for tower in ("vision", "text") if tower in name] or (["vision"] if "llava" in name else []) + [
        "lm"
    ]
    ends = [f"{tower}.embed" for tower in towers]
    if "llava" in name:
        ends += ["projector.hidden", "projector"]
    for tower in towers:
        reads_final = not (tower == "vision" and ("llava" in name or name == "clip vision"))
        ends += [f"{tower}.final"] if reads_final else []  # else the last hidden state is that before the norm
    ends += ["lm.logits"] if "lm" in towers else [f"{towers[0]}.out"] if "projected" in name else []
    return Family(
        make, lambda model: answer(model(**inputs(name))), tuple(f"{tower}.1" for tower in towers), tuple(ends),
        {"text": dict(ids=inputs(name).get("input_ids"))},
    )  # fmt: skip


TRANSFORMERS = {
    "llama": llama,
    "qwen2": qwen2,
    "mistral": mistral,
    "llava": llava,
    "llava full": lambda: llava("full"),
    "llava siglip qwen2": lambda: llava("siglip"),
    "clip vision": clip_vision,
    "clip vision projected": lambda: clip_vision(True),
    "clip text": clip_text,
    "clip text projected": lambda: clip_text(True),
    "siglip vision": lambda: transformers.SiglipVisionModel(SiglipVisionConfig(**PICTURE)),
}
LANGUAGE = [name for name in TRANSFORMERS if name.startswith(("ll", "qwen", "mis"))]

# ---- diffusers ----

N_TOKENS = 12


def pipeline(**unet: Any) -> StableDiffusionPipeline:
    tokenizer = AutoTokenizer.from_pretrained(models.FOLDER / "contrastive", local_files_only=True)
    tokenizer.model_max_length = N_TOKENS
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=N_TOKENS, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    layout = dict(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4,
        ),
        unet=UNet2DConditionModel(**layout | unet), tokenizer=tokenizer, text_encoder=transformers.CLIPTextModel(text),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def latents() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


TIMES = torch.tensor([900, 20])
PROMPTS = torch.randint(0, 400, (2, N_TOKENS), generator=torch.Generator().manual_seed(2))


def predict(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    return pipeline.unet(latents(), TIMES, pipeline.text_encoder(PROMPTS).last_hidden_state).sample


def text_to_image(places: tuple[str, ...], **unet: Any) -> Family:
    return Family(
        lambda: pipeline(**unet),
        predict,
        ("text.1", *places),
        ("text.embed", "text.final", "unet.embed", "unet.down.0.resample", "unet.up.0.resample", "unet.out"),
        {"unet": dict(timestep=TIMES)},
    )


FAMILIES = {
    "open_clip": contrastive(),
    "open_clip custom text": contrastive(lambda: clip(kind=open_clip.CustomTextCLIP)),
    "open_clip sequence first": contrastive(sequence_first),
    "open_clip linear projection": contrastive(linear_projection),
    "open_clip vision alone": Family(
        lambda: clip().visual, lambda model: model(pictures()), ("vision.1",), ("vision.embed", "vision.final")
    ),
    **{name: of_transformers(name, make) for name, make in TRANSFORMERS.items()},
    "stable diffusion": text_to_image(("unet.mid.0", "unet.up.1.0")),
    "stable diffusion, no middle": text_to_image(("unet.up.1.0",), mid_block_type=None),
}
