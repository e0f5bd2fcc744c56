"""What a fill costs beside its encoder: pictures per second of `fill_latents` against the encoder alone, and captions per second of `fill_text`.

Both sides work on the same JPEGs (a photograph's spectrum, 640 × 480 pixels), with the same VAE, batch size, memory format and number of threads, in one
process, in turns, in an order drawn for each round. *Encoder alone* gets its pictures decoded and in memory, and throws its results away; the fill looks keys
up, claims blocks, reads files, decodes, checks that all numbers are finite, makes them fp16 and writes them to a disk, durably. So the ratio is the share of
the encoder's rate that remains: 1 would be a fill that costs nothing. On a machine that others use the clock is a poor judge; so the ratio of the processor
times that the encoding thread needs for a picture is printed, too (with --threads 1 it does all the computing), and the share of the time in which it
computed, which others can hardly disturb: their product is the ratio that a quiet machine would show, if reading and decoding have a core. The VAE is
Stable Diffusion's with fewer channels.

    python tests/bench/fill.py [--size 256] [--width 32] [--pictures 24] [--rounds 7] [--threads 1]
    python tests/bench/fill.py --text [--rounds 7]       # a T5 encoder, captions of 3 to 40 words; encoder alone: the same batches, sorted by length
    python tests/bench/fill.py --gpu [--pictures 4000]   # Stable Diffusion's VAE in full, bf16, 512 × 512

Measured on 2 cores of an AMD EPYC, one thread for the encoder, 7 rounds (text: 5), medians with lowest and highest:

    |                                          | a second alone | fill / encoder       | encoder computed |
    |------------------------------------------|----------------|----------------------|------------------|
    | 20 pictures at 256 px (--pictures 20)    | 5.18           | 0.993 (0.967…1.013)  | 0.995            |
    | 64 at 128 px (--size 128 --pictures 64)  | 21.6           | 0.946 (0.919…1.019)  | 0.983            |
    | 960 captions (--text --captions 960)     | 147            | 1.001 (0.907…1.061)  | 0.986            |

The second row is a hard one: 64 small pictures take 3 s, of which 0.05 s are beginning and end; the machine was not quiet, and in processor time of the
encoder's thread its ratio was 1.007 (0.961…1.013). On a GPU it has not been run yet.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pictures(folder, count):
    """A folder of JPEGs with captions."""
    import numpy as np
    from PIL import Image

    (folder / "train").mkdir(parents=True)
    (folder / "validation").mkdir()
    f = np.hypot(np.fft.fftfreq(480)[:, None], np.fft.rfftfreq(640)[None]).clip(1 / 640)
    for i in range(count + 1):
        rng = np.random.default_rng(i)
        clouds = np.fft.irfft2((rng.standard_normal((3, *f.shape)) + 1j * rng.standard_normal((3, *f.shape))) / f**1.1, s=(480, 640))
        pixels = (128 + 60 * clouds / clouds.std((1, 2), keepdims=True)).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        path = folder / ("validation" if i == count else "train") / f"{i:05d}.jpg"
        Image.fromarray(pixels).save(path, quality=90)
        path.with_suffix(".txt").write_text(f"picture {i}")


def spread(values):
    """Median with lowest and highest."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}…{max(values):.3f})"


def in_turns(rounds, alone, filled, count):
    """Rates of both sides, and the ratio of each round."""
    rates, processor = {"alone": [], "fill": []}, {"alone": [], "fill": []}
    for turn in range(-1, rounds):  # one round to warm up
        for name, run in random.sample([("alone", alone), ("fill", filled)], 2):
            before = time.thread_time()
            seconds = run()
            if turn >= 0:
                rates[name].append(count / seconds)
                processor[name].append((time.thread_time() - before) / count)
    print(f"encoder alone, a second:      {spread(rates['alone'])}")
    print(f"fill, a second:               {spread(rates['fill'])}")
    print(f"fill / encoder, round by round: {spread([f / a for f, a in zip(rates['fill'], rates['alone'])])}, of medians "
          f"{statistics.median(rates['fill']) / statistics.median(rates['alone']):.3f}")
    print(f"the same in processor time of the encoder's thread: {spread([a / f for f, a in zip(processor['fill'], processor['alone'])])}")


def latents(args, folder):
    """Pictures through a VAE."""
    import numpy as np
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from difflit.augmentation import prepare
    from difflit.data import as_numbers
    from difflit.filling import fill_latents
    from difflit.folders import FolderSource
    from difflit.latent import Autoencoder

    pictures(folder / "album", args.pictures)
    source = FolderSource(folder / "album")
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    torch.manual_seed(0)
    widths = tuple(args.width * n for n in (1, 2, 4, 4))
    vae = AutoencoderKL(block_out_channels=widths, norm_num_groups=min(32, args.width // 2), layers_per_block=2, sample_size=args.size, **kinds)
    device, dtype = ("cuda", torch.bfloat16) if args.gpu else ("cpu", torch.float32)
    model = Autoencoder(vae.to(device, dtype), "vae").to(memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = args.gpu
    decoded = torch.from_numpy(np.stack([prepare(source.encoded(i), (args.size, args.size)) for i in range(len(source))]))
    decoded = decoded.pin_memory() if args.gpu else decoded
    busy = []

    def alone():
        start = time.perf_counter()
        for i in range(0, len(decoded), args.batch):
            model.encode(as_numbers(decoded[i : i + args.batch].to(device, non_blocking=True).permute(0, 3, 1, 2)))
        if args.gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def filled():
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            start = time.perf_counter()
            report = fill_latents(source, cache, model, image_size=args.size, batch_size=args.batch)
            seconds = time.perf_counter() - start
        assert report.done == len(source)
        busy.append(report.busy)
        return seconds

    in_turns(args.rounds, alone, filled, len(source))
    print(f"share of the fill in which the encoder computed: {spread(busy[1:])}")


def text(args, folder):
    """Captions through T5."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    from difflit.filling import fill_text
    from difflit.latent import TextEncoder

    words = [f"word{i}" for i in range(1000)]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *words])}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(vocab_size=1003, d_model=512, d_kv=64, d_ff=1024, num_heads=8, num_layers=6, use_cache=False)).eval()
    encoder, rng = TextEncoder(model, tokenizer, "t5"), random.Random(0)
    captions = sorted({" ".join(rng.choices(words, k=rng.randint(3, 40))) for _ in range(args.captions - 1)} | {""}, key=len)
    busy = []

    def alone():
        start = time.perf_counter()
        for i in range(0, len(captions), 16):
            encoder.encode(captions[i : i + 16])
        return time.perf_counter() - start

    def filled():
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            start = time.perf_counter()
            report = fill_text(captions, cache, encoder, batch_size=16)
            seconds = time.perf_counter() - start
        assert report.done == len(captions)
        busy.append(report.busy)
        return seconds

    in_turns(args.rounds, alone, filled, len(captions))
    print(f"share of the fill in which the encoder computed: {spread(busy[1:])}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--pictures", type=int)
    parser.add_argument("--captions", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    args = parser.parse_args()
    for name, here, there in (("size", 256, 512), ("width", 32, 128), ("batch", 8, 32), ("pictures", 24, 4000)):
        if getattr(args, name) is None:
            setattr(args, name, there if args.gpu else here)
    import torch

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        (text if args.text else latents)(args, Path(folder))


if __name__ == "__main__":
    main()
