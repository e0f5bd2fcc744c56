"""Bugs of other GLIDE trainers, each with a test by its name: the docstring tells the bug, then what difflit does."""

import math
import re
import threading
from itertools import islice, pairwise

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY, photograph, save
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

from difflit.data import DataError
from difflit.diffusion import Diffusion
from difflit.folders import FolderSource
from difflit.glide import AttentionBlock, Glide, ResidualBlock, create_glide
from difflit.models import reinitialise_parts
from difflit.precision import Precision
from difflit.randomness import normal
from difflit.recipes import prepare, train_job
from difflit.runs import finish, open_run
from difflit.denoising import per_sample_noise
from difflit.samplers import SAMPLERS, ddim, euler, get_sampler
from difflit.sampling import sample
from difflit.spacing import sigma_steps
from difflit.loading import Loader, open_source
from difflit.tasks import TextToImage
from difflit.text import TextCache, encode_rows
from difflit.averaging import EMA
from difflit.optimizers import make_optimizer
from difflit.training import TrainState, train

SMALL = dict(image_size=16, channels=16, channel_mult=(1, 2), attention_downsamplings=(1, 2), head_channels=16, text_width=32, text_heads=2,
             text_layers=2, text_context=8, vocabulary=50)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_glide(**overrides) -> Glide:
    "A GLIDE of a quarter of a million weights in which nothing is zero, so that every input counts."
    model = create_glide("tiny", **(SMALL | overrides))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


def words(batch: int, context: int = 8) -> dict[str, Tensor]:
    "Captions of different lengths, the first of them empty."
    tokens = torch.arange(batch * context).reshape(batch, context) % 50
    return {"tokens": tokens, "mask": torch.arange(context) < 3 * torch.arange(batch)[:, None]}


# 1. Weights and average in bf16 that never move


class Plane(nn.Module):
    "The smallest network that a task can train: one weight of size 1 per channel."

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x, times, tokens=None, mask=None):
        return torch.nn.functional.conv2d(x, self.gain[..., None].expand(-1, 3, -1, -1))


def images_from(position: int, batch_size: int = 4):
    "Endless batches of plain colours."
    while True:
        positions = torch.arange(position, position + batch_size)
        colours = normal(0, "colours", positions, (3, 1, 1)).clamp(-1, 1).expand(-1, -1, 4, 4)
        yield {"image": colours, "position": positions, "tokens": torch.zeros(batch_size, 1).long(), "mask": torch.ones(batch_size, 1).bool()}
        position += batch_size


def test_bf16_weights_and_their_average_never_move():
    """bf16 weights round a small update away; under precision bf16 difflit keeps weights, moments and average in fp32, and they move."""
    model = Plane()
    state = TrainState(model, EMA(model, 0.99), make_optimizer(model, 1e-5), Accelerator(cpu=True), Precision("bf16", torch.device("cpu")))
    train(state, TextToImage(Diffusion("flow", "flow")), images_from(0), steps=40, batch_size=4, lr=1e-5)
    moments = [m for s in state.optimizer.state.values() for m in s.values() if m.numel() > 1]
    assert moments and {t.dtype for t in [*model.parameters(), *state.ema.model.parameters(), *moments]} == {torch.float32}
    for network in (model, state.ema.model):
        moved = (1 - network.gain).abs()
        assert 1e-6 < moved.min() and moved.max() < 5e-4
        assert torch.equal(network.gain.bfloat16(), torch.ones_like(network.gain).bfloat16()), "what bf16 would have kept of this: nothing"


@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16])
def test_ema_stays_where_it_began(live):
    """A bf16 average of decay 0.9999 stays at 0.0200 for ever; difflit's is fp32 and after 20,000 updates is where float64 says."""
    layer = nn.Linear(1, 1, bias=False).to(live)
    nn.init.constant_(layer.weight, 0.02)
    ema = EMA(layer, 0.9999)
    nn.init.constant_(layer.weight, 0.05)
    begun, goal = ema.model.weight.item(), layer.weight.item()
    stuck = torch.tensor(0.02, dtype=torch.bfloat16)
    for step in range(100_000, 120_000):  # past the warm-up of the decay
        ema.update(layer, step)
        stuck.lerp_(torch.tensor(0.05, dtype=torch.bfloat16), 1e-4)
    right = goal + (begun - goal) * 0.9999**20_000
    assert ema.model.weight.dtype == torch.float32
    assert abs(ema.model.weight.item() - right) < 1e-3 * right and abs(right - 0.046) < 2e-4
    assert abs(float(stuck) - 0.02) < 1e-4, "the bug itself"


# 2. Activation checkpointing that does nothing


def backward_costs(checkpointing: bool) -> tuple[int, dict[str, int], list[Tensor]]:
    "Bytes kept for the backward pass, how often each block runs, and all gradients."
    model, kept, runs = small_glide(checkpointing=checkpointing).train(), {}, {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    blocks = {n: m for n, m in model.named_modules() if isinstance(m, (ResidualBlock, AttentionBlock)) or re.fullmatch(r"transformer\.resblocks\.\d+", n)}
    for name, block in blocks.items():
        block.register_forward_pre_hook(lambda *_, name=name: runs.update({name: runs.get(name, 0) + 1}))

    def note(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = normal(0, "x", range(4), (3, 16, 16))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = model(x, torch.tensor([0, 10, 500, 999]), **words(4)).square().mean()
    loss.backward()
    assert len(blocks) == len(runs) > 10
    return sum(kept.values()), runs, [p.grad for p in model.parameters()]


def test_checkpointing_set_only_on_the_top_module():
    """The flag on the outermost module recomputed nothing; in difflit every block of U-Net and text tower recomputes, and less than half is kept."""
    (plain, once, gradients), (less, twice, same) = backward_costs(False), backward_costs(True)
    assert set(once.values()) == {1} and set(twice.values()) == {2} and once.keys() == twice.keys()
    assert less < 0.5 * plain, f"{less} bytes of {plain}"
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


# 3. A filter that refuses everything, and a loader that waits for more


@pytest.mark.parametrize("content", ["broken", "silent", "mixed"])
def test_a_filter_that_rejects_everything_waits_for_ever(tmp_path, content):
    """A filter that let no sample pass made the loader wait without a word; difflit looks at every file first and says at once what was refused and why."""
    for i in range(12):
        name = f"{i:02d}.png"
        if content == "silent" or (content == "mixed" and i % 2):
            save(tmp_path, name, photograph(i), None)
        else:
            (tmp_path / name).write_bytes(b"no picture")
            (tmp_path / name).with_suffix(".txt").write_text("a caption")
    caught: list[BaseException] = []

    def load() -> None:
        try:
            with Loader(open_source(str(tmp_path)), batch_size=4, image_size=8, workers=2) as loader:
                next(loader)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits"
    assert len(caught) == 1 and isinstance(caught[0], DataError)
    reasons = {"broken": ["not an image"], "silent": ["no caption"], "mixed": ["not an image", "no caption"]}[content]
    for said in ["00.png" if content != "silent" else "01.png", *reasons]:
        assert said in str(caught[0])


# 4. An upsampler that samples at the size of its input


@pytest.mark.parametrize("low", [4, 8, 16])
def test_upsampled_shape_was_fixed_before_times_four(low):
    """The shape was taken before its sides were multiplied by four, so nothing was enlarged; in difflit any low_res gives the upsampler's own size."""
    model = small_glide(super_resolution=True)
    side, d = model.config.image_size, Diffusion("linear", "eps")
    condition = {**words(2), "low_res": normal(0, "low", range(2), (3, low, low)).clamp(-1, 1)}
    pictures = sample(model, d, condition, seeds=[5, 6], shape=(3, side, side), steps=3, guidance=1.0, clamp=1.0)
    assert pictures.shape == (2, 3, side, side) and pictures.isfinite().all()
    others = sample(model, d, {**condition, "low_res": -condition["low_res"]}, seeds=[5, 6], shape=(3, side, side), steps=3, guidance=1.0, clamp=1.0)
    assert (pictures - others).abs().max() > 1e-3, "low_res counts"


# 5. Samplers that are not what they are called


CENTRE, WIDTH = 0.7, 0.25
START = 20 * normal(0, "start", range(16), (8,)).double()


def gaussian(x: Tensor, sigma: float) -> Tensor:
    "The best denoiser of one Gaussian: E[x0 | x0 + σ ε]."
    return CENTRE + WIDTH**2 / (WIDTH**2 + sigma**2) * (x - CENTRE)


def exact(sigma: float) -> Tensor:
    "Where the flow leads from START at σ = 20."
    return CENTRE + (START - CENTRE) * math.sqrt((WIDTH**2 + sigma**2) / (WIDTH**2 + 20**2))


def log_sigmas(steps: int) -> Tensor:
    return torch.logspace(math.log10(20), math.log10(0.02), steps + 1, dtype=torch.float64)


def test_euler_that_is_ddim():
    """A sampler called Euler took DDIM's steps in the wrong scale; difflit's Euler agrees with diffusers' EulerDiscreteScheduler at every step."""
    theirs = EulerDiscreteScheduler(1000, beta_schedule="linear", timestep_spacing="trailing")
    theirs.set_timesteps(20)
    sigmas = sigma_steps(Diffusion("linear"), 20, "trailing")
    torch.testing.assert_close(theirs.sigmas.double(), sigmas, rtol=1e-4, atol=1e-6)
    states: list[Tensor] = []
    first = normal(0, "start", range(16), (8,)).double() * sigmas[0]
    last = euler(gaussian, first, theirs.sigmas.double(), callback=lambda step, sigma, x, x0: states.append(x))
    x = first.float()
    for t, sigma, mine in zip(theirs.timesteps, theirs.sigmas.tolist(), [*states[1:], last], strict=False):
        theirs.scale_model_input(x, t)
        x = theirs.step((x - gaussian(x, sigma)) / sigma, t, x).prev_sample
        torch.testing.assert_close(x.double(), mine, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_is_ddim(eta):
    """The other way round: in the variance preserving scale difflit's DDIM is diffusers' DDIMScheduler, with and without fresh noise."""
    theirs = DDIMScheduler(1000, beta_schedule="linear", timestep_spacing="trailing", clip_sample=False)
    theirs.set_timesteps(20)
    alphas = theirs.alphas_cumprod.double().sqrt()
    sigmas = torch.cat([(1 / alphas**2 - 1).sqrt()[theirs.timesteps], torch.zeros(1).double()])
    fresh = [normal(0, f"fresh {i}", range(16), (8,)).double() for i in range(20)]
    states: list[Tensor] = []
    first = sigmas[0] * normal(0, "start", range(16), (8,)).double()
    last = ddim(gaussian, first, sigmas, eta=eta, noise=lambda step, shape: fresh[step], callback=lambda step, sigma, x, x0: states.append(x))
    y = first * alphas[999]
    for i, t in enumerate(theirs.timesteps):
        torch.testing.assert_close(y / alphas[t], states[i], rtol=1e-4, atol=2e-4)
        noise = (y / alphas[t] - gaussian(y / alphas[t], float(sigmas[i]))) / sigmas[i]
        y = theirs.step(noise, t, y, eta=eta, variance_noise=fresh[i]).prev_sample
    torch.testing.assert_close(y, last, rtol=1e-4, atol=2e-4)


DRAWS_NO_NOISE = {name: f for name, f in SAMPLERS.items() if f.__module__ == "difflit.samplers"}  # the others' order is one of distributions
ORDERS = {name: re.search(r"\border (\d)", f.__doc__ or "") for name, f in DRAWS_NO_NOISE.items()}


@pytest.mark.parametrize("name", [n for n, order in ORDERS.items() if order])
def test_a_sampler_has_the_order_that_it_claims(name):
    """Half the steps must err twice as much with order 1, four times with order 2; a "second-order" solver that was a relabelled Euler step would show."""
    error = {n: float((get_sampler(name)(gaussian, START, log_sigmas(n)) - exact(0.02)).square().mean().sqrt()) for n in (160, 320)}
    order = math.log2(error[160] / error[320])
    claimed = int(ORDERS[name][1])
    assert abs(order - claimed) < 0.1, f"{name}: order {order:.2f}, its docstring says {claimed}"


def test_orders_of_the_first_samplers():
    """Euler and DDIM are of order 1 and Heun of order 2, and say so."""
    assert {name: int(ORDERS[name][1]) for name in ("euler", "ddim", "heun")} == {"euler": 1, "ddim": 1, "heun": 2}


@pytest.mark.parametrize("name", ["dpm++", "DPM++ 2M Karras", "k_euler", "", "plms2"])
def test_dpmpp_that_is_not(name):
    """Asking for a sampler that was never written gave another one under its name; in difflit a name is registered or an error that lists what there is."""
    assert get_sampler("Euler") is euler and get_sampler("DPM++ 2M") is SAMPLERS["dpmpp_2m"]  # spelling is free, meaning is not
    with pytest.raises(ValueError, match="euler"):
        get_sampler(name)
    with pytest.raises(ValueError, match="unknown sampler"):
        sample(lambda x, t: x, Diffusion("flow", "flow"), seeds=[0], shape=(1, 2, 2), guidance=1.0, sampler=name)


# 6. Norms that begin at zero


def test_scratch_init_zeroes_norm_gains():
    """Initialising "all vectors to zero" silenced every norm; in difflit gains begin at one, in a new model and wherever parts begin anew."""
    model = create_glide("tiny", **SMALL)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))}
    assert len(norms) > 20 and all((m.weight == 1).all() and (m.bias == 0).all() for m in norms.values())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert set(reinitialise_parts(model, "norms")) == {f"{n}.{which}" for n in norms for which in ("weight", "bias")}
    assert all((m.weight == 1).all() for m in norms.values())
    reinitialise_parts(model, "all")
    fresh = dict(create_glide("tiny", **SMALL).named_parameters())
    assert all(torch.equal(p, fresh[n]) for n, p in model.named_parameters())


def test_a_signal_comes_through_a_new_network():
    """What zero gains destroyed: at the start the features before the last layer vary from pixel to pixel, and its gradient is not zero."""
    model, seen = create_glide("tiny", **SMALL), []
    model.out[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    model(normal(0, "x", range(2), (3, 16, 16)), torch.tensor([10.0, 900.0]), **words(2)).sub(1).square().mean().backward()
    assert seen[0].std() > 0.1 and model.out[2].weight.grad.abs().max() > 1e-3


# 7. The last timestep


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squared_cosine", "flow"])
def test_last_timestep_never_trained(schedule):
    """Times were drawn from 0…T−2, so that sampling began where the network had never been; in difflit first and last are drawn as often as any other."""
    d = Diffusion(schedule, "flow" if schedule == "flow" else "eps")
    times = d.draw_times(0, "time", torch.arange(100_000)).double()
    first, last = (times < 1e-3, times > 1 - 1e-3) if schedule == "flow" else (times == 0, times == d.timesteps - 1)
    for count in (int(first.sum()), int(last.sum())):
        assert abs(count - 100) < 5 * 10, count  # of a binomial with mean 100
    assert times.min() >= 0 and times.max() <= (1 if schedule == "flow" else d.timesteps - 1)
    assert float(sigma_steps(d, 10)[0]) == float(d.sigma_ve(torch.tensor(1.0 if schedule == "flow" else 999))), "sampling begins at a time that is trained"


# 8. Files with the same stem


def test_same_stem_files_in_different_folders_collide(tmp_path):
    """Pictures and captions were matched by stem alone, so that a/0001 got the caption of b/0001; in difflit each has its own, and its path as its name."""
    names = [f"{place}/0001.png" for place in ("train/a", "train/b", "train/b/deep", "train", "validation")]
    for i, name in enumerate(names):
        save(tmp_path, name, photograph(i), f"photograph {i}")
    source = FolderSource(tmp_path)
    samples = {s.id: s for split in ("train", "validation") for s in FolderSource(tmp_path, split=split)}
    assert {name: s.caption for name, s in samples.items()} == {name: f"photograph {i}" for i, name in enumerate(names)}
    for s in samples.values():
        assert s.image.tobytes() == photograph(int(s.caption.split()[-1])).tobytes()
    with Loader(source, batch_size=4, image_size=16) as loader:
        batch = next(loader)
    assert len(set(batch["id"])) == 4 and len({image.numpy().tobytes() for image in batch["image"]}) == 4


# 9. A cache that is called LRU


class Tower:
    "A text tower that keeps a list of what it was asked."

    def __init__(self):
        self.asked: list[list[int]] = []

    def __call__(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        self.asked.append(tokens[:, 0].tolist())
        return {"sequence": (tokens * mask).float()[:, None].expand(-1, 4, -1).contiguous()}


def captions(*numbers: int) -> tuple[Tensor, Tensor]:
    "Captions that begin with these tokens."
    tokens = torch.tensor(numbers)[:, None] + torch.arange(8)
    return tokens, torch.ones_like(tokens).bool()


def test_lru_that_is_fifo():
    """An "LRU" threw out what was stored first, however often it was used; difflit's throws out what was used least recently, within its bytes."""
    tower, cache = Tower(), TextCache(3 * 4 * 8 * 4, rows=1)  # room for three captions of 4 × 8 numbers in fp32
    for batch in [(1,), (2,), (3,), (1,), (4,)]:
        cache(*captions(*batch), tower)
    assert (len(cache), cache.bytes) == (3, 3 * 4 * 8 * 4)
    tower.asked.clear()
    cache(*captions(1, 3, 4), tower)
    assert tower.asked == [], "1 was stored first and used since: it must be there"
    cache(*captions(2), tower)
    assert tower.asked == [[2]]


@pytest.mark.parametrize("rows", [1, 8])
def test_one_miss_recomputes_the_whole_batch(rows):
    """One new caption made the whole batch be computed again; in difflit a miss is computed alone, once, and the answers are those without a cache."""
    tower, cache = Tower(), TextCache(10**6, rows=rows)
    cache(*captions(1, 2, 3, 4, 5, 6, 7), tower)
    tower.asked.clear()
    batch = captions(1, 9, 2, 3, 9, 4, 5, 6)
    answer = cache(*batch, tower)
    assert tower.asked == [[9] * rows], "one call, for the new caption only (a fixed number of rows keeps its bits the same)"
    assert torch.equal(answer["sequence"], encode_rows(*batch, Tower(), rows=rows)["sequence"])
    assert (cache.misses, cache.hits) == (8, 7)


# 10. Resuming at a place that was never reached


@pytest.fixture
def gappy(tmp_path):
    "23 good pictures to train on, and broken ones among them."
    save(tmp_path, "validation/a.png", photograph(99), "held out")
    for i in range(23):
        save(tmp_path, f"train/{i:02d}.png", photograph(i, (12, 12)), f"photograph {i}")
        if i % 2:
            (tmp_path / f"train/{i:02d}x.png").write_bytes(b"broken")
            (tmp_path / f"train/{i:02d}x.txt").write_text("a caption")
    return FolderSource(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_counted_before_filtering(gappy, workers):
    """The place was step·batch // 10,000, in files, before broken ones were skipped; in difflit it is what was delivered: nothing repeats or is lost."""
    settings = dict(batch_size=5, image_size=8, seed=3, uncond_p=0.3, workers=workers)
    assert (len(gappy), len(gappy.skipped)) == (23, 11)
    with Loader(gappy, **settings) as whole:
        batches = list(islice(whole, 12))
    ids = [i for batch in batches for i in batch["id"]]
    assert sorted(ids[:23]) == sorted(ids[23:46]) == sorted(e.id for e in gappy.entries), "each usable picture once per epoch"
    for stop in (1, 4, 5, 9, 11):  # within, at and beyond the first epoch
        with Loader(gappy, **settings) as first:
            for _ in range(stop):
                next(first)
            position = first.position
        with Loader(gappy, **settings, position=position) as second:
            rest = list(islice(second, 12 - stop))
        for mine, expected in zip(rest, batches[stop:], strict=True):
            assert mine["id"] == expected["id"] and mine["caption"] == expected["caption"]
            assert torch.equal(mine["position"], expected["position"]) and torch.equal(mine["image"], expected["image"])


# 11. Caption dropout that does nothing


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_uncond_p_accepted_and_ignored(share):
    """uncond_p was accepted and never used, so guidance had nothing to push away from; in difflit that share of captions is emptied, and 0 empties none."""
    with Loader(open_source("shapes", limit=300), batch_size=500, image_size=8, uncond_p=share) as loader:
        captions = [c for batch in islice(loader, 4) for c in batch["caption"]]
    emptied = captions.count("") / len(captions)
    assert abs(emptied - share) <= 4 * math.sqrt(share * (1 - share) / len(captions))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_uncond_p_reaches_the_network(tmp_path, share):
    """And it is not lost between the settings and the network: what a run's task receives has that share of captions without a token."""
    run = open_run({**TINY, "steps": 2, "batch_size": 32, "score_images": 0, "statistics_every_steps": 0, "uncond_p": share, "run_dir": str(tmp_path / "run")})
    job, empty = prepare(run), []
    original = job.task.loss

    def spy(model, batch):
        empty.extend((~batch["mask"].any(1)).tolist())
        return original(model, batch)

    job.task.loss = spy
    train_job(job, show=False)
    finish(run)
    assert len(empty) == 64 and abs(sum(empty) / 64 - share) <= 4 * math.sqrt(share * (1 - share) / 64)


# 12. Samplers that begin late and stop early


TARGET = normal(0, "target", range(3), (2, 4, 4)).clamp(-1, 1)
COSTS = {"one": 1, "two": 2, "three": 3}


def evaluations(name: str, steps: int) -> int:
    "How often a sampler asks, by its docstring, on the way to σ = 0."
    said = re.search(r"(one|two|three) evaluations? per step( but for the last)?( and one more)?", SAMPLERS[name].__doc__ or "")
    assert said, f"the docstring of {name} does not say how many evaluations a step takes"
    return COSTS[said[1]] * steps - (COSTS[said[1]] - 1 if said[2] else 0) + bool(said[3] and steps > 1)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_plms_begins_late_and_stops_short(name, steps):
    """PLMS began at the second-noisiest step and stopped one short, with noise left in; difflit's samplers begin at the first σ, visit all, end clean."""
    asked: list[float] = []

    def point_mass(x: Tensor, sigma: float) -> Tensor:
        asked.append(sigma)
        return TARGET

    sigmas = torch.cat([torch.logspace(1, -1.5, steps) if steps > 1 else torch.tensor([10.0]), torch.zeros(1)]).double()
    x = TARGET + sigmas[0].float() * normal(0, "start", range(3), (2, 4, 4))
    done = SAMPLERS[name](point_mass, x, sigmas, noise=per_sample_noise(range(3)))
    torch.testing.assert_close(done, TARGET, rtol=0, atol=1e-5)
    assert asked[0] == float(sigmas[0])
    assert set(sigmas[:-1].tolist()) <= set(asked) and 0.0 not in asked
    smooth = all(now <= 4 * then for now, then in pairwise(sigmas[:-1].tolist()))  # no step that Heun would take as an Euler step
    if name != "restart":  # which goes up again, and asks more
        assert len(asked) == evaluations(name, steps) if smooth else len(asked) <= evaluations(name, steps)


class PointMass(nn.Module):
    "A perfect network for one picture, in the terms of its diffusion; remembers the times it was asked."

    def __init__(self, diffusion: Diffusion):
        super().__init__()
        self.diffusion, self.times = diffusion, []

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.times.append(float(time[0]))
        t = time / 1000 if self.diffusion.continuous else time.round().long()
        alpha, sigma = (s.reshape(-1, 1, 1, 1).to(x) for s in self.diffusion.alpha_sigma(t))
        target = TARGET[:1].to(x)
        if self.diffusion.target == "flow":
            return (x - alpha * target) / sigma - target
        return (x - alpha * target) / sigma


@pytest.mark.parametrize("spacing", ["trailing", "uniform"])
@pytest.mark.parametrize("schedule, target", [("linear", "eps"), ("flow", "flow")])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_sampling_begins_at_the_noisiest_time_and_ends_without_noise(name, schedule, target, spacing):
    """The same of the whole way from seeds to pictures, with the times that the network is shown: the first is the last of training, and no noise is left."""
    d = Diffusion(schedule, target)
    network = PointMass(d)
    pictures = sample(network, d, seeds=range(2), shape=(2, 4, 4), sampler=name, steps=8, guidance=1.0, spacing=spacing)
    torch.testing.assert_close(pictures, TARGET[:1].expand(2, -1, -1, -1), rtol=0, atol=1e-4)
    assert network.times[0] == pytest.approx(1000.0 if schedule == "flow" else 999.0)
    more = name in ("dpmpp_2s_a", "restart")  # these ask in between, or nearly so
    assert network.times[0] == max(network.times) and (len(set(network.times)) == 8 or more)
    if spacing == "uniform" and schedule != "flow":
        assert min(network.times) == 0.0
