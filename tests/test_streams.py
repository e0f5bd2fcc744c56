"""Tars that are read once: whatever is wrong with them has a name, every rank always has a batch, a resumed stream loses nothing."""

import bz2
import gzip
import http.server
import io
import json
import lzma
import shutil
import socketserver
import tarfile
import threading
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tars import add
from tars import photograph as jpeg
from tars import write_tars

from difflit.data import DataError
from difflit.loading import Loader
from difflit.selection import ShardSource
from difflit.shards import index_shards, parse_layout
from difflit.streams import Glimpse, StreamLoader, TarStream, WatchedTar, tars_at

PLAIN = dict(image_size=16, buffer=0)


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> list[Path]:
    return sorted(write_tars(tmp_path_factory.mktemp("streams"), shards=4, each=10).glob("*.tar"))


def draw(count: int, tars, **settings) -> tuple[list[str], TarStream]:
    stream = TarStream([str(t) for t in tars], **{"buffer": 0} | settings)
    drawn = []
    for place, sample in islice(stream, count):
        drawn.append(sample.id)
        stream.places.settle(place)
    return drawn, stream


def expected(n: int) -> list[str]:
    return [f"{10 * n + i:09d}.jpg" for i in range(10)]


def test_every_tar_as_often_in_the_long_run() -> None:
    for count, world in ((4, 3), (4, 8), (5, 5), (1, 4), (7, 2)):
        for epoch in range(3):
            assert sorted(tars_at(3, range(epoch * count, (epoch + 1) * count), count)) == list(range(count))
        for rank in range(world):
            counted = np.bincount(tars_at(3, range(rank, 100 * world, world), count), minlength=count)
            assert abs(counted - 100 / count).max() < 5 * (100 / count) ** 0.5, (count, world, counted)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed(tars, tmp_path: Path, pack) -> None:
    path = tmp_path / "packed.tar.gz"
    path.write_bytes(pack(tars[2].read_bytes()))
    drawn, stream = draw(30, [path])
    assert drawn == expected(2) * 3 and not stream.account.lost
    path.write_bytes(pack(tars[2].read_bytes())[:-2000])
    drawn, stream = draw(10, [path, tars[0]])
    assert list(stream.account.lost) in ([], ["packed.tar.gz"])
    drawn, stream = draw(40, [path, tars[0]])
    assert list(stream.account.lost) == ["packed.tar.gz"] and set(expected(0)) <= set(drawn)


def test_pipes_and_their_failures(tars) -> None:
    assert draw(20, [f"pipe:cat {tars[1]}"])[0] == expected(1) * 2
    drawn, stream = draw(40, [f"pipe:cat {tars[1]}; exit 3", tars[0]])
    assert set(drawn) == {*expected(0), *expected(1)} and list(stream.account.lost.values()) == ["the command ended with status 3"]
    with pytest.raises(DataError, match="the command ended with status"):
        draw(1, ["pipe:false"])
    with StreamLoader(f"pipe:cat {tars[0].parent}/{{00000..00003}}.tar", batch_size=8, **PLAIN) as loader:
        assert len(loader.tars) == 4 and len(next(loader)["id"]) == 8


@pytest.mark.skipif(shutil.which("curl") is None, reason="the library reads from the web by curl")
def test_web(tars) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tars[0].parent))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            with StreamLoader(f"{address}/{{00000..00003}}.tar", batch_size=10, workers=2, **PLAIN) as loader:
                seen = {i for b in islice(loader, 4) for i in b["id"]}
            assert seen == {i for n in range(4) for i in expected(n)}
            drawn, stream = draw(60, [f"{address}/00001.tar", f"{address}/missing.tar"])
            assert set(drawn) == set(expected(1)) and stream.account.lost == {"missing.tar": "the command ended with status 22"}
        finally:
            server.shutdown()


def headers(path: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return {m.name: m for m in tar.getmembers()}


@pytest.mark.parametrize("damage", ["checksum", "zeros", "noise", "cut between", "cut inside", "no end", "joined"])
def test_nothing_is_lost_in_silence(tars, tmp_path: Path, damage: str) -> None:
    "However a tar is damaged: what is missing of it is in the account, by the tar's name, and the others go on."
    content, member = bytearray(tars[1].read_bytes()), headers(tars[1])["000000014.jpg"]
    last = max(headers(tars[1]).values(), key=lambda m: m.offset)
    end = last.offset_data + -(-last.size // 512) * 512
    if damage == "checksum":
        content[member.offset + 150] ^= 1
    elif damage == "zeros":
        content[member.offset : member.offset + 512] = bytes(512)
    elif damage == "noise":
        content[member.offset : member.offset + 2048] = np.random.default_rng(0).integers(0, 256, 2048, np.uint8).tobytes()
    else:
        content = {"cut between": content[: member.offset], "cut inside": content[: member.offset_data + 100], "no end": content[:end],
                   "joined": content + tars[2].read_bytes()}[damage]
    hurt = tmp_path / "hurt.tar"
    hurt.write_bytes(content)
    drawn, stream = draw(60, [hurt, tars[0]])
    assert list(stream.account.lost) == ["hurt.tar"] and stream.account.lost["hurt.tar"]
    assert set(drawn) == {*expected(0), *(expected(1) if damage in ("no end", "joined") else expected(1)[:4])}


def test_a_sound_tar_is_not_blamed(tars, tmp_path: Path) -> None:
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{kind}.tar"
        with tarfile.open(path, "w", format=kind) as tar:
            tar.addfile(tarfile.TarInfo("folder/"))
            for i in range(5):
                name = f"folder/{'long' * 20 if i == 3 else 'x'}{i}"
                add(tar, f"{name}.jpg", jpeg(i))
                add(tar, f"{name}.txt", f"ü {i}".encode())
        last = max(headers(path).values(), key=lambda m: m.offset)
        end = last.offset_data + -(-last.size // 512) * 512  # one block of zeros is end enough
        for content in (path.read_bytes(), path.read_bytes()[: end + 512], path.read_bytes() + bytes(100_000)):
            path.write_bytes(content)
            drawn, stream = draw(10, [path])
            assert len(set(drawn)) == 5 and not stream.account.lost and not stream.account.bad


def test_no_mixing_across_tars(tmp_path: Path) -> None:
    "A picture at the torn end of one tar never gets the caption at the beginning of the next, though both have the same key."
    paths = []
    for n in range(2):
        paths.append(tmp_path / f"{n}.tar")
        with tarfile.open(paths[n], "w") as tar:
            if n == 0:
                add(tar, "same.jpg", jpeg(n))
            add(tar, "same.txt", f"of tar {n}".encode())
            if n == 1:
                add(tar, "same.jpg", jpeg(n))
    torn = headers(paths[0])["same.txt"].offset_data + 2
    paths[0].write_bytes(paths[0].read_bytes()[:torn])
    stream = TarStream([str(p) for p in paths], buffer=0)
    for _, sample in islice(stream, 4):
        assert (sample.caption, sample.content) == ("of tar 1", jpeg(1))
    assert list(stream.account.bad) == ["0.tar: same"]


def test_what_is_no_sample_is_named(tars, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        files = {"../../x.jpg": jpeg(0), "../../x.txt": b"x", "empty.jpg": b"", "empty.txt": b"e", "latin.jpg": jpeg(1), "latin.txt": b"fa\xe7ade",
                 "json.jpg": jpeg(2), "json.txt": b"j", "json.json": b"{oops", "fake.jpg": b"GIF no", "fake.txt": b"f", "good.JPG": jpeg(3), "good.TXT": b"g"}
        for name, content in files.items():
            add(tar, name, content)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        add(tar, "link.txt", b"a link")
        bomb = io.BytesIO()
        Image.new("1", (12000, 12000)).save(bomb, "PNG")
        add(tar, "bomb.png", bomb.getvalue())
        add(tar, "bomb.txt", b"a bomb")
    told: list[str] = []
    drawn, stream = draw(25, [tmp_path / "odd.tar", tars[0]], on_bad=lambda where, why: told.append(where))
    assert set(drawn) == {"good.JPG", *expected(0)}
    words = {"../../x": "leads out", "empty": "empty", "latin": "UTF-8", "json": "JSON", "fake": "not an image", "link": "no image", "bomb": "bomb"}
    assert {f"odd.tar: {k}" for k in words} == set(stream.account.bad) == set(told) and len(told) == len(words)
    assert all(words[k.partition(": ")[2]] in why for k, why in stream.account.bad.items())


def test_too_many_bad_stop(tars, tmp_path: Path) -> None:
    broken = write_tars(tmp_path / "broken", shards=1, each=40, broken=tuple(range(0, 40, 2)))
    for workers in (0, 2):
        with StreamLoader(broken, batch_size=4, workers=workers, **PLAIN) as loader, pytest.raises(DataError, match=r"11 of \d+ samples are unusable"):
            list(islice(loader, 40))
        with StreamLoader(broken, batch_size=4, workers=workers, bad_samples=0.6, **PLAIN) as loader:
            assert len({i for b in islice(loader, 10) for i in b["id"]}) == 20 and len(loader.account.bad) >= 18
        with StreamLoader(broken, batch_size=4, workers=workers, bad_samples=1.0, where="caption_chars > 1000", patience=200, **PLAIN) as loader:
            with pytest.raises(DataError, match="none of 200 samples in a row"):
                next(loader)


def test_hopeless_streams_end(tars, tmp_path: Path) -> None:
    (tmp_path / "void.tar").write_bytes(bytes(10240))
    (tmp_path / "nothing.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_text("this is not a tar " * 1000)
    for name in ("void", "nothing", "text"):
        with pytest.raises(DataError, match="tars in a row held nothing"):
            draw(1, [tmp_path / f"{name}.tar"])
    with pytest.raises(DataError, match="none of 100 samples"):
        draw(1, tars, where="width > 1000", patience=100)
    with pytest.raises(DataError, match="unusable"):
        draw(1, tars, layout=parse_layout("webp,txt,json"))
    all_broken = write_tars(tmp_path / "broken", shards=1, each=8, broken=tuple(range(8)))
    with StreamLoader(all_broken, batch_size=4, bad_samples=1.0, patience=50, **PLAIN) as loader, pytest.raises(DataError, match="could be decoded"):
        next(loader)


def test_same_batches_for_any_number_of_workers(tars) -> None:
    runs, drawn = [], dict(crop=0.5, flip=True, jitter=0.3, uncond_p=0.3)
    for workers in (0, 1, 3):
        with StreamLoader(tars, batch_size=7, image_size=24, seed=3, workers=workers, buffer=12, raw=True, **drawn) as loader:
            runs.append(list(islice(loader, 9)))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert a["id"] == b["id"] and a["caption"] == b["caption"] and torch.equal(a["image"], b["image"]) and torch.equal(a["position"], b["position"])


def test_stream_and_index_make_equal_pictures(tars) -> None:
    "At equal positions, whatever the order: the stream's samples are put where the index's are."
    settings = dict(seed=3, crop=0.5, flip=True, jitter=0.3, uncond_p=0.3, image_size=24)
    with StreamLoader(tars, batch_size=40, buffer=5, **settings) as loader:
        batch = next(loader)
    source = ShardSource([str(t) for t in tars])
    found = {}
    with Loader(source, batch_size=len(source), **settings) as loader:
        for other in islice(loader, 60):
            for i, (name, position) in enumerate(zip(other["id"], other["position"].tolist())):
                found[name, position] = other["image"][i], other["caption"][i]
    met = 0
    for i, (name, position) in enumerate(zip(batch["id"], batch["position"].tolist())):
        if (name, position) in found:
            image, caption = found[name, position]
            assert torch.equal(image, batch["image"][i]) and caption == batch["caption"][i]
            met += 1
    assert met or len(source) < 40


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("buffer", [0, 7, 100])
def test_a_resumed_stream_loses_nothing(tars, world: int, buffer: int) -> None:
    "Stopped after any number of batches: all samples of all tars that are settled in the end were delivered, before the stop or after it."
    for stop in (1, 3, 8):
        for rank in range(world):
            settings = dict(batch_size=3 * world, image_size=16, seed=9, rank=rank, world=world, buffer=buffer)
            with StreamLoader(tars, workers=rank % 2, **settings) as loader:
                first = [b["id"] for b in islice(loader, stop)]
                state = json.loads(json.dumps(loader.state_dict()))
            assert state["position"] == stop * 3 * world
            with StreamLoader(tars, workers=2 - rank % 2, **settings) as loader:
                loader.load_state_dict(state)
                batches = list(islice(loader, 60))
                settled = loader.state_dict()["place"]
            assert batches[0]["position"][0] == state["position"] + rank * 3
            assert settled > state["place"] or buffer == 100
            wanted = {i for t in tars_at(9, range(rank, settled, world), 4) for i in expected(t)}
            assert wanted <= {i for ids in [*first, *(b["id"] for b in batches)] for i in ids}
            if buffer == 0:  # and no more than the tar that was being read comes a second time
                done = sum(len(ids) for ids in first)
                names = [i for t in tars_at(9, range(rank, 8 * world, world), 4) for i in expected(t)]
                assert [i for b in batches for i in b["id"]][:20] == names[done - done % 10 :][:20]


def test_changing_the_number_of_ranks(tars) -> None:
    settings = dict(batch_size=12, image_size=16, seed=2, buffer=8)
    states, seen = [], set()
    for rank in range(3):
        with StreamLoader(tars, rank=rank, world=3, **settings) as loader:
            seen |= {i for b in islice(loader, 4) for i in b["id"]}
            states.append(loader.state_dict())
    for world in (1, 2, 4):
        after = set()
        for rank in range(world):
            with StreamLoader(tars, rank=rank, world=world, **settings) as loader:
                loader.load_state_dict(states)
                after |= {i for b in islice(loader, 40) for i in b["id"]}
                assert loader.position == 48 + 40 * 12
        assert len(seen | after) == 40
    with StreamLoader(tars[:3], **settings) as loader, pytest.raises(DataError, match="number of tars is 3 and was 4"):
        loader.load_state_dict(states)
    with StreamLoader(tars, **settings | {"seed": 3}) as loader, pytest.raises(DataError, match="the seed is 3 and was 2"):
        loader.load_state_dict(states)


def test_ranks_never_wait(tars) -> None:
    "More ranks than tars, tars of unequal length: all deliver the same number of batches, and positions never collide."
    for world in (3, 8):
        parts = []
        for rank in range(world):
            with StreamLoader(tars[:2], batch_size=2 * world, rank=rank, world=world, **PLAIN) as loader:
                parts.append([b["position"] for b in islice(loader, 30)])
        for step in zip(*parts, strict=True):
            assert sorted(torch.cat(step).tolist()) == list(range(int(step[0][0]), int(step[0][0]) + 2 * world))


def test_repeated_pictures_once_per_epoch(tars) -> None:
    drawn, stream = draw(80, [tars[0], tars[1], tars[0].parent / "." / "00000.tar"], unique=100)
    assert all(sorted(drawn[20 * e : 20 * e + 20]) == sorted([*expected(0), *expected(1)]) for e in range(4))
    assert stream.account.repeated >= 30


def test_watcher_blocks() -> None:
    watched = WatchedTar(io.BytesIO(b"x" * 512 + bytes(1024)))
    assert [len(watched.read(10240)) for _ in range(3)] == [512, 512, 512]
    assert watched.fault() is None
    assert "breaks off after 5 bytes" in str(_read_all(WatchedTar(io.BytesIO(b"short"))).fault())


def _read_all(watched: WatchedTar) -> WatchedTar:
    while watched.read():
        pass
    return watched


def test_closing_early_ends_threads_and_commands(tars) -> None:
    before = threading.active_count()
    for _ in range(3):
        loader = StreamLoader([f"pipe:cat {t}" for t in tars], batch_size=4, workers=2, **PLAIN)
        next(loader)
        loader.close()
        loader.close()
        with pytest.raises(RuntimeError, match="closed"):
            next(loader)
    assert threading.active_count() == before


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("buffer", [0, 7])
def test_what_was_seen_survives_a_stop(tars, tmp_path: Path, world: int, buffer: int) -> None:
    "Resumed with its memory, a stream decides as one that was never stopped; and a tar that is read again is not turned away as known."
    twice = [*tars, *(tmp_path / f"{n}.tar" for n in range(4))]
    for path in twice[4:]:
        shutil.copy(tars[int(path.stem)], path)
    settings = dict(batch_size=3 * world, image_size=16, seed=5, world=world, buffer=buffer, unique=1000)
    for rank in range(world):
        with StreamLoader(twice, rank=rank, **settings) as loader:
            unbroken = [i for b in islice(loader, 40) for i in b["id"]]
            assert loader.account.repeated
        for stop in (1, 4, 7, 12, 15):
            with StreamLoader(twice, rank=rank, workers=stop % 2, **settings) as loader:
                before = [i for b in islice(loader, stop) for i in b["id"]]
                state = json.loads(json.dumps(loader.state_dict(seen=tmp_path / f"stop-{rank}.seen")))
            with StreamLoader(twice, rank=rank, workers=1 - stop % 2, **settings) as loader:
                loader.load_state_dict(state, seen=tmp_path)
                after = [i for b in islice(loader, 16) for i in b["id"]]
            if buffer == 0:
                assert any(unbroken[len(before) - n :][: len(after)] == after for n in range(10)), stop
            settled = {i for t in tars_at(5, range(rank, state["place"], world), 8) for i in expected(t % 4)}
            if state["place"] < 8:  # nothing of a settled tar again, in what is left of the epoch
                rest = {i for t in tars_at(5, range(state["place"], 8), 8)[(rank - state["place"]) % world :: world] for i in expected(t % 4)} - settled
                assert set(after[: len(rest)]) == rest or buffer


def test_memory_is_the_states_own(tars, tmp_path: Path, caplog) -> None:
    settings = dict(batch_size=6, image_size=16, unique=1000)
    with StreamLoader(tars, **settings) as loader:
        next(loader)
        state = loader.state_dict(seen=tmp_path / "a.seen")
        assert set(state["seen"]) == {"file", "sha256"} and state["seen"]["file"] == "a.seen"
        list(islice(loader, 3))
        loader.state_dict(seen=tmp_path / "a.seen")  # the file is another one now, the old state was kept
    for name, words in (("a.seen", "does not belong to this state"), ("b.seen", "is missing")):
        with StreamLoader(tars, **settings) as loader, pytest.raises(DataError, match=words):
            loader.load_state_dict(state | {"seen": {"file": name, "sha256": "0"}}, seen=tmp_path)
    with StreamLoader(tars, **settings) as loader:
        loader.load_state_dict(state)
        assert "may come a second time" in caplog.text and len(next(loader)["id"]) == 6
    with StreamLoader(tars, **settings | {"unique": 0}) as loader:
        assert "seen" not in loader.state_dict(seen=tmp_path / "c.seen") and not (tmp_path / "c.seen").exists()
        loader.load_state_dict(state, seen=tmp_path / "nowhere")


def test_glimpse_sees_all_tars_of_equal_names(tmp_path: Path) -> None:
    for n in range(5):
        with tarfile.open(tmp_path / f"{n}.tar", "w") as tar:
            for i in range(3):
                add(tar, f"{i:04d}.jpg", jpeg(i))
                add(tar, f"{i:04d}.txt", f"word{n}".encode())
    assert set(Glimpse(tmp_path, count=100).captions()) == {f"word{n}" for n in range(5)}
    assert len(Glimpse(tmp_path, count=100)) == 15 and len(Glimpse(tmp_path, count=4)) == 4
    assert len(Glimpse(tmp_path, where="matches(caption, 'word3')")) == 3


def test_names_with_dots_as_the_index_reads_them(tmp_path: Path) -> None:
    files = ["./v1.0/film.0.jpg", "./v1.0/film.0.txt", "./v1.0/film.1.JPG", "./v1.0/film.1.txt", "./v1.0/film.1.npy", "17.depth.png", "17.jpg", "17.txt",
             "17.seg.png", "18.jpg", "18.txt", "18.a.jpg", "18.a.txt", "18.b.jpg", "19.alone.jpg", "x.tar.jpg", "x.tar.json", "x.tar.txt"]
    with tarfile.open(tmp_path / "dots.tar", "w") as tar:
        for name in files:
            add(tar, name, {"jpg": jpeg(1), "png": jpeg(1), "txt": b"words", "json": b"{}", "npy": b"?"}[name.lower()[-4:].lstrip(".")])
    index = index_shards(tmp_path / "dots.tar")
    drawn, stream = draw(20, [tmp_path / "dots.tar"])
    assert set(drawn) == set(index.ids()) == {"v1.0/film.0.jpg", "v1.0/film.1.JPG", "17.jpg", "18.jpg", "18.a.jpg", "x.tar.jpg"}
    assert set(stream.account.bad) == {"dots.tar: 19.alone"} and [p.key for p in index.problems] == ["19.alone"]


@pytest.mark.parametrize("settings", [{}, {"patience": 30}])
def test_a_misspelt_column_is_named(tars, settings: dict) -> None:
    with pytest.raises(DataError, match=r"No sample has 'punsaef', which the filter asks for; did you mean 'punsafe'\?.*metadata holds .*similarity"):
        draw(1, tars, where="punsaef < 0.9 and short_side > 4", **settings)
    with pytest.raises(DataError, match="none of 30|tars in a row") as stopped:
        draw(1, tars, where="punsafe > 7", **settings)
    assert "No sample has" not in str(stopped.value)
