"""Checkpoints of others: read safely, recognised, converted, exchanged with the original code; and downloads that survive what networks do."""

import os
import random
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
import torch
from torch import nn

from difflit.config import SettingsError
from difflit.files import DownloadError, digest_bytes, digest_file, download
from difflit.glide import GLIDES, GlideConfig, create_glide, glide_config
from difflit.weights import (
    OFFICIAL,
    WeightsError,
    convert_precision,
    detect_config,
    glide_diffusion,
    load_glide,
    official_weights,
    read_tensors,
    save_glide,
    variant_of,
)

NO_ORIGINAL = "glide_text2im is not installed: pip install git+https://github.com/openai/glide-text2im"
SMALL = dict(image_size=16, channels=32, channel_mult=(1, 2, 2), residual_blocks=2, attention_downsamplings=(2,), head_channels=64, norm_groups=32,
             dropout=0.1, text_context=12, text_width=64, text_layers=3, text_heads=8, vocabulary=300, position_map=False, learned_variance=True)


def small_model(seed: int = 0, **overrides):
    "A small GLIDE of the original's design, random numbers everywhere."
    model = create_glide("tiny", **{**SMALL, **overrides}).eval()
    torch.manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02 if p.dim() == 1 else p[0].numel() ** -0.5)
    return model


def inputs(config: GlideConfig):
    g = torch.Generator().manual_seed(3)
    more = {}
    if config.super_resolution:
        more["low_res"] = torch.randn(2, 3, 4, 4, generator=g)
    if config.inpaint:
        more |= {"inpaint_image": torch.randn(2, 3, 16, 16, generator=g), "inpaint_mask": (torch.rand(2, 1, 16, 16, generator=g) < 0.5).float()}
    tokens, mask = torch.randint(300, (2, 12), generator=g), torch.arange(12) < torch.tensor([[7], [0]])
    return (torch.randn(2, 3, 16, 16, generator=g), torch.tensor([10, 900])), {"tokens": tokens, "mask": mask, **more}


def answer(model) -> torch.Tensor:
    places, names = inputs(model.config)
    with torch.no_grad():
        return model(*places, **names)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def state(model):
    return {name: t.contiguous() for name, t in model.state_dict().items()}


# -- files of others ---------------------------------------------------------------------------------------------------------------------------------


class Thief:
    "Makes a file when it is unpickled."

    def __init__(self, loot):
        self.loot = loot

    def __reduce__(self):
        return os.system, (f"touch {self.loot}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["alone", "tensor", "beside", "deep"])
def test_malicious_pickle_is_not_executed(tmp_path, state, zipped, place):
    thief, loot = Thief(tmp_path / "loot"), tmp_path / "loot"
    held = {"alone": thief, "tensor": {**state, "out.2.bias": thief}, "beside": {"model": state, "note": thief},
            "deep": {"model": state, "optimizer": {"state": [(1, {"a": thief})]}}}[place]
    torch.save(held, tmp_path / "thief.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="is refused: where only tensors belong it holds the Python object posix.system"):
        load_glide(tmp_path / "thief.pt")
    assert not loot.exists()
    torch.load(tmp_path / "thief.pt", weights_only=False)
    assert loot.exists(), "the trap was not armed"


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_anywhere(tmp_path, model, state, kind):
    "Cut at any length, a file is refused by name, and never read in part."
    whole = tmp_path / ("whole.safetensors" if kind == "safetensors" else "whole.pt")
    if kind == "safetensors":
        save_glide(model, whole)
    else:
        torch.save(state, whole, _use_new_zipfile_serialization=kind == "zip")
    content, cut = whole.read_bytes(), tmp_path / f"cut{whole.suffix}"
    for length in (0, 1, 5, 9, 100, 1000, len(content) // 10, len(content) // 2, len(content) * 9 // 10, len(content) - 1000, len(content) - 1):
        cut.write_bytes(content[:length])
        with pytest.raises(WeightsError, match="cut"):
            load_glide(cut)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_damaged_bytes_never_escape_as_another_error(tmp_path, zipped):
    "Sixty files with a few bytes exchanged: each is read, or refused with a `WeightsError`."
    torch.save({"a.weight": torch.zeros(4, 4), "b": torch.ones(3)}, tmp_path / "good.pt", _use_new_zipfile_serialization=zipped)
    content, dice = (tmp_path / "good.pt").read_bytes(), random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(4):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        (tmp_path / "bad.pt").write_bytes(damaged)
        try:
            read_tensors(tmp_path / "bad.pt")
        except WeightsError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize(
    "content, said",
    [(b"", "is empty"), (b"  <!DOCTYPE html><html>", "is a web page"), (b"<html><body>Sign in", "is a web page"),
     (b"<?xml version='1.0'?><Error>", "is a web page"),
     (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git-lfs pointer"), (b"\x89PNG\r\n\x1a\n", "is no file of weights"),
     (b'{"message": "Not Found"}', "is no file of weights"), (b"PK\x03\x04" + b"0" * 100, "is damaged or cut off")],
)
def test_what_is_no_checkpoint(tmp_path, content, said):
    (tmp_path / "base.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=said):
        load_glide(tmp_path / "base.pt")


def test_script_and_other_contents(tmp_path):
    with ZipFile(tmp_path / "script.pt", "w") as archive:  # what torch.jit.save leaves
        for name in ("data.pkl", "code/__torch__.py", "constants.pkl", "version"):
            archive.writestr(f"script/{name}", b"")
    with pytest.raises(WeightsError, match="TorchScript"):
        read_tensors(tmp_path / "script.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(WeightsError, match="holds the Python object torch.nn.modules.linear.Linear"):
        read_tensors(tmp_path / "whole.pt")
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "numbers.pt")
    with pytest.raises(WeightsError, match="holds a dict of epoch, loss, and no state dict"):
        read_tensors(tmp_path / "numbers.pt")
    with pytest.raises(WeightsError, match="is no file"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.module."])
def test_prefixes_and_formats(tmp_path, model, state, prefix, zipped):
    torch.save({prefix + name: t for name, t in state.items()}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    loaded = load_glide(tmp_path / "w.pt", image_size=16)
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(answer(loaded), answer(model))


def test_compiled_parts(tmp_path, model, state):
    "torch.compile on single blocks leaves its mark in the middle of names."
    marked = {name.replace("input_blocks.1.", "input_blocks.1._orig_mod."): t for name, t in state.items()}
    torch.save(marked, tmp_path / "w.pt")
    assert torch.equal(answer(load_glide(tmp_path / "w.pt")), answer(model))


@pytest.mark.parametrize("key", ["model", "model_state_dict", "state_dict", "module"])
def test_training_states_of_glide_finetune(tmp_path, model, state, key):
    optimizer = torch.optim.AdamW(small_model().parameters()).state_dict()
    torch.save({"epoch": 2, key: state, "optimizer_state_dict": optimizer, "torch_rng_state": torch.get_rng_state()}, tmp_path / "w.pt")
    assert torch.equal(answer(load_glide(tmp_path / "w.pt")), answer(model))


def test_average_or_live_weights(tmp_path, state):
    average = {name: t + 1 for name, t in state.items()}
    torch.save({"model": state, "ema": average}, tmp_path / "w.pt")
    assert torch.equal(load_glide(tmp_path / "w.pt").state_dict()["out.2.bias"], average["out.2.bias"])
    assert torch.equal(load_glide(tmp_path / "w.pt", weights="model").state_dict()["out.2.bias"], state["out.2.bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_fill_a_full_precision_model(tmp_path, model, state, dtype):
    torch.save({name: t.to(dtype) for name, t in state.items()}, tmp_path / "w.pt")
    loaded = load_glide(tmp_path / "w.pt")
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float32}
    error = ((answer(loaded) - answer(model)).norm() / answer(model).norm()).item()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.005), error


def test_missing_unexpected_and_misshapen_tensors(tmp_path, state):
    torch.save({k: v for k, v in state.items() if k not in ("final_ln.weight", "time_embed.2.bias")}, tmp_path / "w.pt")
    with pytest.raises(SettingsError, match="2 missing: final_ln.weight, time_embed.2.bias"):
        load_glide(tmp_path / "w.pt")
    torch.save({**state, "clip_to_time.0.weight": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(SettingsError, match="1 unknown: clip_to_time.0.weight"):
        load_glide(tmp_path / "w.pt")
    torch.save({**state, "padding_embedding": torch.zeros(12, 63)}, tmp_path / "w.pt")
    with pytest.raises(SettingsError, match=r"1 of another shape: padding_embedding \[12, 63\] instead of \[12, 64\]"):
        load_glide(tmp_path / "w.pt")


# -- which model -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(GLIDES))
def test_variants_are_recognised_by_shapes(name):
    with torch.device("meta"):
        tensors = create_glide(name).state_dict()
    assert detect_config(tensors) == GLIDES[name] and variant_of(detect_config(tensors)) == name


def test_any_design_is_recognised():
    "Forty random designs: every field that shapes can tell is told."
    dice = random.Random(0)
    for _ in range(40):
        levels = dice.randint(1, 5)
        config = glide_config(
            "tiny", image_size=32, channels=32, channel_mult=tuple(dice.randint(1, 3) for _ in range(levels)), residual_blocks=dice.randint(1, 3),
            norm_groups=32, attention_downsamplings=tuple(2**i for i in range(levels) if dice.random() < 0.5), head_channels=32,
            text_context=dice.randint(2, 40),
            text_width=64, text_layers=dice.randint(1, 3), text_heads=8, vocabulary=dice.randint(10, 90), super_resolution=dice.random() < 0.5,
            inpaint=dice.random() < 0.5, learned_variance=dice.random() < 0.5, position_map=dice.random() < 0.3)
        with torch.device("meta"):
            tensors = create_glide("tiny", **{f: getattr(config, f) for f in config.__dataclass_fields__}).state_dict()
        assert detect_config(tensors, image_size=32, head_channels=32, dropout=0.0) == config


def test_wrong_variant_says_which_it_is_and_how_it_was_seen(tmp_path, monkeypatch):
    "The four official designs in small, each asked for as each."
    inputs_of = {"base": 3, "upsample": 6, "base-inpaint": 7, "upsample-inpaint": 10}
    names = {"base": "a base model's", "upsample": "an upsampler's", "base-inpaint": "an inpainting base model's",
             "upsample-inpaint": "an inpainting upsampler's"}
    for name in inputs_of:
        monkeypatch.setitem(GLIDES, name, glide_config("tiny", **{**SMALL, "super_resolution": "upsample" in name, "inpaint": "inpaint" in name}))
    for name in inputs_of:
        path = save_glide(small_model(super_resolution="upsample" in name, inpaint="inpaint" in name), tmp_path / f"{name}.pt")
        for asked in inputs_of:
            if asked == name:
                assert variant_of(load_glide(path, variant=asked).config) == name
            else:
                expected = f"is '{name}' and not '{asked}': its first convolution takes {inputs_of[name]} channels, {names[asked]} takes {inputs_of[asked]}"
                with pytest.raises(SettingsError, match=expected):
                    load_glide(path, variant=asked)


def test_processes():
    assert {name: glide_diffusion(name)["schedule"] for name in OFFICIAL} == {
        "base": "squared_cosine", "base-inpaint": "squared_cosine", "upsample": "linear", "upsample-inpaint": "linear"}


# -- precision and saving ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(model, dtype):
    half = convert_precision(small_model(), dtype)
    out = answer(half)
    error = ((out - answer(model)).norm() / answer(model).norm()).item()
    assert out.dtype == torch.float32 and error < (0.05 if dtype == torch.bfloat16 else 0.01), error


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_round_trip(tmp_path, model, suffix, dtype):
    loaded = load_glide(save_glide(model, tmp_path / f"w{suffix}", dtype), image_size=16)
    assert loaded.config == model.config
    if dtype is None:
        assert torch.equal(answer(loaded), answer(model))
    else:
        again = load_glide(tmp_path / f"w{suffix}", dtype=dtype)
        expected = convert_precision(small_model(), dtype).state_dict()
        assert all(t.dtype == expected[name].dtype and torch.equal(t, expected[name]) for name, t in again.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == [f"w{suffix}"]


def test_loaded_model_is_its_own(tmp_path, model):
    "Nothing of it hangs on the file any more; it lies in channels-last memory and can be trained."
    path = save_glide(model, tmp_path / "w.pt")
    loaded = load_glide(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(answer(loaded), answer(model))
    assert loaded.out[2].weight.is_contiguous(memory_format=torch.channels_last)
    places, names = inputs(loaded.config)
    loaded(*places, **names).square().mean().backward()
    assert all(p.requires_grad and p.grad is not None for p in loaded.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_peaks_at_about_one_model(tmp_path):
    "OpenAI's base in half precision fills a full-precision model: measured in a process of its own."
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in create_glide("base").state_dict().items()}
    torch.save({name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}, tmp_path / "base.pt")
    code = (
        "import sys, threading, torch; from difflit.weights import load_glide, variant_of\n"
        "anonymous = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1])\n"
        "peak, before, done = 0, anonymous(), threading.Event()\n"
        "def watch():\n"
        "    global peak\n"
        "    while not done.wait(0.002): peak = max(peak, anonymous())\n"
        "watcher = threading.Thread(target=watch); watcher.start()\n"
        "model = load_glide(sys.argv[1], variant='base'); done.set(); watcher.join()\n"
        "print((max(peak, anonymous()) - before) * 1024 / sum(4 * p.numel() for p in model.parameters()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "base.pt")], capture_output=True, text=True)
    (tmp_path / "base.pt").unlink()
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0.95 < float(done.stdout) < 1.15, done.stdout


# -- the original code -------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def original():
    "glide_text2im's own network for a small configuration."
    pytest.importorskip("glide_text2im", reason=NO_ORIGINAL)
    from glide_text2im.text2im_model import InpaintText2ImUNet, SuperResInpaintText2ImUnet, SuperResText2ImUNet, Text2ImUNet

    def build(config: GlideConfig, use_fp16: bool = False):
        kind = {(False, False): Text2ImUNet, (True, False): SuperResText2ImUNet, (False, True): InpaintText2ImUNet, (True, True): SuperResInpaintText2ImUnet}
        return kind[config.super_resolution, config.inpaint](
            text_ctx=config.text_context, xf_width=config.text_width, xf_layers=config.text_layers, xf_heads=config.text_heads, xf_final_ln=True,
            tokenizer=SimpleNamespace(n_vocab=config.vocabulary), xf_padding=True, in_channels=3, model_channels=config.channels, out_channels=6,
            num_res_blocks=config.residual_blocks, attention_resolutions=config.attention_downsamplings, dropout=config.dropout,
            channel_mult=config.channel_mult, use_fp16=use_fp16, num_heads=1, num_head_channels=config.head_channels, num_heads_upsample=-1,
            use_scale_shift_norm=True, resblock_updown=True).eval()

    return build


DESIGNS = {"base": {}, "inpaint": {"inpaint": True}, "upsample": {"super_resolution": True}, "both": {"inpaint": True, "super_resolution": True}}


@pytest.mark.parametrize("design", DESIGNS)
def test_original_loads_ours_strictly(tmp_path, original, design):
    ours = small_model(**DESIGNS[design])
    theirs = original(ours.config)
    theirs.load_state_dict(torch.load(save_glide(ours, tmp_path / "w.pt")), strict=True)
    places, names = inputs(ours.config)
    with torch.no_grad():
        expected = theirs(*places, **names)
    assert ((answer(ours) - expected).abs().max() / expected.abs().max()).item() < 1e-5


@pytest.mark.parametrize("design", DESIGNS)
def test_we_load_the_originals(tmp_path, original, design):
    theirs = original(small_model(**DESIGNS[design]).config)
    torch.manual_seed(1)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.02 if p.dim() == 1 else p[0].numel() ** -0.5)
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    ours = load_glide(tmp_path / "w.pt")
    places, names = inputs(ours.config)
    with torch.no_grad():
        expected = theirs(*places, **names)
    assert ((answer(ours) - expected).abs().max() / expected.abs().max()).item() < 1e-5


def test_halves_what_the_original_halves(original):
    ours = convert_precision(small_model(), torch.float16)
    theirs = original(ours.config)
    theirs.convert_to_fp16()
    assert {name: t.dtype for name, t in ours.state_dict().items()} == {name: t.dtype for name, t in theirs.state_dict().items()}


def test_half_precision_is_as_good_as_the_originals(original):
    "In fp16, on the same weights, our error against fp32 is no larger than the original's."
    full, half = small_model(), convert_precision(small_model(), torch.float16)
    theirs = original(full.config, use_fp16=True)
    theirs.load_state_dict(full.state_dict())
    theirs.convert_to_fp16()
    places, names = inputs(full.config)
    with torch.no_grad():
        errors = [((out - answer(full)).norm() / answer(full).norm()).item() for out in (answer(half), theirs(*places, **names))]
    assert errors[0] < 1.2 * errors[1] + 1e-4, errors


# -- downloads ---------------------------------------------------------------------------------------------------------------------------------------


class Shaky(BaseHTTPRequestHandler):
    "Serves `server.content`; each answer carries at most the next of `server.portions` bytes, then the line breaks."

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        if server.status:
            code = server.status.pop(0)
            if code != 200:
                self.send_error(code)
                return
        start = int(asked[6:-1]) if asked and server.ranges else 0
        if start and self.headers.get("If-Range", server.etag) != server.etag:
            start = 0
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.end_headers()
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.end_headers()
        self.wfile.write(body[: server.portions.pop(0)] if server.portions else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Shaky)
    server.content, server.asked, server.portions, server.status = random.Random(1).randbytes(100_000), [], [], []
    server.etag, server.ranges = '"one"', True
    server.url = f"http://127.0.0.1:{server.server_port}/w.pt"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_download_goes_on_where_the_line_broke(server, tmp_path):
    server.portions = [40_000, 0, 10_000]
    download(server.url, tmp_path / "w.pt", sha256=digest_bytes(server.content))
    assert server.asked == [None, "bytes=40000-", "bytes=40000-", "bytes=50000-"]
    assert (tmp_path / "w.pt").read_bytes() == server.content and [p.name for p in tmp_path.iterdir()] == ["w.pt"]


def test_download_goes_on_in_the_next_call(server, tmp_path):
    server.portions = [60_000, 0, 0, 0]
    with pytest.raises(DownloadError, match="broke after 60000 of 100000 bytes; the next call goes on from there.*By hand"):
        download(server.url, tmp_path / "w.pt")
    assert not (tmp_path / "w.pt").exists()
    server.asked.clear()
    download(server.url, tmp_path / "w.pt")
    assert server.asked == ["bytes=60000-"] and (tmp_path / "w.pt").read_bytes() == server.content


@pytest.mark.parametrize("etag", ['"one"', ""])
def test_download_of_a_file_that_changed_meanwhile(server, tmp_path, etag):
    "With a mark the server sends the new file whole; without one the length tells, and it is fetched anew."
    server.etag, server.portions = etag, [60_000, 0, 0, 0]
    with pytest.raises(DownloadError):
        download(server.url, tmp_path / "w.pt")
    server.content, server.etag = random.Random(2).randbytes(100_001), etag and '"two"'
    assert download(server.url, tmp_path / "w.pt").read_bytes() == server.content


def test_download_from_a_server_without_ranges(server, tmp_path):
    server.ranges, server.portions = False, [40_000, 50_000]
    assert download(server.url, tmp_path / "w.pt").read_bytes() == server.content
    assert len(server.asked) == 3


def test_download_statuses(server, tmp_path):
    server.status = [404]
    with pytest.raises(DownloadError, match="404"):
        download(server.url, tmp_path / "w.pt")
    assert len(server.asked) == 1
    server.status = [503, 200]
    assert download(server.url, tmp_path / "w.pt").read_bytes() == server.content
    server.status = [503] * 9
    with pytest.raises(DownloadError, match="503"):
        download(server.url, tmp_path / "v.pt")
    assert len(server.status) == 6  # three attempts


def test_download_with_another_hash_keeps_the_old_file(server, tmp_path):
    (tmp_path / "w.pt").write_text("old")
    with pytest.raises(DownloadError, match=f"SHA-256 is {digest_bytes(server.content)}, expected was {'0' * 64}"):
        download(server.url, tmp_path / "w.pt", sha256="0" * 64)
    assert (tmp_path / "w.pt").read_text() == "old" and not list(tmp_path.glob(".w.pt.partial"))


def test_two_downloads_at_once(server, tmp_path):
    "The second waits for the first and finds the file."
    threads = [threading.Thread(target=download, args=(server.url, tmp_path / "w.pt")) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert (tmp_path / "w.pt").read_bytes() == server.content


def test_weights_by_name(server, tmp_path, monkeypatch, model):
    "Fetched once over a line that breaks, hash noted, used from the cache without a network, and checked."
    server.content = save_glide(model, tmp_path / "source.pt").read_bytes()
    server.portions = [len(server.content) // 2]
    cache = tmp_path / "cache" / "glide"
    monkeypatch.setenv("DIFFLIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(OFFICIAL, "base-inpaint", server.url.replace("w.pt", "base_inpaint.pt"))
    assert torch.equal(answer(load_glide("base-inpaint")), answer(model))
    assert len(server.asked) == 2 and sorted(p.name for p in cache.iterdir()) == ["base_inpaint.pt", "base_inpaint.pt.sha256"]
    assert (cache / "base_inpaint.pt.sha256").read_text().split() == [digest_file(tmp_path / "source.pt"), "base_inpaint.pt"]
    server.shutdown()
    assert official_weights("base-inpaint", sha256=digest_bytes(server.content).upper()) == cache / "base_inpaint.pt"
    with pytest.raises(WeightsError, match="expected was 0000"):
        load_glide("base-inpaint", sha256="0" * 64)
    with pytest.raises(SettingsError, match="is none of the named variants and not 'base-inpaint'"):
        load_glide("base-inpaint", variant="base-inpaint")
    damaged = bytearray(server.content)
    damaged[len(damaged) // 2] ^= 1
    (cache / "base_inpaint.pt").write_bytes(damaged)
    with pytest.raises(WeightsError, match="has the SHA-256"):
        load_glide("base-inpaint")


def test_weights_by_name_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(OFFICIAL, "base", "http://127.0.0.1:1/dec-2021/base.pt")
    with pytest.raises(WeightsError, match=r"not in the cache.*http://127.0.0.1:1/dec-2021/base.pt.*put it at .*base\.pt"):
        load_glide("base", cache=tmp_path)
