"""A folder of runs with small models, as training leaves them, for the tests of the page: made in a second, loaded and drawn like large ones."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from difflit.diffusion import Diffusion
from difflit.files import atomic_write
from difflit.glide import create_glide
from difflit.models import model_card
from difflit.text import trimmed_tokenizer

WORDS = ["a red circle", "a blue square", "a green star"]
SMALL = dict(channels=32, channel_mult=(1, 1), residual_blocks=1, attention_downsamplings=(2,), text_context=8, text_width=64, text_layers=1, text_heads=2,
             position_map=False)


def save_model(folder: Path, seed: int = 0, **other) -> Path:
    "A small GLIDE with an opinion, as a checkpoint."
    tokenizer = trimmed_tokenizer(WORDS, 8)
    torch.manual_seed(seed)
    network = create_glide("tiny", **{**SMALL, "image_size": 16, "vocabulary": tokenizer.vocabulary, **other}).eval()
    nn.init.normal_(network.out[2].weight, std=0.05)
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / "ema.safetensors")
    sampling = {"sampler": "euler", "steps": 4, "guidance": 2.0}
    size = network.config.image_size
    atomic_write(folder / "config.json", model_card(network, diffusion=Diffusion("flow", "flow"), image_size=size, upscale_factor=2, sampling=sampling))
    tokenizer.save(folder / "tokenizer.json")
    return folder


def save_run(folder: Path, seed: int = 0, steps=(10, 20), **other) -> Path:
    "A run of a small model with a checkpoint at each of these steps."
    for step in steps:
        save_model(folder / "checkpoints" / f"step-{step:08d}", seed + step, **other)
    atomic_write(folder / "status.json", json.dumps({"state": "done", "kind": "train", "preset": "shapes", "step": steps[-1], "steps": steps[-1]}))
    atomic_write(folder / "settings.yaml", f"preset: shapes\nlr: {1e-3 * (seed + 1)}\nseed: {seed}\n")
    rows = [f"{step},{2 / (1 + step / 5) + 0.1 * seed:.4f},{2.2 / (1 + step / 5) + 0.1 * seed:.4f}" for step in range(1, 21)]
    atomic_write(folder / "metrics.csv", "\n".join(["step,loss,val_loss", *rows, ""]))
    return folder


def save_enlarger(folder: Path, factor: int = 2) -> Path:
    "A small Swin2SR in transformers' format."
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

    torch.manual_seed(factor)
    config = Swin2SRConfig(image_size=64, embed_dim=8, depths=[1], num_heads=[1], window_size=8, upscale=factor, upsampler="pixelshuffle")
    Swin2SRForImageSuperResolution(config).save_pretrained(folder)
    return folder


def save_judge(folder: Path, name: str) -> dict[str, str]:
    "A small CLIP that knows nothing, as options of a studio."
    import open_clip

    torch.manual_seed(0)
    judge = {"embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
             "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}}
    (folder / f"{name}.json").write_text(json.dumps(judge))
    open_clip.add_model_config(folder / f"{name}.json")
    save_file(open_clip.create_model(name).state_dict(), folder / "judge.safetensors")
    return {"rank_model": name, "rank_weights": str(folder / "judge.safetensors")}


def save_runs(root: Path) -> Path:
    "Two runs that draw, one that enlarges."
    save_run(root / "shapes-a")
    save_run(root / "shapes-b", seed=1, steps=(20,))
    save_run(root / "upsampler", seed=2, steps=(20,), image_size=32, super_resolution=True)
    return root
