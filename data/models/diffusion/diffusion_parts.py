"""The parts of the text-to-image model before training: autoencoder, U-Net, scheduler, and the frozen text tower."""

import json
from pathlib import Path

import torch
import training
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

MODELS = Path(__file__).parents[1]
SEED = 0
SIZES = ("medium", "large")  # a small object is ten pixels wide, and three latents: its style is lost in them


def build_autoencoder() -> AutoencoderKL:
    """64 x 64 pixels to 16 x 16 latents of 4 channels."""
    torch.manual_seed(SEED)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=64,
        mid_block_add_attention=False,
    )  # fmt: skip


def build_unet() -> UNet2DConditionModel:
    """Cross-attention to the caption's tokens at 16 x 16 and at 8 x 8."""
    torch.manual_seed(SEED)
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 128), layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=144, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    """Velocity is predicted, and the last step is pure noise: else the model learns to read a ground's brightness off
    what noise leaves of it, and cannot choose it (Lin et al. 2024)."""
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
        steps_offset=1,
    )  # fmt: skip


def tower(name: str) -> Path:
    """The weights of the contrastive model in the folder `name`."""
    return MODELS / name / "open_clip_model.safetensors"


def build_text(name: str) -> tuple[CLIPTextModel, PreTrainedTokenizerFast]:
    """The text tower of the contrastive model in the folder `name`, under transformers' names; what it gives is its
    states after the last norm."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODELS / name)
    known = json.loads((MODELS / name / "open_clip_config.json").read_text())["model_cfg"]
    config = known["text_cfg"]
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=config["vocab_size"], hidden_size=config["width"], num_hidden_layers=config["layers"],
        num_attention_heads=config["heads"], intermediate_size=int(config["width"] * config["mlp_ratio"]),
        max_position_embeddings=config["context_length"], hidden_act="gelu", projection_dim=known["embed_dim"],
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip
    text.load_state_dict(text_weights(load_file(tower(name))))
    return text.eval().requires_grad_(False), tokenizer


def text_weights(clip: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of open_clip's text tower under the names of transformers' CLIPTextModel."""
    outside = {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias",
    }  # fmt: skip
    return training.from_open_clip(clip, "transformer.resblocks.", outside)
