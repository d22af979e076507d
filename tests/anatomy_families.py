"""The models that the contract of tests/test_anatomy.py holds for: a new architecture is a new entry in `FAMILIES`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import open_clip
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
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


def parts_of(model: Any) -> list[torch.nn.Module]:
    """The model, or a pipeline's models."""
    parts = [model] if isinstance(model, torch.nn.Module) else model.components.values()
    return [part for part in parts if isinstance(part, torch.nn.Module)]


def strengthen(model: Any) -> Any:
    """At random initialisation attention is nearly uniform and adds little: a wrong pattern would hardly show."""
    parts = [part for part in parts_of(model) if not isinstance(part, AutoencoderKL)]
    with torch.no_grad():
        for name, parameter in (pair for part in parts for pair in part.named_parameters()):
            if parameter.ndim == 2 and "embed" not in name and "time" not in name:
                peaked = name.endswith(
                    ("q_proj.weight", "k_proj.weight", "in_proj_weight", "qkv.weight", "to_q.weight", "to_k.weight")
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


def clip_model() -> Any:
    """Two towers whose projections stand beside them."""
    text = dict(SIZES, vocab_size=61, max_position_embeddings=20, bos_token_id=1, eos_token_id=60)
    config = transformers.CLIPConfig(text_config=text, vision_config=PICTURE, projection_dim=32)
    return transformers.CLIPModel(config)


def siglip() -> Any:
    text = dict(SIZES, vocab_size=61, max_position_embeddings=12)
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=PICTURE))


def onevision() -> Any:
    """As llava-hf/llava-onevision-qwen2-0.5b-ov-hf: the whole picture and its tiles are rows of the vision tower."""
    config = transformers.LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**PICTURE, vision_use_head=False),
        text_config=transformers.Qwen2Config(**LM, num_key_value_heads=2), image_token_id=IMAGE, video_token_id=2,
        image_grid_pinpoints=[[32, 32], [32, 64], [64, 32]], vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def qwen2_vl() -> Any:
    """Queries, keys and values of the vision tower in one map, pictures in one sequence, positions of three parts."""
    vision = dict(embed_dim=48, hidden_size=48, depth=3, num_heads=6, mlp_ratio=2, patch_size=8)
    rope = dict(rope_type="default", mrope_section=[2, 1, 1], rope_theta=10000.0)
    text = dict(LM, num_key_value_heads=2, rope_parameters=rope)
    ids = dict(image_token_id=IMAGE, video_token_id=2, vision_start_token_id=58, vision_end_token_id=59)
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    )


def phi() -> Any:
    """A stranger, which a layout alone makes known: attention and MLP side by side, unembedding with a bias."""
    anatomy.register(transformers.PhiModel, anatomy.Layout(
        attention="self_attn", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.dense",
        attn="self_attn.dense", mlp="mlp", up="mlp.fc1", down="mlp.fc2", tower="lm", layers="layers",
        norm="final_layernorm", out="lm_head", causal=True, pool="last",
    ))  # fmt: skip
    return transformers.PhiForCausalLM(transformers.PhiConfig(**LM))


def inputs(name: str, n: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """What the transformers model of this name is given."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 60, (n, length), generator=generator)
    ids[:, -1] = 60
    pixels = torch.randn(n, 3, 32, 32, generator=generator)
    if name in ("clip", "siglip"):
        return dict(input_ids=ids, pixel_values=pixels)
    if "vision" in name.split():
        return dict(pixel_values=pixels)
    if name not in PICTURED:
        return dict(input_ids=ids)
    given = dict(pixel_values=pixels)
    if name == "llava onevision":  # pictures twice as wide as high: the whole, and two tiles
        given = dict(pixel_values=torch.randn(n, 3, 3, 32, 32, generator=generator))
        given["image_sizes"] = torch.tensor([[30, 60]] * n)
    elif name == "qwen2-vl":  # of 4 x 6 patches, four of which make a token
        grid = torch.tensor([[1, 4, 6]] * n)
        given = dict(pixel_values=torch.randn(24 * n, 3 * 2 * 8 * 8, generator=generator), image_grid_thw=grid)
    pictured = torch.full((n, PICTURED[name]), IMAGE)
    given["input_ids"] = torch.cat([torch.ones(n, 1, dtype=torch.long), pictured, ids], 1)
    if name == "qwen2-vl":
        given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).int()
    return given


# What stands for a picture in the prompt; of LLaVA-OneVision's 16 patches, and 4 rows of 8 with a token behind each.
PICTURED = {
    "llava": 16, "llava full": 17, "llava siglip qwen2": 16, "llava onevision": 16 + 4 * (8 + 1), "qwen2-vl": 6
}  # fmt: skip


def embeddings(output: Any) -> torch.Tensor:
    return torch.cat([output.image_embeds, output.text_embeds], 1)


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

SEEN = ("vision.embed", "projector.hidden", "projector", "lm.embed", "lm.final", "lm.logits")
BOTH = tuple(f"{tower}.{end}" for tower in ("vision", "text") for end in ("embed", "final", "out"))


def further(
    name: str, make: Callable[[], Any], ends: tuple[str, ...], read: Callable = answer, **given: dict
) -> Family:
    towers = dict.fromkeys(f"{end.split('.')[0]}.1" for end in ends if not end.startswith("projector"))
    return Family(make, lambda model: read(model(**inputs(name))), tuple(towers), ends, given)


def positions() -> torch.Tensor:
    given = {key: x for key, x in inputs("qwen2-vl").items() if key != "pixel_values"}
    return qwen2_vl().model.get_rope_index(**given)[0]


FURTHER = {
    "clip": further("clip", clip_model, BOTH, embeddings, text=dict(ids=inputs("clip")["input_ids"])),
    "siglip": further("siglip", siglip, BOTH, embeddings),
    "llava onevision": further("llava onevision", onevision, SEEN),
    "qwen2-vl": further(
        "qwen2-vl", qwen2_vl, ("vision.final", *SEEN), lm=dict(position_ids=positions()),
        vision=dict(image_grid_thw=inputs("qwen2-vl")["image_grid_thw"]),
    ),
    "phi, from outside": further("phi", phi, SEEN[3:]),
}  # fmt: skip

# ---- diffusers ----

N_TOKENS = 12
TIMES = torch.tensor([900, 20])
PROMPTS = torch.randint(0, 400, (2, N_TOKENS), generator=torch.Generator().manual_seed(2))
ENDED = torch.cat([PROMPTS[:, :-1], torch.full((2, 1), 454)], 1)  # with the end token, at which SDXL reads an embedding


def parts() -> dict[str, Any]:
    """What the pipelines have in common."""
    tokenizer = AutoTokenizer.from_pretrained(models.FOLDER / "contrastive", local_files_only=True)
    tokenizer.model_max_length = N_TOKENS
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    return dict(vae=vae, tokenizer=tokenizer, scheduler=DDIMScheduler(steps_offset=1, clip_sample=False))


def prompt_config(tokenizer: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=N_TOKENS, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        projection_dim=20,
    )  # fmt: skip


def unet(**options: Any) -> UNet2DConditionModel:
    plain = dict(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    return UNet2DConditionModel(**plain | options)


def pipeline(**options: Any) -> StableDiffusionPipeline:
    have = parts()
    text = transformers.CLIPTextModel(prompt_config(have["tokenizer"]))
    unguarded = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return StableDiffusionPipeline(**have, **unguarded, unet=unet(**options), text_encoder=text)


def sdxl() -> StableDiffusionXLPipeline:
    """Two text encoders, the second one's embedding beside the time step, and two transformer layers in a place."""
    have = parts()
    text = prompt_config(have["tokenizer"])
    return StableDiffusionXLPipeline(
        **have, tokenizer_2=have["tokenizer"], text_encoder=transformers.CLIPTextModel(text),
        text_encoder_2=transformers.CLIPTextModelWithProjection(text), unet=unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), layers_per_block=1, use_linear_projection=True,
            up_block_types=("UpBlock2D",) * 2, transformer_layers_per_block=(1, 2), cross_attention_dim=48,
            addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=20 + 24,
        ),
    )  # fmt: skip


def predict_xl(pipeline: StableDiffusionXLPipeline) -> torch.Tensor:
    one = pipeline.text_encoder(ENDED, output_hidden_states=True)
    two = pipeline.text_encoder_2(ENDED, output_hidden_states=True)
    told = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)
    return pipeline.unet(
        latents(), TIMES, told, added_cond_kwargs=dict(text_embeds=two.text_embeds, time_ids=sizes)
    ).sample  # fmt: skip


def pixart() -> PixArtSigmaPipeline:
    """A transformer for a denoiser, with gates on what its layers add, and a text encoder that is not known."""
    text = transformers.T5Config(
        vocab_size=400, d_model=24, d_kv=6, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return PixArtSigmaPipeline(**parts(), text_encoder=transformers.T5EncoderModel(text), transformer=dit())


def dit() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=6, num_layers=3, sample_size=8, caption_channels=24,
        cross_attention_dim=24, use_additional_conditions=False,
    )  # fmt: skip


def predict_dit(pipeline: PixArtSigmaPipeline) -> torch.Tensor:
    told = pipeline.text_encoder(PROMPTS).last_hidden_state
    return pipeline.transformer(latents(), encoder_hidden_states=told, timestep=TIMES).sample


def latents() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


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
    **FURTHER,
    "stable diffusion": text_to_image(("unet.mid.0", "unet.up.1.0")),
    "stable diffusion, no middle": text_to_image(("unet.up.1.0",), mid_block_type=None),
    "sdxl": Family(
        sdxl,
        predict_xl,
        ("text.1", "text_2.1", "unet.down.1.0", "unet.mid.0"),
        ("text.embed", "text_2.embed", "text_2.final", "text_2.out", "unet.embed", "unet.out"),
        {"text_2": dict(ids=ENDED)},
    ),
    "pixart": Family(pixart, predict_dit, ("dit.1",), ("dit.embed", "dit.out")),
}
