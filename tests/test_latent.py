"""Models in the hub's formats: loaded, saved, compared with diffusers' own pipeline; what does not fit is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import twins
from safetensors.torch import load_file, save_file

from difflit import pipelines
from difflit.config import SettingsError
from difflit.diffusion import Diffusion
from difflit.latent import (
    LatentConfig, LatentDenoiser, TextEncoder, adapt_text, create_latent, diffusion_of, encoder_entry, fold_projection, latent_denoiser, scheduler_config,
    text_condition, unet_config, unused_parameters,
)
from difflit.pipelines import (
    component_digest, find_model, load_autoencoder, load_parts, load_text_encoder, load_unet, pull, save_pipeline, wanted_files,
)
from difflit.denoising import Denoiser, begin, per_sample_noise
from difflit.samplers import ddim
from difflit.spacing import sigma_steps
from difflit.text import weights_digest

PROMPTS = ["a red circle on a blue background", "two white stars"]


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Path:
    return twins.save_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    return twins.save_t5(tmp_path_factory.mktemp("models") / "t5")


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    "Neither this machine's models nor its caches."
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("DIFFLIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DIFFLIT_MODELS", raising=False)


def pipeline_of(folder: Path):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(str(folder), local_files_only=True).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images_of(pipe, steps=4, **options):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return pipe(PROMPTS, latents=noise.clone(), num_inference_steps=steps, guidance_scale=3.0, output_type="pt", height=64, width=64, **options).images


def ours(parts, model=None, steps=4, x=None):
    "The same images by this house's own sampler."
    model = model or parts.denoiser()
    diffusion = Diffusion(**parts.diffusion)
    denoise = Denoiser(model, diffusion, text_condition(parts.encoders, PROMPTS), text_condition(parts.encoders, [""]), 3.0)
    sigmas = sigma_steps(diffusion, steps, "trailing")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5)) if x is None else x
    with torch.no_grad():
        return parts.autoencoder.decode(ddim(denoise, noise / float(diffusion.alpha_sigma(torch.tensor(999))[0]), sigmas)).add(1).div(2).clamp(0, 1)


def changed(folder: Path, file: str, **values) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# what diffusers computes

def test_a_pipeline_saved_by_us_gives_diffusers_identical_images(sd, tmp_path):
    parts = load_parts(sd)
    saved = save_pipeline(tmp_path / "ours", parts.denoiser(), parts.autoencoder, parts.encoders, parts.diffusion, scheduler=parts.scheduler)
    assert torch.equal(images_of(pipeline_of(saved)), images_of(pipeline_of(sd)))


def test_a_trained_pipeline_is_what_diffusers_reads(sd, tmp_path):
    parts = load_parts(sd)
    model = parts.denoiser()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.01)
    pipe = pipeline_of(sd)
    pipe.unet.load_state_dict(model.unet.state_dict())
    saved = save_pipeline(tmp_path / "ours", model, parts.autoencoder, parts.encoders, parts.diffusion, scheduler=parts.scheduler)
    assert torch.equal(images_of(pipeline_of(saved)), images_of(pipe))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_our_ddim_gives_the_images_of_diffusers_pipeline(sd, tmp_path, prediction):
    from diffusers import DDIMScheduler

    folder = shutil.copytree(sd, tmp_path / "sd")
    changed(folder, "scheduler/scheduler_config.json", _class_name="DDIMScheduler", prediction_type=prediction, set_alpha_to_one=True,
            timestep_spacing="trailing", steps_offset=0)
    changed(folder, "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    pipe = pipeline_of(folder)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    theirs, mine = images_of(pipe, 8), ours(load_parts(folder), steps=8)
    assert (theirs - mine).abs().max() < 1e-5 and theirs.std() > 0.05


def test_a_t5_pipeline_comes_back_identical(sd, t5, tmp_path):
    parts = load_parts(sd)
    for how in ("linear", "mlp", "replace"):
        encoders = {"t5": load_text_encoder(t5)}
        parts = load_parts(sd, ("unet", "vae", "scheduler"))
        model = parts.denoiser(how, encoders, seed=3)
        saved = save_pipeline(tmp_path / how, model, parts.autoencoder, encoders, parts.diffusion)
        again = load_parts(saved)
        parts.encoders = encoders
        assert again.config == model.config and again.encoders["t5"].digest == encoders["t5"].digest
        assert torch.equal(ours(again), ours(parts, model))


def test_two_encoders_and_one_that_is_only_referred_to(sd, t5, tmp_path, monkeypatch):
    parts = load_parts(sd, ("unet", "vae", "scheduler"))
    encoders = {"clip": load_text_encoder(sd), "big": load_text_encoder(t5, called="big", length=20)}
    model = latent_denoiser(parts.unet, encoders, "mlp")
    saved = save_pipeline(tmp_path / "two", model, parts.autoencoder, encoders, parts.diffusion, refer={"big": str(t5)})
    assert not (saved / "text_encoder_2").exists()
    again = load_parts(saved)
    parts.encoders = encoders
    assert torch.equal(ours(again), ours(parts, model))
    other = twins.save_t5(tmp_path / "other", seed=9)
    changed(saved, "difflit.json", encoders={**json.loads((saved / "difflit.json").read_text())["encoders"],
                                             "big": {"reference": str(other), "digest": encoders["big"].digest, "length": 20}})
    with pytest.raises(SettingsError, match="was made with text encoder big .* fetch that very model"):
        load_parts(saved)


def test_an_encoder_that_trains_is_saved_with_its_new_weights(sd, tmp_path):
    parts = load_parts(sd)
    model = latent_denoiser(parts.unet, parts.encoders, train=["clip"])
    with torch.no_grad():
        model.encoders["clip"].model.encoder.layers[0].mlp.fc1.weight.add_(0.3)
    saved = save_pipeline(tmp_path / "trained", model, parts.autoencoder, parts.encoders, parts.diffusion, scheduler=parts.scheduler)
    again = load_parts(saved)
    states = {n: e.encode(PROMPTS)["states"] for n, e in (("new", again.encoders["clip"]), ("old", parts.encoders["clip"]))}
    inside = model.encode_text(text={"clip": parts.encoders["clip"].tokenize(PROMPTS)})["clip"]["states"]
    assert torch.equal(states["new"], inside) and not torch.allclose(states["new"], states["old"])
    assert again.encoders["clip"].digest != parts.encoders["clip"].digest
    assert not torch.equal(images_of(pipeline_of(saved)), images_of(pipeline_of(sd)))
    assert torch.equal(ours(again), ours(again, model)), "the network's own copy says the same"


def test_a_pipeline_in_half_precision(sd, tmp_path):
    parts = load_parts(sd)
    saved = save_pipeline(tmp_path / "half", parts.denoiser(), parts.autoencoder, parts.encoders, parts.diffusion, scheduler=parts.scheduler, dtype="fp16")
    assert all(t.dtype == torch.float16 for f in saved.rglob("*.safetensors") for n, t in load_file(f).items() if t.is_floating_point())
    assert (images_of(pipeline_of(saved)) - images_of(pipeline_of(sd))).abs().max() < 0.02
    assert load_parts(saved).autoencoder.digest == parts.autoencoder.digest, "what was cached with the original stays good"


def float_types(folder: Path) -> set:
    return {t.dtype for f in folder.rglob("*.safetensors") for t in load_file(f).values() if t.is_floating_point()}


def halved(sd: Path, folder: Path, *parts: str) -> Path:
    "A pipeline some of whose parts lie there in half precision, as published ones do."
    shutil.copytree(sd, folder)
    for file in (f for part in parts for f in (folder / part).glob("*.safetensors")):
        save_file({n: t.half() if t.is_floating_point() else t for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    if "text_encoder" in parts:
        changed(folder, "text_encoder/config.json", dtype="float16")
    return folder


@pytest.mark.parametrize("dtype", [None, "fp16", "bf16"])
def test_parts_of_several_precisions_are_written_in_one(sd, tmp_path, dtype):
    from diffusers import StableDiffusionPipeline

    mixed = load_parts(halved(sd, tmp_path / "mixed", "vae", "text_encoder"))
    before = {n: t.clone() for n, t in mixed.autoencoder.vae.state_dict().items()}
    saved = save_pipeline(tmp_path / "one", mixed.denoiser(), mixed.autoencoder, mixed.encoders, mixed.diffusion, scheduler=mixed.scheduler, dtype=dtype)
    assert float_types(saved) == {{None: torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]}
    pipe = StableDiffusionPipeline.from_pretrained(str(saved), local_files_only=True)  # and nobody says torch_dtype
    pipe.set_progress_bar_config(disable=True)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    drawn = images_of(pipe)
    if dtype is None:
        assert torch.equal(drawn, images_of(pipeline_of(tmp_path / "mixed")))
    again, notes = load_parts(saved), json.loads((saved / "difflit.json").read_text())
    assert again.autoencoder.digest == mixed.autoencoder.digest and again.encoders["clip"].digest == mixed.encoders["clip"].digest
    if dtype != "fp16":
        assert notes["encoders"]["clip"]["stored"] != notes["encoders"]["clip"]["digest"] and notes["autoencoder"]["stored"] != notes["autoencoder"]["digest"]
    assert all(torch.equal(t, before[n]) for n, t in mixed.autoencoder.vae.state_dict().items()), "saving changes nothing in memory"


def test_the_exported_tiny_model_runs_in_diffusers(tmp_path):
    from diffusers import StableDiffusionPipeline

    from difflit.encoders import Encoders, export_latent
    from difflit.models import model_card

    encoders = Encoders("tiny", ["tiny"])
    model = create_latent("latent-tiny", {n: encoder_entry(e) for n, e in encoders.text.items()})
    (tmp_path / "run").mkdir()
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "run" / "model.safetensors")
    card = model_card(model, diffusion={"schedule": "scaled_linear", "target": "v"}, image_size=64, sampling={"steps": 2}, **encoders.card())
    (tmp_path / "run" / "config.json").write_text(card)
    folder = export_latent(tmp_path / "run", tmp_path / "pipeline")
    assert float_types(folder) == {torch.float32}
    pipe = StableDiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=2).images[0].size == (64, 64)


def test_the_size_and_the_sampling_of_a_run_travel_with_it(sd, tmp_path):
    from difflit.generation import load_pipeline

    parts = load_parts(sd)
    rest = parts.denoiser(), parts.autoencoder, parts.encoders, parts.diffusion
    how = {"sampler": "ddim", "steps": 3, "spacing": "trailing", "guidance": 2.0}
    saved = save_pipeline(tmp_path / "small", *rest, scheduler=parts.scheduler, image_size=32, sampling=how)
    with torch.no_grad():
        assert pipeline_of(saved)(PROMPTS[0], num_inference_steps=1, output_type="pt").images.shape[2:] == (32, 32)
    again, stage = load_parts(saved), load_pipeline(saved, "cpu")
    assert (again.unet.config["sample_size"], again.config.unet["sample_size"], again.sampling) == (4, 4, how)
    assert (stage.image_size, stage.sampling) == (32, how)
    plain = load_pipeline(save_pipeline(tmp_path / "plain", *rest, scheduler=parts.scheduler), "cpu")
    assert (plain.image_size, plain.sampling["guidance"]) == (64, 7.5)
    with pytest.raises(SettingsError, match="image_size=33 is no multiple of 8"):
        save_pipeline(tmp_path / "no", *rest, image_size=33)


# where models lie

def test_where_models_are_looked_for(sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="'sd15' is not on this machine: looked in ./models, .*difflit pull sd15"):
        find_model("sd15")
    with pytest.raises(SettingsError, match="no model 'sd-15'.*did you mean 'sd15'"):
        find_model("sd-15")
    with pytest.raises(SettingsError, match="hub's cache .* for owner/thing. .*difflit pull owner/thing"):
        find_model("owner/thing")
    hub = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("a" * 40)
    snapshot = shutil.copytree(sd, hub / "snapshots" / ("a" * 40))
    assert find_model("sd15") == snapshot and find_model("sd15/vae") == snapshot / "vae"
    assert find_model("stable-diffusion-v1-5/stable-diffusion-v1-5/unet") == snapshot / "unet"
    assert load_autoencoder("sd15").name == "sd15-vae"
    shutil.copytree(sd, tmp_path / "elsewhere" / "sd15")
    monkeypatch.setenv("DIFFLIT_MODELS", str(tmp_path / "elsewhere"))
    assert find_model("sd15") == tmp_path / "elsewhere" / "sd15"
    shutil.copytree(sd, tmp_path / "models" / "sd15")
    assert find_model("sd15") == Path("models/sd15")
    assert load_autoencoder("stable-diffusion-v1-5/stable-diffusion-v1-5/vae").digest == component_digest(sd / "vae")


def test_an_encoder_in_a_folder_of_a_repository_has_its_tokenizer_beside_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFLIT_MODELS", str(tmp_path))
    model, tokenizer = twins.tiny_clip(projection=24)
    model.save_pretrained(tmp_path / "clip-g" / "text_encoder_2")
    tokenizer.save_pretrained(tmp_path / "clip-g" / "tokenizer_2")
    encoder = load_text_encoder("clip-g")
    assert (encoder.pooled, encoder.skip, encoder.norm, encoder.width) == (24, 1, False, 32)
    got = encoder.encode(PROMPTS)
    with torch.no_grad():
        theirs = model(tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids, output_hidden_states=True)
    assert got["states"].shape == (2, 77, 32) and got["pooled"].shape == (2, 24)
    assert torch.equal(got["states"], theirs.hidden_states[-2])


FILES = ["model_index.json", "README.md", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
         "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_pytorch_model.bin",
         "text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors", "text_encoder/config.json", "text_encoder_2/model.safetensors",
         "text_encoder_2/config.json", "tokenizer/vocab.json", "tokenizer_2/merges.txt", "safety_checker/model.safetensors", "vae_decoder/model.onnx",
         "vae/diffusion_pytorch_model.fp16.safetensors"]


def test_only_what_is_needed_is_pulled():
    assert wanted_files(FILES) == [
        "README.md", "model_index.json", "text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors", "tokenizer/vocab.json", "tokenizer_2/merges.txt", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"]
    assert wanted_files(FILES, "text_encoder_2") == ["text_encoder_2/config.json", "text_encoder_2/model.safetensors", "tokenizer_2/merges.txt"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json", "model.fp16-00001-of-00002.safetensors",
              "model.safetensors.index.fp16.json", "config.json", "spiece.model", "pytorch_model.bin", "tf_model.h5"]
    assert wanted_files(shards) == ["config.json", *shards[:3], "spiece.model"]
    with pytest.raises(SettingsError, match="only pickles .pytorch_model.bin"):
        wanted_files(["config.json", "pytorch_model.bin"])


def test_pulling_names_what_went_wrong_and_puts_things_where_they_are_found(sd, tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def fetched(repository, allow_patterns, cache_dir, local_dir):
        asked.update(repository=repository, files=allow_patterns)
        return str(shutil.copytree(sd, local_dir))

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repository: FILES)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert pull("sd15", tmp_path / "models") == tmp_path / "models" / "sd15"
    monkeypatch.chdir(tmp_path)
    assert find_model("sd15").exists() and asked["repository"] == "stable-diffusion-v1-5/stable-diffusion-v1-5" and "v1-5-pruned.ckpt" not in asked["files"]
    assert pull("owner/thing", tmp_path / "models") == tmp_path / "models" / "owner" / "thing" and find_model("owner/thing") == Path("models/owner/thing")
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repository: (_ for _ in ()).throw(OSError("no route to host")))
    with pytest.raises(SettingsError, match="could not be fetched: no route to host"):
        pull("sd15")
    with pytest.raises(SettingsError, match="did you mean 'sd15'"):
        pull("sd-15")


def test_the_pull_command_and_a_node_without_a_network(sd, tmp_path, monkeypatch):
    """`difflit pull` on a login node, twice the same way; on a compute node the first line says what is missing and how to get it."""
    import huggingface_hub
    from typer.testing import CliRunner

    from difflit.cli import app

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repository: FILES)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, allow_patterns, cache_dir, local_dir: str(shutil.copytree(sd, local_dir)))
    done = CliRunner().invoke(app, ["pull", "sd15", "sdxl-vae", "--to", str(tmp_path / "store")])
    assert done.exit_code == 0 and done.output.count(str(tmp_path / "store")) == 2, done.output
    monkeypatch.setenv("DIFFLIT_MODELS", str(tmp_path / "store"))
    assert load_parts("sd15").autoencoder.digest == component_digest(sd / "vae") and find_model("sdxl-vae").exists()

    def no_network(*_, **__):
        raise AssertionError("reached for the network")

    monkeypatch.setattr("socket.socket.connect", no_network)
    with pytest.raises(SettingsError, match=r"model 't5-xxl' is not on this machine: looked in .*where there is a network: difflit pull t5-xxl"):
        load_text_encoder("t5-xxl", weights=False)


# what weights are called

def test_a_digest_does_not_depend_on_how_weights_are_cut(sd, tmp_path):
    tensors = load_file(sd / "unet" / "diffusion_pytorch_model.safetensors")
    digest = component_digest(sd / "unet")
    assert digest == weights_digest(tensors) == component_digest(sd / "unet" / "diffusion_pytorch_model.safetensors")
    unet = load_unet(sd)
    unet.save_pretrained(tmp_path / "cut", max_shard_size="1MB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2 and component_digest(tmp_path / "cut") == digest
    assert load_unet(tmp_path / "cut").state_dict().keys() == unet.state_dict().keys()
    name = next(iter(tensors))
    tensors[name][0] += 1e-3
    save_file(tensors, tmp_path / "cut" / "other.safetensors")
    assert component_digest(tmp_path / "cut" / "other.safetensors") != digest


def test_a_digest_is_remembered_until_the_file_changes(sd, tmp_path, monkeypatch):
    file = Path(shutil.copy(sd / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "vae.safetensors"))
    digest = component_digest(file)
    monkeypatch.setattr(pipelines, "_streamed_digest", lambda *a: "computed again")
    assert component_digest(file) == digest
    file.touch()
    assert component_digest(file) == "computed again"


# single files

def as_original(tensors: dict) -> dict:
    "A VAE of one block per level in the names of the original code: the inverse of diffusers' conversion."
    names, levels = {}, 1 + max(int(n.split(".")[2]) for n in tensors if n.startswith("encoder.down_blocks."))
    for name in tensors:
        new = name
        for side, theirs in (("encoder.down_blocks", "encoder.down"), ("decoder.up_blocks", "decoder.up")):
            if name.startswith(side):
                parts = name.split(".")
                level = int(parts[2]) if theirs.endswith("down") else levels - 1 - int(parts[2])
                kind = {"resnets": f"block.{parts[4]}"}.get(parts[3]) or parts[3].replace("downsamplers", "downsample").replace("upsamplers", "upsample")
                new = ".".join([theirs, str(level), kind, *parts[5:]])
        new = new.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2").replace("mid_block.attentions.0", "mid.attn_1")
        for old, fresh in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"), ("conv_norm_out", "norm_out"),
                           ("conv_shortcut", "nin_shortcut")):
            new = new.replace(old, fresh)
        names[name] = new
    shape = lambda n, t: t[:, :, None, None] if "attn_1" in n and n.endswith("weight") and t.ndim == 2 else t
    return {new: shape(new, tensors[name]).contiguous() for name, new in names.items()}


def test_a_vae_in_one_file_in_either_naming(tmp_path):
    folder = twins.save_vae(tmp_path / "vae", twins.tiny_vae(scaling_factor=0.5))
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    wanted = load_autoencoder(folder).encode(images)
    for label, content in (("new", tensors), ("old", as_original(tensors)), ("inside", {f"first_stage_model.{n}": t for n, t in as_original(tensors).items()})):
        file = tmp_path / f"{label}.safetensors"
        save_file(content, file)
        shutil.copy(folder / "config.json", file.with_suffix(".json"))
        coder = load_autoencoder(file)
        assert torch.allclose(coder.encode(images), wanted, atol=1e-6) and coder.scaling_factor == 0.5, label
    assert coder.digest == component_digest(file, "first_stage_model.") and coder.name == "inside-vae"
    with pytest.raises(SettingsError, match="you says scaling_factor 0.18215, but autoencoder inside-vae has 0.5"):
        load_autoencoder(file, scaling_factor=0.18215)
    file.with_suffix(".json").unlink()
    with pytest.raises(SettingsError, match="does not say its scaling factor, .*scaling_factor=0.13025 .SDXL."):
        load_autoencoder(file)


def test_a_whole_checkpoint_in_one_file(sd, tmp_path):
    tensors = {f"model.diffusion_model.{n}": t for n, t in load_file(sd / "unet" / "diffusion_pytorch_model.safetensors").items()}
    with pytest.raises(SettingsError, match="holds no UNet"):
        pipelines._known_unet(Path(save_vae_file(sd, tmp_path)))
    unet = {n.removeprefix("model.diffusion_model."): t for n, t in tensors.items()}
    text = {f"cond_stage_model.transformer.text_model.{n}": t for n, t in load_file(sd / "text_encoder" / "model.safetensors").items()}
    vae = {f"first_stage_model.{n}": t for n, t in as_original(load_file(sd / "vae" / "diffusion_pytorch_model.safetensors")).items()}
    file = tmp_path / "whole.safetensors"
    save_file({**unet, **text, **vae}, file)
    for which in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (tmp_path / "whole").mkdir(exist_ok=True)
        shutil.copytree(sd / which, tmp_path / "whole" / which, ignore=shutil.ignore_patterns("*.safetensors"))
    for weights in (True, False):
        alone = load_text_encoder(file, weights=weights, length=20)
        assert (alone.name, alone.length, alone.digest) == ("clip", 20, component_digest(file, "cond_stage_model.transformer."))
    assert load_text_encoder(file, skip=1, called="mine").name == "mine"
    parts, wanted = load_parts(file, ("vae", "text", "scheduler")), load_parts(sd)
    assert parts.diffusion == wanted.diffusion
    assert torch.equal(parts.encoders["clip"].encode(PROMPTS)["states"], wanted.encoders["clip"].encode(PROMPTS)["states"])
    latents = torch.randn(1, 4, 8, 8)
    assert torch.allclose(parts.autoencoder.decode(latents), wanted.autoencoder.decode(latents), atol=1e-6)


def as_original_unet(tensors: dict) -> dict:
    "A UNet of two levels and one block per level in the names of the original code, written out from its block numbers."
    import re

    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
              "conv_shortcut": "skip_connection"}
    outside = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
               "conv_norm_out": "out.0", "conv_out": "out.2"}
    places = {"down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.attentions.0": "input_blocks.1.1",
              "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op", "down_blocks.1.resnets.0": "input_blocks.3.0",
              "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
              "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.resnets.1": "output_blocks.1.0",
              "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv", "up_blocks.1.resnets.0": "output_blocks.2.0",
              "up_blocks.1.attentions.0": "output_blocks.2.1", "up_blocks.1.resnets.1": "output_blocks.3.0",
              "up_blocks.1.attentions.1": "output_blocks.3.1", **outside}
    renamed = {}
    for name, tensor in tensors.items():
        start = next(p for p in places if name.startswith(p + "."))
        rest = name.removeprefix(start + ".")
        rest = re.sub(r"^(\w+)(?=\.)", lambda m: resnet.get(m[1], m[1]), rest) if ".resnets." in f".{start}." else rest
        renamed[f"model.diffusion_model.{places[start]}.{rest}"] = tensor
    assert len(renamed) == len(tensors)
    return renamed


def test_a_unet_in_one_file_in_either_naming(sd, tmp_path):
    wanted, x = load_unet(sd), torch.randn(2, 4, 8, 8)
    tensors, given = load_file(sd / "unet" / "diffusion_pytorch_model.safetensors"), (torch.tensor([3.0, 700.0]), torch.randn(2, 77, 32))
    for label, content in (("new", tensors), ("old", as_original_unet(tensors))):
        save_file(content, tmp_path / f"{label}.safetensors")
        (tmp_path / label / "unet").mkdir(parents=True)
        shutil.copy(sd / "unet" / "config.json", tmp_path / label / "unet")
        with torch.no_grad():
            assert torch.equal(load_unet(tmp_path / f"{label}.safetensors")(x, *given).sample, wanted(x, *given).sample), label


@pytest.mark.parametrize("kind", ["gated-gelu", "relu"])
def test_a_t5_in_one_file_needs_no_configuration(tmp_path, kind):
    model, tokenizer = twins.tiny_t5()
    config = type(model.config)(**{**model.config.to_dict(), "feed_forward_proj": kind, "num_layers": 3, "d_kv": 6})
    with twins.seeded(4):
        model = type(model)(config).eval()
    folder = twins.save_text(tmp_path / "t5", model, tokenizer)
    wanted, tensors = load_text_encoder(folder), load_file(folder / "model.safetensors")
    file = tmp_path / "alone.safetensors"
    file_of = lambda content: save_file({n: t.contiguous() for n, t in content.items()}, file)
    file_of(tensors)
    with pytest.raises(SettingsError, match="alone.safetensors brings no tokenizer: put the folder alone/tokenizer beside it, or take one of a T5"):
        load_text_encoder(file)
    tokenizer.save_pretrained(tmp_path / "alone" / "tokenizer")
    found = load_text_encoder(file)
    assert (found.name, found.ragged, found.digest) == ("t5", True, wanted.digest)
    assert torch.equal(found.encode(PROMPTS)["states"], wanted.encode(PROMPTS)["states"])
    assert load_text_encoder(file, weights=False).recipe() == wanted.recipe()
    assert load_text_encoder(file, "bf16").encode(PROMPTS)["states"].dtype == torch.bfloat16
    words = tensors.get("shared.weight", tensors.get("encoder.embed_tokens.weight"))
    bare = {n: t for n, t in tensors.items() if n not in ("shared.weight", "encoder.embed_tokens.weight")}
    file_of({**bare, "encoder.embed_tokens.weight": words, "decoder.final_layer_norm.weight": torch.ones(48)})  # the other name, and half of a translator
    assert torch.equal(load_text_encoder(file).encode(PROMPTS)["states"], wanted.encode(PROMPTS)["states"])
    scaled = {**tensors, "encoder.block.0.layer.0.SelfAttention.q.scale_weight": torch.ones(1)}
    for wrong in (scaled, {n: t for n, t in tensors.items() if "block.1.layer.0" not in n}):
        file_of(wrong)
        with pytest.raises(SettingsError, match=r"alone.safetensors: its text encoder does not fit: encoder.block.[01].layer.0"):
            load_text_encoder(file)


def test_a_clip_in_one_file(sd, tmp_path):
    folder, file = sd / "text_encoder", tmp_path / "clip.safetensors"
    tensors = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in load_file(folder / "model.safetensors").items()}
    save_file({**tensors, "logit_scale": torch.ones(1), "text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    shutil.copytree(sd / "tokenizer", tmp_path / "clip" / "tokenizer")
    with pytest.raises(SettingsError, match="holds a CLIP 32 wide, whose shapes do not tell its heads: put its config.json beside it, as clip.json"):
        load_text_encoder(file)
    shutil.copy(folder / "config.json", tmp_path / "clip.json")
    assert torch.equal(load_text_encoder(file).encode(PROMPTS)["states"], load_text_encoder(folder).encode(PROMPTS)["states"])


def test_single_files_that_lack_something(sd, tmp_path):
    from difflit.generation import load_pipeline

    file = tmp_path / "broken.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
               "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(1280, 768)}, file)
    with pytest.raises(SettingsError, match="broken.safetensors does not load as UNet2DConditionModel: .*fetch or convert it again"):
        load_pipeline(file, "cpu")
    with pytest.raises(SettingsError, match="single file without a text encoder: neither cond_stage_model.transformer"):
        load_text_encoder(file)
    for names in (["first_stage_model.encoder.conv_in.weight"], ["first_stage_model.encoder.conv_in.weight", "first_stage_model.quant_conv.weight"]):
        save_file({n: torch.zeros(128 if "in" in n else 8, 3 if "in" in n else 8, *[3 if "in" in n else 1] * 2) for n in names}, tmp_path / "vae.safetensors")
        with pytest.raises(SettingsError, match="vae.safetensors does not load as AutoencoderKL: .*fetch or convert it again"):
            load_autoencoder(tmp_path / "vae.safetensors", scaling_factor=0.18215)
    text = {f"cond_stage_model.transformer.text_model.{n}": t for n, t in load_file(sd / "text_encoder" / "model.safetensors").items()}
    save_file(text, tmp_path / "text.safetensors")
    (tmp_path / "text" / "text_encoder").mkdir(parents=True)
    shutil.copy(sd / "text_encoder" / "config.json", tmp_path / "text" / "text_encoder")
    with pytest.raises(SettingsError, match="text.safetensors brings no tokenizer: put the folder text/tokenizer beside it"):
        load_text_encoder(tmp_path / "text.safetensors")


@pytest.mark.parametrize("name, hint", [("sd5", "did you mean 'sd15'"), ("nonsense", "valid are base, "), ("bse", "did you mean 'base'")])
def test_a_name_that_is_no_model_is_told_its_neighbours(name, hint):
    from difflit.generation import load_pipeline

    with pytest.raises(SettingsError, match=f"{name} holds no model: .* no model of that name; {hint}"):
        load_pipeline(name, "cpu")


def save_vae_file(sd: Path, folder: Path) -> Path:
    return Path(shutil.copy(sd / "vae" / "diffusion_pytorch_model.safetensors", folder / "only_vae.safetensors"))


# what does not fit

@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_pickles_are_refused_by_name_and_damaged_files_named(sd, tmp_path, file):
    folder = shutil.copytree(sd, tmp_path / "sd")
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[:-100])
    with pytest.raises(SettingsError, match=f"{file} is cut off"):
        load_parts(folder)
    (folder / file).write_bytes(b"<html>")
    with pytest.raises(SettingsError, match=f"{file} is no safetensors file, or damaged .6 bytes"):
        load_parts(folder)
    (folder / file).rename((folder / file).with_suffix(".bin"))
    with pytest.raises(SettingsError, match=rf"{file.removesuffix('.safetensors')}.bin is a pickle, .*refused.*use_safetensors=False"):
        load_parts(folder)
    (folder / file).with_suffix(".bin").unlink()
    with pytest.raises(SettingsError, match="holds no weights"):
        load_parts(folder)
    with pytest.raises(SettingsError, match="model.ckpt is a pickle"):
        find_model(tmp_path / "model.ckpt")


def test_missing_files_are_named(sd, tmp_path):
    for lost, message in (("unet/config.json", "sd/unet has no config.json"), ("scheduler/scheduler_config.json", "does not say its noise schedule"),
                          ("tokenizer/tokenizer.json", "no tokenizer for this CLIPTextModel: expected tokenizer.json or vocab.json and merges.txt in"),
                          ("model_index.json", "is no pipeline: it has no model_index.json")):
        folder = shutil.copytree(sd, tmp_path / lost / "sd")
        (folder / lost).unlink()
        with pytest.raises(SettingsError, match=message):
            load_parts(folder)
    parts = load_parts(sd, ("scheduler",))
    assert parts.unet is None and parts.autoencoder is None and not parts.encoders and parts.diffusion["schedule"] == "scaled_linear"
    with pytest.raises(SettingsError, match="no part 'encoder'"):
        load_parts(sd, ("encoder",))


def test_weights_that_do_not_fit_their_configuration(sd, tmp_path):
    folder = shutil.copytree(sd, tmp_path / "sd")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("conv_in.weight")
    save_file(tensors, file)
    with pytest.raises(SettingsError, match="unet do.* not fit its config.json: 1 tensors are missing .conv_in.weight."):
        load_unet(folder)
    changed(folder, "text_encoder/config.json", hidden_size=64)
    with pytest.raises(SettingsError, match="text_encoder"):
        load_text_encoder(folder)
    changed(folder, "text_encoder/config.json", architectures=["BertModel"], model_type="bert")
    with pytest.raises(SettingsError, match="holds a BertModel .bert.; as text encoders there are: CLIPTextModel"):
        load_text_encoder(folder)
    changed(folder, "vae/config.json", _class_name="AutoencoderTiny")
    with pytest.raises(SettingsError, match="AutoencoderTiny"):
        load_autoencoder(folder)


def test_another_scaling_factor_than_the_pipeline_was_saved_with(sd, tmp_path):
    parts = load_parts(sd)
    saved = save_pipeline(tmp_path / "ours", parts.denoiser(), parts.autoencoder, parts.encoders, parts.diffusion)
    changed(saved, "vae/config.json", scaling_factor=0.13025)
    with pytest.raises(SettingsError, match="difflit.json says scaling_factor 0.18215, but autoencoder ours-vae has 0.13025"):
        load_parts(saved)


def test_parts_that_do_not_belong_together_are_not_saved(sd, t5, tmp_path):
    parts, other = load_parts(sd), load_text_encoder(t5)
    model = parts.denoiser()
    wide = pipelines.Autoencoder(twins.tiny_vae(latent_channels=16))
    for args, message in (((model, wide, parts.encoders, parts.diffusion), "UNet answers with 4 channels, autoencoder vae has latents of 16"),
                          ((model, parts.autoencoder, {"t5": other}, parts.diffusion), "the network reads clip; given to be written: t5"),
                          ((model, parts.autoencoder, {"clip": other}, parts.diffusion), "states 48 wide, the network reads 32")):
        with pytest.raises(SettingsError, match=message):
            save_pipeline(tmp_path / "no", *args)
    with pytest.raises(SettingsError, match="the scheduler says .*'eps'.* trained with .*'v'"):
        save_pipeline(tmp_path / "no", model, parts.autoencoder, parts.encoders, {**parts.diffusion, "target": "v"}, scheduler=parts.scheduler)
    assert not (tmp_path / "no").exists()


def test_states_of_another_width(sd):
    with pytest.raises(SettingsError, match="text encoder 't5' gives states 48 wide, the UNet takes 32: project them .*or replace"):
        LatentConfig(unet=unet_config(sd), encoders={"t5": {"width": 48}})
    model = load_parts(sd).denoiser()
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5.0])
    with pytest.raises(ValueError, match=r"states of text encoder 'clip' are \[1, 7, 48\], this network was made for \[B, L, 32\]"):
        model(x, t, {"clip": {"states": torch.zeros(1, 7, 48)}})
    with pytest.raises(ValueError, match="reads the text of clip; it was given t5"):
        model(x, t, {"t5": {"states": torch.zeros(1, 7, 32)}})
    with pytest.raises(ValueError, match="tokens came for text encoder 'clip', which is not part of this network"):
        model(x, t, {"clip": {"tokens": torch.zeros(1, 7, dtype=torch.long)}})


# networks

def test_adaptation_reinitialises_or_projects_and_folding_changes_nothing(sd):
    unet = load_unet(sd)
    before = {n: p.clone() for n, p in unet.named_parameters()}
    states, x, t = torch.randn(2, 9, 48), torch.randn(2, 4, 8, 8), torch.tensor([5.0, 900.0])
    projection = adapt_text(unet, 48, "project", seed=4)
    assert abs(float(projection(states).std()) - 1) < 0.1
    with torch.no_grad():
        wanted = unet(x, t, projection(states)).sample
        folded = fold_projection(unet, projection)
        assert torch.allclose(folded(x, t, states).sample, wanted, atol=1e-5) and folded.config["cross_attention_dim"] == 48
    unet = load_unet(sd)
    adapt_text(unet, 48, "replace")
    fresh = {n for n, p in unet.named_parameters() if p.shape != before[n].shape or not torch.equal(p, before[n])}
    assert fresh == {n for n in before if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))} and unet.config["cross_attention_dim"] == 48
    model = LatentDenoiser(LatentConfig(unet=unet_config(dict(unet.config)), encoders={"t5": {"width": 48}}), unet)
    rebuilt = LatentDenoiser(LatentConfig(**json.loads(json.dumps(pipelines._config_json(model.config)))))
    assert {n: p.shape for n, p in rebuilt.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_padding_is_hidden_where_the_encoder_masks_it():
    model = create_latent(dict(twins.tiny_unet().config), {"t5": {"width": 32, "length": 9, "masked": True}}).eval()
    states, mask = torch.randn(1, 9, 32), torch.arange(9)[None] < 4
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5.0])
    with torch.no_grad():
        short = model(x, t, {"t5": {"states": states[:, :4], "mask": mask[:, :4]}})
        assert torch.allclose(model(x, t, {"t5": {"states": states, "mask": mask}}), short, atol=1e-5)
        assert not torch.allclose(model(x, t, {"t5": {"states": states, "mask": torch.ones_like(mask)}}), short, atol=1e-3)


def test_encoders_side_by_side_fill_the_row():
    entries = {"l": {"width": 12}, "g": {"width": 20}}
    model = create_latent(dict(twins.tiny_unet().config), entries).eval()
    a, b = torch.randn(1, 77, 12), torch.randn(1, 77, 20)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5.0])
    with torch.no_grad():
        got = model(x, t, {"l": {"states": a}, "g": {"states": b}})
        assert torch.equal(got, model.unet(x, t, torch.cat([a, b], 2)).sample)
    with pytest.raises(SettingsError, match="need one length"):
        LatentConfig(unet=unet_config(dict(twins.tiny_unet().config)), encoders={"l": {"width": 12, "length": 9}, "g": {"width": 20}})


def test_the_states_of_clip_at_every_layer_are_those_of_diffusers(sd):
    pipe = pipeline_of(sd)
    assert torch.equal(load_text_encoder(sd).encode(PROMPTS)["states"], pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0])
    tokens = pipe.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():  # as its clip_skip=1 does, which transformers 5 cannot run
        theirs = pipe.text_encoder.final_layer_norm(pipe.text_encoder(tokens, output_hidden_states=True).hidden_states[-2])
    assert torch.equal(load_text_encoder(sd, skip=1).encode(PROMPTS)["states"], theirs)
    with pytest.raises(SettingsError, match="has 2 layers: skip=2"):
        load_text_encoder(sd, skip=2)
    with pytest.raises(SettingsError, match="reads at most 77 tokens, not 200"):
        load_text_encoder(sd, length=200)


def trains(kind: str):
    "An encoder that trains in a network: kinds of it, layers left out, with or without the last norm."
    from difflit.latent import LatentDenoiser as network

    model, tokenizer = {"clip": twins.tiny_clip, "projected": lambda: twins.tiny_clip(projection=24), "t5": lambda: twins.tiny_t5(width=32)}[kind.split()[0]]()
    options = {"skip": int(kind.split()[1]), "norm": kind.endswith("norm")}
    encoder = TextEncoder(model, tokenizer, "text", **options)
    made: network = latent_denoiser(twins.tiny_unet(32), {"text": encoder}, train=["text"])
    return made, {"text": encoder.tokenize(PROMPTS, encoder.length)}


@pytest.mark.parametrize("kind", ["clip 0 norm", "clip 1 norm", "clip 1", "projected 0 norm", "projected 1", "projected 1 norm", "t5 0 norm", "t5 1",
                                  "t5 1 norm"])
def test_what_a_trained_encoder_never_reads_is_frozen(kind):
    model, text = trains(kind)
    unused = unused_parameters(model)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == unused
    model.requires_grad_(True)
    model(torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0]), text).square().mean().backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == unused


def test_processes_do_not_wait_for_gradients_that_never_come(tmp_path):
    from torch import distributed

    model, text = trains("clip 1")
    distributed.init_process_group("gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        shared = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second pass fails where the first left a gradient unfinished
            shared(torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0]), text=text).square().mean().backward()
    finally:
        distributed.destroy_process_group()


def test_long_captions_are_cut_counted_and_said_once(sd, t5):
    for folder, length in ((sd, 77), (t5, 16)):
        encoder = load_text_encoder(folder, length=length)
        with pytest.warns(UserWarning, match=f"which reads {length}: the end of 'a red a red") as said:
            tokens = encoder.tokenize(["a red " * 100, "a red " * 90, "short"])["tokens"]
            encoder.tokenize(["a red " * 100])
        assert encoder.truncated == 3 and len(said) == 1 and tokens.shape == (3, length)
        assert tokens[0, -1] == encoder.tokenizer.eos_token_id


def test_t5_states_do_not_depend_on_their_neighbours(t5):
    encoder = load_text_encoder(t5)
    alone, together = encoder.encode(["two white stars"]), encoder.encode(["two white stars", "a small green square left of a yellow triangle"])
    n = alone["states"].shape[1]
    assert torch.allclose(together["states"][:1, :n], alone["states"], atol=1e-5)
    assert not together["states"][0, n:].any() and together["mask"].sum(1).tolist()[0] == n
    assert encoder.encode([""])["mask"].tolist() == [[True]]
    a, b = encoder.recipe(), encoder.recipe(64)
    assert a.ragged and a.shape == (128, 48) and a.digest != b.digest and a.weights == component_digest(t5)


def test_a_t5_whose_tokenizer_is_a_sentencepiece_model(t5, tmp_path):
    import sentencepiece

    folder = shutil.copytree(t5, tmp_path / "t5", ignore=shutil.ignore_patterns("tokenizer*"))
    (tmp_path / "captions.txt").write_text("\n".join(["a red circle on a blue background", "the quick brown fox jumps over the lazy dog"] * 20))
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "captions.txt"), model_prefix=str(folder / "spiece"), vocab_size=34,
                                             pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    got = load_text_encoder(folder).tokenize(["a red dog", ""])
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model")).encode("a red dog")
    assert got["tokens"][0].tolist() == [*pieces, 1] and got["tokens"][1].tolist() == [1] + [0] * len(pieces)


def test_a_text_encoder_of_open_clip(tmp_path):
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    card = {"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}}
    (tmp_path / "tiny-for-test.json").write_text(json.dumps(card))
    open_clip.add_model_config(tmp_path / "tiny-for-test.json")
    model = open_clip.create_model("tiny-for-test").eval()
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    encoder = load_text_encoder(f"open_clip:tiny-for-test:{tmp_path / 'open_clip_model.safetensors'}")
    assert (encoder.width, encoder.pooled, encoder.length, encoder.skip) == (16, 24, 77, 1)
    with torch.no_grad():
        theirs = model.encode_text(SimpleTokenizer()(PROMPTS))
    assert torch.allclose(encoder.encode(PROMPTS)["pooled"], theirs, atol=1e-5)
    last = load_text_encoder(f"open_clip:tiny-for-test:{tmp_path}", skip=0, norm=True)
    assert last.encode(PROMPTS)["states"].shape == (2, 77, 16)
    with pytest.raises(SettingsError, match="no architecture 'ViT-bigG-15'; did you mean .*'ViT-bigG-14'"):
        load_text_encoder("open_clip:ViT-bigG-15")
    with pytest.raises(SettingsError, match="difflit pull laion/CLIP-ViT-bigG-14"):
        load_text_encoder("open_clip:ViT-bigG-14")


def test_weights_under_other_names(sd, t5, tmp_path):
    "Variants, files that somebody renamed, CLIP as a whole, and the names that older files have."
    wanted = load_text_encoder(sd).encode(PROMPTS)["states"]
    folder = shutil.copytree(sd, tmp_path / "variant")
    for file in ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        (folder / file).rename((folder / file).with_suffix(".fp16.safetensors"))
    parts = load_parts(folder)
    assert torch.equal(parts.encoders["clip"].encode(PROMPTS)["states"], wanted) and parts.autoencoder.digest == component_digest(sd / "vae")
    old = {f"text_model.{n}": t for n, t in load_file(sd / "text_encoder" / "model.safetensors").items()}
    save_file({**old, "text_model.embeddings.position_ids": torch.arange(77)[None]}, folder / "text_encoder" / "model.safetensors")
    assert torch.equal(load_text_encoder(folder).encode(PROMPTS)["states"], wanted)
    renamed = shutil.copytree(t5, tmp_path / "renamed")
    (renamed / "model.safetensors").rename(renamed / "pytorch_model.safetensors")
    assert torch.equal(load_text_encoder(renamed).encode(PROMPTS)["states"], load_text_encoder(t5).encode(PROMPTS)["states"])

    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

    model, tokenizer = twins.tiny_clip()
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)
    whole = CLIPModel(CLIPConfig(text_config=model.config.to_dict(), vision_config=vision.to_dict(), projection_dim=32))
    whole.text_model.load_state_dict(model.state_dict())
    twins.save_text(tmp_path / "whole", whole, tokenizer)
    assert torch.equal(load_text_encoder(tmp_path / "whole").encode(PROMPTS)["states"], wanted)


def test_an_encoder_is_described_without_reading_its_weights(sd, t5):
    for folder in (sd, t5):
        full, bare = load_text_encoder(folder), load_text_encoder(folder, weights=False)
        assert next(bare.model.parameters()).is_meta and bare.recipe() == full.recipe() and bare.digest == full.digest
        assert torch.equal(bare.tokenize(PROMPTS)["tokens"], full.tokenize(PROMPTS)["tokens"])


# the noise

@pytest.mark.parametrize("settings", [{}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {"beta_schedule": "squaredcos_cap_v2"},
                                      {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}, {"beta_start": 0.001, "beta_end": 0.015}])
def test_the_noise_schedule_is_that_of_diffusers(settings):
    from diffusers import DDIMScheduler

    config = {**twins.SD_BETAS, **settings, "_class_name": "DDIMScheduler"}
    found = diffusion_of(config)
    ours = Diffusion(**found).alpha_sigma(torch.arange(1000))[0].square()
    theirs = DDIMScheduler.from_config(config).alphas_cumprod.double()
    assert torch.allclose(ours, theirs, atol=2e-6)
    assert diffusion_of(scheduler_config(found)) == found


def test_schedules_that_are_none_of_ours_are_refused():
    assert diffusion_of({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}) == {"schedule": "flow", "target": "flow", "shift": 3.0}
    assert scheduler_config({"schedule": "flow", "target": "flow", "shift": 3.0})["shift"] == 3.0
    for config in ({"trained_betas": [0.1]}, {"beta_schedule": "exp"}, {"_class_name": "EDMEulerScheduler"}, {"prediction_type": "other"}):
        with pytest.raises(SettingsError, match="none that can be trained here"):
            diffusion_of(config)
    with pytest.raises(SettingsError, match="no scheduler for schedule 'linear' with target 'flow'"):
        scheduler_config({"schedule": "linear", "target": "flow"})


# the autoencoder

def test_moments_latents_and_images_are_those_of_diffusers(sd):
    coder = load_autoencoder(sd)
    vae, images = coder.vae, torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        theirs = vae.encode(images).latent_dist
    moments = coder.encode(images)
    assert torch.equal(moments, theirs.parameters) and torch.equal(coder.latents_of(moments), theirs.mode() * 0.18215)
    noise = torch.randn(2, 4, 8, 8)
    assert torch.allclose(coder.latents_of(moments, noise), (theirs.mean + theirs.std * noise) * 0.18215, atol=1e-6)
    assert torch.equal(coder.decode(coder.latents_of(moments)), vae.decode(coder.latents_of(moments) / 0.18215).sample)
    sliced = load_autoencoder(sd).slicing().encode(images)
    assert torch.allclose(sliced, moments, atol=1e-5)
    large = torch.rand(1, 3, 160, 160) * 2 - 1
    tiled = load_autoencoder(sd).tiling()
    assert tiled.encode(large).shape == (1, 8, 20, 20) and not torch.equal(tiled.encode(large), coder.encode(large))
    assert coder.recipe((128, 64)).shape == (8, 8, 16) and coder.recipe(64, mean_only=True).shape == (4, 8, 8)


def test_slices_and_tiles_bound_what_the_autoencoder_holds():
    """The largest tensor of a convolution: one picture of a batch, one tile of a picture; what is seen stays nearly the same."""
    from conftest import photograph

    from difflit.data import image_tensor

    coder, held = load_autoencoder("tiny"), []
    for layer in coder.vae.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda module, given, out: held.append(out.numel()))
    images = torch.stack([image_tensor(photograph(i, (128, 128)), 128) for i in range(2)])

    def work():
        held.clear()
        moments = coder.encode(images)
        return moments, coder.decode(coder.latents_of(moments)), max(held)

    moments, drawn, most = work()
    sliced, drawn_sliced, most_sliced = coder.slicing() and work()
    assert torch.allclose(sliced, moments, atol=1e-5) and torch.allclose(drawn_sliced, drawn, atol=1e-4) and most_sliced == most // 2
    coder.slicing(False)
    tiled, drawn_tiled, most_tiled = coder.tiling() and work()
    assert most_tiled <= most // 4, "tiles of 64 pixels instead of 128"
    assert tiled.shape == moments.shape and not torch.equal(tiled, moments)
    far, far_tiled = ((d - images).abs().mean() for d in (drawn, drawn_tiled))
    assert far_tiled < 1.1 * far, "as near to the pictures as without"
    coder.tiling(False)
    assert torch.equal(work()[0], moments)


def test_sdxls_autoencoder_does_not_compute_in_half_precision(tmp_path):
    sdxl, sd = (twins.save_vae(tmp_path / str(f), twins.tiny_vae(scaling_factor=f)) for f in (0.13025, 0.18215))
    with pytest.warns(UserWarning, match="overflows in fp16 .* computes in fp32"):
        assert load_autoencoder(sdxl, "fp16").vae.dtype == torch.float32
    assert load_autoencoder(sd, "fp16").vae.dtype == torch.float16 and load_autoencoder(sdxl, "bf16").vae.dtype == torch.bfloat16
    assert load_autoencoder(sdxl, "bf16").encode(torch.zeros(1, 3, 64, 64)).dtype == torch.float32
    with pytest.raises(SettingsError, match="no precision 'half'"):
        load_autoencoder(sd, "half")


def test_a_shifted_autoencoder(tmp_path):
    coder = load_autoencoder(twins.save_vae(tmp_path / "v", twins.tiny_vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609)))
    moments = coder.encode(torch.rand(1, 3, 64, 64))
    assert torch.allclose(coder.latents_of(moments), (moments[:, :16] - 0.0609) * 1.5305)
    with pytest.raises(ValueError, match="means alone"):
        coder.latents_of(moments[:, :16], torch.zeros(1, 16, 8, 8))
    with pytest.raises(ValueError, match=r"encodes \[B, 3, H, W\], H and W multiples of 8; these images are \[1, 3, 60, 64\]"):
        coder.encode(torch.zeros(1, 3, 60, 64))


def test_sd15_in_full_size_without_memory():
    with torch.device("meta"):
        model = create_latent("sd15", {"clip-l": {"width": 768}})
        wide = create_latent("sd15", {"t5-xxl": {"width": 4096, "masked": True}}, "replace")
    assert sum(p.numel() for p in model.parameters()) == 859_520_964
    assert sum(p.numel() for p in wide.parameters()) - 859_520_964 == (4096 - 768) * 2 * sum(
        m.to_k.out_features for n, m in wide.named_modules() if n.endswith("attn2"))


def test_the_models_that_come_with_the_package():
    parts = load_parts("tiny", ("vae", "text", "scheduler"))
    model = create_latent("latent-tiny", parts.encoders)
    latents = parts.autoencoder.latents_of(parts.autoencoder.encode(torch.zeros(1, 3, 64, 64)))
    assert model(latents, torch.tensor([3.0]), **text_condition(parts.encoders, ["a red circle"])).shape == latents.shape
    assert create_latent(find_model("tiny")).state_dict().keys() == model.state_dict().keys() and pull("tiny") == find_model("tiny")
    with pytest.raises(SettingsError, match="unet holds no weights"):
        load_unet("tiny")


def test_what_is_computed_is_the_same_sampled_from_a_seed(sd):
    parts = load_parts(sd)
    diffusion = Diffusion(**parts.diffusion)
    denoise = Denoiser(parts.denoiser(), diffusion, text_condition(parts.encoders, PROMPTS))
    noise = per_sample_noise([3, 4])
    with torch.no_grad():
        first, second = (ddim(denoise, *begin(denoise, noise(-1, (2, 4, 8, 8)), sigma_steps(diffusion, 3))) for _ in range(2))
    assert torch.equal(first, second) and isinstance(parts.encoders["clip"], TextEncoder)
