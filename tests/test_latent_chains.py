"""From one latent run to the next: what belongs to weights stays with them, what is new learns, what was exchanged is told."""

import re
import shutil

import pytest
import torch
import twins
from safetensors.torch import load_file, save_file
from test_latent_runs import few_held_out, models, trained  # noqa: F401  fixtures

from difflit.adapters import trainable_parts
from difflit.checkpoints import CheckpointError
from difflit.config import SettingsError
from difflit.encoders import export_latent
from difflit.generation import generate, load_pipeline
from difflit.job_data import fill_caches
from difflit.recipes import prepare
from difflit.runs import open_run


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def begun(folder, **given):
    """A run that is prepared and not trained."""
    from test_latent_runs import SMALL

    return prepare(open_run({**SMALL, "run_dir": str(folder), **{k: str(v) if hasattr(v, "joinpath") else v for k, v in given.items()}}))


def test_layers_and_lengths_stay_with_the_weights(tmp_path, cache):
    trained(tmp_path / "run", cache=cache, steps=1, clip_skip=1, text_length=8)
    [encoder] = load_pipeline(tmp_path / "run", "cpu").tokenizer.encoders.text.values()
    assert (encoder.skip, encoder.length) == (1, 8)
    with torch.no_grad():
        own = generate(load_pipeline(tmp_path / "run", "cpu"), ["a red star"], steps=2, precision="fp32")
        how = {**load_pipeline(tmp_path / "run", "cpu").sampling, "steps": 2}
        out = generate(load_pipeline(export_latent(tmp_path / "run", tmp_path / "out"), "cpu"), ["a red star"], precision="fp32", **how)
    assert own.shape == out.shape and (own - out).abs().max() < 1e-3


def test_fresh_weights_learn_beside_adapters(tmp_path, cache, models):  # noqa: F811
    given = {"cache": cache, "model": "sd15", "init_from": models / "sd", "vae": models / "sd", "text_encoder": models / "t5", "lora_rank": 2, "steps": 1}
    for projection, wanted in (("auto", "projections."), ("replace", "attn2.to_k")):
        job = begun(tmp_path / projection, projection=projection, **given)
        live = {n for n, p in job.state.model.named_parameters() if p.requires_grad}
        assert any(wanted in n for n in live) and any("lora_" in n for n in live)
        assert live == set(trainable_parts(job.state.model))
        assert not any(n.startswith("unet.conv_in") for n in live)
    trained(tmp_path / "run", **given)
    with pytest.raises(SettingsError, match="diffusers"):
        export_latent(tmp_path / "run", tmp_path / "lora", format="lora")


def test_a_trained_projection_is_not_lost(tmp_path, cache, models):  # noqa: F811
    """Run → pipeline → run keeps what lies between UNet and text encoder."""
    given = {"cache": cache, "vae": models / "vae", "text_encoder": models / "t5", "steps": 2}
    first = trained(tmp_path / "run", **given)
    pipeline = export_latent(tmp_path / "run", tmp_path / "pipeline")
    again = begun(tmp_path / "again", init_from=pipeline, **given)
    name = next(n for n, _ in first.state.model.named_parameters() if n.startswith("projections."))
    kept = dict(first.state.ema.model.named_parameters())[name]
    assert torch.allclose(dict(again.state.model.named_parameters())[name], kept, atol=1e-6)


def test_encoders_that_trained_go_along(tmp_path, cache):
    trained(tmp_path / "text", cache=cache, steps=2, train_text=True)
    still = begun(tmp_path / "still", cache=cache, steps=1, init_from=tmp_path / "text")
    assert not still.data.train.text and list(still.tokenizer.training) == list(still.state.model.config.trained_encoders)
    assert not any(p.requires_grad for n, p in still.state.model.named_parameters() if n.startswith("encoders."))
    trained(tmp_path / "plain", cache=cache, steps=1)
    job = trained(tmp_path / "late", cache=cache, steps=2, train_text=True, init_from=tmp_path / "plain")
    assert any(p.requires_grad for n, p in job.state.model.named_parameters() if n.startswith("encoders."))


def test_adapters_of_another_rank(tmp_path, cache):
    trained(tmp_path / "base", cache=cache, steps=1)
    trained(tmp_path / "four", cache=cache, steps=2, init_from=tmp_path / "base", lora_rank=4)
    two = begun(tmp_path / "two", cache=cache, steps=1, init_from=tmp_path / "four", lora_rank=2)
    assert two.state.model.config.lora["rank"] == 2 and any("merged" in note for note in two.notes)
    none = begun(tmp_path / "none", cache=cache, steps=1, init_from=tmp_path / "four")
    assert not none.state.model.config.lora and all(p.requires_grad for p in none.state.model.parameters())


def test_what_was_exchanged_is_told(tmp_path, cache):
    place = tmp_path / "mine"
    twins.save_vae(place / "vae", twins.tiny_vae(seed=4, factor=4))
    given = {"cache": cache, "vae": place / "vae", "steps": 1}
    trained(tmp_path / "run", **given)
    file = next(place.rglob("*.safetensors"))
    save_file({n: t + 0.01 for n, t in load_file(file).items()}, file)
    for attempt in (lambda: load_pipeline(tmp_path / "run", "cpu"), lambda: export_latent(tmp_path / "run", tmp_path / "out")):
        with pytest.raises(SettingsError, match="was trained with autoencoder"):
            attempt()
    assert any("must learn anew" in note for note in begun(tmp_path / "next", init_from=tmp_path / "run", **given).notes)


def test_a_resumed_run_keeps_its_objective(tmp_path, cache):
    trained(tmp_path / "run", cache=cache, stop_after=4)
    with pytest.raises(CheckpointError, match="target=v, here target=eps"):
        begun(tmp_path / "run", cache=cache, resume="auto", target="eps")
    with pytest.raises(CheckpointError, match="adam"):
        begun(tmp_path / "run", cache=cache, resume="auto", optimizer="adam")
    job = begun(tmp_path / "run", cache=cache, resume="auto", offset_noise=0.1)
    assert any("offset_noise: 0.0 → 0.1" in note for note in job.notes)


def test_the_same_encoder_under_another_name(tmp_path, cache):
    """A copy of the autoencoder elsewhere is the same autoencoder: nothing is computed again."""
    trained(tmp_path / "first", cache=cache, steps=1)
    shutil.copytree(twins.Path(__file__).parent.parent / "difflit" / "assets" / "tiny", tmp_path / "models" / "other")
    job = trained(tmp_path / "run", cache=cache, steps=1, vae=tmp_path / "models" / "other", text_encoder=tmp_path / "models" / "other")
    assert not job.filled


def test_a_text_encoder_that_stayed_behind(tmp_path, monkeypatch, models):  # noqa: F811
    """Its states are in the cache: training needs no more of it; a new caption says what is missing."""
    shutil.copytree(models / "t5", tmp_path / "t5")
    given = {"cache": tmp_path / "cache", "text_encoder": tmp_path / "t5", "steps": 1}
    trained(tmp_path / "here", **given)
    for file in (tmp_path / "t5").rglob("*.safetensors"):
        file.unlink()
    job = trained(tmp_path / "there", **given, data="cache", fill=False)
    with pytest.raises(SettingsError):
        job.tokenizer(["words that nobody has encoded"])


def test_fill_names_what_cannot_be_computed(tmp_path, models):  # noqa: F811
    from difflit.config import FillSettings, resolve

    settings = resolve({"preset": "latent-tiny", "limit": 4, "image_size": 32, "cache": str(tmp_path / "cache"), "text_encoder": "t5-xxl"}, cls=FillSettings)
    with pytest.raises(SettingsError, match=re.escape("difflit pull t5-xxl")):
        fill_caches(settings)
