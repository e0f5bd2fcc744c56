"""Metrics against torch-fidelity and torchmetrics with the same features, and moments that do not care who counted."""

import os
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from difflit.config import SettingsError
from difflit.data import DataError
from difflit.metrics import (
    FrechetDistances,
    Moments,
    density_coverage,
    frechet_curve,
    frechet_distance,
    frechet_distance_of_features,
    frechet_infinity,
    frechet_score,
    frechet_scores,
    inception_score,
    kernel_distance,
    kernel_score,
    load_moments,
    precision_recall,
    vendi_score,
)
from difflit.randomness import integers, normal

D, N = 64, 500
PROJECTION = normal(0, "a fixed random projection", 0, (3 * 8 * 8, D))[0] / (3 * 8 * 8) ** 0.5


def pictures(name: str, n: int = N, offset: int = 0) -> torch.Tensor:
    "uint8 pictures, [n, 3, 8, 8]."
    return (integers(0, name, range(n), 200, (3, 8, 8)) + offset).to(torch.uint8)


def look(images: torch.Tensor) -> torch.Tensor:
    "The extractor of all these tests: float64 [n, D], so that nobody's rounding hides a difference."
    return (images.double() / 128 - 1).flatten(1) @ PROJECTION.double()


class Look(torch.nn.Module):
    num_features = D

    def forward(self, images):
        return look(images)


class Pictures(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def collect(features, processes=1, batch=64, groups=10):
    parts = []
    for rank in range(processes):
        parts.append(Moments(features.shape[1], groups))
        for places in torch.arange(rank, len(features), processes).split(batch):
            parts[-1].update(features[places], places)
    for other in parts[1:]:
        parts[0].merge(other)
    return parts[0]


@pytest.fixture(scope="module")
def sets():
    "Generated and real pictures; some are the same, so that precision and recall are neither 0 nor 1."
    real = pictures("real")
    fake = pictures("fake", offset=40)
    return torch.cat((real[:100] // 2 * 2 + 1, fake[100:])), real


@pytest.fixture(scope="module")
def fidelity(sets, tmp_path_factory):
    "What torch-fidelity says, without a cache and without a trace in the home folder."
    torch_fidelity = pytest.importorskip("torch_fidelity")

    class Extractor(torch_fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("all",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "all"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, images):
            return (look(images),)

    cache = tmp_path_factory.mktemp("fidelity")
    traces = [Path(os.environ.get("TORCH_HOME", "~/.cache/torch")).expanduser() / name for name in ("fidelity_cache", "fidelity_datasets")]
    before = [trace.exists() for trace in traces]
    torch_fidelity.register_feature_extractor("difflit-test", Extractor)
    found = torch_fidelity.calculate_metrics(
        input1=Pictures(sets[0]), input2=Pictures(sets[1]), feature_extractor="difflit-test", cuda=False, cache=False, cache_root=str(cache), verbose=False,
        fid=True, kid=True, isc=True, prc=True, kid_subset_size=N, kid_subsets=2, samples_shuffle=False, save_cpu_ram=True)
    assert [trace.exists() for trace in traces] == before and not list(cache.iterdir())
    return found


def test_torch_fidelity_finds_the_same(sets, fidelity):
    fake, real = (look(s) for s in sets)
    moments = collect(fake), collect(real)
    distance = fidelity["frechet_inception_distance"]
    assert frechet_distance(*moments) == pytest.approx(distance, rel=1e-9)
    assert frechet_score(*moments, "x")["value"] == pytest.approx(distance, rel=1e-9)
    assert frechet_distance_of_features(fake, real) == pytest.approx(distance, rel=1e-9)
    for subsets in (0, 2):  # subsets of all N pictures are all the same, in whatever order they are drawn
        score = kernel_score(fake, real, "x", subsets=subsets, subset_size=N)
        assert score["value"] == pytest.approx(fidelity["kernel_inception_distance_mean"], rel=1e-9)
    logits = inception_score(fake, "x", seed=None)
    assert logits["value"] == pytest.approx(fidelity["inception_score_mean"], rel=1e-9)
    half = (logits["high"] - logits["low"]) / 2
    assert half == pytest.approx(scipy.stats.t.ppf(0.975, 9) * fidelity["inception_score_std"] / 3, rel=1e-9)  # theirs divides by the number of splits
    scores = precision_recall(fake, real, "x")
    assert 0.05 < scores["precision"]["value"] < 0.95 and 0.05 < scores["recall"]["value"] < 0.95
    for name in scores:
        assert scores[name]["value"] == pytest.approx(fidelity[name], rel=1e-6)  # they average in float32


def test_torchmetrics_finds_the_same(sets):
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    fake, real = (look(s) for s in sets)
    theirs = FrechetInceptionDistance(feature=Look()).set_dtype(torch.float64)
    kernel = KernelInceptionDistance(feature=Look(), subsets=2, subset_size=N)
    for images, true in zip(sets, (False, True)):
        for batch in images.split(50):
            theirs.update(batch, real=true)
            kernel.update(batch, real=true)
    assert frechet_distance(collect(fake), collect(real)) == pytest.approx(float(theirs.compute()), rel=1e-6)  # it returns float32
    assert kernel_score(fake, real, "x", subsets=2, subset_size=N)["value"] == pytest.approx(float(kernel.compute()[0]), rel=1e-9)
    mean, _ = _inception(InceptionScore, sets[0])
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    assert inception_score(fake[order], "x", seed=None)["value"] == pytest.approx(float(mean), rel=1e-9)


def _inception(score, images):
    "It shuffles by the global generator: the same seed gives the same splits."
    metric = score(feature=Look(), splits=10)
    metric.update(images)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return metric.compute()


def test_scipy_finds_the_same(sets):
    fake, real = (look(s) for s in sets)
    a, b = collect(fake), collect(real)
    s1, s2 = a.covariance.numpy(), b.covariance.numpy()
    root = scipy.linalg.sqrtm(s1 @ s2)
    reference = float((a.mean - b.mean).square().sum()) + np.trace(s1) + np.trace(s2) - 2 * np.trace(root).real
    assert frechet_distance(a, b) == pytest.approx(reference, rel=1e-8)
    assert frechet_distance_of_features(fake, real) == pytest.approx(reference, rel=1e-8)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


@pytest.mark.parametrize("n, m", [(30, 40), (30, 500), (500, 30), (65, 64), (2, 2)])
def test_fewer_pictures_than_dimensions(sets, n, m):
    fake, real = (look(s) for s in sets)
    covariances = frechet_distance(collect(fake[:n]), collect(real[:m]))
    assert covariances == pytest.approx(frechet_distance_of_features(fake[:n], real[:m]), rel=1e-8)
    told = frechet_score(collect(fake[:n], groups=2), collect(real[:m]), "x")["protocol"] if n > 3 else "singular"
    assert ("singular" in told) == (min(n, m) <= D)


def test_features_that_say_the_same_twice(sets):
    "Enough pictures, and a singular covariance all the same; and features that never move."
    fake, real = (torch.cat((s, s[:, :3], s[:, :3] * 2 + 1, torch.full((N, 2), 7.0)), 1) for s in (look(s) for s in sets))
    reference = frechet_distance_of_features(fake, real)
    assert frechet_distance(collect(fake), collect(real)) == pytest.approx(reference, rel=1e-8)
    assert frechet_score(collect(fake), collect(real), "x")["value"] == pytest.approx(reference, rel=1e-8)
    still = collect(torch.ones(N, 4))
    assert frechet_distance(still, still) == 0 and frechet_distance(still, collect(torch.full((N, 4), 3.0))) == pytest.approx(16)


def test_blocks_of_the_product(sets):
    "More than one block of 256, with the last one smaller."
    rows = normal(0, "wide", range(700), (600,)).double()
    a, b = collect(rows * 1.2 + 0.1, groups=2), collect(rows.flip(0), groups=2)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance_of_features(rows * 1.2 + 0.1, rows), rel=1e-8)


@pytest.mark.parametrize("processes, batch", [(1, 1), (1, 500), (2, 64), (3, 17)])
def test_who_counted_and_in_which_batches_is_no_matter(sets, processes, batch):
    fake, real = (look(s) for s in sets)
    whole, reference = collect(fake, batch=50), collect(real)
    parts = collect(fake, processes, batch)
    assert torch.equal(parts.counts, whole.counts)
    torch.testing.assert_close(parts.means, whole.means, rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.scatters, whole.scatters, rtol=1e-12, atol=1e-12 * float(whole.scatters.abs().max()))
    one, other = frechet_scores(whole, reference, "x", both=True), frechet_scores(parts, reference, "x", both=True)
    for name in one:
        for key in ("value", "low", "high"):
            assert other[name][key] == pytest.approx(one[name][key], rel=1e-12, abs=1e-12)
        assert other[name]["n"] == N and other[name]["protocol"] == one[name]["protocol"]


def test_order_of_positions_is_no_matter(sets):
    fake = look(sets[0])
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    shuffled = Moments(D)
    for places in order.split(33):
        shuffled.update(fake[places], places)
    torch.testing.assert_close(shuffled.covariance, collect(fake).covariance, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_of_lower_precision_lose_nothing_more(sets, dtype):
    "What they are after rounding is counted exactly, with a mean of 1000, too."
    features = (look(sets[0]) + 1000).to(dtype)
    assert torch.allclose(collect(features).covariance, torch.cov(features.double().T), rtol=1e-10, atol=1e-12)
    small = look(sets[0]).to(dtype)
    exact = look(sets[0])
    close = 0.02 if dtype != torch.float32 else 1e-5
    real = look(sets[1])
    assert frechet_distance_of_features(small, real) == pytest.approx(frechet_distance_of_features(exact, real), rel=close)
    assert kernel_score(small, real, "x", subsets=0)["value"] == pytest.approx(kernel_distance(exact, real), rel=close)
    assert density_coverage(small, real, "x")["coverage"]["value"] == pytest.approx(density_coverage(exact, real, "x")["coverage"]["value"], abs=0.02)
    assert vendi_score(small, "x")["value"] == pytest.approx(vendi_score(exact, "x")["value"], rel=close)
    assert inception_score(small, "x")["value"] == pytest.approx(inception_score(exact, "x")["value"], rel=close)


def size(moments):
    return sum(t.untyped_storage().nbytes() for t in moments.state().values())


def test_memory_does_not_grow():
    "Neither the state, nor what a process holds: 200 more batches leave no tensor behind."
    import gc

    def tensors():
        gc.collect()
        return sum(1 for o in gc.get_objects() if type(o) is torch.Tensor)

    moments = Moments(D)
    moments.update(normal(0, "first", range(64), (D,)), range(64))
    before, held = size(moments), tensors()
    for i in range(1, 201):
        moments.update(normal(0, "more", range(64), (D,)), range(64 * i, 64 * i + 64))
    assert moments.n == 64 * 201 and size(moments) == before == 10 * (8 + 8 * D + 8 * D * D) and tensors() <= held


def test_state_goes_through_a_file(sets, tmp_path):
    from safetensors.torch import load_file, save_file

    moments = collect(look(sets[0]))
    save_file(moments.state(), tmp_path / "moments.safetensors")
    back = load_moments(load_file(tmp_path / "moments.safetensors"))
    assert all(torch.equal(back.state()[k], t) for k, t in moments.state().items())
    back.update(look(sets[1])[:1], [N])
    assert back.n == N + 1 and moments.n == N  # copies


def test_merging_in_any_order(sets):
    features = look(sets[0])
    parts = [Moments(D).update(features[i::3], range(i, N, 3)) for i in range(3)]
    parts.append(Moments(D))  # a process that saw nothing
    forward, backward = Moments(D), Moments(D)
    for part in parts:
        forward.merge(part)
    for part in reversed(parts):
        backward.merge(part)
    torch.testing.assert_close(forward.covariance, backward.covariance, rtol=1e-12, atol=1e-13)
    assert forward.n == backward.n == N


BAD = torch.zeros(30, D)
BAD[7, 3], BAD[9, 0] = float("nan"), float("inf")
GOOD = normal(0, "good", range(30), (D,))


@pytest.mark.parametrize("call", [
    lambda bad: Moments(D).update(bad, range(30)),
    lambda bad: frechet_distance_of_features(bad, GOOD),
    lambda bad: frechet_distance_of_features(GOOD, bad),
    lambda bad: kernel_score(bad, GOOD, "x", subsets=0),
    lambda bad: kernel_score(GOOD, bad, "x", subsets=5, subset_size=10),
    lambda bad: inception_score(bad, "x"),
    lambda bad: precision_recall(bad, GOOD, "x"),
    lambda bad: density_coverage(GOOD, bad, "x"),
    lambda bad: vendi_score(bad, "x"),
])
def test_bad_features_are_named(call):
    with pytest.raises(DataError, match=r"2 of 30 rows hold NaN or infinite numbers \(the first at position 7\)"):
        call(BAD)
    with pytest.raises(DataError, match="must be a table"):
        call(GOOD[:, 0])
    if "inception" not in call.__code__.co_names[0] and "vendi" not in call.__code__.co_names[0]:
        with pytest.raises(DataError, match="dimensions where .* are needed"):
            call(GOOD[:, :5])


@pytest.mark.parametrize("call, words", [
    (lambda: Moments(D).update(GOOD[:1], [0]).mean, "at least 2 pictures, there are 1"),
    (lambda: Moments(D).covariance, "at least 2 pictures, there are 0"),
    (lambda: frechet_score(collect(GOOD[:19]), collect(GOOD), "x"), "number 9 has 1"),
    (lambda: frechet_infinity(collect(GOOD), collect(GOOD), "x"), "more than 64 pictures each"),
    (lambda: frechet_curve(collect(GOOD), collect(GOOD), [11]), "1…10 can be merged, not 11"),
    (lambda: frechet_distance_of_features(GOOD, GOOD[:1]), "second features are of 1 pictures, at least 2"),
    (lambda: kernel_score(GOOD, GOOD, "x"), "reference features are of 30 pictures, at least 1000"),
    (lambda: kernel_score(GOOD[:19], GOOD, "x", subsets=0), "generated features are of 19 pictures, at least 20"),
    (lambda: inception_score(GOOD[:19], "x"), "logits are of 19 pictures, at least 20"),
    (lambda: precision_recall(GOOD, GOOD[:3], "x"), "reference features are of 3 pictures, at least 4"),
    (lambda: density_coverage(GOOD[:5], GOOD, "x"), "generated features are of 5 pictures, at least 6"),
    (lambda: vendi_score(GOOD[:19], "x"), "at least 20"),
    (lambda: vendi_score(GOOD * 0, "x"), "all zeros"),
    (lambda: Moments(D).merge(Moments(D + 1)), "cannot be merged"),
    (lambda: Moments(D).update(GOOD, range(29)), "need as many positions"),
    (lambda: load_moments({}), "counts, means, scatters missing"),
    (lambda: frechet_score(collect(GOOD), collect(torch.zeros(30, 3)), "x"), "made by the same network"),
])
def test_what_cannot_be_computed_says_why(call, words):
    with pytest.raises(DataError) as told:
        call()
    assert words in str(told.value)


def test_each_distance_is_computed_once(monkeypatch, sets):
    from difflit import metrics

    calls = []
    true = metrics._distance
    monkeypatch.setattr(metrics, "_distance", lambda *a: calls.append(1) or true(*a))
    fake, real = (collect(look(s)) for s in sets)
    frechet_scores(fake, real, "x")
    assert len(calls) == 11  # all groups, and ten times all but one
    FrechetDistances(fake, real).merged(9)
    assert len(calls) == 21


def test_a_refused_batch_changes_nothing(sets):
    moments = collect(look(sets[0]))
    before = {k: t.clone() for k, t in moments.state().items()}
    with pytest.raises(DataError):
        moments.update(BAD, range(30))
    assert all(torch.equal(before[k], t) for k, t in moments.state().items())


@pytest.mark.parametrize("call, words", [
    (lambda: Moments(D, groups=0), "groups must be at least 1, not 0"),
    (lambda: kernel_score(GOOD, GOOD, "x", subsets=-1), "subsets must be at least 0, not -1"),
    (lambda: kernel_score(GOOD, GOOD, "x", subset_size=1), "subset_size must be at least 2"),
    (lambda: kernel_score(GOOD, GOOD, "x", subsets=0, groups=1), "groups must be at least 2, not 1"),
    (lambda: inception_score(GOOD, "x", splits=0), "splits must be at least 1, not 0"),
    (lambda: precision_recall(GOOD, GOOD, "x", k=0), "k must be at least 1, not 0"),
    (lambda: density_coverage(GOOD, GOOD, "x", chunk=0), "chunk must be at least 1, not 0"),
    (lambda: vendi_score(GOOD, "x", groups=1), "groups must be at least 2, not 1"),
])
def test_settings_that_make_no_sense(call, words):
    with pytest.raises(SettingsError) as told:
        call()
    assert words in str(told.value)


def test_an_empty_batch_is_no_matter():
    assert Moments(D).update(GOOD[:0], []).n == 0


def test_copies_lie_in_their_originals_balls():
    "With a large mean and in half precision, too: the distance of a copy is zero, not what rounding leaves."
    rows = (GOOD + 300).half().repeat(4, 1)  # each four times: its third neighbour is a copy, the ball a point
    scores = precision_recall(rows, rows.clone(), "x") | density_coverage(rows, rows.clone(), "x", k=3)
    assert [s["value"] for s in scores.values()] == pytest.approx([1, 1, 4 / 3, 1])
    assert precision_recall(rows + 1, rows, "x")["precision"]["value"] == 0
