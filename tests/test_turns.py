"""Judges and the networks that draw take turns on a device; faiss, where it is installed, finds what we find."""

import logging

import pytest
import torch
from conftest import TINY
from torch import nn

import difflit.evaluation
from difflit import neighbours as searching
from difflit.extractors import EXTRACTORS, module_extractor
from difflit.neighbours import neighbours
from difflit.recipes import judge_now, prepare, train_job
from difflit.runs import finish, open_run


@pytest.fixture
def sent(monkeypatch):
    """Who was sent where, in order; nobody really moves, and judges believe in a GPU."""
    found = []

    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 8, 4, stride=4)

        def forward(self, x):
            found.append((self, "looks"))
            return self.layer(x)

    network = Looks()
    made = module_extractor(network, 16, name="watched", device="cpu")
    monkeypatch.setitem(EXTRACTORS, "watched", lambda weights, device: made)
    found.clear()
    monkeypatch.setattr(difflit.evaluation, "choose_device", lambda name="auto": torch.device("cuda"))
    monkeypatch.setattr(nn.Module, "to", lambda self, place=None, *more, **rest: found.append((self, str(place))) or self)
    return network, found


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    run = open_run({**TINY, "steps": 1, "score_images": 0, "limit": 32, "image_size": 16, "channels": 32, "judge_images": 20,
                    "extractors": "watched", "run_dir": str(tmp_path_factory.mktemp("turns") / "run")})
    job = train_job(prepare(run), show=False)
    finish(run)
    return job


@pytest.mark.parametrize("compiled", [False, True])
def test_the_trained_network_makes_room_for_judges(job, sent, compiled):
    (network, found), model, average = sent, job.state.model, job.state.ema.model
    before = [id(p) for group in job.state.optimizer.param_groups for p in group["params"]]
    job.panel, job.state.wrapped = None, model if compiled else None
    try:
        judge_now(job)
    finally:
        job.panel, job.state.wrapped = None, None
    told = [("judge" if who is network else "model" if who is model else "average" if who is average else "other", what) for who, what in found]
    told = [each for i, each in enumerate(told) if i == 0 or told[i - 1] != each]  # it looks more than once
    leave = [("average", "cpu")] if compiled else [("model", "cpu"), ("average", "cpu")]
    turn = [*leave, ("judge", "cuda"), ("judge", "looks"), ("judge", "cpu"), *leave]
    assert told == [*turn, *turn] or told == [*turn, *turn[1:]], told  # the real pictures, then the drawn ones
    assert before == [id(p) for group in job.state.optimizer.param_groups for p in group["params"]]


@pytest.mark.cuda
def test_moving_keeps_parameters():
    from difflit.evaluation import taking_turns

    model = nn.Linear(64, 64).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    kept = [*model.parameters()]
    for turn in range(2):
        model(torch.ones(2, 64, device="cuda")).square().sum().backward()
        optimizer.step()
        with taking_turns(torch.device("cuda"), [model], []):
            assert all(p.device.type == "cpu" for p in model.parameters())
        assert all(a is b and a.is_cuda for a, b in zip(kept, model.parameters())), turn


@pytest.fixture
def vectors():
    draw = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(20, 24, generator=draw), torch.randn(3000, 24, generator=draw)
    gallery[100] = gallery[2500] = queries[3] + 1e-4  # near copies, twice
    gallery[1000:1400] = gallery[999]  # more equal ones than are named
    queries[7] = gallery[999] + 1e-3
    return queries, gallery


@pytest.mark.parametrize("shift, scale", [(0.0, 1.0), (300.0, 1.0), (300.0, 1e-3)])
@pytest.mark.parametrize("how", [{}, {"metric": "cosine"}, {"exclude": torch.arange(20) + 990}])
def test_faiss_changes_no_result(vectors, shift, scale, how, monkeypatch):
    pytest.importorskip("faiss")
    queries, gallery = (scale * each + shift for each in vectors)
    used = []
    nominate = searching._nominate_by_faiss
    monkeypatch.setattr(searching, "_nominate_by_faiss", lambda *words: used.append(1) or nominate(*words))
    theirs = neighbours(queries, gallery.split(128), 9, faiss_above=2999, **how)
    assert not used, "the size of a stream is not known"
    theirs, ours = neighbours(queries, gallery, 9, chunk=700, faiss_above=2999, **how), neighbours(queries, gallery, 9, chunk=700, **how)
    assert len(used) == 5 and torch.equal(theirs.index, ours.index) and torch.equal(theirs.distance, ours.distance)
    direct = torch.cdist(queries.double(), gallery.double()) if "metric" not in how else 1 - nn.functional.cosine_similarity(
        queries.double()[:, None], gallery.double()[None], dim=2)
    if "exclude" in how:
        direct[torch.arange(20), how["exclude"]] = torch.inf
    torch.testing.assert_close(theirs.distance, direct.sort(1).values[:, :9], rtol=1e-5, atol=1e-7)


def test_without_faiss_the_search_goes_on(vectors, monkeypatch, caplog):
    import builtins

    real = builtins.__import__

    def missing(name, *words, **more):
        if name == "faiss":
            raise ImportError(name)
        return real(name, *words, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    searching._faiss.cache_clear()
    with caplog.at_level(logging.WARNING, "difflit"):
        found = [neighbours(*vectors, 3, faiss_above=10) for _ in range(2)]
    searching._faiss.cache_clear()
    assert torch.equal(found[0].index, neighbours(*vectors, 3).index)
    assert [record.getMessage() for record in caplog.records if "faiss" in record.getMessage()] == [
        "faiss is not installed: the gallery is searched without it, as exactly (pip install 'difflit[faiss]')"]


def test_the_audited_network_makes_room_for_the_descriptor(sent):
    """But for its autoencoder, which latents may need."""
    from difflit.audits import audit
    from difflit.evaluation import Candidate, ask

    (_, found), painter, coder = sent, nn.Linear(2, 2), nn.Linear(2, 2)
    training = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def answer(questions):
        found.append((painter, "draws"))
        return training[: len(questions)]

    candidate = Candidate("painter", "painter", answer, [painter, coder], autoencoder=coder)
    audit(candidate, ask(["a", "b"]), training, methods=["ratio"], descriptor=EXTRACTORS["watched"](None, None), perturb=False, device=torch.device("cuda"))
    told = [("painter" if who is painter else "coder" if who is coder else "judge", what) for who, what in found]
    assert told[:3] == [("painter", "draws"), ("painter", "cpu"), ("judge", "cuda")] and told[-2:] == [("judge", "cpu"), ("painter", "cpu")], told
    assert {what for _, what in told[3:-2]} == {"looks"}
