"""A stand-in for a VAE, light enough for a child process to import at once."""

import time

import torch
from torch import nn

from difflit.caching import Recipe


class Means(nn.Module):
    """Eight pixels square become one: their mean, and the mean of their squares. Quick, and every number can be checked."""

    def __init__(self, name="means", digest="a" * 64, seconds=0.0):
        super().__init__()
        self.name, self.digest, self.seconds = name, digest, seconds
        self.batches: list[int] = []
        self.weight = nn.Parameter(torch.ones(()), requires_grad=False)

    def recipe(self, image_size, dtype="fp16", mean_only=False, **settings):
        shape = (3 if mean_only else 6, image_size[1] // 8, image_size[0] // 8)
        return Recipe("latents", self.name, self.digest, shape, dtype, settings={"image_size": list(image_size), "moments": not mean_only, **settings})

    def encode(self, images):
        self.batches.append(len(images))
        time.sleep(self.seconds)
        pooled = [nn.functional.avg_pool2d(x * self.weight, 8) for x in (images, images**2)]
        return torch.cat(pooled, 1).float()
