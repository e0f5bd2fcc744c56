"""Decoding and augmentation: every decoder, every orientation, and bytes that are wrong in every way we could think of."""

import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from difflit import decoding
from difflit.augmentation import Augmentation, crop_box, draw, prepare
from difflit.data import Encoded, Sample, square, upright_rgb
from difflit.decoding import DamagedImage, Header, available_decoders, decode_cut, decode_full, peek, pick_decoder, resize_cut
from difflit.tasks import low_resolution

DECODERS = available_decoders()
SCALED = [d for d in DECODERS if d != "pil"]


def picture(seed=0, width=400, height=300):
    """Smooth colours with texture: noise at five scales."""
    random = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for octave in range(2, 7):
        grid = random.uniform(-1, 1, (2**octave, 2**octave, 3)).astype(np.float32) * 127 + 128
        layer = Image.fromarray(grid.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        pixels += (np.asarray(layer) - 128.0) / 1.6 ** (octave - 2)
    return Image.fromarray((pixels * 0.8 + 128).clip(0, 255).astype(np.uint8))


def encoded(image, kind="JPEG", orientation=1, **settings):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(buffer, kind, **({"exif": exif} if orientation != 1 else {}), **settings)
    return buffer.getvalue()


def decibels(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-4))


def random_boxes(count, width, height, size=(64, 64), seed=0):
    random = np.random.default_rng(seed)
    return [crop_box(width, height, size, 0.3, random.uniform(0, 1, 3).tolist()) for _ in range(count)]


PHOTO = picture()
JPEG = encoded(PHOTO, quality=90)
VARIANTS = {
    "4:2:0": {"subsampling": "4:2:0"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:4:4": {"subsampling": "4:4:4"},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True, "quality": 60},
    "restart marks": {"restart_marker_blocks": 4},
    "stored as RGB": {"keep_rgb": True},
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "GIF", "BMP", "JPEG2000", "PPM"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_peek_agrees_with_pillow(kind, orientation):
    content = encoded(picture(1, 60, 40), kind, orientation)
    assert peek(content).size == upright_rgb(Image.open(io.BytesIO(content))).size
    assert peek(memoryview(content)) == peek(content)


def test_peek_finds_orientation_in_odd_places():
    small, exif = picture(1, 60, 40), Image.Exif()
    exif[0x0112], exif[0x010F] = 8, "a maker"
    big_endian = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    assert peek(encoded(small, exif=exif)).orientation == 8
    plain = encoded(small)
    assert peek(plain[:2] + b"\xff\xe1" + (len(big_endian) + 2).to_bytes(2, "big") + big_endian + plain[2:]).orientation == 6
    comment = b"\xff\xfe" + (60_002).to_bytes(2, "big") + b"\xff\xd9" * 30_000
    assert peek(plain[:2] + comment + plain[2:]) == peek(plain)
    assert peek(plain[:2] + b"\xff\xff\xff" + plain[2:]).size == (60, 40), "fill bytes"
    nonsense = Image.Exif()
    nonsense[0x0112] = 9
    assert peek(encoded(small, exif=nonsense)).orientation == 1
    two = encoded(small, "MPO", save_all=True, append_images=[small])
    assert peek(two).format == "jpeg" and decode_full(two).shape == (40, 60, 3)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", [(400, 300), (203, 131), (97, 211)])
def test_decoders_give_the_same_bits(name, shape):
    content = encoded(picture(2, *shape), **VARIANTS[name])
    for size in ((64, 64), (32, 48)):
        for box in random_boxes(6, *shape, size):
            cuts = [decode_cut(content, box, size, decoder=d) for d in SCALED]
            assert all(np.array_equal(cuts[0], c) for c in cuts)
            assert cuts[0].shape == (size[1], size[0], 3) and cuts[0].dtype == np.uint8 and cuts[0].flags.c_contiguous
            assert decibels(cuts[0], decode_cut(content, box, size, decoder="pil")) > 33


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_cut_is_near_the_careful_way(decoder):
    values = []
    for seed in range(4):
        whole = picture(seed)
        content = encoded(whole, quality=95)
        for box in random_boxes(8, 400, 300, seed=seed):
            divisor = decoding.scale_divisor(box, (64, 64))
            (left, right), (top, bottom) = (decoding._on_grid(box[i], box[i + 2], (400, 300)[i], divisor) for i in (0, 1))
            exact = resize_cut(Image.open(io.BytesIO(content)), (left * divisor, top * divisor, right * divisor, bottom * divisor), (64, 64))
            values.append(decibels(decode_cut(content, box, (64, 64), decoder=decoder), exact))
            assert max(abs(left * divisor - box[0]), abs(bottom * divisor - box[3])) <= divisor
    assert np.mean(values) > 40 and min(values) > 35, (np.mean(values), min(values))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_lying_pictures(decoder, orientation):
    content = encoded(PHOTO, "JPEG", orientation, quality=95)
    upright = upright_rgb(Image.open(io.BytesIO(content)))
    assert np.array_equal(decode_full(content, decoder), np.asarray(upright))
    for size in ((64, 64), (48, 80)):
        for box in random_boxes(3, *upright.size, size):
            box = tuple(float(8 * round(v / 8)) for v in box)
            if orientation not in (1, 5):  # the grid begins at the stored picture's corner, here 400 × 300
                box = tuple(min(v, m) for v, m in zip(box, (upright.width // 8 * 8, upright.height // 8 * 8) * 2))
            exact = resize_cut(upright, box, size)
            assert decibels(decode_cut(content, box, size, decoder=decoder), exact) > 26, (orientation, box)


@pytest.mark.parametrize("decoder", DECODERS)
def test_unusual_jpegs(decoder):
    for mode in ("CMYK", "L"):
        cut = decode_cut(encoded(PHOTO.convert(mode), quality=95), (48, 0, 348, 300), (64, 64), decoder=decoder)
        assert decibels(cut, resize_cut(PHOTO.convert(mode), (48, 0, 348, 300), (64, 64))) > 33
    for width, height in ((1, 1), (1, 500), (500, 1), (7, 9), (17, 16)):
        tiny = encoded(picture(3, width, height))
        for size in ((64, 64), (1, 1), (8, 3)):
            out = prepare(Encoded(tiny, "", ""), size, Augmentation(crop=0.5), np.array([0.3, 0.9, 0.1, 1, 0.5, 0.5, 0.5], np.float32), decoder)
            assert out.shape == (size[1], size[0], 3)
        assert decode_full(tiny, decoder).shape == (height, width, 3)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_at_any_place(decoder, progressive):
    whole = encoded(PHOTO, quality=85, progressive=progressive)
    thumbnail = encoded(PHOTO.resize((40, 30)))
    block = b"Exif\0\0II*\0\x08\0\0\0\0\0" + thumbnail
    previewed = whole[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + whole[2:]
    assert decode_full(previewed, decoder).shape == (300, 400, 3)
    for content in (whole, previewed):  # the preview has an end mark of its own
        for length in [*range(0, len(content), len(content) // 40), *(len(content) - n for n in (1, 2, 3, 10, 50))]:
            with pytest.raises(DamagedImage):
                decode_cut(content[:length], (0, 0, 300, 300), (64, 64), decoder=decoder)
            with pytest.raises(DamagedImage):
                decode_full(content[:length], decoder)


@pytest.mark.parametrize("decoder", DECODERS)
def test_wrong_bytes_never_do_worse_than_damaged(decoder):
    random = np.random.default_rng(0)
    contents = [encoded(picture(5, 120, 90), k, **s) for k, s in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {}))]
    for content in contents:
        for trial in range(60):
            bad = bytearray(content)
            reach = len(bad) if trial % 2 else min(700, len(bad))  # half of the time in the header
            for at in random.integers(0, reach, random.integers(1, 8)):
                bad[at] = random.integers(256)
            try:
                header = peek(bytes(bad))
                out = decode_cut(bytes(bad), (0, 0, *header.size), (32, 32), decoder=decoder)
                assert out.shape == (32, 32, 3)
            except DamagedImage as error:
                assert str(error)


def test_damage_inside_is_seen_by_simplejpeg():
    pytest.importorskip("simplejpeg")
    half = len(JPEG) // 2
    for bad in (JPEG[:half] + bytes(2000) + JPEG[half + 2000 :], JPEG[:half] + b"\xff\xd9", JPEG[:half] + JPEG[half + 3000 :]):
        with pytest.raises(DamagedImage):
            decode_full(bad, "simplejpeg")


@pytest.mark.parametrize("decoder", DECODERS)
def test_harmless_oddities_are_accepted(decoder):
    whole = decode_full(JPEG, decoder)
    for odd in (JPEG + b"trailing bytes" * 50, JPEG[:-2] + bytes(40) + JPEG[-2:], JPEG + JPEG[: len(JPEG) // 2]):
        assert np.array_equal(decode_full(odd, decoder), whole)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_and_lies(monkeypatch):
    start = JPEG.index(b"\xff\xc0")
    for height, width in ((60_000, 60_000), (0, 400), (400, 0)):
        claim = JPEG[: start + 5] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + JPEG[start + 9 :]
        with pytest.raises(DamagedImage, match="bomb|without any"):
            peek(claim)
        with pytest.raises(DamagedImage, match="bomb|without any"):
            decode_full(claim)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400 * 300 - 1)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        with pytest.raises(DamagedImage, match="400 × 300 pixels, more than Image.MAX_IMAGE_PIXELS"):
            peek(encoded(PHOTO, kind))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert peek(JPEG) == Header("jpeg", 400, 300)


def test_a_missing_library_is_missed_politely(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    monkeypatch.setitem(sys.modules, "cv2", None)
    decoding._library.cache_clear()
    pick_decoder.cache_clear()
    try:
        assert available_decoders() == ["draft", "pil"] and pick_decoder() == "draft"
        with pytest.raises(ValueError, match="pip install 'opencv-python-headless>=4.11', or choose among draft, pil"):
            pick_decoder("cv2")
        alone = decode_cut(JPEG, (50, 0, 350, 300), (64, 64))
    finally:
        monkeypatch.undo()
        decoding._library.cache_clear()
        pick_decoder.cache_clear()
    assert np.array_equal(alone, decode_cut(JPEG, (50, 0, 350, 300), (64, 64))), "the same pixels with and without"


@pytest.mark.parametrize("decoder", DECODERS)
def test_many_threads(decoder):
    jobs = [(encoded(picture(s, 200, 150)), b) for s in range(4) for b in random_boxes(6, 200, 150)]
    alone = [decode_cut(*job, (64, 64), decoder=decoder) for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda job: decode_cut(*job, (64, 64), decoder=decoder), jobs * 4))
    assert all(np.array_equal(a, b) for a, b in zip(alone * 4, together))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L", "1", "I;16", "CMYK"])
def test_a_picture_and_its_file_are_one(mode):
    if mode == "I;16":
        image = Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257)
    else:
        image = PHOTO.convert(mode)
    content = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    assert np.array_equal(prepare(Encoded(content, "", ""), (64, 64)), np.asarray(square(image, 64)))
    varied = Augmentation(crop=0.4, flip=True, jitter=0.4, trim=True)
    for numbers in draw(varied, 3, torch.arange(6)):
        both = [prepare(s, (56, 72), varied, numbers) for s in (Encoded(content, "", ""), Sample(image, "", ""))]
        assert np.array_equal(*both)


def test_the_upsamplers_small_picture_shows_the_same_cut():
    varied = Augmentation(crop=0.5, flip=True, jitter=0.3)
    for numbers in draw(varied, 0, torch.arange(4)):
        pixels = prepare(Encoded(JPEG, "", ""), (64, 64), varied, numbers)
        large = torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32)) / 127.5 - 1
        small = ((low_resolution(large, 4)[0].permute(1, 2, 0) + 1) * 127.5).numpy()
        assert np.abs(small - pixels.reshape(16, 4, 16, 4, 3).mean((1, 3))).max() <= 0.51


def test_a_box_outside_is_a_mistake_not_damage():
    for box in ((-1, 0, 10, 10), (0, 0, 401, 300), (10, 10, 10, 20), (0, 20, 10, 10)):
        with pytest.raises(ValueError, match="does not lie in a picture of 400 × 300") as caught:
            decode_cut(JPEG, box, (8, 8))
        assert not isinstance(caught.value, DamagedImage)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_no_team_of_threads_is_woken_in_a_worker():
    program = """
import io, os, sys, threading
import numpy as np, torch
from PIL import Image
from difflit.decoding import decode_cut
torch.set_num_threads(4)
buffer = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8)).save(buffer, "JPEG")
work = lambda: [decode_cut(buffer.getvalue(), (80, 0, 980, 900), (s, s)) for s in (64, 256, 512, 900)]
work()
before = len(os.listdir("/proc/self/task"))
workers = [threading.Thread(target=work) for _ in range(3)]
[w.start() for w in workers], [w.join() for w in workers]
sys.exit(len(os.listdir("/proc/self/task")) > before + 3)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0
