"Adapters of latent networks: LoRA that diffusers reads, merging, rebuilding from a card, attention added and replaced, checkpointing, quick layers."

import json

import pytest
import torch
import twins
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import nn

from difflit.adapters import (
    add_cross_attention,
    add_lora,
    gradient_checkpointing,
    load_lora,
    lora_state,
    merge_lora,
    quicken,
    replace_cross_attention,
    save_lora,
    trainable_parts,
)
from difflit.config import SettingsError
from difflit.diagnostics import qk_gradients
from difflit.diffusion import Diffusion
from difflit.latent import TextEncoder, latent_denoiser
from difflit.models import build_model, freeze, model_card, reinitialise_parts
from difflit.tasks import LatentDiffusion
from difflit.averaging import EMA

PROMPT = "a red circle on a blue background"


@pytest.fixture(autouse=True)
def fixed():
    torch.manual_seed(0)




@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    "A folder with a whole small Stable Diffusion."
    return twins.save_sd(tmp_path_factory.mktemp("sd"))


def opened(folder) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe) -> torch.Tensor:
    "Two latents drawn with guidance, from fixed noise."
    options = dict(num_inference_steps=4, guidance_scale=3.0, height=64, width=64, output_type="latent")
    return pipe(PROMPT, generator=torch.Generator().manual_seed(0), num_images_per_prompt=2, **options).images


def network(pipe, train=()):
    "A latent denoiser around a pipeline's parts."
    encoder = TextEncoder(pipe.text_encoder, pipe.tokenizer, "clip-l")
    return latent_denoiser(pipe.unet, {"clip-l": encoder}, train=train), encoder


def batch(width=32, channels=4, encoder="clip-l", count=4):
    "A cached latent batch."
    g = torch.Generator().manual_seed(7)
    return {"moments": torch.randn(count, 2 * channels, 8, 8, generator=g), "position": torch.arange(count),
            f"states.{encoder}": torch.randn(count, 9, width, generator=g), f"mask.{encoder}": torch.ones(count, 9).bool()}


def teach(model, data, steps=3, lr=3e-2):
    "A few real updates, so that the low-rank change is not zero."
    task = LatentDiffusion(Diffusion("scaled_linear", "eps"), scaling_factor=0.18215)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    for step in range(steps):
        loss = task.loss(model, {**data, "position": data["position"] + len(data["position"]) * step}).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("targets, alpha, quick", [("attention", None, True), ("all", 16, False), (["to_v", "proj_in"], 2, False), ("cross", 3, False)])
def test_diffusers_draws_the_same_images_with_our_lora(pipeline, tmp_path, targets, alpha, quick):
    ours = opened(pipeline)
    plain = images(ours)
    model, _ = network(ours)
    add_lora(model, rank=4, alpha=alpha, targets=targets)
    if quick:
        quicken(model)
    assert torch.allclose(images(ours), plain, atol=1e-5)  # nothing learned, nothing changed
    teach(model.train(), batch())
    model.eval()
    drawn = images(ours)
    assert (drawn - plain).abs().max() > 0.1
    save_lora(model, tmp_path)
    theirs = opened(pipeline)
    theirs.load_lora_weights(tmp_path)
    assert torch.allclose(images(theirs), drawn, atol=1e-4)


def test_lora_of_a_text_encoder_that_trains(pipeline, tmp_path):
    ours = opened(pipeline)
    model, encoder = network(ours, train=["clip-l"])
    new = add_lora(model, rank=2, alpha=6)
    assert any(n.startswith("encoders.clip-l.model") for n in new) and any(n.startswith("unet.") for n in new)
    data = batch()
    read = encoder.tokenize([PROMPT] * 4)
    data = {k: v for k, v in data.items() if "clip" not in k} | {"tokens.clip-l": read["tokens"], "mask.clip-l": read["mask"]}
    teach(model.train(), data)
    assert all(p.grad is not None for n, p in model.named_parameters() if n in new)
    model.eval()
    ours.text_encoder = model.encoders["clip-l"].model
    drawn = images(ours)
    save_lora(model, tmp_path)
    theirs = opened(pipeline)
    theirs.load_lora_weights(tmp_path)
    assert torch.allclose(images(theirs), drawn, atol=1e-4)
    merge_lora(model)
    assert torch.allclose(images(ours), drawn, atol=1e-4)


def test_what_is_fresh_trains_beside_lora(pipeline, tmp_path):
    "A map from wider words starts at random: frozen it would stay noise."
    model = latent_denoiser(opened(pipeline).unet, {"t5": {"width": 48, "length": 9, "masked": True}}, "linear")
    names = add_lora(model, rank=2, also=["projection"])
    fresh = [n for n, _ in model.named_parameters() if n.startswith("projections.")]
    assert fresh and set(names) == {*fresh, *(n for n, _ in model.named_parameters() if ".lora_" in n)}
    assert json.loads(json.dumps(model.config.lora))["also"] == ["projection"]
    counts = freeze(model, trainable_parts(model))
    assert counts["trainable_tensors"] == len(names)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    teach(model.train(), batch(width=48, encoder="t5"))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(names)
    for save in (lambda: save_lora(model, tmp_path), lambda: lora_state(model)):
        with pytest.raises(SettingsError, match="this network has projection, which a file of LoRA cannot hold .* export it whole as diffusers"):
            save()
    assert not list(tmp_path.iterdir())
    again = build_model(json.loads(model_card(model)))
    again.load_state_dict(model.state_dict())
    assert trainable_parts(again) == names and [n for n, p in again.named_parameters() if p.requires_grad] == names
    merge_lora(model)
    assert all(p.requires_grad for p in model.parameters())


def test_replaced_attention_trains_whole_beside_lora(pipeline, tmp_path):
    "New keys and values carry LoRA too; their own weights train under the name that peft gives them."
    model = latent_denoiser(opened(pipeline).unet, {"t5": {"width": 48, "length": 9, "masked": True}}, "replace")
    one = next(n for n, _ in model.named_parameters() if n.endswith("attn1.to_q.weight"))
    names = add_lora(model, rank=2, also=["cross_kv", one])
    assert any(n.endswith("attn2.to_k.base_layer.weight") for n in names) and one.replace(".weight", ".base_layer.weight") in names
    teach(model.train(), batch(width=48, encoder="t5"))
    with pytest.raises(SettingsError, match="this network has cross_kv, "):
        save_lora(model, tmp_path)
    with pytest.raises(SettingsError, match="nothing in this network is called 'projektion', which shall train also; did you mean 'projection'"):
        add_lora(merge_lora(model), also=["projektion"])


def test_lora_leaves_out_the_layers_that_are_never_read(pipeline):
    pipe = opened(pipeline)
    encoder = TextEncoder(pipe.text_encoder, pipe.tokenizer, "clip-l", skip=1)
    model = latent_denoiser(pipe.unet, {"clip-l": encoder}, train=["clip-l"])
    names = add_lora(model, rank=2)
    assert any(".layers.0." in n for n in names) and not any(".layers.1." in n for n in names)
    assert not any(p.requires_grad for n, p in merge_lora(model).named_parameters() if ".layers.1." in n)


def test_lora_is_loaded_trained_on_and_merged(pipeline, tmp_path):
    first, _ = network(opened(pipeline))
    add_lora(first, rank=4, alpha=8, targets=["to_q", "to_k"])
    teach(first.train(), batch())
    save_lora(first, tmp_path)
    pipe = opened(pipeline)
    second, _ = network(pipe)
    assert sorted(load_lora(second, tmp_path)) == sorted(n for n, p in first.named_parameters() if p.requires_grad)
    assert all(torch.equal(a, b) for a, b in zip(lora_state(first).values(), lora_state(second).values()))
    teach(second.train(), batch())
    drawn = images(pipe)
    merge_lora(second.eval())
    assert torch.allclose(images(pipe), drawn, atol=1e-4)
    assert not any("lora" in n for n, _ in second.named_parameters()) and second.config.lora is None
    pipe.save_pretrained(tmp_path / "merged")
    assert torch.allclose(images(opened(tmp_path / "merged")), drawn, atol=1e-4)


def test_a_card_rebuilds_lora_and_the_average_follows(pipeline):
    model, _ = network(opened(pipeline))
    add_lora(model, rank=4, alpha=2, targets="transformer", dropout=0.1)
    average = EMA(model, 0.5)
    teach(model.train(), batch())
    average.update(model, 1)
    for source in (model.eval(), average.model):
        rebuilt = build_model(json.loads(model_card(source))).eval()
        rebuilt.load_state_dict(source.state_dict())
        x, text = torch.randn(2, 4, 8, 8), {"clip-l": {"states": torch.randn(2, 9, 32), "mask": torch.ones(2, 9).bool()}}
        with torch.no_grad():
            assert torch.allclose(rebuilt(x, torch.tensor([5.0, 900.0]), text), source(x, torch.tensor([5.0, 900.0]), text), atol=1e-5)


def test_a_loaded_lora_survives_its_card(pipeline, tmp_path):
    model, _ = network(opened(pipeline))
    add_lora(model, rank=3, alpha=5, targets=["attn2.to_q"])
    save_lora(model, tmp_path)
    other, _ = network(opened(pipeline))
    load_lora(other, tmp_path)
    rebuilt = build_model(json.loads(model_card(other)))
    rebuilt.load_state_dict(other.state_dict())
    assert rebuilt.config == other.config and rebuilt.config.lora["alpha"] == 5


def test_files_that_are_no_lora(pipeline, tmp_path):
    from safetensors.torch import save_file

    model, _ = network(opened(pipeline))
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(SettingsError, match="pickled"):
        load_lora(model, tmp_path / "x.bin")
    save_file({"weight": torch.zeros(2)}, str(tmp_path / "y.safetensors"))
    with pytest.raises(SettingsError, match="holds no LoRA of a UNet"):
        load_lora(model, tmp_path / "y.safetensors")
    with pytest.raises(SettingsError, match="there is no LoRA"):
        load_lora(model, tmp_path / "z.safetensors")


def test_kohyas_names_are_read(pipeline, tmp_path):
    from safetensors.torch import save_file

    model, _ = network(opened(pipeline))
    path = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    down, up = torch.randn(2, 32) * 0.1, torch.randn(32, 2) * 0.1
    save_file({f"lora_unet_{path}.lora_down.weight": down, f"lora_unet_{path}.lora_up.weight": up, f"lora_unet_{path}.alpha": torch.tensor(1.0)},
              str(tmp_path / "kohya.safetensors"))
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    before = model.get_submodule(layer).weight.detach().clone()
    load_lora(model, tmp_path / "kohya.safetensors")
    merge_lora(model)
    assert torch.allclose(model.get_submodule(layer).weight, before + 0.5 * up @ down, atol=1e-6)


def test_checkpointing_recomputes_and_changes_no_gradient(pipeline):
    pipe = opened(pipeline)
    model, encoder = network(pipe, train=["clip-l"])
    model.train()
    read = encoder.tokenize([PROMPT] * 2)
    calls: list[str] = []
    for name in ("unet.down_blocks.0.resnets.0.conv1", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "unet.up_blocks.1.resnets.0.conv1"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    text_layer = next(n for n, m in model.encoders.named_modules() if n.endswith("layers.0.mlp.fc1"))
    model.encoders.get_submodule(text_layer).register_forward_hook(lambda *_: calls.append("text"))
    x, times = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 600.0])

    def gradients():
        calls.clear()
        model.zero_grad()
        model(x, times, {"clip-l": dict(read)}).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None], {n: calls.count(n) for n in set(calls)}

    plain, once = gradients()
    again, twice = gradients() if gradient_checkpointing(model) else None
    assert len(once) == 4 and set(once.values()) == {1} and set(twice.values()) == {2}
    for a, b in zip(plain, again):
        torch.testing.assert_close(a, b)
    gradient_checkpointing(model, on=False)
    assert gradients()[1] == once


def test_attention_added_to_a_unet_without_words():
    flat = twins.tiny_unet(down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), mid_block_type="UNetMidBlock2D")
    model = quicken(latent_denoiser(flat, {"clip-l": {"width": 32, "length": 9}}))
    data = batch()
    x, times = data["moments"][:, :4], torch.full((4,), 300.0)
    text = {"clip-l": {"states": data["states.clip-l"], "mask": data["mask.clip-l"]}}
    with torch.no_grad():
        before = model(x, times, text)
        new = add_cross_attention(model)
        assert torch.allclose(model(x, times, text), before, atol=5e-6)  # attention hands on another memory layout, in which convolutions round otherwise
    assert "attn2" in " ".join(new)
    teach(model.train(), data)
    assert qk_gradients(model) > 0
    rebuilt = build_model(json.loads(model_card(model)))
    rebuilt.load_state_dict(model.state_dict())


def test_attention_replaced_for_t5(pipeline):
    model, _ = network(opened(pipeline))
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    anew = replace_cross_attention(model, {"t5": {"width": 48, "length": 9, "masked": True}})
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters() if n not in anew)
    teach(model.train(), batch(width=48, encoder="t5"))


@pytest.mark.parametrize("part", ["cross_kv", "unet.mid_block", "norms", "unet.*.to_out.0.*", "output"])
def test_any_part_begins_anew(pipeline, part):
    model, _ = network(opened(pipeline))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    names = reinitialise_parts(model, part)
    assert names and all(torch.equal(p, before[n]) == (n not in names) for n, p in model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and f"{name}.weight" in names:
            assert (module.weight == 1).all() and (module.bias == 0).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-4), (torch.bfloat16, 0.05)])
def test_quick_layers_compute_the_same(dtype, tolerance, masked):
    unets = [latent_denoiser(twins.tiny_unet(sample_size=16), {"clip-l": {"width": 32, "length": 9, "masked": masked}}).train() for _ in range(2)]
    quicken(unets[1])
    x, times = torch.randn(2, 4, 16, 16), torch.tensor([10.0, 600.0])
    text = {"clip-l": {"states": torch.randn(2, 9, 32), "mask": torch.arange(9) < torch.tensor([[3], [9]])}}
    results = []
    for model in unets:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            answer = model(x, times, text)
        answer.float().square().mean().backward()
        results.append((answer.detach().float(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (answer, gradient), (quick, quick_gradient) = results
    assert (answer - quick).norm() < tolerance * answer.norm()
    assert (gradient - quick_gradient).norm() < tolerance * gradient.norm()
