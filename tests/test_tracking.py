"""Where a run's numbers go: torn files, resumes, sinks that fail, columns that come late, W&B offline, endpoints."""

import json
import logging
import math
import os
import socket
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from difflit import tracking
from difflit.config import SettingsError
from difflit.tracking import (
    LossBins,
    PrometheusSink,
    Sink,
    Tracker,
    add_columns,
    close,
    flush,
    log_image,
    log_scores,
    metric,
    open_sinks,
    parse_sinks,
    read_metrics,
    record,
    settle,
    sink,
)


@pytest.fixture
def registered():
    """Registries as they were, afterwards."""
    sinks, metrics = dict(tracking.SINKS), dict(tracking.METRICS)
    yield
    for registry, before in ((tracking.SINKS, sinks), (tracking.METRICS, metrics)):
        registry.clear()
        registry.update(before)


def train(tracker, first, last, stop=None):
    for step in range(first, last + 1):
        record(tracker, step, loss=torch.tensor(1 / step, dtype=torch.bfloat16), lr=1e-3)
        if step % 4 == 0:
            record(tracker, step, val_loss=torch.tensor(2 / step, dtype=torch.float64))


@pytest.mark.parametrize("cut", range(1, 24))
def test_tables_torn_at_any_byte_resume_to_the_same(tmp_path, cut):
    whole = Tracker(tmp_path / "whole", ["loss", "lr", "val_loss"], sinks="jsonl")
    train(whole, 1, 12)
    close(whole)
    torn = Tracker(tmp_path / "torn", ["loss", "lr", "val_loss"], sinks="jsonl")
    train(torn, 1, 11)
    close(torn)
    for name in ("metrics.csv", "metrics.jsonl"):
        path = tmp_path / "torn" / name
        os.truncate(path, path.stat().st_size - cut)
    steps = read_metrics(tmp_path / "torn")["step"].tolist()
    assert steps == list(range(1, len(steps) + 1)) and len(steps) < 11
    resumed = Tracker(tmp_path / "torn", ["loss", "lr", "val_loss"], last_step=8, sinks="jsonl")
    assert [row["step"] for row in resumed.rows] == list(range(1, 9))
    train(resumed, 9, 12)
    close(resumed)
    for name in ("metrics.csv", "metrics.jsonl"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_tensors_are_read_as_they_are(tmp_path):
    tracker = Tracker(None, ["a", "b", "c", "d"])
    values = {"a": torch.tensor(0.1), "b": torch.tensor([3], dtype=torch.int64), "c": torch.tensor(1 / 3, dtype=torch.float64, requires_grad=True), "d": 2}
    record(tracker, 1, **values)
    record(tracker, 2, a=torch.tensor(math.nan))
    first, second = settle(tracker)
    assert first == {"step": 1.0, **{k: float(v) for k, v in values.items()}}
    assert math.isnan(second["a"])  # only the empty bins of `loss_bin` are left out


def test_jsonl_is_strict_json(tmp_path):
    tracker = Tracker(tmp_path, ["loss"], sinks="jsonl")
    record(tracker, 1, loss=math.inf)
    close(tracker)
    told = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert told == {"step": 1, "loss": None}


class Failing(Sink):
    def __init__(self, folder=None, last_step=0, after=0):
        self.calls, self.closed, self.after = 0, 0, after

    def log(self, rows):
        self.calls += 1
        if self.calls > self.after:
            raise OSError(28, "No space left on device")

    def image(self, name, step, picture):
        raise ConnectionError("gone")

    def close(self):
        self.closed += 1
        raise RuntimeError("cannot even close")


def test_a_failing_sink_is_switched_off_with_one_warning(tmp_path, caplog):
    failing = Failing(after=1)
    tracker = Tracker(tmp_path, ["loss"], flush_every=1, sinks=["jsonl", failing])
    with caplog.at_level(logging.WARNING, "difflit"):
        for step in range(1, 8):
            record(tracker, step, loss=0.5)
        close(tracker)
    assert (failing.calls, failing.closed) == (2, 1)
    assert [r.getMessage() for r in caplog.records] == [
        "metrics no longer go to Failing (OSError: [Errno 28] No space left on device); the run and its metrics.csv go on"]
    assert len(read_metrics(tmp_path)["step"]) == len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 7


def test_a_sink_that_cannot_show_a_picture_or_begin_is_left_out(tmp_path, caplog, registered):
    tracker = Tracker(tmp_path, ["loss"], sinks=[Failing(after=9)])
    log_image(tracker, "x", 1, np.zeros((2, 2, 3), np.uint8))
    assert not tracker.sinks

    @sink("unreachable")
    def unreachable(folder, last_step):
        raise ConnectionError("no route to host")

    assert open_sinks("unreachable, jsonl", tmp_path).keys() == {"jsonl"}
    assert "no longer go to unreachable" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_on_a_full_disk_does_not_stop_or_hang(tmp_path, caplog, monkeypatch):
    tracker = Tracker(tmp_path, ["loss"], flush_every=1)
    record(tracker, 1, loss=0.5)
    flush(tracker)
    writer = tracker.sinks["tensorboard"].board()._get_file_writer().event_writer._async_writer._writer
    monkeypatch.setattr(writer, "write", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    monkeypatch.setattr(writer, "flush", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for step in range(2, 12):
        record(tracker, step, loss=0.5)
    close(tracker)
    assert len(read_metrics(tmp_path)["step"]) == 11
    assert caplog.text.count("no longer go to tensorboard") == 1


def test_the_table_failing_raises(tmp_path):
    tracker = Tracker(tmp_path, ["loss"], sinks=())
    tracker.table.path = tmp_path / "missing" / "metrics.csv"
    record(tracker, 1, loss=0.5)
    with pytest.raises(OSError):
        flush(tracker)


def test_a_refused_start_leaves_the_table(tmp_path):
    tracker = Tracker(tmp_path, ["loss"], sinks="jsonl")
    record(tracker, 1, loss=0.5)
    close(tracker)
    cases = {"tensorbord": "did you mean 'tensorboard'", "jsonl:file=x": "{'file': 'x'}", "prometheus:port=x": "cannot", "wandb.x": "wandb"}
    for wrong, message in cases.items():
        with pytest.raises(SettingsError, match=message):
            Tracker(tmp_path, ["loss"], last_step=1, sinks=wrong)
    assert read_metrics(tmp_path)["loss"].tolist() == [0.5]


def test_settings_are_read():
    assert parse_sinks("") == parse_sinks("none") == parse_sinks("csv") == {}
    assert parse_sinks(" tensorboard,prometheus:port=9100:bind=::1 ,wandb:project=a-b:mode=offline") == {
        "tensorboard": {}, "prometheus": {"port": 9100, "bind": "::1"}, "wandb": {"project": "a-b", "mode": "offline"}}


def test_columns_may_come_late_but_typos_may_not(tmp_path, registered):
    tracker = Tracker(tmp_path, ["loss"], sinks=())
    record(tracker, 1, loss=1.0)
    with pytest.raises(KeyError, match="'sharpness' is not a column"):
        record(tracker, 1, sharpness=2.0)
    metric("sharpness")(lambda state, losses: 2.0)
    record(tracker, 2, loss=0.5, sharpness=torch.tensor(2.0))
    add_columns(tracker, "sharpness", "more")
    record(tracker, 3, more=7)
    close(tracker)
    table = read_metrics(tmp_path)
    assert list(table) == ["step", "loss", "sharpness", "more"] and table["step"].tolist() == [1, 2, 3]
    assert table["sharpness"][1] == 2 and table["more"][2] == 7 and np.isnan(table["sharpness"][[0, 2]]).all()
    resumed = Tracker(tmp_path, ["new", "loss"], last_step=2, sinks=())
    record(resumed, 3, new=1, loss=0.1, more=8)
    close(resumed)
    table = read_metrics(tmp_path)
    assert list(table) == ["step", "new", "loss", "sharpness", "more"] and table["loss"].tolist() == [1.0, 0.5, 0.1] and table["more"][2] == 8


def test_tensorboard_purges_after_the_checkpoint(tmp_path):
    for first, last, resumed in ((1, 12, 0), (9, 10, 8)):
        tracker = Tracker(tmp_path, ["loss", "lr", "val_loss"], last_step=resumed)
        train(tracker, first, last)
        close(tracker)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 11)) and [e.step for e in events.Scalars("val_loss")] == [4, 8]


def test_prometheus_is_local_and_finds_a_port(tmp_path, caplog):
    from prometheus_client.parser import text_string_to_metric_families

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        tracker = Tracker(tmp_path, ["loss"], flush_every=1, sinks={"prometheus": {"port": port}, "prometheus-file": {}})
    endpoint = tracker.sinks["prometheus"]
    try:
        assert f"port {port} is taken" in caplog.text and port < endpoint.port < port + 10
        assert endpoint._server.server_address[0] == "127.0.0.1"
        record(tracker, 1, loss=0.5)
        log_scores(tracker, 1, {"clip": {"value": 0.3, "low": 0.2, "high": None, "n": 4}})
        told = urllib.request.urlopen((tmp_path / "prometheus.txt").read_text().strip(), timeout=10).read().decode()
        values = {s.name: s.value for family in text_string_to_metric_families(told) for s in family.samples}
        assert values == {"difflit_running": 1, "difflit_step": 1, "difflit_loss": 0.5, "difflit_score_clip": 0.3, "difflit_score_clip_low": 0.2}
        assert (tmp_path / "metrics.prom").read_text() == told
    finally:
        close(tracker)
    with socket.socket() as free:
        assert free.connect_ex(("127.0.0.1", endpoint.port)) != 0, "still listening"


def test_all_ports_taken_is_a_clear_error(tmp_path, monkeypatch):
    import errno

    import prometheus_client

    monkeypatch.setattr(prometheus_client, "start_http_server", lambda *a: (_ for _ in ()).throw(OSError(errno.EADDRINUSE, "in use")))
    with pytest.raises(SettingsError, match="finds ports 9464 to 9473 taken"):
        PrometheusSink(tmp_path)


def test_a_collectors_file_is_never_half_written(tmp_path, monkeypatch):
    tracker = Tracker(tmp_path / "run", ["loss"], flush_every=1, sinks={"prometheus-file": {"path": str(tmp_path)}})
    record(tracker, 1, loss=0.5)
    flush(tracker)
    path = tmp_path / "difflit-run.prom"
    before = path.read_text()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("killed")))
    monkeypatch.setattr(os, "rename", lambda *a: (_ for _ in ()).throw(OSError("killed")))
    record(tracker, 2, loss=0.25)
    flush(tracker)
    assert path.read_text() == before and list(tmp_path.glob("*.prom")) == [path]


WANDB = """
import sys, torch
from difflit.tracking import Tracker, close, log_image, record
for last in (0, 2):
    tracker = Tracker(sys.argv[1], ["loss"], last_step=last, sinks="wandb:mode=offline:project=difflit-test")
    for step in (1, 2):
        record(tracker, last + step, loss=torch.tensor(0.5))
    log_image(tracker, "samples", last + 2, torch.zeros(3, 4, 4))
    assert tracker.sinks, "switched off"
    close(tracker)
"""


def test_wandb_offline_keeps_one_identity_and_phones_nobody(tmp_path):
    """The real package; whatever would leave the machine would first ask the proxy, and the proxy is ours."""
    pytest.importorskip("wandb")
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        proxy.settimeout(0.2)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        names = {n: address for n in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY")}
        clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB") and k.lower() != "no_proxy"}
        done = subprocess.run([sys.executable, "-c", WANDB, str(tmp_path)], capture_output=True, text=True, timeout=180, env={**clean, **names})
        assert done.returncode == 0, done.stderr
        with pytest.raises(TimeoutError):
            proxy.accept()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    identity = (tmp_path / "wandb-id.txt").read_text().strip()
    assert [p.name for p in runs] == [f"run-{identity}.wandb"] * 2
    assert all(b"loss" in p.read_bytes() and b"samples" in p.read_bytes() for p in runs)


def test_loss_bins_are_those_of_a_plain_loop():
    torch.manual_seed(0)
    bins, seen = LossBins(), [[] for _ in range(10)]
    for _ in range(7):
        losses, times = torch.rand(6), torch.randint(0, 900, (6,))
        bins.add(losses, times)
        for loss, t in zip(losses.tolist(), times.tolist()):
            seen[t // 100].append(loss)
    bins.add(torch.ones(6), None)
    taken = bins.take()
    for i, values in enumerate(seen):
        told = taken[f"loss_bin{i}"].item()
        assert math.isnan(told) if not values else math.isclose(told, np.mean(values), rel_tol=1e-5)
    assert not seen[9]


def test_loss_bins_of_two_processes_weigh_samples_alike():
    one, two = LossBins(), LossBins()
    one.add(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([5, 6, 7]))
    two.add(torch.tensor([5.0, 9.0]), torch.tensor([8, 500]))
    sums = []
    for part in (one, two):
        part.take(reduce=lambda s: sums.append(s) or s)
    one.add(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([5, 6, 7]))
    assert one.take(reduce=lambda s: s + sums[1])["loss_bin0"] == 2.0
