"""How fast batches come: difflit against its peers, on the same images and the same task, and against decoding alone.

Four tars of 1000 samples each (a JPEG of about 400 pixels and 47 kB, a caption, a LAION-like json) are made of procedural pictures whose spectrum is a
photograph's. The task: a random square cut (side 0.7…1 of the short side) at 64×64, as uint8 batches of 64 with their captions. Every contender runs in a
process of its own, held to the first 1 or 2 cores; they take turns, in an order that changes every round, so that a busy machine slows all alike. All
shuffle, and prepare batches in the background, as training needs it: with as many workers as there are cores, which are threads in difflit and processes
in its peers. (`--inline` lets all of them work in line, without workers, on one core.) Peers marked "same decoder" call difflit's own `decode_cut`, so what
is compared is the loading around it. *Decoding alone* is a loop over files in memory, by as many threads as cores, at the same scale, doing nothing else:
the most that anything could reach with that decoder. Prints images per second and the ratio of difflit to each, as medians with lowest and highest.
The processor time per image, of all a contender's threads and processes, is printed too: it hardly depends on what else the machine does.

    python tests/bench/loading.py [--cores 1 2] [--pairs 9] [--peers FOLDER] [--only NAMES]
    python tests/bench/loading.py --resume          # the first batch after a resume, at position 0, a million and three thousand million
    python tests/bench/loading.py --access          # samples per second: indexing, reading in order and at random
    python tests/bench/loading.py --repacked        # the same tars and repacked ones, by as many threads as there are cores
    python tests/bench/loading.py --decoders        # images per core and second of each decoder, with the resizing, and its distance from Lanczos

The peers are no dependencies of difflit. webdataset is there anyway; the other two are installed beside the environment, without disturbing it:

    pip install --no-deps --target FOLDER litdata mosaicml-streaming boto3 botocore s3transfer jmespath tifffile obstore \\
        Brotli python-snappy cramjam zstd catalogue

Measured on 2 cores of an AMD EPYC with the versions in constraints.txt, litdata 0.2.76 and mosaicml-streaming 0.13.0, medians (lowest…highest) of 9 rounds
of 3000 images; difflit's rate divided by each:

    |                                  | 1 core            | 2 cores           |
    |----------------------------------|-------------------|-------------------|
    | difflit, images/s                | 2238 (2057…2303)  | 4333 (3942…4509)  |
    | webdataset + PIL                 | 3.04 (2.83…3.22)  | 2.81 (2.58…2.95)  |
    | webdataset, same decoder         | 1.36 (1.26…1.88)  | 1.25 (1.15…1.47)  |
    | litdata, same decoder            | 1.09 (1.05…1.32)  | 1.26 (1.04…1.46)  |
    | mosaicml-streaming, same decoder | 1.48 (1.43…1.78)  | 1.54 (1.31…1.61)  |
    | decoding alone                   | 0.85 (0.84…1.03)  | 0.84 (0.76…0.89)  |

On one core decoding alone is 1.26 times as fast as litdata: a loader that is 1.2 times as fast would have to reach 95 % of it. First batch after a resume at
0, 10⁶ and 3·10⁹: 25, 23 and 28 ms over 3,770 samples; 54, 55 and 55 ms over 5·10⁹ (virtual) samples. Repacked at twice the training size the tars have
0.21 of the bytes, and load 2.82 (1.82…3.23) times as fast on both cores.
"""

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
SHARDS, SAMPLES, SIZE, BATCH, SHARE = 4, 1000, 64, 64, 0.7
CONTENDERS = {
    "difflit": "difflit",
    "webdataset + PIL": "webdataset-pil",
    "webdataset, same decoder": "webdataset",
    "litdata, same decoder": "litdata",
    "mosaicml-streaming, same decoder": "mosaicml",
    "decoding alone": "decode",
}


# ---- the data


def canvas(seed, side=1100):
    """A large picture with a photograph's spectrum: textured patches behind one another, and grain."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFilter

    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]).clip(1 / side)

    def clouds(slope):
        noise = np.fft.irfft2((rng.standard_normal(f.shape) + 1j * rng.standard_normal(f.shape)) / f**slope, s=(side, side))
        return ((noise - noise.mean()) / noise.std())[..., None].astype(np.float32)

    def layer():
        return rng.uniform(30, 225, 3) + clouds(rng.uniform(1.0, 1.5)) * rng.uniform(12, 38)

    pixels = layer() + np.concatenate([clouds(1.6) * 6 for _ in range(3)], 2)
    for _ in range(14):
        mask, n = Image.new("L", (side, side)), int(rng.integers(3, 12))
        angle, radius = np.sort(rng.uniform(0, 6.283, n)), rng.uniform(60, 230) * rng.uniform(0.5, 1.3, n)
        x, y = rng.uniform(0, side) + radius * np.cos(angle), rng.uniform(0, side) + radius * np.sin(angle)
        ImageDraw.Draw(mask).polygon(list(zip(x, y)), fill=255)
        cover = np.asarray(mask.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5))), np.float32)[..., None] / 255
        pixels = pixels + cover * (layer() - pixels)
    return (pixels + rng.standard_normal((side, side, 1)) * rng.uniform(1, 4)).clip(0, 255).astype(np.uint8)


def photographs(shard):
    """The JPEGs of one tar: windows of canvases, turned and coloured differently."""
    import numpy as np
    from PIL import Image

    rng, sheets = np.random.default_rng(1000 + shard), [canvas(8 * shard + i) for i in range(8)]
    for i in range(SAMPLES):
        long = int(rng.integers(360, 441))
        width, height = long, int(long * rng.uniform(0.66, 1))
        left, top = rng.integers(0, 1100 - width), rng.integers(0, 1100 - height)
        pixels = sheets[i % len(sheets)][top : top + height, left : left + width, rng.permutation(3)]
        if rng.random() < 0.4:
            pixels = pixels.transpose(1, 0, 2)
        tone = (255 * (np.arange(256) / 255) ** rng.uniform(0.7, 1.4)).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(tone[pixels])).save(buffer, "JPEG", quality=int(rng.integers(87, 96)))
        yield buffer.getvalue(), pixels.shape[1], pixels.shape[0], rng


def write_tar(folder, shard):
    """One tar as img2dataset writes it."""
    name, words = folder / f"{shard:05d}.tar", "old red house by the sea with a boat and two people in the evening sun".split()
    with tarfile.open(name.with_suffix(".part"), "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (content, width, height, rng) in enumerate(photographs(shard)):
            key, caption = f"{shard:05d}{i:04d}", " ".join(words[j] for j in rng.integers(0, len(words), rng.integers(3, 14)))
            record = {"caption": caption, "url": f"https://example.org/pictures/{key}.jpg", "key": key, "status": "success", "error_message": None,
                      "width": width, "height": height, "original_width": width, "original_height": height, "exif": "{}",
                      "similarity": round(float(rng.uniform(0.2, 0.4)), 6), "punsafe": round(float(rng.uniform(0, 0.3)), 6),
                      "pwatermark": round(float(rng.uniform(0, 1)), 6), "aesthetic": round(float(rng.uniform(3, 7)), 6)}  # fmt: skip
            for ending, member in (("jpg", content), ("txt", caption.encode()), ("json", json.dumps(record).encode())):
                entry = tarfile.TarInfo(f"{key}.{ending}")
                entry.size = len(member)
                tar.addfile(entry, io.BytesIO(member))
    name.with_suffix(".part").rename(name)


def samples(folder):
    """All samples of the tars, in order: JPEG and caption."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found = {m.name: tar.extractfile(m).read() for m in tar if not m.name.endswith("json")}
        for name in sorted(n for n in found if n.endswith("jpg")):
            yield found[name], found[name[:-3] + "txt"].decode()


def make_data(folder):
    """The tars, once."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [s for s in range(SHARDS) if not (folder / f"{s:05d}.tar").exists()]
    for shard in missing:
        print(f"making tar {shard + 1} of {SHARDS}", flush=True)
        write_tar(folder, shard)
    sizes = [len(content) for content, _ in samples(folder)]
    print(f"{len(sizes)} images, {statistics.mean(sizes) / 1000:.1f} kB each (median {statistics.median(sizes) / 1000:.1f})", flush=True)


def convert(folder, kind):
    """The same files in a peer's own format."""
    target, rows = folder / kind, [{"image": content, "caption": caption} for content, caption in samples(folder)]
    if target.exists():
        return
    if kind == "litdata":
        from litdata.streaming.writer import BinaryWriter

        part = target.with_suffix(".part")
        writer = BinaryWriter(str(part), chunk_bytes="64MB")
        for i, row in enumerate(rows):
            writer.add_item(i, row)
        writer.done()
        writer.merge(1)
        part.rename(target)
    else:
        from streaming import MDSWriter

        with MDSWriter(out=str(target), columns={"image": "bytes", "caption": "str"}) as writer:
            for row in rows:
                writer.write(row)


# ---- the task


def cut(content):
    """The task with difflit's decoder: what the peers marked "same decoder" do."""
    from difflit.augmentation import crop_box
    from difflit.decoding import decode_cut, peek

    header = peek(content)
    box = crop_box(*header.size, (SIZE, SIZE), SHARE, (random.random(), random.random(), random.random()))
    return decode_cut(content, box, (SIZE, SIZE), header=header)


def pil_cut(image):
    """The task as it is usually written, on a decoded Pillow image: torchvision's RandomResizedCrop with a bicubic filter, which is difflit's too."""
    import numpy as np
    from PIL import Image

    side = min(image.size) * random.uniform(SHARE, 1)
    left, top = random.uniform(0, image.width - side), random.uniform(0, image.height - side)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))


def together(rows):
    """Pairs of pixels and captions as a batch."""
    import numpy as np
    import torch

    return torch.from_numpy(np.stack([r[0] for r in rows])), [r[1] for r in rows]


# ---- the contenders: each yields the number of images in a batch, for ever


def difflit_batches(folder, workers):
    from difflit.loading import Loader
    from difflit.selection import ShardSource

    source = ShardSource(str(folder / "*.tar"))
    with Loader(source, batch_size=BATCH, image_size=SIZE, crop=SHARE, workers=workers, raw=True) as loader:
        for batch in loader:
            assert batch["image"].shape[1:] == (3, SIZE, SIZE) and str(batch["image"].dtype) == "torch.uint8"
            yield len(batch["image"])


def webdataset_batches(folder, workers, decode="same"):
    import torch
    import webdataset as wds

    urls = [str(p) for p in sorted(folder.glob("*.tar"))]
    data = wds.WebDataset(urls, shardshuffle=SHARDS, seed=0).shuffle(1000)
    if decode == "pil":  # as in webdataset's own documentation
        data = data.decode("pil").to_tuple("jpg", "txt").map_tuple(pil_cut, str)
    else:
        data = data.to_tuple("jpg", "txt").map_tuple(cut, bytes.decode)
    data = data.batched(BATCH, collation_fn=together, partial=False).repeat()
    for image, _ in torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers):
        assert image.shape[1:] == (SIZE, SIZE, 3)
        yield len(image)


def litdata_batches(folder, workers):
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(str(folder / "litdata"), shuffle=True, transform=lambda row: (cut(row["image"]), row["caption"]))
    loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=together, persistent_workers=workers > 0)
    while True:
        for image, _ in loader:
            yield len(image)


def mosaicml_batches(folder, workers):
    import torch
    from streaming import StreamingDataset

    class Data(StreamingDataset):
        def __getitem__(self, at):
            row = super().__getitem__(at)
            return cut(row["image"]), row["caption"]

    data = Data(local=str(folder / "mosaicml"), batch_size=BATCH, shuffle=True)
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=together, persistent_workers=workers > 0)
    while True:
        for image, _ in loader:
            yield len(image)


def decode_batches(folder, workers):
    """No loader at all: files in memory, decoded at the scale that their cuts need, by so many threads."""
    import numpy as np

    from difflit.augmentation import crop_box
    from difflit.decoding import peek, pick_decoder, scale_divisor

    assert pick_decoder() == "simplejpeg", "decoding alone is measured with simplejpeg, which is not installed"
    from simplejpeg import decode_jpeg

    rng, jobs = np.random.default_rng(0), []
    for content, _ in samples(folder):
        header = peek(content)
        divisor = scale_divisor(crop_box(*header.size, (SIZE, SIZE), SHARE, rng.uniform(0, 1, 3).tolist()), (SIZE, SIZE))
        jobs.append((content, -(-header.height // divisor), -(-header.width // divisor)))
    rng.shuffle(jobs)

    def work(mine):
        for content, height, width in mine:
            decode_jpeg(content, "RGB", min_height=height, min_width=width)

    at, portion, many = 0, 1000, max(workers, 1)
    while True:
        threads = [threading.Thread(target=work, args=(jobs[at + c * portion // many : at + (c + 1) * portion // many],)) for c in range(many)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        at = (at + portion) % len(jobs)
        yield portion


BATCHES = {
    "difflit": difflit_batches,
    "webdataset-pil": lambda folder, workers: webdataset_batches(folder, workers, "pil"),
    "webdataset": webdataset_batches,
    "litdata": litdata_batches,
    "mosaicml": mosaicml_batches,
    "decode": decode_batches,
}


# ---- turns


def cpu_seconds(process="self"):
    """Processor time of a process, its threads and its living children."""
    used = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    seconds = (int(used[11]) + int(used[12])) / os.sysconf("SC_CLK_TCK")
    children = {child for task in Path(f"/proc/{process}/task").glob("*/children") for child in task.read_text().split()}
    return seconds + sum(cpu_seconds(child) for child in children)


def serve(name, folder, cores, images, inline):
    """A contender in its own process: measures one stretch whenever it is told to."""
    os.sched_setaffinity(0, range(cores))
    import torch

    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    batches = BATCHES[name](folder, 0 if inline else cores)
    next(batches)
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        count = 0
        while count < 512:  # what was prepared while others had their turn
            count += next(batches)
        start, used, count = time.perf_counter(), cpu_seconds(), 0
        while count < images:
            count += next(batches)
        print(count / (time.perf_counter() - start), (cpu_seconds() - used) / count * 1e6, file=answers, flush=True)
    os._exit(0)  # worker processes of some peers do not end by themselves


def line(values, form="{:.0f}"):
    """Median with lowest and highest."""
    return f"{form.format(statistics.median(values))} ({form.format(min(values))}…{form.format(max(values))})"


def compare(options):
    """All contenders, by turns."""
    chosen = {title: name for title, name in CONTENDERS.items() if name == "difflit" or not options.only or name in options.only}
    for cores in [1] if options.inline else options.cores:
        running = {}
        for title, name in chosen.items():
            command = [sys.executable, __file__, "--serve", name, "--folder", str(options.folder), "--cores", str(cores), "--images", str(options.images)]
            command += ["--inline"] if options.inline else []
            running[title] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None if options.verbose else subprocess.DEVNULL,
                                              text=True, env=environment(options))  # fmt: skip
            if running[title].stdout.readline().strip() != "ready":
                print(f"{title}: does not start; is it installed? (--verbose shows why)")
                del running[title]
                if name == "difflit":
                    sys.exit(1)
        rates, costs = {title: [] for title in running}, {title: [] for title in running}
        for turn in range(options.pairs):
            titles = list(running)
            for title in titles[turn % len(titles) :] + titles[: turn % len(titles)]:
                running[title].stdin.write("go\n")
                running[title].stdin.flush()
                rate, cost = map(float, running[title].stdout.readline().split())
                rates[title].append(rate)
                costs[title].append(cost)
        for process in running.values():
            process.stdin.close()
            process.wait()
        print(f"\n{cores} core{'s' * (cores > 1)}, {options.pairs} rounds of {options.images} images; median (lowest…highest)")
        for title, found in rates.items():
            ratio = line([a / b for a, b in zip(rates["difflit"], found)], "{:.2f}")
            cost = statistics.median([b / a for a, b in zip(costs["difflit"], costs[title])])
            print(f"  {title:34} {line(found):>22} images/s, {statistics.median(costs[title]):4.0f} µs of CPU per image; "
                  f"difflit is {ratio} times as fast (by CPU time {cost:.2f})", flush=True)  # fmt: skip


def environment(options):
    """The children are told where the peers are; they look there last, so that a peer's libraries shadow none of ours."""
    return os.environ | {"DIFFLIT_PEERS": str(options.peers.resolve()) if options.peers else ""}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pairs", type=int, default=9, help="rounds")
    parser.add_argument("--images", type=int, default=3000, help="in each stretch that is timed")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "difflit-bench-loading", help="where the data are made and kept")
    parser.add_argument("--peers", type=Path, help="where litdata and mosaicml-streaming are installed")
    parser.add_argument("--only", nargs="+", help=f"compare difflit with these alone: {' '.join(CONTENDERS.values())}")
    parser.add_argument("--inline", action="store_true", help="without workers, on one core")
    parser.add_argument("--verbose", action="store_true", help="show what the contenders print")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--convert", help=argparse.SUPPRESS)
    for mode in ("resume", "access", "repacked", "decoders"):
        parser.add_argument(f"--{mode}", action="store_true", help="measure this instead; see above")
    options = parser.parse_args()
    if os.environ.get("DIFFLIT_PEERS"):
        sys.path.append(os.environ["DIFFLIT_PEERS"])
    if options.serve:
        return serve(options.serve, options.folder, options.cores[0], options.images, options.inline)
    if options.convert:
        return convert(options.folder, options.convert)
    make_data(options.folder)
    modes = {"resume": resume, "access": access, "repacked": repacked, "decoders": decoders}
    if asked := [measure for name, measure in modes.items() if getattr(options, name)]:
        for measure in asked:
            measure(options)
        return None
    for kind in ("litdata", "mosaicml"):
        if options.peers and (not options.only or kind in options.only):
            subprocess.run([sys.executable, __file__, "--convert", kind, "--folder", str(options.folder)], env=environment(options), check=False)
    return compare(options)


# ---- single measurements


def resume(options):
    """The first batch after a resume, anywhere: of these 4000 samples, and of five thousand million made of them."""
    from difflit.data import Source
    from difflit.loading import Loader
    from difflit.selection import ShardSource

    class Endless(Source):
        """So many samples: the tars', over and over."""

        def __init__(self, source, count):
            self.source, self.count, self.name = source, count, "endless"

        def __len__(self):
            return self.count

        def encoded(self, index, metadata=True):
            return self.source.encoded(index % len(self.source))

        def digest(self):
            return f"{self.count} {self.source.digest()}"

    start = time.perf_counter()
    source = ShardSource(str(options.folder / "*.tar"))
    print(f"opening the source: {(time.perf_counter() - start) * 1000:.0f} ms")
    for count in (len(source), 5_000_000_000):
        data = source if count == len(source) else Endless(source, count)
        for position in (0, 1_000_000, 3_000_000_000):
            found = []
            for again in range(options.pairs):
                start = time.perf_counter()
                with Loader(data, batch_size=BATCH, image_size=SIZE, crop=SHARE, workers=2, raw=True) as loader:
                    state = loader.state_dict() | {"position": position + again * 64_000}
                    loader.load_state_dict(state)
                    next(loader)
                    found.append((time.perf_counter() - start) * 1000)
            size = len(json.dumps(state))
            print(f"{count:>13,} samples, position {position:>13,}: first batch after {line(found)} ms; state {size} bytes", flush=True)


def access(options):
    """Indexing the tars, and reading encoded samples out of them, with a warm page cache, on one core."""
    os.sched_setaffinity(0, {0})
    from difflit.selection import ShardSource
    from difflit.shards import index_shards

    found = []
    for _ in range(options.pairs):
        with tempfile.TemporaryDirectory(dir=options.folder.parent) as fresh:
            for tar in options.folder.glob("*.tar"):  # at a new place, or what was read before would be found again
                os.link(tar, Path(fresh) / tar.name)
            start = time.perf_counter()
            count = len(index_shards(fresh, workers=1))
            found.append(count / (time.perf_counter() - start))
    print(f"indexing: {line(found)} samples/s")
    source = ShardSource(str(options.folder / "*.tar"))
    orders = {"in order": list(range(len(source))), "at random": random.Random(0).sample(range(len(source)), len(source))}
    for name, order in orders.items():
        found = []
        for _ in range(options.pairs):
            start = time.perf_counter()
            for index in order:
                source.encoded(index)
            found.append(len(order) / (time.perf_counter() - start))
        print(f"reading {name}: {line(found)} samples/s")


def repacked(options):
    """The task on the tars as they are and on copies repacked at twice the training size, taking turns."""
    from difflit.repacking import repack

    small = options.folder / "repacked"
    report = repack(str(options.folder / "*.tar"), small, image_size=SIZE, workers=2)
    print(f"bytes: {sum(Path(p).stat().st_size for p in report.paths) / sum(p.stat().st_size for p in options.folder.glob('*.tar')):.3f} of before")
    cores, rates = max(options.cores), ([], [])
    for _ in range(options.pairs):
        for folder, found in zip((options.folder, small), rates):
            batches = difflit_batches(folder, cores)
            next(batches)
            start, count = time.perf_counter(), 0
            while count < options.images:
                count += next(batches)
            found.append(count / (time.perf_counter() - start))
            batches.close()
    print(f"as they are: {line(rates[0])} images/s; repacked: {line(rates[1])} images/s; {line([b / a for a, b in zip(*rates)], '{:.2f}')} times as fast")


def decoders(options):
    """Each decoder on one core: a whole cut, and how far it is from full decoding and Lanczos on the same box."""
    os.sched_setaffinity(0, {0})
    import numpy as np
    import torch
    from PIL import Image

    from difflit.augmentation import crop_box
    from difflit.decoding import available_decoders, decode_cut, peek, resize_cut, scale_divisor

    torch.set_num_threads(1)
    rng, jobs = np.random.default_rng(0), []
    for content, _ in list(samples(options.folder))[::5]:
        box = np.array(crop_box(*peek(content).size, (SIZE, SIZE), SHARE, rng.uniform(0, 1, 3).tolist()))
        side = round((box[2] - box[0]) / 8) * 8 - 8  # on the grid of every scale, so that all mean the same box
        left, top = box[:2] // 8 * 8
        jobs.append((content, (float(left), float(top), float(left + side), float(top + side))))
    exact = [resize_cut(Image.open(io.BytesIO(c)), b, (SIZE, SIZE)).astype(float) for c, b in jobs[:200]]
    ways = {(d, m): [] for d in available_decoders() for m in (1.0, 1.1, 1.25, 2.0) if d != "pil" or m == 1.1}
    for _ in range(options.pairs):
        for (decoder, margin), found in ways.items():
            start = time.perf_counter()
            for content, box in jobs:
                decode_cut(content, box, (SIZE, SIZE), decoder=decoder, margin=margin)
            found.append(len(jobs) / (time.perf_counter() - start))
    for (decoder, margin), found in ways.items():
        error = [np.mean((decode_cut(c, b, (SIZE, SIZE), decoder=decoder, margin=margin) - e) ** 2) for (c, b), e in zip(jobs, exact)]
        quality = [10 * np.log10(255**2 / max(e, 1e-4)) for e in error]
        scales = [scale_divisor(b, (SIZE, SIZE), margin) for _, b in jobs] if decoder != "pil" else [1]
        mix = ", ".join(f"1/{s} {scales.count(s) / len(scales):.0%}" for s in sorted(set(scales)))
        print(f"{decoder:11} margin {margin:4}: {line(found)} images/s; {np.mean(quality):.1f} dB, worst {min(quality):.1f} ({mix})", flush=True)


if __name__ == "__main__":
    main()
