"""What the text module promises and a notebook cannot show."""

import gzip
import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from torch import nn

from difflit.config import SettingsError
from difflit.glide import create_glide
from difflit.text import TextCache, Tokenizer, encode_rows, glide_tokenizer, weights_digest

BPE = Path(__file__).parent / "data" / "glide_bpe"
NO_ORIGINAL = "glide_text2im is not installed: pip install git+https://github.com/openai/glide-text2im"


def test_text_imports_lightly() -> None:
    "Tokenizing plain captions needs neither open_clip (four seconds) nor ftfy, in a fresh process."
    code = (
        "import sys; from difflit.text import trimmed_tokenizer; trimmed_tokenizer(['a red circle'])(['a red circle', '']);"
        "print({'open_clip', 'ftfy', 'torchvision', 'timm', 'transformers'} & set(sys.modules))"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == "set()", fresh.stdout


def odd_strings(count: int = 1000) -> list[str]:
    "Strings of random characters from scripts, symbols, emoji, control codes and blanks, pieces of real captions among them."
    dice = random.Random(7)
    blocks = [(0, 0x7F), (0x80, 0x24F), (0x370, 0x5FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x2000, 0x2BFF), (0x3040, 0x30FF), (0x4E00, 0x4FFF),
              (0xAC00, 0xAD00), (0xFB00, 0xFFFD), (0x1F300, 0x1F6FF), (0xE0000, 0xE007F)]
    words = ["a corgi", " I'M ", "it'S", "don't", "'ſ", "İstanbul", "ǅ", "ß", "2024", "½", "&amp;",
             "  ", "\t\n", "\u00a0", "\u200d", "o'clock", "<|endoftext|>", "e\u0301"]
    strings = []
    while len(strings) < count:
        parts = []
        for _ in range(dice.randint(0, 12)):
            if dice.random() < 0.4:
                parts.append(dice.choice(words))
            else:
                low, high = dice.choice(blocks)
                parts += [chr(dice.randint(low, high)) for _ in range(dice.randint(1, 6))]
        strings.append("".join(c for c in "".join(parts) if unicodedata.category(c) != "Cs"))
    return strings


def test_glide_golden_tokens() -> None:
    tokenizer = glide_tokenizer(BPE)
    assert tokenizer.encode("An Oil painting of a Corgi") == [272, 3056, 12036, 286, 257, 1162, 12397]
    batch = tokenizer(["An Oil painting of a Corgi", ""])
    assert batch["tokens"][0].tolist() == [272, 3056, 12036, 286, 257, 1162, 12397] + [50256] * 121
    assert batch["mask"].sum(1).tolist() == [7, 0] and batch["tokens"][1].unique().tolist() == [50256]


def test_glide_numbers_are_the_originals() -> None:
    with gzip.open(BPE / "encoder.json.gz") as f:
        numbers = json.load(f)
    tokenizer = glide_tokenizer(BPE / "vocab.bpe.gz")
    assert numbers.pop("<|endoftext|>") == tokenizer.pad == 50256
    assert len(numbers) == 50256 and {piece: n for n, piece in enumerate(tokenizer.pieces)} == numbers


def test_glide_tokenizer_loses_nothing() -> None:
    tokenizer = glide_tokenizer(BPE)
    for text in odd_strings():
        assert tokenizer.decode(tokenizer.encode(text)) == text.lower()


def test_glide_tokenizer_is_the_originals_on_a_thousand_odd_strings() -> None:
    bpe = pytest.importorskip("glide_text2im.tokenizer.bpe", reason=NO_ORIGINAL)
    reference, tokenizer = bpe.get_encoder(), glide_tokenizer()  # found in the installed package
    strings = odd_strings() + [""]
    batch = tokenizer([s for s in strings if len(reference.encode(s)) <= 128])
    kept = [s for s in strings if len(reference.encode(s)) <= 128]
    for text in strings:
        assert tokenizer.encode(text) == reference.encode(text), repr(text)
        assert tokenizer.decode(reference.encode(text)) == reference.decode(reference.encode(text)), repr(text)
    for text, tokens, mask in zip(kept, batch["tokens"], batch["mask"]):
        assert (tokens.tolist(), mask.tolist()) == tuple(reference.padded_tokens_and_mask(reference.encode(text), 128))


@pytest.fixture
def nothing_installed(monkeypatch, tmp_path):
    "No glide_text2im, an empty cache, and a network that ends at a closed port."
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "glide_text2im" else find(name, *rest))
    monkeypatch.setenv("DIFFLIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("difflit.text.GLIDE_VOCABULARY", "http://127.0.0.1:1/vocab.bpe.gz")
    return tmp_path / "cache" / "glide"


def test_glide_vocabulary_without_a_network(nothing_installed) -> None:
    with pytest.raises(SettingsError, match="(?s)vocabulary was not found.*Three ways.*give a path.*cache folder.*pip install"):
        glide_tokenizer()
    nothing_installed.mkdir(parents=True, exist_ok=True)
    (nothing_installed / "vocab.bpe.gz").write_bytes((BPE / "vocab.bpe.gz").read_bytes())
    assert glide_tokenizer().vocabulary == 50257
    merges = gzip.decompress((BPE / "vocab.bpe.gz").read_bytes())
    (nothing_installed / "vocab.bpe.gz").unlink()
    (nothing_installed / "vocab.bpe").write_bytes(merges)  # unpacked is as good
    assert glide_tokenizer(context=64).context == 64
    (nothing_installed / "vocab.bpe").write_bytes(merges.rsplit(b"\n", 3)[0] + b"\n")
    with pytest.raises(SettingsError, match="is not GLIDE's vocabulary: SHA-256"):
        glide_tokenizer()
    (nothing_installed / "vocab.bpe.gz").write_bytes((BPE / "vocab.bpe.gz").read_bytes()[:1000])
    with pytest.raises(SettingsError, match="cannot be read as a vocabulary"):
        glide_tokenizer()


def test_glide_tokenizer_saved_and_loaded(tmp_path) -> None:
    tokenizer = glide_tokenizer(BPE, context=77)
    again = Tokenizer.load(tokenizer.save(tmp_path / "tokenizer.json"))
    for text in odd_strings(100):
        assert again.encode(text) == tokenizer.encode(text)
    assert (again.context, again.pad, again.vocabulary) == (77, 50256, 50257)


def tower(**overrides):
    "A frozen GLIDE with random numbers everywhere."
    model = create_glide("tiny", vocabulary=300, **overrides).eval().requires_grad_(False)
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02 if p.dim() == 1 else p[0].numel() ** -0.5)
    return model


def captions(count: int, context: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, context + 1, (count, 1), generator=g)
    return torch.randint(300, (count, context), generator=g), torch.arange(context) < lengths


SLOW_BF16 = [pytest.param(*given, id=name, marks=pytest.mark.slow) for *given, name in ((True, 1, 128, "bf16-1-128"), (True, 2, 24, "bf16-2-24"))]


@pytest.mark.parametrize("autocast, threads, context", [(False, 1, 24), (False, 1, 128), (False, 2, 24), (True, 1, 24), *SLOW_BF16])
def test_a_caption_says_the_same_in_any_company(autocast, threads, context) -> None:
    "Eight at once: order, neighbours and the size of the batch make no difference to the bits."
    model, before = tower(text_context=context), torch.get_num_threads()
    tokens, mask = captions(24, context)
    torch.set_num_threads(threads)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            whole = encode_rows(tokens, mask, model.encode_text)
            for size in (1, 3, 8, 13):
                parts = [encode_rows(t, m, model.encode_text) for t, m in zip(tokens.split(size), mask.split(size))]
                for name, expected in whole.items():
                    assert torch.equal(torch.cat([p[name] for p in parts]), expected), f"{name}, {size} at once"
            order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
            for name, found in encode_rows(tokens[order], mask[order], model.encode_text).items():
                assert torch.equal(found, whole[name][order]) and found.stride() == whole[name].stride() == model.encode_text(tokens, mask)[name].stride()
    finally:
        torch.set_num_threads(before)


@pytest.mark.cuda
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_a_caption_says_the_same_in_any_company_on_a_gpu(autocast) -> None:
    model = tower(text_context=128).cuda()
    tokens, mask = (t.cuda() for t in captions(64, 128))
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        whole = encode_rows(tokens, mask, model.encode_text)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).cuda()
        for size in (1, 3, 8, 13):
            parts = [encode_rows(t, m, model.encode_text) for t, m in zip(tokens[order].split(size), mask[order].split(size))]
            for name, expected in whole.items():
                assert torch.equal(torch.cat([p[name] for p in parts]), expected[order]), f"{name}, {size} at once"
        cache = TextCache(10**9)
        for rows in (order[:20], order[10:40]):
            assert torch.equal(cache(tokens[rows], mask[rows], model.encode_text)["sequence"], whole["sequence"][rows])


@pytest.mark.parametrize("autocast, budget", [
    pytest.param(False, 10**9, id="fp32-ample"), pytest.param(False, 200_000, id="fp32-small"), pytest.param(False, 0, id="fp32-none"),
    pytest.param(True, 200_000, id="bf16-small"),
    pytest.param(True, 10**9, id="bf16-ample", marks=pytest.mark.slow), pytest.param(True, 0, id="bf16-none", marks=pytest.mark.slow),
])
def test_losses_with_and_without_the_cache_are_the_same_bits(autocast, budget) -> None:
    "Five updates of the U-Net over a frozen text tower, captions coming back in other orders and company."
    context, losses, caches = 24, [], []
    tokens, mask = captions(20, context)
    for cached in (False, True):
        model = tower(text_context=context, learned_variance=False)
        painter = [p for name, p in model.named_parameters() if name.startswith(("input_blocks", "middle_block", "output_blocks", "out."))]
        for p in painter:
            p.requires_grad_(True)
        cache = TextCache(budget, digest=weights_digest({n: t for n, t in model.state_dict().items() if "embedding" in n or n.startswith("transformer")}))
        optimizer, g, run = torch.optim.AdamW(painter, lr=1e-3), torch.Generator().manual_seed(5), []
        for _ in range(5):
            rows = torch.randint(20, (6,), generator=g)
            x, t = torch.randn(6, 3, 32, 32, generator=g), torch.rand(6, generator=g) * 1000
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                encode = (lambda a, b: cache(a, b, model.encode_text)) if cached else (lambda a, b: encode_rows(a, b, model.encode_text))  # noqa: B023
                text = encode(tokens[rows], mask[rows])
                loss = (model(x, t, text=text).float() - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(loss.item())
        losses.append(run)
        caches.append(cache)
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 5
    if budget == 10**9:
        assert caches[1].misses <= 20 and caches[1].hit_rate > 0.3


def test_lru_is_not_fifo_and_a_miss_is_computed_alone() -> None:
    "A peer's cache dropped the oldest entry however often it was used, and encoded the whole batch again for one miss."
    model, asked = tower(), []

    def encode(tokens, mask):
        asked.append(len(tokens))
        return model.encode_text(tokens, mask)

    tokens, mask = captions(40, 24)
    one = sum(t.numel() * t.element_size() for t in encode_rows(tokens[:1], mask[:1], model.encode_text).values())
    cache = TextCache(20 * one)
    cache(tokens[:20], mask[:20], encode)
    for i in range(20, 30):
        cache(tokens[[0, i]], mask[[0, i]], encode)  # the first is used again and again
    assert (cache.misses, cache.hits, len(cache), cache.bytes) == (30, 10, 20, 20 * one)
    assert asked == [8, 8, 8] + [8] * 10
    asked.clear()
    cache(tokens[:1], mask[:1], encode)
    assert asked == []
    cache(tokens[1:2], mask[1:2], encode)
    assert asked == [8]
    assert len(cache._entries) == len(cache) == 20 and cache.bytes == 20 * one


def test_changed_weights_are_never_answered_from_the_cache() -> None:
    model, (tokens, mask) = tower(), captions(5, 24)
    cache = TextCache(10**8, digest=weights_digest(model))
    old = cache(tokens, mask, model.encode_text)
    with torch.no_grad():
        model.token_embedding.weight += 0.1
    assert cache.digest != weights_digest(model)
    cache.digest = weights_digest(model)
    new = cache(tokens, mask, model.encode_text)
    assert cache.misses == 10 and not torch.equal(old["pooled"], new["pooled"])
    assert torch.equal(new["pooled"], encode_rows(tokens, mask, model.encode_text)["pooled"])


def test_precisions_do_not_mix_and_answers_are_not_shared() -> None:
    "What was computed under autocast is not handed to fp32, and changing an answer does not change the cache."
    model, (tokens, mask) = tower(), captions(5, 24)
    cache = TextCache(10**8)
    with torch.autocast("cpu", torch.bfloat16):
        half = cache(tokens, mask, model.encode_text)
    full = cache(tokens, mask, model.encode_text)
    assert cache.misses == 10 and not torch.equal(half["pooled"].float(), full["pooled"])
    assert not full["pooled"].requires_grad
    full["pooled"].zero_()
    assert cache(tokens, mask, model.encode_text)["pooled"].any()
