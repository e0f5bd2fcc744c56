"""What a step of sampling costs besides the network: difflit's loop against the loop of diffusers' pipeline, with the same tiny UNet.

*Theirs* is `StableDiffusionPipeline.__call__` with prompt embeddings given and `output_type="latent"`, so no text is read and nothing decoded; *ours* is
`difflit.sampling.sample`. Both have the same UNet object, the same batch, guidance 7.5 in one two-branch batch, and take turns. The time inside the UNet is
measured in both and taken away; what is left, divided by the number of steps, is the overhead. `--sampler` compares the same method in both.

    OMP_NUM_THREADS=1 python tests/bench/sampling.py [--rounds 7] [--steps 50] [--batch-size 1] [--json FILE]
    python tests/bench/sampling.py --gpu     # besides: images/s of GLIDE's base and upsampler, eager, compiled, with a CUDA graph
"""

import argparse
import json
import statistics
import time
import warnings

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from diffusers import StableDiffusionPipeline, UniPCMultistepScheduler

from difflit.diffusion import Diffusion
from difflit.latent import create_latent, unet_config
from difflit.sampling import sample

SMALL = {  # SD1.5's shape, small enough that a step is a few milliseconds
    "sample_size": 8, "block_out_channels": [32, 32], "layers_per_block": 1, "attention_head_dim": 1, "cross_attention_dim": 64,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
METHODS = {
    "plms": lambda: PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=True),  # the pipeline's default, with an evaluation more
    "ddim": lambda: DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=True),
    "euler": lambda: EulerDiscreteScheduler(**SCHEDULE),
    "dpmpp_2m": lambda: DPMSolverMultistepScheduler(**SCHEDULE, final_sigmas_type="zero"),
    "unipc": lambda: UniPCMultistepScheduler(**SCHEDULE, final_sigmas_type="zero"),
}


class Clock:
    "Time spent inside a module's forward, which it wraps."

    def __init__(self, module):
        self.seconds, self.calls, self.forward = 0.0, 0, module.forward
        module.forward = self

    def __call__(self, *args, **keywords):
        begun = time.perf_counter()
        result = self.forward(*args, **keywords)
        self.seconds += time.perf_counter() - begun
        self.calls += 1
        return result

    def reset(self):
        self.seconds, self.calls = 0.0, 0


def overhead(run, clock, steps):
    "Seconds per step outside the network."
    clock.reset()
    start = time.perf_counter()
    run()
    total = time.perf_counter() - start
    assert clock.calls in (steps, steps + 1), clock.calls
    return (total - clock.seconds) / steps, clock.seconds / steps


def compare(name, network, clock, rounds, steps, batch):
    "Overheads in turns, and by how much the results differ."
    width = network.config.encoders["clip-l"]["width"]
    states, empty = torch.randn(batch, 77, width, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 77, width)
    vae = AutoencoderKL(block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4)
    pipeline = StableDiffusionPipeline(vae, None, None, network.unet, METHODS[name](), None, None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    diffusion = Diffusion("scaled_linear")
    mask = torch.ones(1, 77, dtype=torch.bool)

    def theirs():
        return pipeline(prompt_embeds=states, negative_prompt_embeds=empty.expand(batch, -1, -1), num_inference_steps=steps, guidance_scale=7.5,
                        output_type="latent", generator=torch.Generator().manual_seed(0), height=16, width=16).images

    def ours():
        text, none = ({"text": {"clip-l": {"states": s, "mask": mask.expand(len(s), -1)}}} for s in (states, empty))
        return sample(network, diffusion, text, unconditional=none, seeds=range(batch), shape=(4, 8, 8), guidance=7.5, sampler=name, steps=steps)

    for run in (ours, theirs):
        run()
    rows = []
    for _ in range(rounds):
        mine, inside = overhead(ours, clock, steps)
        other, _ = overhead(theirs, clock, steps)
        rows.append((mine, other, inside))
    ratios = sorted(a / b for a, b, _ in rows)
    mine, other, inside = (1e3 * statistics.median(column) for column in zip(*rows))
    print(f"{name:9} ours {mine:.3f} ms, diffusers {other:.3f} ms per step besides {inside:.2f} ms in the network; "
          f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f}…{ratios[-1]:.2f})")
    return {"ours_ms": mine, "diffusers_ms": other, "network_ms": inside, "ratio": statistics.median(ratios), "spread": [ratios[0], ratios[-1]]}


def on_gpu(seconds=8.0):
    "Images per second of GLIDE's two stages with random weights, bf16."
    from difflit.glide import create_glide
    from difflit.weights import glide_diffusion

    torch.backends.cuda.matmul.allow_tf32 = True
    for stage, batch, settings in (("base", 64, dict(sampler="ddpm", steps=100, spacing="uniform", guidance=3.0)),
                                   ("upsample", 16, dict(sampler="ddim", spacing="fast27", guidance=1.0, temperature=0.997))):
        model = create_glide(stage).cuda().eval().to(memory_format=torch.channels_last)
        diffusion, size = Diffusion(**glide_diffusion(model.config)), model.config.image_size
        tokens = torch.zeros(batch, model.config.text_context, dtype=torch.long, device="cuda")
        words = {"tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)}
        shown = {"low_res": torch.zeros(batch, 3, 64, 64, device="cuda")} if model.config.super_resolution else {}
        for label, compiled in (("eager", None), ("compile", "default"), ("CUDA graph", "reduce-overhead")):
            network = model if compiled is None else torch.compile(model, mode=compiled)
            run = lambda network=network, words=words, shown=shown, settings=settings, batch=batch, size=size, diffusion=diffusion: sample(  # noqa: E731
                network, diffusion, {**words, **shown}, unconditional={k: v[:1] for k, v in words.items()}, seeds=range(batch), shape=(3, size, size),
                autocast=torch.bfloat16, device="cuda", **settings)
            run()
            torch.cuda.synchronize()
            start, made = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                run()
                torch.cuda.synchronize()
                made += batch
            print(f"GLIDE {stage}, {label}: {made / (time.perf_counter() - start):.1f} images/s at batch {batch}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--sampler", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--json")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    network = create_latent({**unet_config("sd15"), **SMALL}, {"clip-l": {"length": 77, "width": 64, "masked": False}}).eval()
    clock = Clock(network.unet)
    found = {name: compare(name, network, clock, asked.rounds, asked.steps, asked.batch_size) for name in asked.sampler}
    if asked.gpu:
        on_gpu()
    if asked.json:
        with open(asked.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
