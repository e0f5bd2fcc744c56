"""Make the tiny models that ship with the package: an autoencoder, a text encoder with its tokenizer, a scheduler and the shape of a UNet.

They are what Stable Diffusion is made of, in its own layout and a thousandth of its size, so that latent diffusion can be learned, tried and tested on
a CPU without a network. All are made from the drawn shapes alone:

    python tests/make_tiny_models.py                # writes difflit/assets/tiny and prints the held-out measures; about 4 minutes on two CPU cores
    python tests/make_tiny_models.py --out other    # somewhere else, to compare

What is trained, and on what:

- *vae*: 64 px → 16 × 16 × 4, with a small KL weight. Afterwards its latent channels are moved to mean 0 and to one common standard deviation, exactly, by
  its 1 × 1 convolutions; `scaling_factor` in its config is 1/std of latents drawn over training scenes, as Rombach et al. 2022 measured theirs;
- *tokenizer*: CLIP's vocabulary, cut down to the merges that captions of shapes use. All bytes stay, so that any text can be written in it;
- *text_encoder*: a CLIP text model of two layers, which learns to tell from its last state what a caption says (shapes, colours, size, place,
  background), so that its states carry what a UNet has to know;
- *scheduler*, *unet*: configurations only; the UNet is what one trains.

Draws are seeded; another processor or version of torch may round otherwise and give other bits of equal quality.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from difflit.data import image_tensor
from difflit.similarity import psnr
from difflit.randomness import integers, normal
from difflit.sources import BACKGROUNDS, COLOURS, POSITIONS, RELATIONS, SHAPES, Scene, ShapesSource, position_word, relation_word, size_word
from difflit.text import trimmed_tokenizer

SIZE = 64  # pixels along a side
LENGTH = 16  # tokens of a caption, with the marks of its start and end; the longest caption of shapes has 15
WIDTH = 64  # of the states of text
DATA_SEED = 0  # of the scenes; held-out ones come from the split "validation"
OUT = Path(__file__).parents[1] / "difflit" / "assets" / "tiny"


def pictures(split: str, count: int) -> Tensor:
    "The first scenes of a split, float32 [count, 3, SIZE, SIZE] in −1…1."
    source = ShapesSource(split=split, seed=DATA_SEED, image_size=SIZE)
    return torch.stack([image_tensor(source[i].image, SIZE) for i in range(count)])


def one_cycle(step: int, steps: int) -> float:
    "Factor on the learning rate: up within a tenth, down along a cosine."
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * (step - warm) / (steps - warm))))


def train(parameters, loss_of, steps: int, lr: float, what: str) -> None:
    "Minimise `loss_of(step)` by Adam; prints ten lines."
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    began = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * one_cycle(step, steps)
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % max(1, steps // 10) == 0:
            print(f"{what}: step {step + 1}/{steps}, loss {loss.item():.5f}, {time.perf_counter() - began:.0f} s", flush=True)


def new_vae() -> AutoencoderKL:
    "An untrained autoencoder: three resolutions, one residual block each, no attention."
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, block_out_channels=[16, 32, 32], layers_per_block=1,
        latent_channels=4, norm_num_groups=8, sample_size=SIZE, mid_block_add_attention=False)


def train_vae(images: Tensor, steps: int, kl_weight: float, batch: int = 32) -> AutoencoderKL:
    "Learn to copy: mean absolute and squared errors, and the KL divergence of the latents from a standard normal."
    vae = new_vae()

    def loss_of(step: int) -> Tensor:
        positions = torch.arange(step * batch, (step + 1) * batch)
        x = images[integers(0, "tiny vae scenes", positions, len(images))]
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.encode(x).latent_dist
            noise = normal(0, "tiny vae noise", positions, tuple(moments.mean.shape[1:]))
            y = vae.decode(moments.mean + moments.std * noise).sample
        error = y.float() - x
        kl = 0.5 * (moments.mean.float().square() + moments.var.float() - 1 - moments.logvar.float()).mean()
        return error.abs().mean() + 4 * error.square().mean() + kl_weight * kl

    train(list(vae.parameters()), loss_of, steps, 3e-3, "vae")
    return vae.eval()


@torch.no_grad()
def moments_of(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    "Means and standard deviations of the latents of pictures, float32 [N, 4, h, w] each."
    encoded = [vae.encode(part).latent_dist for part in images.split(64)]
    return torch.cat([e.mean for e in encoded]), torch.cat([e.std for e in encoded])


def latents_of(vae: AutoencoderKL, images: Tensor) -> Tensor:
    "Latents drawn for pictures, unscaled."
    mean, std = moments_of(vae, images)
    return mean + std * normal(0, "tiny vae measure", torch.arange(len(images)), tuple(mean.shape[1:]))


@torch.no_grad()
def level(vae: AutoencoderKL, images: Tensor) -> None:
    "Shift and scale the latent channels to mean 0 and their common standard deviation; what decodes stays the same."
    latents = latents_of(vae, images)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    scale = std.square().mean().sqrt() / std
    both = torch.cat([scale, torch.ones(4)])
    vae.quant_conv.weight.mul_(both[:, None, None, None])
    vae.quant_conv.bias.mul_(both).add_(torch.cat([-mean * scale, 2 * scale.log()]))
    vae.post_quant_conv.bias.add_(vae.post_quant_conv.weight[:, :, 0, 0] @ mean)
    vae.post_quant_conv.weight.div_(scale[None, :, None, None])


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, images: Tensor) -> Tensor:
    "PSNR of pictures decoded from drawn latents, one number each."
    latents = latents_of(vae, images)
    return psnr(torch.cat([vae.decode(part).sample for part in latents.split(64)]).clamp(-1, 1), images)


def save_vae(vae: AutoencoderKL, images: Tensor, folder: Path) -> None:
    "Level the latents, round the weights to fp16, measure the scaling factor with these weights, and write."
    level(vae, images)
    vae.half().float()
    vae.register_to_config(scaling_factor=round(1 / float(latents_of(vae, images).std()), 5))
    vae.half().save_pretrained(folder)
    vae.float()


def save_text_encoder(encoder: CLIPTextModel, folder: Path) -> None:
    "Write in fp16, tensors named as in the files that Stable Diffusion came with, which transformers of any version reads."
    encoder.half().save_pretrained(folder)
    weights = {"text_model." + name.removeprefix("text_model."): value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    "CLIP's tokenizer for captions of shapes: bytes, bytes that end a word, the merges these captions use, and the two marks."
    captions = [c for split in ("train", "validation", "test") for c in ShapesSource(split=split, seed=DATA_SEED).captions(20_000)]
    small = trimmed_tokenizer(sorted(set(captions)))
    vocabulary = {piece: number for number, piece in enumerate([*small.pieces, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[tuple(m.split(" ")) for m in small.merges], model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    # the two files of which CLIP's vocabulary has always consisted; other readers look for these
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(small.merges) + "\n", encoding="utf-8")
    return tokenizer


def token_numbers(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    "Captions as numbers, padded as Stable Diffusion pads them, int64 [N, LENGTH]."
    return tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    "An untrained CLIP text model of two layers; word and place embeddings of comparable size, so that states differ from the start."
    torch.manual_seed(1)
    model = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, hidden_act="quick_gelu", bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    for name, weight in model.named_parameters():
        if "embedding" in name:
            nn.init.normal_(weight, std=1.0 if "token" in name else 0.5)
    return model


_ANSWERS: tuple[tuple, ...] = (
    (None, *COLOURS), (None, *SHAPES), (None, *SHAPES), (None, "small", "large"), (None, *POSITIONS), (None, *RELATIONS), (None, *BACKGROUNDS))


def answers(scene: Scene | None) -> list[int]:
    "What a caption says, a number for each of seven questions; 0 is nothing."
    said: list[str | None] = [None] * 7
    if scene is not None:
        first, *rest = scene.things
        said = [first.colour, first.shape, None, size_word(first), position_word(first), None, scene.background]
        if rest:
            said[2:6] = [rest[0].shape, None, None, relation_word(first, rest[0])]
    return [options.index(word) for options, word in zip(_ANSWERS, said)]


def questions(split: str, count: int, tokenizer: CLIPTokenizer) -> tuple[Tensor, Tensor]:
    "Captions and what they say: int64 [N, LENGTH] and [N, 7]. The empty caption comes first, and now and then."
    source = ShapesSource(split=split, seed=DATA_SEED)
    samples = [source[i] for i in range(count)]
    empty = [i % 20 == 0 for i in range(count)]
    tokens = token_numbers(tokenizer, ["" if e else s.caption for e, s in zip(empty, samples)])
    return tokens, torch.tensor([answers(None if e else s.metadata["scene"]) for e, s in zip(empty, samples)])


def last_states(model: CLIPTextModel, tokens: Tensor) -> Tensor:
    "States of the end mark and of the padding behind it, averaged: what has seen the whole caption, [N, WIDTH]."
    states = model(tokens).last_hidden_state
    end = (tokens == model.config.eos_token_id).to(states)[..., None]
    return (states * end).sum(1) / end.sum(1)


def train_text_encoder(tokenizer: CLIPTokenizer, steps: int, batch: int = 128) -> tuple[CLIPTextModel, float]:
    "Learn to tell what captions say; returns the model and the share of answers right on held-out captions."
    model = new_text_encoder(tokenizer)
    heads = nn.Linear(WIDTH, sum(map(len, _ANSWERS)))
    widths = [len(options) for options in _ANSWERS]
    tokens, truth = questions("train", 16_384, tokenizer)

    def loss_of(step: int) -> Tensor:
        chosen = integers(0, "tiny text captions", torch.arange(step * batch, (step + 1) * batch), len(tokens))
        logits = heads(last_states(model, tokens[chosen])).split(widths, 1)
        return torch.stack([F.cross_entropy(part, truth[chosen, i]) for i, part in enumerate(logits)]).mean()

    train([*model.parameters(), *heads.parameters()], loss_of, steps, 2e-3, "text encoder")
    with torch.no_grad():
        tokens, truth = questions("validation", 1024, tokenizer)
        logits = heads(last_states(model, tokens)).split(widths, 1)
        right = torch.stack([part.argmax(1) for part in logits], 1) == truth
    return model.eval(), float(right.float().mean())


def scheduler() -> DDIMScheduler:
    "Stable Diffusion's schedule of noise, with v as target; DDIM's steps end at the last timestep, where sampling begins."
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False,
        timestep_spacing="trailing", steps_offset=1)  # trailing steps ignore the offset, pipelines want to see it


UNET = dict(  # heads of 64; attention only at 8 × 8, where a CPU computes it quickly
    sample_size=SIZE // 4, in_channels=4, out_channels=4, down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
    mid_block_type="UNetMidBlock2DCrossAttn", up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], block_out_channels=[64, 128], layers_per_block=1,
    cross_attention_dim=WIDTH, attention_head_dim=[1, 2], norm_num_groups=8)  # in this class, attention_head_dim is the number of heads

PARTS = {"scheduler": ("diffusers", "DDIMScheduler"), "text_encoder": ("transformers", "CLIPTextModel"), "tokenizer": ("transformers", "CLIPTokenizer"),
         "unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL")}


def write_configs(out: Path) -> None:
    "The parts without weights, and the list of all parts."
    scheduler().save_config(out / "scheduler")
    UNet2DConditionModel(**UNET).save_config(out / "unet")
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", "feature_extractor": [None, None], "image_encoder": [None, None],
             "requires_safety_checker": False, "safety_checker": [None, None], **PARTS}
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    "Make everything, measure it, write it."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to write")
    parser.add_argument("--parts", default="text,vae,configs", help="which parts to make anew")
    parser.add_argument("--vae-steps", type=int, default=1200, help="updates of the autoencoder, of 32 scenes each")
    parser.add_argument("--text-steps", type=int, default=600, help="updates of the text encoder, of 128 captions each")
    parser.add_argument("--kl", type=float, default=1e-3, help="weight of the KL divergence")
    asked = parser.parse_args()
    parts = asked.parts.split(",")
    asked.out.mkdir(parents=True, exist_ok=True)
    if "configs" in parts:
        write_configs(asked.out)
    if "text" in parts:
        encoder, right = train_text_encoder(make_tokenizer(asked.out / "tokenizer"), asked.text_steps)
        save_text_encoder(encoder, asked.out / "text_encoder")
        print(f"text encoder: {100 * right:.2f} % of answers right on held-out captions")
    if "vae" in parts:
        images = pictures("train", 8192)
        vae = train_vae(images, asked.vae_steps, asked.kl)
        save_vae(vae, images[:2048], asked.out / "vae")
        decibels = reconstruction(vae, pictures("validation", 512))
        print(f"vae: PSNR {float(decibels.mean()):.2f} dB on held-out scenes (worst {float(decibels.min()):.2f}), scaling factor {vae.config.scaling_factor}")
    for file in asked.out.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes files that nobody else may read
    print(f"{asked.out.name}: {sum(f.stat().st_size for f in asked.out.rglob('*') if f.is_file()):,} bytes")


if __name__ == "__main__":
    main()
