"""`difflit sample` from a saved model to files: every option, resumed batches, shared work, and what is refused, in one line and before any drawing."""

import json
import math

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution
from twins import save_sd
from typer.testing import CliRunner

from difflit.albums import read_picture
from difflit.cli import app
from difflit.diffusion import Diffusion
from difflit.files import atomic_write
from difflit.glide import create_glide
from difflit.models import model_card
from difflit.text import trimmed_tokenizer

WORDS = ["a red circle", "a blue square", "a green star"]
SMALL = dict(channels=32, channel_mult=(1, 1), residual_blocks=1, attention_downsamplings=(2,), text_context=8, text_width=64, text_layers=1, text_heads=2,
             position_map=False)


def save_model(folder, seed=0, **other):
    "A small GLIDE as a run saves it, with an opinion about words."
    tokenizer = trimmed_tokenizer(WORDS, 8)
    torch.manual_seed(seed)
    network = create_glide("tiny", **{**SMALL, "image_size": 16, "vocabulary": tokenizer.vocabulary, **other})
    for weight in network.parameters():
        if weight.ndim > 1 and not weight.any():
            nn.init.normal_(weight, std=0.05)
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / "ema.safetensors")
    card = model_card(network, diffusion=Diffusion("flow", "flow"), image_size=network.config.image_size, upscale_factor=2,
                      sampling={"steps": 4, "guidance": 2.0})
    atomic_write(folder / "config.json", card)
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("sample")
    save_model(root / "base")
    save_model(root / "up", seed=1, image_size=32, super_resolution=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(root / "photo.png")
    half = Image.new("L", (30, 20), 255)
    half.paste(0, (0, 0, 15, 20))
    half.save(root / "mask.png")
    config = Swin2SRConfig(image_size=64, embed_dim=32, depths=[2], num_heads=[2], window_size=8, upscale=2, upsampler="pixelshuffle")
    Swin2SRForImageSuperResolution(config).save_pretrained(root / "x2")
    judge = {"embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
             "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}}
    (root / "tiny-judge.json").write_text(json.dumps(judge))
    open_clip.add_model_config(root / "tiny-judge.json")
    save_file(open_clip.create_model("tiny-judge").state_dict(), root / "judge.safetensors")
    (root / "prompts.txt").write_text("\ufeff" + "\n".join(WORDS) + "\n\n", encoding="utf-8")
    return root


def sample(*words):
    "The command in this process: its exit code and what it says, an error's message included."
    result = CliRunner().invoke(app, ["sample", *map(str, words)])
    return result.exit_code, result.output.strip() or str(result.exception)


def drawn(folder, pattern="*.png"):
    return {path.name: np.array(Image.open(path)) for path in sorted(folder.glob(pattern)) if path.name != "grid.png"}


def test_a_file_of_prompts_becomes_files_that_say_what_made_them(places, tmp_path):
    code, said = sample("--checkpoint", places / "base", "--prompts", places / "prompts.txt", "--count", 2, "--out", tmp_path / "out", "--negative", "dull",
                        "--sampler", "DPM++ 2M", "--spacing", "karras", "--steps", 6, "--rescale", 0.5, "--interval", "0.1,50", "--seed", 7)
    assert code == 0 and said.endswith(f"6 pictures and grid.png in {tmp_path / 'out'}"), said
    pictures = drawn(tmp_path / "out")
    assert list(pictures)[0] == "00007-a-red-circle.png" and len(pictures) == 6 and (tmp_path / "out" / "grid.png").exists()
    says = read_picture(tmp_path / "out" / "00008-a-red-circle.png")
    assert (says["prompt"], says["seed"], says["negative"]) == ("a red circle", 8, "dull")
    assert says["sampling"] == {"steps": 6, "guidance": 2.0, "sampler": "DPM++ 2M", "spacing": "karras", "rescale": 0.5, "interval": [0.1, 50.0]}
    code, said = sample("--again", tmp_path / "out" / "00008-a-red-circle.png", "--out", tmp_path / "again")
    assert code == 0, said
    assert (drawn(tmp_path / "again")["again-00008-a-red-circle.png"] == pictures["00008-a-red-circle.png"]).all()


def test_a_second_start_draws_only_what_is_missing_and_parts_share_the_work(places, tmp_path):
    common = (places / "base", "--prompts", places / "prompts.txt", "--count", 3, "--batch", 2)
    assert sample(*common, "--out", tmp_path / "whole")[0] == 0
    whole = drawn(tmp_path / "whole")
    for name in list(whole)[4:]:
        (tmp_path / "whole" / name).unlink()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "whole").glob("0*.png")}
    assert sample(*common, "--out", tmp_path / "whole")[0] == 0
    assert all((a == b).all() for a, b in zip(drawn(tmp_path / "whole").values(), whole.values(), strict=True))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    for k in (1, 2):
        assert sample(*common, "--out", tmp_path / "shared", "--part", f"{k}/2")[0] == 0
    shared = drawn(tmp_path / "shared")
    assert list(shared) == list(whole) and all((shared[name] == whole[name]).all() for name in whole)
    code, said = sample(*common, "--out", tmp_path / "whole", "--guidance", 5)
    assert code == 1 and "is another picture already: its sampling" in said


def test_stages_fillings_and_changes(places, tmp_path):
    def size(*words):
        code, said = sample(places / "base", "--prompt", "a red circle", "--out", tmp_path / str(len(list(tmp_path.iterdir()))), *words)
        assert code == 0, said
        return next(iter(drawn(max(tmp_path.iterdir(), key=lambda p: int(p.name))).values())).shape[0]

    assert size("--upsampler", places / "up") == 32
    assert size("--enlarger", places / "x2") == 32
    assert size("--upsampler", places / "up", "--enlarger", places / "x2", "--factor", 4) == 128
    assert size("--image", places / "photo.png", "--strength", 0.3) == 16
    assert size("--image", places / "photo.png", "--mask", places / "mask.png") == 16
    assert size("--sampler", "ddim", "-o", "eta=0.5", "--threshold", 0.99) == 16


def test_a_latent_pipeline_draws_changes_and_fills_in(places, tmp_path):
    folder = save_sd(tmp_path / "sd")
    common = (folder, "--prompt", "a red circle", "--steps", 3, "--sampler", "dpmpp_2m_sde", "--negative", "dull")
    for name, words in (("plain", ()), ("changed", ("--image", places / "photo.png", "--strength", 0.4)),
                        ("filled", ("--image", places / "photo.png", "--mask", places / "mask.png"))):
        code, said = sample(*common, "--out", tmp_path / name, *words)
        assert code == 0, said
    pictures = [next(iter(drawn(tmp_path / name).values())) for name in ("plain", "changed", "filled")]
    assert {picture.shape for picture in pictures} == {(64, 64, 3)} and len({picture.tobytes() for picture in pictures}) == 3
    with pytest.warns(UserWarning, match="122 tokens for clip, which reads 77: the end of 'a red circle"):
        assert sample(*common, "--prompt", "a red circle " * 40, "--out", tmp_path / "long")[0] == 0


def test_the_best_candidates_are_kept(places, tmp_path):
    judge = ("--rank-model", "tiny-judge", "--rank-weights", places / "judge.safetensors", "--candidates", 5, "--top", 2)
    code, said = sample(places / "base", "--prompt", "a red circle", "--out", tmp_path / "one", "--format", "jpg", *judge)
    assert code == 0, said
    record = json.loads((tmp_path / "one" / "metadata.json").read_text())
    assert sorted(p.name for p in (tmp_path / "one").glob("image*")) == ["image_rank_001.jpg", "image_rank_002.jpg"]
    best = [read_picture(tmp_path / "one" / f"image_rank_00{k}.jpg") for k in (1, 2)]
    assert [info["score"] for info in best] == sorted(record["scores"], reverse=True)[:2]
    assert sample(places / "base", "--prompts", places / "prompts.txt", "--out", tmp_path / "many", *judge)[0] == 0
    assert len(list((tmp_path / "many").glob("0*/image_rank_00[12].png"))) == 6
    code, said = sample(places / "base", "--prompt", "a red circle", "--out", tmp_path / "gif", "--format", "gif", *judge)
    assert code == 1 and "png or jpg" in said and not list((tmp_path / "gif").iterdir())  # said before anything is drawn


@pytest.mark.parametrize(("words", "message"), [
    (("--sampler", "eulre"), "unknown sampler 'eulre': did you mean 'euler'"),
    (("--sampler", "unipc", "-o", "order=5"), "unipc has the orders 1, 2 and 3, not 5"),
    (("--sampler", "euler", "-o", "eta=1"), "sampler euler has no option 'eta'"),
    (("--spacing", "karas"), "did you mean 'karras'"),
    (("--prompt", "  "), "prompt 2 is empty"),
    (("--negative", "dull", "--guidance", 1), "a negative prompt does nothing with guidance 1"),
    (("--upsampler", "nowhere"), "nowhere holds no model"),
    (("--enlarger", "nowhere"), "there is no model 'nowhere'"),
    (("--factor", 4), "give the network that does it"),
    (("--out", "/proc/nowhere"), "pictures cannot be written to /proc/nowhere"),
    (("--image", "none.png", "--strength", 0.5), "none.png cannot be read as a picture"),
    (("--interval", "3"), "two numbers are meant, such as 0.3,5"),
    (("--part", "3/2"), "the first number is at least 1"),
    (("--candidates", 2, "--rank-model", "ViT-L/15"), "there is no CLIP 'ViT-L/15': did you mean ViT-L-1"),
    (("--format", "gif"), "pictures are written as png or jpg"),
    (("--clip", "nowhere"), "nowhere"),
    (("--prompts", "none.txt"), "--prompts none.txt cannot be read"),
])
def test_bad_input_gets_one_clear_error(places, tmp_path, words, message):
    code, said = sample(places / "base", "--prompt", "a red circle", "--out", tmp_path / "out", *words)
    assert code == 1 and message in said, said
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True  # nothing half-done is left


def test_a_model_that_breaks_stops_with_the_step(places, tmp_path):
    broken = save_model(tmp_path / "broken")
    weights = load_file(broken / "ema.safetensors")
    name = next(name for name in weights if name.startswith("out."))
    save_file({k: v * (math.nan if k == name else 1) for k, v in weights.items()}, broken / "ema.safetensors")
    code, said = sample(broken, "--prompt", "a red circle", "--out", tmp_path / "out")
    assert code == 1 and "step 1 of 4" in said and "NaN" in said
    assert not list((tmp_path / "out").glob("*.png"))
