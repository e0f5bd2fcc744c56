"The networks that look: OpenAI's arithmetic, and gradients that can be trusted."

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from difflit.perception import (
    Clip,
    ClipConfig,
    Lpips,
    clean_clip_gradient,
    clip_gradient,
    contrastive_loss,
    create_clip,
    load_lpips,
    noised_clip_tokens,
    same_rows,
)

SMALL = ClipConfig(image_size=16, image_width=32, image_layers=2, image_heads=2, text_width=48, text_layers=3, text_heads=3,
                   text_context=12, vocabulary=100, n_embd=24, timesteps=10)
REASON = "openai/glide-text2im is not installed: pip install git+https://github.com/openai/glide-text2im"


def original(config: ClipConfig, clip: Clip):
    "OpenAI's encoders of the same shape, strictly filled with our weights."
    encoders = pytest.importorskip("glide_text2im.clip.encoders", reason=REASON)
    cpu = torch.device("cpu")
    image = encoders.ImageEncoder(image_size=config.image_size, patch_size=config.patch_size, n_embd=config.n_embd, device=cpu,
                                  n_head=config.image_heads, n_head_state=config.image_width // config.image_heads,
                                  n_xf_blocks=config.image_layers, n_timestep=config.timesteps)
    text = encoders.TextEncoder(n_bpe_vocab=config.vocabulary, max_text_len=config.text_context, n_embd=config.n_embd, device=cpu,
                                n_head=config.text_heads, n_head_state=config.text_width // config.text_heads, n_xf_blocks=config.text_layers)
    image.load_state_dict(clip.image_encoder.state_dict(), strict=True)
    text.load_state_dict(clip.text_encoder.state_dict(), strict=True)
    return image, text


def randomised(config: ClipConfig) -> Clip:
    "A network in which no weight is zero or one, so that none can be forgotten."
    clip = create_clip("glide-noised", **{k: v for k, v in vars(config).items()})
    torch.manual_seed(1)
    with torch.no_grad():
        for p in clip.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return clip


@pytest.mark.parametrize("timesteps", [10, 0])
def test_parity_with_the_original(timesteps):
    config = replace(SMALL, timesteps=timesteps)
    clip = randomised(config)
    image, text = original(config, clip)
    x = torch.randn(4, 3, 16, 16).requires_grad_()
    rows = torch.tensor([0, 3, 9, 5]) if timesteps else None
    theirs = image((x + 1) * 127.5, rows)
    theirs = theirs / (torch.linalg.norm(theirs, dim=-1, keepdim=True) + 1e-12)
    ours = clip.encode_image(x, rows * 100 if rows is not None else None)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    probe = torch.randn_like(ours)
    mine, other = (torch.autograd.grad((f * probe).sum(), x)[0] for f in (ours, theirs))
    torch.testing.assert_close(mine, other, atol=1e-5 * float(other.abs().max()), rtol=1e-4)
    tokens, lengths = torch.randint(100, (4, 12)), torch.tensor([12, 2, 7, 1])
    said = text(tokens, lengths)
    mask = torch.arange(12) < lengths[:, None]
    torch.testing.assert_close(clip.encode_text(tokens, mask), said / torch.linalg.norm(said, dim=-1, keepdim=True), atol=1e-5, rtol=0)


def test_gradient_is_the_originals():
    "The guidance of GLIDE's notebook: scale 3 times the logit scale 100."
    clip = randomised(SMALL)
    image, text = original(SMALL, clip)
    x, rows, tokens, lengths = torch.randn(2, 3, 16, 16), torch.tensor([2, 7]), torch.randint(100, (2, 12)), torch.tensor([12, 5])
    variable = x.clone().requires_grad_()
    seen, said = image((variable + 1) * 127.5, rows), text(tokens, lengths)
    seen, said = (f / torch.linalg.norm(f, dim=-1, keepdim=True) for f in (seen, said))
    expected = torch.autograd.grad(300 * (seen * said.detach()).sum(), variable)[0]
    with torch.inference_mode():
        ours = clip_gradient(clip, {"tokens": tokens, "mask": torch.arange(12) < lengths[:, None]})(x, rows * 100.0)
    torch.testing.assert_close(ours, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-3)


def test_tokens_are_the_originals():
    tokenizers = pytest.importorskip("glide_text2im.tokenizer.simple_tokenizer", reason=REASON)
    theirs = tokenizers.SimpleTokenizer()
    captions = ["An Oil painting of a Corgi", "", "ein Mädchen, 3 Äpfel", "一只红色的猫 😀", "word " * 74 + "word"]
    ours = noised_clip_tokens(captions)
    for row, mask, caption in zip(ours["tokens"], ours["mask"], captions):
        tokens, length = theirs.padded_tokens_and_len(theirs.encode(caption), 77)
        assert (row.tolist(), int(mask.sum())) == (tokens, length)


def test_too_long_a_caption_is_said():
    from difflit.perception import _plain_tokenizer

    _plain_tokenizer.cache_clear()
    with pytest.warns(UserWarning, match="is cut"):
        ours = noised_clip_tokens(["word " * 100], 20)
    assert ours["tokens"][0, -1] == 49407 and ours["mask"].all()


def test_the_published_shape():
    "Every name and shape of the published configuration, without its 600 MB."
    encoders = pytest.importorskip("glide_text2im.clip.encoders", reason=REASON)
    meta = torch.device("meta")
    with meta:
        clip = create_clip("glide-noised")
    sizes = {"n_embd": 512, "n_xf_blocks": 12, "device": meta}
    theirs = {"image": encoders.ImageEncoder(image_size=64, patch_size=4, n_head=12, n_timestep=1000, **sizes),
              "text": encoders.TextEncoder(n_bpe_vocab=65536, max_text_len=77, n_head=8, **sizes)}
    for name, ours in (("image", clip.image_encoder), ("text", clip.text_encoder)):
        expected = {k: tuple(v.shape) for k, v in theirs[name].state_dict().items()}
        assert {k: tuple(v.shape) for k, v in ours.state_dict().items()} == expected


def test_equal_captions_are_no_counter_examples():
    torch.manual_seed(0)
    u, v = (torch.nn.functional.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    tokens = torch.tensor([[1], [2], [1], [3], [1]])
    v[2] = v[4] = v[0]
    losses = contrastive_loss(u, v, 10.0, same_rows(tokens))
    alone = [0, 1, 3]
    torch.testing.assert_close(losses[0], contrastive_loss(u[alone], v[alone], 10.0)[0])
    assert torch.isfinite(contrastive_loss(u, v, 10.0, torch.ones(5, 5, dtype=torch.bool))).all()


@pytest.mark.parametrize("tower", ["vit", "conv"])
def test_a_picture_does_not_depend_on_its_batch(tower):
    clip = randomised(replace(SMALL, tower=tower, image_width=32)).eval()
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([100.0, 500.0, 900.0])
    tokens, mask = torch.randint(100, (3, 12)), torch.ones(3, 12, dtype=torch.bool)
    gradient = clip_gradient(clip, {"tokens": tokens, "mask": mask})
    alone = clip_gradient(clip, {"tokens": tokens[1:2], "mask": mask[1:2]})
    torch.testing.assert_close(gradient(x, t)[1:2], alone(x[1:2], t[1:2]), rtol=1e-3, atol=1e-4)


def test_gradients_leave_no_trace():
    "No gradient on the weights, no graph on the answer, no change of torch's random state."
    clip = create_clip("tiny", timesteps=0)
    x, wish = torch.randn(2, 3, 32, 32), torch.randn(1, 128)
    before = torch.get_rng_state()
    answer = clean_clip_gradient(clip, wish, least=2, most=4)(x, torch.tensor([100.0, 900.0]))
    assert not answer.requires_grad and all(p.grad is None for p in clip.parameters())
    assert torch.equal(before, torch.get_rng_state())


def test_the_module_stands_alone():
    "In a fresh process, importing it brings no diffusion, sampler or training along."
    others = "('difflit.samplers', 'difflit.sampling', 'difflit.denoising', 'difflit.diffusion', 'difflit.training')"
    code = f"import difflit.perception, sys; print([m for m in sys.modules if m in {others}])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---------------------------------------------------------------- LPIPS


def lpips_files(folder):
    """A VGG16 and linear weights in the published files' format, with numbers from a stream that never changes."""
    draw = np.random.RandomState(0)
    widths = [(name, p.shape) for name, p in Lpips().features.state_dict().items()]
    vgg = {f"features.{n}": torch.from_numpy(draw.standard_normal(s) * (2 / np.prod(s[1:]) if len(s) > 1 else 0.01) ** 0.5).float() for n, s in widths}
    vgg["classifier.6.bias"] = torch.zeros(1000)  # the real file holds the classifier too
    linear = {f"lin{i}.model.1.weight": torch.from_numpy(draw.rand(1, c, 1, 1)).float() for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(vgg, folder / "vgg16.pth")
    torch.save(linear, folder / "linear.pth")
    pairs = torch.from_numpy(draw.rand(2, 2, 3, 24, 40)).float() * 2 - 1
    return vgg, linear, pairs


@pytest.mark.parametrize("weights", ["random", "published"])
def test_lpips_is_torchmetrics_lpips(tmp_path, weights):
    """The same weights give the same distances, also with the real linear weights, which torchmetrics carries and we find there."""
    reference = pytest.importorskip("torchmetrics.functional.image.lpips", reason="torchmetrics is not installed")
    vgg, linear, (a, b) = lpips_files(tmp_path)
    theirs = reference._LPIPS(pretrained=weights == "published", net="vgg", pnet_rand=True)  # pnet_rand: nothing is fetched
    for part in theirs.net.children():
        part.load_state_dict({n: vgg[f"features.{n}"] for n in part.state_dict()})
    if weights == "random":
        told = theirs.load_state_dict(linear, strict=False)  # strict would ask for the VGG again; what is passed over must not be a linear weight
        assert not told.unexpected_keys
    ours = load_lpips(tmp_path / "vgg16.pth", tmp_path / "linear.pth" if weights == "random" else None)
    for mine, layer in zip(ours.linear, theirs.lins, strict=True):
        assert torch.equal(mine, layer.model[1].weight.flatten()), "the reference was not given the weights"
    torch.testing.assert_close(ours(a, b), theirs(a, b).flatten(), rtol=1e-5, atol=0)


LPIPS_OF_TORCHMETRICS = [0.4586596, 0.1936733, 0.0636453, 0.02230134, 0.01617038]


def test_lpips_keeps_to_its_numbers(tmp_path):
    """Of the same weights, each depth alone, as torchmetrics 1.9.0 gave them: for where it is not installed."""
    _, _, (a, b) = lpips_files(tmp_path)
    ours = load_lpips(tmp_path / "vgg16.pth", tmp_path / "linear.pth")
    given, found = [w.clone() for w in ours.linear], []
    for kept in range(5):
        for i, weight in enumerate(ours.linear):
            weight.data.copy_(given[i] * (i == kept))
        found.append(ours(a[:1], b[:1]).item())
    assert found == pytest.approx(LPIPS_OF_TORCHMETRICS, rel=1e-4)
