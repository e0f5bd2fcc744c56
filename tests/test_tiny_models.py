"""The tiny models that ship with the package: they load with the libraries whose formats they follow, and are as good as their note says."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from make_tiny_models import LENGTH, OUT, UNET, WIDTH, latents_of, pictures, questions, reconstruction, token_numbers
from transformers import CLIPTextModel, CLIPTokenizer

from difflit.diffusion import make_betas
from difflit.oracles import alignment
from difflit.sources import ShapesSource
from difflit.text import clip_tokenizer


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(OUT / "vae").float().eval()


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(OUT / "tokenizer")


def test_folder_is_small_and_names_its_parts() -> None:
    files = [f for f in OUT.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 1_000_000
    index = json.loads((OUT / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    parts = {name for name, value in index.items() if isinstance(value, list) and value[0]}
    assert parts == {f.name for f in OUT.iterdir() if f.is_dir()} == {"vae", "unet", "text_encoder", "tokenizer", "scheduler"}
    assert not any("_name_or_path" in f.read_text() for f in files if f.suffix == ".json"), "a path of the machine it was made on"


def test_vae_copies_held_out_scenes(vae: AutoencoderKL) -> None:
    scenes = pictures("validation", 128)
    quality = reconstruction(vae, scenes)
    assert float(quality.mean()) > 32.5 and float(quality.min()) > 25, (float(quality.mean()), float(quality.min()))
    source = ShapesSource(split="validation", image_size=64)
    latents = latents_of(vae, scenes)
    assert latents.shape[1:] == (4, 16, 16)
    with torch.no_grad():
        copies = vae.decode(latents).sample.clamp(-1, 1)
    assert alignment(copies, [source[i].caption for i in range(128)])["alignment.all"]["value"] > 0.99


def test_scaling_factor_is_one_over_std(vae: AutoencoderKL) -> None:
    latents = latents_of(vae, pictures("train", 1024))
    assert float(latents.std()) * vae.config.scaling_factor == pytest.approx(1, rel=0.01)
    assert latents.mean((0, 2, 3)).abs().max() * vae.config.scaling_factor < 0.02
    assert latents.std((0, 2, 3)).mul(vae.config.scaling_factor).sub(1).abs().max() < 0.02
    assert vae.config.shift_factor is None


def test_tokenizer_cuts_captions_as_clip_does(tokenizer: CLIPTokenizer) -> None:
    full = clip_tokenizer()
    captions = {c for split in ("train", "validation", "test") for c in ShapesSource(split=split, seed=5).captions(1000)}
    for caption in [*sorted(captions), "A Large RED star!"]:
        numbers = tokenizer(caption).input_ids
        pieces = [full.pieces[n] for n in full.encode(caption)]
        if "!" not in caption:
            assert tokenizer.convert_ids_to_tokens(numbers) == ["<|startoftext|>", *pieces, "<|endoftext|>"]
            assert len(numbers) <= LENGTH == tokenizer.model_max_length
        assert tokenizer.decode(numbers, skip_special_tokens=True).replace(" ", "") == caption.lower().replace(" ", "")
    assert tokenizer("").input_ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert tokenizer.decode(tokenizer("東京 🗼 zebra").input_ids, skip_special_tokens=True).replace(" ", "") == "東京🗼zebra"  # no text is unknown


def test_text_encoder_reads_padded_captions(tokenizer: CLIPTokenizer) -> None:
    encoder, notes = CLIPTextModel.from_pretrained(OUT / "text_encoder", output_loading_info=True)
    assert not any(notes.values()), notes
    tokens, said = questions("validation", 256, tokenizer)
    assert len(tokenizer) == encoder.config.vocab_size and int(tokens.max()) == encoder.config.eos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id
    with torch.no_grad():
        states = encoder.float()(tokens).last_hidden_state
    assert states.shape == (256, LENGTH, WIDTH) and states.isfinite().all() and 0.5 < float(states.std()) < 2
    ends = states[:, -1]  # those that say the same lie nearer to one another than those that do not
    distance = torch.cdist(ends, ends)
    same = (said[:, None] == said[None]).all(-1)
    assert distance[same].max() < distance[~same].median()


def test_scheduler_and_unet_fit() -> None:
    scheduler = DDIMScheduler.from_pretrained(OUT / "scheduler")
    assert torch.allclose(scheduler.betas.double(), make_betas("scaled_linear"), rtol=1e-5)
    assert scheduler.config.prediction_type == "v_prediction"
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(OUT / "unet"))
    assert {name: getattr(unet.config, name) for name in UNET} == UNET
    empty = token_numbers(CLIPTokenizer.from_pretrained(OUT / "tokenizer"), [""])
    with torch.no_grad():
        states = CLIPTextModel.from_pretrained(OUT / "text_encoder", dtype=torch.float32)(empty).last_hidden_state
        assert unet(torch.zeros(1, 4, 16, 16), 500, encoder_hidden_states=states).sample.shape == (1, 4, 16, 16)
