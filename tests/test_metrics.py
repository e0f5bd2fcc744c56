"""Our metrics against torch-fidelity's and torchmetrics', with the same features of the same pictures."""

import numpy as np
import pytest
import torch

from difflit.metrics import Moments, frechet_distance, inception_score, kernel_score, load_moments, moments_of, precision_recall

fidelity = pytest.importorskip("torch_fidelity")
torchmetrics = pytest.importorskip("torchmetrics")
from torch_fidelity.feature_extractor_base import FeatureExtractorBase  # noqa: E402
from torch_fidelity.registry import register_feature_extractor  # noqa: E402

N, D = 300, 32
DIRECTIONS = torch.randn(3 * 16 * 16, D, generator=torch.Generator().manual_seed(0)) / 16


def project(images):
    return torch.relu((images.double().flatten(1) / 127.5 - 1) @ DIRECTIONS.double())


class Projection(FeatureExtractorBase):
    """A fixed random projection in torch-fidelity's own form."""

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return ("projection",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "projection"

    @staticmethod
    def can_be_compiled():
        return False

    @staticmethod
    def get_dummy_input_for_compile():
        return torch.zeros(1, 3, 16, 16, dtype=torch.uint8)

    def forward(self, images):
        return (project(images),)


class Module(torch.nn.Module):
    """The same for torchmetrics."""

    num_features = D

    def forward(self, images):
        return project(images)


class Pictures(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


@pytest.fixture(scope="module")
def pictures():
    draw = torch.Generator().manual_seed(1)
    base = torch.randint(0, 256, (N, 3, 16, 16), generator=draw)
    return base.byte(), (0.8 * torch.randint(0, 256, (N, 3, 16, 16), generator=draw) + 30).byte()


@pytest.fixture(scope="module")
def theirs(pictures, tmp_path_factory):
    register_feature_extractor("difflit-projection", Projection)
    made, real = pictures
    options = dict(isc=True, fid=True, kid=True, prc=True, kid_subsets=2, kid_subset_size=N, samples_shuffle=False, verbose=False, cache=False)
    return fidelity.calculate_metrics(input1=Pictures(made), input2=Pictures(real), feature_extractor="difflit-projection", cuda=False, batch_size=50,
                                      cache_root=str(tmp_path_factory.mktemp("cache")), **options)


def test_frechet_distance_is_theirs(pictures, theirs):
    made, real = map(project, pictures)
    ours = frechet_distance(moments_of(made), moments_of(real))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    metric = torchmetrics.image.fid.FrechetInceptionDistance(feature=Module(), normalize=False).set_dtype(torch.float64)
    metric.update(pictures[0], real=False)
    metric.update(pictures[1], real=True)
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)


def test_kernel_distance_is_theirs(pictures, theirs):
    made, real = map(project, pictures)
    ours = kernel_score(made, real, "", subsets=1, subset_size=N)
    assert ours["value"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    metric = torchmetrics.image.kid.KernelInceptionDistance(feature=Module(), subsets=1, subset_size=N).set_dtype(torch.float64)
    metric.update(pictures[0], real=False)
    metric.update(pictures[1], real=True)
    assert ours["value"] == pytest.approx(float(metric.compute()[0]), rel=1e-6)


def test_inception_score_is_theirs(pictures, theirs):
    ours = inception_score(project(pictures[0]), "", splits=10)
    assert ours["value"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)


def test_precision_and_recall_are_theirs(pictures, theirs):
    ours = precision_recall(*map(project, pictures), k=3)
    assert ours["precision"]["value"] == pytest.approx(theirs["precision"], rel=1e-6)
    assert ours["recall"]["value"] == pytest.approx(theirs["recall"], rel=1e-6)
    assert 0 < theirs["precision"] < 1 or 0 < theirs["recall"] < 1  # or the comparison says nothing


@pytest.mark.parametrize("processes, batch", [(1, 300), (2, 64), (3, 17)])
def test_moments_do_not_know_who_counted(pictures, processes, batch):
    rows = project(pictures[0])
    whole = moments_of(rows)
    parts = []
    for rank in range(processes):
        mine = Moments(D)
        for places in torch.arange(rank, N, processes).split(batch):
            mine.update(rows[places], places)
        parts.append(load_moments(mine.state()))  # as it would travel between processes
    for other in parts[1:]:
        parts[0].merge(other)
    assert torch.equal(parts[0].counts, whole.counts)
    torch.testing.assert_close(parts[0].covariance, whole.covariance, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(whole.covariance.numpy(), np.cov(rows.numpy().T), rtol=1e-10, atol=1e-12)


def test_memory_does_not_grow(pictures):
    rows, moments = project(pictures[0]), Moments(D)
    sizes = []
    for turn in range(5):
        moments.update(rows, torch.arange(N) + turn * N)
        sizes.append(sum(t.numel() * t.element_size() for t in moments.state().values()))
    assert len(set(sizes)) == 1 and moments.n == 5 * N
