"""Loss terms: every one trains and goes on bit-exactly; without terms nothing changes; weights reach the loss from every loader."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from difflit.checkpoints import CheckpointError, pack_optimizer, unpack_optimizer
from difflit.config import SettingsError
from difflit.diffusion import Diffusion
from difflit.losses import LOSS_TERMS, Adversarial, Terms, forget_terms, pack_terms, parse_terms, unpack_terms, update_terms
from difflit.precision import choose_precision
from difflit.tasks import LatentDiffusion, TextToImage

FLOW = Diffusion("flow", "flow", time_sampling="logit_normal")


class Tiny(nn.Module):
    "Two convolutions that are told the time."

    def __init__(self, channels=3):
        super().__init__()
        self.first, self.last = nn.Conv2d(channels + 1, 8, 3, padding=1), nn.Conv2d(8, channels, 3, padding=1)

    def forward(self, x, times, tokens=None, mask=None, text=None):
        time = (times / 1000).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        return self.last(F.silu(self.first(torch.cat([x, time.to(x.dtype)], 1))))


def batch_of(step, size=4, seed=1):
    "The pictures of a step: the same whenever they are asked for."
    pictures = torch.rand(size, 3, 16, 16, generator=torch.Generator().manual_seed(1000 * seed + step)) * 2 - 1
    words = {"tokens": torch.zeros(size, 4).long(), "mask": torch.ones(size, 4).bool()}
    return {"image": pictures, "position": torch.arange(step * size, (step + 1) * size), **words}


class Run:
    "The plainest loop: what the real one does with terms, in ten lines."

    def __init__(self, spec, precision="fp32", accumulate=1):
        torch.manual_seed(0)
        self.network, self.accumulate = Tiny(), accumulate
        self.optimizer = torch.optim.AdamW(self.network.parameters(), 1e-3)
        self.task = TextToImage(FLOW, terms=parse_terms(spec, seed=5))
        self.precision, self.losses = choose_precision(precision, torch.device("cpu")), []

    def train(self, start, stop):
        for step in range(start, stop):
            for part in zip(*(v.chunk(self.accumulate) for v in batch_of(step).values())):
                with self.precision.autocast():
                    told = self.task.loss(self.network, dict(zip(batch_of(step), part)))
                (told.loss.mean() / self.accumulate).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            update_terms(self.task.terms, step + 1)
            self.losses.append(told.loss.mean().item())
        return self

    def save(self, folder):
        tensors, rest = pack_optimizer(self.optimizer)
        terms, state = pack_terms(self.task.terms)
        groups = {"model": self.network.state_dict(), "optimizer": tensors, "terms": {k: v.contiguous() for k, v in terms.items()}}
        for name, group in groups.items():
            save_file(group, folder / f"{name}.safetensors")
        (folder / "state.json").write_text(json.dumps({"optimizer": rest, "terms": state}))

    def load(self, folder):
        state = json.loads((folder / "state.json").read_text())
        self.network.load_state_dict(load_file(folder / "model.safetensors"))
        unpack_optimizer(self.optimizer, load_file(folder / "optimizer.safetensors"), state["optimizer"])
        unpack_terms(self.task.terms, load_file(folder / "terms.safetensors"), state["terms"])
        return self

    def everything(self):
        return {**self.network.state_dict(), **pack_terms(self.task.terms)[0]}


SPECS = ["task=0,huber=1", "l1=0.5", "perceptual=0.1", "adversarial:1e-3=0.05", "huber:0.1=1,perceptual=0.1,adversarial=0.01"]


@pytest.mark.parametrize("spec", SPECS)
def test_every_term_goes_on_bit_exactly(spec, tmp_path):
    whole = Run(spec).train(0, 50)
    Run(spec).train(0, 25).save(tmp_path)
    torch.manual_seed(99)  # what is restored must not lean on torch's global generator
    resumed = Run(spec).load(tmp_path).train(25, 50)
    assert resumed.losses == whole.losses[25:]
    expected, found = whole.everything(), resumed.everything()
    assert expected.keys() == found.keys() and not [name for name in expected if not torch.equal(expected[name], found[name])]
    assert all(np.isfinite(whole.losses)) and whole.losses[0] != Run("").train(0, 1).losses[0]


def test_every_registered_term_is_tried():
    assert all(any(name in spec for spec in SPECS) for name in LOSS_TERMS), "a term without a test of its resume"


def test_without_terms_nothing_changes():
    "The formulas of a task without terms, written out."
    task, network, batch = TextToImage(FLOW), Tiny(), batch_of(3)
    told = task.loss(network, batch)
    noise_task = TextToImage(FLOW, terms=Terms())
    assert torch.equal(told.loss, noise_task.loss(network, batch).loss) and told.parts == {} and not task.terms
    from difflit.randomness import normal

    times = FLOW.draw_times(0, "time", batch["position"])
    noise = normal(0, "noise", batch["position"], (3, 16, 16))
    answer = network(FLOW.add_noise(batch["image"], noise, times), FLOW.model_time(times))
    assert torch.equal(told.loss, torch.ones(4) * (answer - (noise - batch["image"])).square().flatten(1).mean(1))


def test_a_gradient_reaches_the_network_from_each_term_alone():
    for name in ("huber", "l1", "perceptual", "adversarial"):
        run = Run(f"task=0,{name}=1")
        run.task.loss(run.network, batch_of(0)).loss.mean().backward()
        assert all(p.grad.abs().sum() > 0 for p in run.network.parameters()), name
        assert name != "adversarial" or all(p.grad is None for p in run.task.terms.terms[0].network.parameters())


def test_terms_compute_in_fp32_inside_autocast():
    seen = []

    def look(predicted, true, times, batch):
        seen.append((predicted.dtype, torch.is_autocast_enabled("cpu")))
        return predicted.flatten(1).mean(1)

    run, term = Run("", "bf16"), LOSS_TERMS["l1"]()
    term.__class__ = type("Looking", (LOSS_TERMS["l1"],), {"__call__": lambda self, *a: look(*a)})
    run.task = replace(run.task, terms=[term])
    run.train(0, 1)
    assert seen == [(torch.float32, False)]


def test_the_discriminator_needs_no_loss_scaling():
    "Its step is the same whatever the network's loss is multiplied by."
    ends = []
    for scale in (1.0, 2.0**16):
        run = Run("adversarial=0.1")
        (run.task.loss(run.network, batch_of(0)).loss.mean() * scale).backward()
        update_terms(run.task.terms, 1)
        ends.append(pack_terms(run.task.terms)[0])
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_samples_that_are_not_finite_do_not_reach_the_discriminator():
    term = Adversarial()
    pictures = torch.rand(4, 3, 16, 16)
    broken = pictures.clone()
    broken[2, 0, 0, 0] = torch.nan
    term(broken, pictures, None, {"signal": torch.ones(4)})
    term.update(1)
    assert all(p.isfinite().all() for p in term.network.parameters())


def test_micro_batches_make_the_same_step_and_forgotten_ones_none():
    whole, cut = (Run("adversarial=0.1", accumulate=n).train(0, 1).everything() for n in (1, 2))
    moments = [name for name in whole if name.endswith("exp_avg")]  # after one step half of the gradient; weights after Adam would hide its size
    assert moments
    for name in moments:
        torch.testing.assert_close(whole[name], cut[name], rtol=1e-3, atol=1e-6)
    run = Run("adversarial=0.1")
    before = {k: v.clone() for k, v in pack_terms(run.task.terms)[0].items()}
    run.task.loss(run.network, batch_of(0))
    forget_terms(run.task.terms)
    assert update_terms(run.task.terms, 1) == {} and all(torch.equal(before[k], v) for k, v in pack_terms(run.task.terms)[0].items())


def test_validation_asks_no_terms():
    run = Run("adversarial=0.1,perceptual=1")
    with torch.no_grad():
        values = run.task.validation_loss(run.network, [batch_of(0)])
    assert values == TextToImage(FLOW).validation_loss(run.network, [batch_of(0)]) and not run.task.terms.terms[0].kept


def _rank(rank, folder, port):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(rank)  # the initial weights must not depend on it
    term = Adversarial(lr=1e-3)
    for step in range(3):
        batch = batch_of(step)["image"][2 * rank : 2 * rank + 2]
        term(batch * 0.5, batch, None, {"signal": torch.ones(2)})
        term.update(step + 1)
    save_file({k: v.contiguous() for k, v in term.tensors().items()}, f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_two_processes_train_the_discriminator_of_one(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_rank, (str(tmp_path), port), nprocs=2)
    first, second = (load_file(tmp_path / f"{r}.safetensors") for r in (0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    alone = Adversarial(lr=1e-3)
    for step in range(3):
        batch = batch_of(step)["image"]
        alone(batch * 0.5, batch, None, {"signal": torch.ones(4)})
        alone.update(step + 1)
    for name, value in alone.network.state_dict().items():
        torch.testing.assert_close(first[f"network.{name}"], value, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(SettingsError, match="'perceptual' looks at pixels, and the task LatentDiffusion trains on latents"):
        LatentDiffusion(FLOW, scaling_factor=1.0, terms=parse_terms("perceptual=1"))
    LatentDiffusion(FLOW, scaling_factor=1.0, terms=parse_terms("perceptual=1", decode=lambda x: x[:, :3]))
    narrow, wide = Adversarial(width=8), Adversarial(width=16)
    with pytest.raises(CheckpointError, match="discriminator does not fit"):
        wide.load(narrow.tensors(), narrow.state_dict())


@pytest.fixture
def labelled(tmp_path):
    "A tar of twelve pictures, nine cats and three dogs."
    import io
    import tarfile

    from conftest import photograph

    path = tmp_path / "pets.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(12):
            picture = io.BytesIO()
            photograph(i).save(picture, "PNG")
            kind = json.dumps({"kind": "dog" if i % 4 == 0 else "cat"}).encode()
            for ending, content in {"png": picture.getvalue(), "txt": f"pet {i}".encode(), "json": kind}.items():
                member = tarfile.TarInfo(f"{i:02d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def test_every_loader_of_pictures_weighs_alike(labelled):
    "Indexed and streamed, counted and written; against the formula in float64."
    from difflit.data import DataError
    from difflit.loading import Loader, sample_weights
    from difflit.selection import ShardSource
    from difflit.streams import StreamLoader

    settings = {"batch_size": 12, "image_size": 16}
    source = ShardSource(str(labelled), columns=["kind"])
    sizes = {kind: list(source.labels("kind")).count(kind) for kind in ("dog", "cat")}  # of the split that is trained on
    assert sizes["dog"] == 3 and 5 < sizes["cat"] < 9
    raw = {kind: (1 - 0.9) / (1 - 0.9**size) for kind, size in sizes.items()}
    mean = sum(sizes[kind] * raw[kind] for kind in sizes) / sum(sizes.values())
    written = "kind:0.9: " + " ".join(f"{kind}={size}" for kind, size in sizes.items())
    with Loader(source, class_weights="kind:0.9", **settings) as loader, StreamLoader(labelled, class_weights=written, **settings) as stream:
        for batch in (next(loader), next(stream)):
            expected = [raw["dog" if int(i[:2]) % 4 == 0 else "cat"] / mean for i in batch["id"]]
            torch.testing.assert_close(batch["weight"], torch.tensor(expected, dtype=torch.float32))
    assert sample_weights(source, "kind:0.9").mean() == pytest.approx(1)
    with Loader(source, **settings) as loader:
        assert "weight" not in next(loader)
    with pytest.raises(DataError, match="a stream cannot count its classes"):
        StreamLoader(labelled, class_weights="kind", **settings)
    with StreamLoader(labelled, class_weights="kind:0.9: cat=9", **settings) as stream, pytest.raises(DataError, match="has kind=dog, whose size is not"):
        next(stream)
    with pytest.raises(DataError, match="twice; choose one"):
        Loader(source, class_weights="kind", balance="kind", **settings)


def test_a_substitute_for_a_damaged_sample_brings_its_own_weight():
    from difflit.data import DamagedSample, Sample, Source
    from difflit.loading import Loader, sample_weights

    class Hurt(Source):
        name, skipped = "hurt", []

        def __len__(self):
            return 20

        def __getitem__(self, index):
            if index == 3:
                raise DamagedSample("torn")
            from conftest import photograph

            return Sample(photograph(index), "a picture", str(index), {"kind": "rare" if index == 3 else "usual"})

        def ids(self):
            return [str(i) for i in range(20)]

        def labels(self, key):
            return ["rare" if i == 3 else "usual" for i in range(20)]

        def digest(self):
            return "hurt"

    usual = float(sample_weights(Hurt(), "kind:0.9")[0])
    with Loader(Hurt(), batch_size=20, image_size=8, class_weights="kind:0.9") as loader:
        assert next(loader)["weight"].tolist() == [usual] * 20
