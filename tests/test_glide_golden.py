"""All four official GLIDE variants return what openai/glide-text2im returns, for weights and inputs given by formula.

The numbers in `data/glide_golden.json` come from the original code in fp32. Each model has 385 to 398 million weights: one is held at a time.
"""

import gc
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from difflit.glide import Glide, create_glide

GOLDEN = json.loads((Path(__file__).parent / "data" / "glide_golden.json").read_text())
TOKENS = [272, 3056, 12036, 286, 257, 1162, 12397]  # "an oil painting of a corgi" in GLIDE's GPT-2 BPE
PADDING, CONTEXT = 50256, 128


def wave(count: int, phase: int) -> Tensor:
    "The formula of all weights and inputs: sin(0.37·n + phase), in float64."
    return torch.sin(0.37 * torch.arange(count, dtype=torch.float64) + phase)


def fill(model: Glide) -> None:
    "Weights by formula: the i-th state-dict entry, in the order of sorted names, is a wave with phase i, scaled by its kind."
    for phase, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        values = wave(tensor.numel(), phase)
        if "embedding" in name:
            values *= 0.02
        elif tensor.dim() >= 2:
            values /= math.sqrt(tensor[0].numel())
        else:
            values = 1 + 0.1 * values if name.endswith("weight") else 0.05 * values
        tensor.copy_(values.view(tensor.shape))


def golden_output(variant: str) -> Tensor:
    "The model's answer to the golden inputs, [6, 64, 64]."
    with torch.device("meta"):
        model = create_glide(variant)
    model = model.to_empty(device="cpu").eval()
    fill(model)
    mask = torch.arange(CONTEXT)[None] < len(TOKENS)
    tokens = torch.tensor([TOKENS + [PADDING] * (CONTEXT - len(TOKENS))])
    extra = {}
    if model.config.super_resolution:
        extra["low_res"] = wave(3 * 16 * 16, 2).view(1, 3, 16, 16).float()
    if model.config.inpaint:
        extra["inpaint_image"] = wave(3 * 64 * 64, 3).view(1, 3, 64, 64).float()
        extra["inpaint_mask"] = (torch.arange(64 * 64) % 3 > 0).float().view(1, 1, 64, 64)
    x = wave(3 * 64 * 64, 1).view(1, 3, 64, 64).float()
    with torch.no_grad():
        return model(x, torch.tensor([500]), tokens, mask, **extra)[0]


@pytest.mark.parametrize("variant", list(GOLDEN))
def test_glide_golden(variant: str) -> None:
    "First pixels, mean, deviation and norm agree with the original to 1e-4 of their own size."
    golden, out = GOLDEN[variant], golden_output(variant)
    gc.collect()
    found = {
        "first": out.flatten()[:12],
        "channel_mean": out.mean((1, 2)),
        "channel_std": out.flatten(1).std(1),
        "norm": out.norm(),
    }
    for key, value in found.items():
        expected = torch.tensor(golden[key])
        error = ((value - expected).abs().max() / expected.abs().max()).item()
        assert error < 1e-4, f"{variant}: {key} differs by {error:.1e} of its size"


@pytest.mark.parametrize("variant", list(GOLDEN))
def test_parameter_counts(variant: str) -> None:
    "The number of parameters is exactly OpenAI's, and so is the number of tensors."
    with torch.device("meta"):
        model = create_glide(variant)
    assert sum(p.numel() for p in model.parameters()) == GOLDEN[variant]["parameters"]
    assert len(model.state_dict()) == (797 if variant.startswith("upsample") else 783)
