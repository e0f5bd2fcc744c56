"""Small twins of the hub's models, with random weights, in the hub's own formats: made in seconds, loaded like the large ones."""

import contextlib
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network is a defect
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

CAPTIONS = ["", "a red circle on a blue background", "a small green square left of a yellow triangle", "two white stars", "a photograph of a café at night"]
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "clip_sample": False,
            "set_alpha_to_one": False, "steps_offset": 1}


@contextlib.contextmanager
def seeded(seed: int):
    "Random weights that leave no trace in the global state."
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield


def tiny_vae(seed: int = 0, latent_channels: int = 4, scaling_factor: float = 0.18215, shift_factor: float | None = None, factor: int = 8, width: int = 16):
    "AutoencoderKL that shrinks images by `factor`; encodes any random image to moments of a sensible size."
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    levels = factor.bit_length()
    with seeded(seed):
        return AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=latent_channels, block_out_channels=(width,) * levels, layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, sample_size=32 * factor // 8 * 2,
            scaling_factor=scaling_factor, shift_factor=shift_factor,
        ).eval()


def tiny_unet(cross: int = 32, seed: int = 1, channels: int = 4, sample_size: int = 8, **overrides: Any):
    "UNet2DConditionModel of two levels, 0.3 million parameters; the last layer is not zero, so that its answers depend on everything."
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with seeded(seed):
        return UNet2DConditionModel(**{
            "sample_size": sample_size, "in_channels": channels, "out_channels": channels, "block_out_channels": (32, 64), "layers_per_block": 1,
            "norm_num_groups": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": cross, "attention_head_dim": 4, **overrides,
        }).eval()


def clip_tokenizer(captions: Iterable[str] = CAPTIONS, length: int = 77):
    "A CLIPTokenizer whose vocabulary is CLIP's, cut down to what these captions need (any other text is still spelt out)."
    from transformers import CLIPTokenizer

    from difflit.text import trimmed_tokenizer

    pieces = trimmed_tokenizer([*captions, "a picture"])
    vocabulary = {piece: number for number, piece in enumerate([*pieces.pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(merge.split(" ")) for merge in pieces.merges]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def tiny_clip(width: int = 32, seed: int = 2, captions: Iterable[str] = CAPTIONS, projection: int | None = None, layers: int = 2):
    "CLIPTextModel (with `projection`: CLIPTextModelWithProjection) and its tokenizer."
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer(captions)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=projection or width, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with seeded(seed):
        model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
        for parameter in model.parameters():  # its own initialisation is so small that all texts look alike
            parameter.data.mul_(1 if parameter.ndim < 2 else 4)
    return model, tokenizer


def t5_tokenizer(captions: Iterable[str] = CAPTIONS):
    "A T5 tokenizer: Unigram over these captions, `</s>` at the end, no beginning."
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import T5TokenizerFast

    raw = Tokenizer(models.Unigram())
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    letters = [chr(c) for c in range(97, 123)]
    raw.train_from_iterator([*captions, *letters], trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", initial_alphabet=letters, show_progress=False))
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=raw, extra_ids=0, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=512)


def tiny_t5(width: int = 48, seed: int = 3, captions: Iterable[str] = CAPTIONS):
    "T5EncoderModel (gated, as v1.1 and flan are) and its tokenizer."
    from transformers import T5Config, T5EncoderModel

    tokenizer = t5_tokenizer(captions)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_ff=2 * width, d_kv=8, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
                      is_encoder_decoder=False, use_cache=False, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1)
    with seeded(seed):
        return T5EncoderModel(config).eval(), tokenizer


def save_vae(folder: str | Path, vae=None) -> Path:
    "A VAE alone, as `stabilityai/sd-vae-ft-mse` is."
    (vae or tiny_vae()).save_pretrained(folder)
    return Path(folder)


def save_text(folder: str | Path, model, tokenizer) -> Path:
    "A text encoder with its tokenizer beside it, as `openai/clip-vit-large-patch14` and `google/t5-v1_1-xxl` are."
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def save_clip(folder: str | Path, **options: Any) -> Path:
    "A CLIP text encoder alone."
    return save_text(folder, *tiny_clip(**options))


def save_t5(folder: str | Path, **options: Any) -> Path:
    "A T5 encoder alone."
    return save_text(folder, *tiny_t5(**options))


def save_sd(folder: str | Path, *, vae=None, unet=None, text=None, scheduler: dict[str, Any] | None = None, captions: Iterable[str] = CAPTIONS) -> Path:
    "A complete StableDiffusionPipeline folder; `text` is a pair of model and tokenizer, `scheduler` changes to PNDM's settings."
    folder = Path(folder)
    text_model, tokenizer = text or tiny_clip(captions=captions)
    (vae or tiny_vae()).save_pretrained(folder / "vae")
    (unet or tiny_unet(text_model.config.hidden_size)).save_pretrained(folder / "unet")
    text_model.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "scheduler").mkdir(exist_ok=True)
    config = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "skip_prk_steps": True, "trained_betas": None, **SD_BETAS, **(scheduler or {})}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=2))
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0", "scheduler": ["diffusers", config["_class_name"]],
             "text_encoder": ["transformers", type(text_model).__name__], "tokenizer": ["transformers", "CLIPTokenizer"],
             "unet": ["diffusers", "UNet2DConditionModel"],
             "vae": ["diffusers", "AutoencoderKL"], "safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder
