"""The cache on disk: several processes, killed ones, copies, truncation, flipped bits; nothing wrong is ever read, nothing whole is lost."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import difflit.caching as caching
from difflit.caching import CacheError, Recipe, Store, caption_keys, list_stores, open_store, picture_key, with_variant

WEIGHTS = "0123456789abcdef" * 4
LATENTS = Recipe("latents", "vae", WEIGHTS, (8, 4, 4), "fp16", settings={"image_size": [32, 32]})
RAGGED = Recipe("text", "t5", WEIGHTS, (16, 12), "bf16", ragged=True)


def keys(numbers):
    """Keys of made-up pictures."""
    return np.array([picture_key(f"picture {n}".encode()) for n in numbers], np.uint64).reshape(-1, 2)


def entries(numbers, shape=(8, 4, 4)):
    """Entries that can be told from their numbers."""
    return torch.stack([torch.full(shape, float(n)) + torch.arange(np.prod(shape)).view(shape) / 64 for n in numbers])


def filled(cache, count=40, part=8):
    store = Store(cache, LATENTS)
    for first in range(0, count, part):
        store.append(keys(range(first, first + part)), entries(range(first, first + part)))
    return store


def holds(store, numbers):
    """Whether these are there, each with its own content."""
    rows = store.find(keys(numbers))
    return bool((rows >= 0).all()) and torch.equal(store.read(rows), entries(numbers).half())


WRITER = """
import sys
import numpy as np, torch
sys.path.insert(0, {tests!r})
from test_caching import LATENTS, Store, entries, keys
store = Store({cache!r}, LATENTS)
print("ready", flush=True)
sys.stdin.readline()
for first in range({start}, {stop}, {part}):
    with_claim = store.claim(f"block {{first}}") if {claims} else True
    if with_claim:
        store.append(keys(range(first, first + {part})), entries(range(first, first + {part})))
        if {claims}:
            open({cache!r} + f"/done-{{first}}", "a").write("x")
        print(first, flush=True)
        if {claims}:
            with_claim.release()
"""


def writer(cache, start, stop, part=4, claims=False, **settings):
    code = WRITER.format(tests=str(Path(__file__).parent), cache=str(cache), start=start, stop=stop, part=part, claims=claims)
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **settings)


def together(processes):
    """Start all at the same moment, and wait for all."""
    for p in processes:
        assert p.stdout.readline() == "ready\n"
    for p in processes:
        p.stdin.write("go\n")
        p.stdin.flush()


def test_three_processes_append_at_once(tmp_path):
    processes = [writer(tmp_path, 100 * n, 100 * n + 100) for n in range(3)]
    together(processes)
    assert [p.communicate()[0].count("\n") and p.returncode for p in processes] == [0, 0, 0]
    store = Store(tmp_path, LATENTS)
    assert len(store) == 300 and holds(store, range(300)) and store.verify().whole
    extents = sorted((int(p.stem), json.loads(p.read_text())["cells"]) for p in (store.folder / "parts").glob("*.claim"))
    assert all(a + n == b for (a, n), (b, _) in zip(extents, extents[1:])), "extents overlap or leave gaps"
    assert len(extents) == 75 and all(n * store.cell_bytes % 4096 == 0 for _, n in extents)
    assert not list(store.folder.rglob("*.partial"))


def test_equal_keys_from_two_processes_are_one_entry(tmp_path):
    processes = [writer(tmp_path, 0, 40) for _ in range(2)]
    together(processes)
    assert [p.wait() for p in processes] == [0, 0]
    store = Store(tmp_path, LATENTS)
    assert len(store) == 40 and holds(store, range(40)) and store.verify().rows == 80
    again = open_store(store.folder)
    assert (store.find(keys(range(40))) == again.find(keys(range(40)))).all()
    store.prune()
    assert len(store) == 40 and store.verify().rows == 40 and holds(store, range(40))


def test_killed_in_the_middle(tmp_path):
    process = writer(tmp_path, 0, 100_000)
    together([process])
    for _ in range(20):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    store = Store(tmp_path, LATENTS)
    there = len(store)
    assert there >= 80 and there % 4 == 0 and store.verify().whole and holds(store, range(there))
    store.append(keys(range(there, there + 8)), entries(range(there, there + 8)))
    assert holds(open_store(store.folder), range(there + 8))
    store.prune()
    assert holds(store, range(there + 8)) and not list(store.folder.rglob("*.partial"))


@pytest.mark.parametrize("moment", ["_put", "atomic_write"])
def test_a_writer_that_dies_before_publishing_shows_nothing(tmp_path, monkeypatch, moment):
    store = filled(tmp_path, 8)
    boom = lambda *_, **__: (_ for _ in ()).throw(OSError(28, "no space left"))
    with monkeypatch.context() as patch:
        patch.setattr(Store if moment == "_put" else caching, moment, boom)
        with pytest.raises(OSError, match="no space left"):
            store.append(keys([20]), entries([20]))
    assert len(store) == 8 and store.find(keys([20]))[0] == -1 and len(open_store(store.folder)) == 8
    store.append(keys([20]), entries([20]))
    assert holds(open_store(store.folder), [*range(8), 20])


def test_extents_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "not supported")

    monkeypatch.setattr(os, "link", refuse)
    assert holds(filled(tmp_path), range(40)) and len(list(tmp_path.rglob("*.claim"))) == 5


def test_a_claim_whose_content_comes_late(tmp_path):
    store = Store(tmp_path, LATENTS)
    claim = store.folder / "parts" / f"{0:016}.claim"
    claim.touch()
    threading.Timer(0.3, lambda: claim.write_text('{"cells": 64}')).start()
    assert store.append(keys([1]), entries([1]))[0] == 64


def test_copied_to_another_place(tmp_path):
    store = filled(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "here")
    copy = Store(tmp_path / "there", LATENTS, create=False)
    assert holds(copy, range(40)) and copy.verify().whole
    copy.append(keys([40]), entries([40]))
    assert holds(list_stores(tmp_path / "there")[0], range(41)) and str(tmp_path / "here") not in "".join(
        p.read_text("latin-1") for p in copy.folder.rglob("*") if p.is_file())
    del store


def test_copied_while_it_was_filled(tmp_path):
    """`rows.bin` first and the parts later, as rsync may do it."""
    store = filled(tmp_path / "here", 8)
    shutil.copytree(store.folder, tmp_path / "copy" / "latents" / store.folder.name)
    store.append(keys(range(8, 16)), entries(range(8, 16)))
    copy = tmp_path / "copy" / "latents" / store.folder.name
    for path in (store.folder / "parts").iterdir():
        shutil.copy(path, copy / "parts")
    with pytest.raises(CacheError, match=rf"{copy}/rows.bin is truncated: it has \d+ bytes, its parts need \d+"):
        open_store(copy)
    saved = open_store(copy, salvage=True)
    saved.prune()
    assert holds(saved, range(8)) and len(open_store(copy)) == 8


def test_truncated_while_it_is_open(tmp_path):
    store = filled(tmp_path)
    os.truncate(store.rows_file, 20 * store.cell_bytes)
    found = store.verify()
    assert not found.whole and found.missing_bytes > 0 and "too short: row" in str(found)
    os.truncate(store.rows_file, 40 * store.cell_bytes + 4096)  # a hole instead of content: long enough, and all zeros
    assert len(store.verify().bad) > 0
    store.prune()
    assert store.verify().whole and len(store) < 40
    for path, age in ((store.folder / ".old.partial", 700), (store.folder / "bad" / ".young.partial", 5)):
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    store.prune()
    assert [p.name for p in store.folder.rglob("*.partial")] == [".young.partial"]


def test_every_flipped_bit_is_found(tmp_path):
    store = filled(tmp_path, 16)
    whole = store.rows_file.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(10):
        number = int(rng.integers(16))
        place = int(store.find(keys([number]))[0]) * store.cell_bytes + int(rng.integers(store.cell_bytes))
        store.rows_file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << int(rng.integers(8))]) + whole[place + 1 :])
        assert [key for _, key in store.verify().bad] == [tuple(keys([number])[0].tolist())]
    store.prune()
    assert len(store) == 15
    part = next((store.folder / "parts-1").glob("*.idx"))
    content = part.read_bytes()
    for place in (3, 20, len(content) - 1):
        part.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(CacheError, match=f"{part} is damaged"):
            open_store(store.folder)
    part.write_bytes(content[:-7])
    with pytest.raises(CacheError, match=f"{part} is damaged"):
        open_store(store.folder)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"layout": 2}', '{"layout": 1, "kind": "latents"}', '{"layout": 1, "shape": "x"}'])
def test_recipe_missing_or_damaged(tmp_path, content):
    store = filled(tmp_path, 8)
    path = store.folder / "recipe.json"
    path.unlink() if content is None else path.write_text(content)
    for attempt in (lambda: open_store(store.folder), lambda: Store(tmp_path, LATENTS), lambda: list_stores(tmp_path)):
        with pytest.raises(CacheError, match=str(store.folder)):
            attempt()


def test_another_recipe_in_the_same_folder_is_named(tmp_path):
    store = filled(tmp_path, 8)
    said = {**LATENTS.to_json(), "weights": "f" * 64, "dtype": "bf16"}
    (store.folder / "recipe.json").write_text(json.dumps(said))
    with pytest.raises(CacheError, match=r"holds something else: encoder vae \(ffffffffffff\) instead of vae \(0123456789ab\); dtype bf16 instead of fp16"):
        Store(tmp_path, LATENTS)


def test_whatever_decides_a_number_makes_another_store(tmp_path):
    changes = [{"weights": "f" * 64}, {"shape": (4, 4, 4)}, {"dtype": "fp32"},
               {"settings": {"image_size": [32, 48]}}, {"settings": {"image_size": [32, 32], "trim": True}}]
    plain = {"kind": "latents", "encoder": "vae", "weights": WEIGHTS, "shape": (8, 4, 4), "dtype": "fp16", "settings": {"image_size": [32, 32]}}
    stores = [Store(tmp_path, Recipe(**{**plain, **c})) for c in [{}, *changes]]
    assert len({s.folder for s in stores}) == len(stores) == len(list_stores(tmp_path))
    assert Store(tmp_path, Recipe(**{**plain, "encoder": "/some/where/else/"})).folder == stores[0].folder
    assert all(s.recipe.differences(LATENTS) for s in stores[1:]) and not stores[0].recipe.differences(LATENTS)


def test_prune_and_fill_do_not_meet(tmp_path):
    store = filled(tmp_path)
    process = writer(tmp_path, 1000, 1400)
    together([process])
    done = refused = 0
    while process.poll() is None:
        try:
            store.prune()
            done += 1
        except CacheError as error:
            assert "is being filled" in str(error)
            refused += 1
        time.sleep(0.02)
    assert process.returncode == 0 and done + refused > 0
    store.refresh()
    assert len(store) == 440 and holds(store, range(40)) and holds(store, range(1000, 1400)) and store.verify().whole


@pytest.mark.parametrize("moment", ["atomic_file", "atomic_write", "rename", "rmtree"])
def test_prune_killed_at_any_moment(tmp_path, monkeypatch, moment):
    store = filled(tmp_path)

    def boom(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr({"rename": os, "rmtree": shutil}.get(moment, caching), moment, boom)
        with pytest.raises(KeyboardInterrupt):
            store.prune(keys(range(20)))
    again = open_store(store.folder)
    assert holds(again, range(20)) and again.verify().whole and len(again) == (20 if moment == "rmtree" else 40)
    again.prune(keys(range(20)))
    assert holds(again, range(20)) and len(again) == 20
    names = sorted(p.name for p in again.folder.iterdir())
    assert names == sorted(["recipe.json", "work", f"parts-{again.generation}", f"rows-{again.generation}.bin"])


def test_prune_frees_and_readers_go_on(tmp_path):
    store = filled(tmp_path)
    reader, rows = open_store(store.folder), store.find(keys(range(40)))
    held = reader.read(rows)
    before = store.rows_file.stat().st_size
    freed = store.prune(keys(range(0, 40, 2)))
    assert freed == before - 20 * store.cell_bytes
    assert torch.equal(reader.read(rows), held), "a reader that did not refresh sees the old file"
    reader.refresh()
    assert reader.generation == 1 and len(reader) == 20 and holds(reader, range(0, 40, 2)) and (reader.find(keys([1])) == -1).all()
    store.prune(np.empty((0, 2), np.uint64))
    assert len(store) == 0 and store.verify().whole and len(open_store(store.folder)) == 0
    store.append(keys([5]), entries([5]))
    assert holds(store, [5])


def test_claims_are_taken_over_from_the_dead_only(tmp_path):
    store = Store(tmp_path, LATENTS)
    with store.claim("block 1") as claim:
        assert store.claim("block 1") is None and open_store(store.folder).claim("block 1") is None
        assert store.claim("block 2") is not None
        said = json.loads(claim.path.read_text())
        child = subprocess.Popen(["true"])
        child.wait()
        for change in ({"pid": child.pid}, {"born": "1"}):
            claim.path.write_text(json.dumps({**said, **change}))
            with store.claim("block 1") as heir:
                assert heir.beat() and not claim.beat()
        claim.path.write_text(json.dumps({**said, "host": "elsewhere"}))
        assert store.claim("block 1") is None
        os.utime(claim.path, (time.time() - 601,) * 2)
        heirs = [store.claim("block 1") for _ in range(3)]
        assert sum(h is not None for h in heirs) == 1
        heirs[0].release()
    assert [p.name for p in (store.folder / "work").glob("*.claim")] == ["block-2-" + caching.digest_bytes("block 2")[:8] + ".0.claim"]


def test_many_processes_share_work_without_doing_it_twice(tmp_path):
    processes = [writer(tmp_path, 0, 120, part=12, claims=True) for _ in range(3)]
    together(processes)
    assert [p.wait() for p in processes] == [0, 0, 0]
    store = Store(tmp_path, LATENTS)
    assert holds(store, range(120))
    held = [p.read_text() for p in tmp_path.glob("done-*")]
    assert len(held) == 10  # a block that was finished may be claimed again: who claims looks first what is missing


def test_bad_is_remembered_and_forgiven(tmp_path):
    store = filled(tmp_path, 8)
    other = open_store(store.folder)
    store.note_bad(keys([100, 101]), ["a.jpg", "b.jpg"], ["truncated", "NaN"])
    other.note_bad(keys([102]), ["c.jpg"], ["empty"])
    store.refresh()
    assert sorted(id for _, id, _ in store.bad) == ["a.jpg", "b.jpg", "c.jpg"]
    assert store.find(keys([0, 100, 102, 103])).tolist()[1:] == [-2, -2, -1]
    store.append(keys([100]), entries([100]))
    assert store.find(keys([100]))[0] >= 0, "what is there counts more than a note"
    assert store.forgive() == 3 and store.find(keys([101]))[0] == -1
    other.refresh()
    assert other.bad == []
    store.note_bad(keys([]), [], [])
    with pytest.raises(ValueError):
        store.note_bad(keys([1, 2]), ["one"], ["why"])


def test_not_finite_is_refused_as_a_whole(tmp_path):
    store = Store(tmp_path, LATENTS)
    for bad, why in ((float("nan"), "NaN or infinity"), (float("inf"), "NaN or infinity"), (7e4, "7e[+]04 is beyond what fp16 holds")):
        many = entries(range(4))
        many[2, 0, 0, 0] = bad
        with pytest.raises(CacheError, match=f"entry 2 .*{why}"):
            store.append(keys(range(4)), many)
    assert len(store) == 0 and not store.rows_file.exists()
    assert len(Store(tmp_path, Recipe("latents", "vae", WEIGHTS, (8, 4, 4), "bf16")).append(keys([1]), entries([1]) * 1e30)) == 1


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("pooled", [0, 5, 12, 31])
def test_text_comes_back_to_the_last_bit(tmp_path, dtype, ragged, pooled):
    store = Store(tmp_path, Recipe("text", "t5", WEIGHTS, (16, 12), dtype, ragged=ragged, pooled=pooled))
    captions = [f"caption {n} ✓" for n in range(50)] + [""]
    rng = torch.Generator().manual_seed(0)
    lengths = [int(n) for n in torch.randint(0, 17, (51,), generator=rng)] if ragged else [16] * 51
    states = [torch.randn(n, 12, generator=rng) for n in lengths]
    extra = torch.randn(51, pooled, generator=rng) if pooled else None
    for part in (slice(0, 20), slice(20, 51)):
        store.append(caption_keys(captions[part]), states[part], None if extra is None else extra[part])
    store = open_store(store.folder)
    order = torch.randperm(51, generator=rng).numpy()
    for length in (None, 5, 16, 20):
        found = store.read_text(store.find(caption_keys([captions[i] for i in order])), length)
        wide = length or 16
        assert found["states"].shape == (51, wide, 12) and found["states"].dtype == store.dtype and ("pooled" in found) == bool(pooled)
        for row, i in enumerate(order):
            kept = min(lengths[i], wide)
            assert torch.equal(found["states"][row, :kept], states[i][:kept].to(store.dtype))
            assert not found["states"][row, kept:].any() and found["mask"][row].tolist() == [n < kept for n in range(wide)]
            assert not pooled or torch.equal(found["pooled"][row], extra[i].to(store.dtype))
    assert (store.lengths(store.find(caption_keys(captions))) == lengths).all()
    store.prune()
    found = store.read_text(store.find(caption_keys(captions[:2])))
    assert torch.equal(found["states"][0, : lengths[0]], states[0].to(store.dtype)) and store.verify().whole


def test_memory_is_not_taken_from_whoever_holds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(caching._Buffers.__init__, "__defaults__", (8, 0))
    store = filled(tmp_path)
    rng, rows = np.random.default_rng(0), store.find(keys(range(40)))
    held = []
    for _ in range(60):
        wanted = rng.integers(0, 40, 6)
        held.append((store.read(rows[wanted])[2:4, 1], wanted[2:4]))
        held = held[-int(rng.integers(1, 12)) :]
        assert all(torch.equal(view, entries(numbers)[:, 1].half()) for view, numbers in held)
    assert len(store._buffers.shelf) <= 8


def test_threads_read_and_write_at_once(tmp_path):
    store, wrong = filled(tmp_path), []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(60):
            numbers = rng.integers(0, 40, 8).tolist()
            if not holds(store, numbers):
                wrong.append(numbers)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for n in range(100, 140, 4):
        store.append(keys(range(n, n + 4)), entries(range(n, n + 4)))
    for thread in threads:
        thread.join()
    assert not wrong and holds(store, range(100, 140))


def test_keys_against_a_dictionary():
    rng = np.random.default_rng(0)
    table, plain = caching._Keys(), {}
    for first in range(0, 20_000, 500):
        new = rng.integers(0, 40, (500, 2)).astype(np.uint64) << np.uint64(50)  # many equal ones, and words that mix alike
        starts = np.arange(first, first + 500)
        table.add(new, starts, np.ones(500, np.int64))
        for key, start in zip(map(tuple, new.tolist()), starts.tolist()):
            plain.setdefault(key, start)
    every = np.array([(a << 50, b << 50) for a in range(45) for b in range(45)], np.uint64)
    assert table.find(every).tolist() == [plain.get(tuple(k), -1) for k in every.tolist()]
    assert len(table) == len(plain)
    many = np.tile(every, (4, 1))
    assert (table.find(many) == np.tile(table.find(every), 4)).all()


def test_variants_share_nothing(tmp_path):
    store, base = Store(tmp_path, LATENTS), keys(range(10))
    for v in range(5):
        store.append(with_variant(base, v), entries(range(100 * v, 100 * v + 10)))
    assert len(store) == 50
    for v in range(5):
        assert torch.equal(store.read(store.find(with_variant(base, v))), entries(range(100 * v, 100 * v + 10)).half())
    assert (store.find(with_variant(base, 5)) == -1).all()


def test_a_read_only_copy_can_be_read(tmp_path):
    store = filled(tmp_path)
    for path in [*store.folder.rglob("*"), store.folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        copy = pickle.loads(pickle.dumps(open_store(store.folder)))
        assert holds(copy, range(40)) and copy.verify().whole
    finally:
        for path in [store.folder, *store.folder.rglob("*")]:
            path.chmod(0o755)


def test_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(OSError, match="needs"):
        filled(tmp_path, 8)
    assert not list(tmp_path.rglob("*.claim"))


def test_ragged_texts_of_two_processes(tmp_path):
    code = ("import sys; sys.path.insert(0, {!r}); from test_caching import *; s = Store({!r}, RAGGED); "
            "[s.append(caption_keys([f'{{n}}']), [torch.full((n % 16 + 1, 12), float(n))]) for n in range({}, 90, 2)]")
    processes = [subprocess.Popen([sys.executable, "-c", code.format(str(Path(__file__).parent), str(tmp_path), n)]) for n in range(2)]
    assert [p.wait() for p in processes] == [0, 0]
    store = Store(tmp_path, RAGGED)
    states, mask = store.read_ragged(store.find(caption_keys([str(n) for n in range(90)])))
    assert (mask.sum(1) == torch.arange(90) % 16 + 1).all() and (states[:, 0, 0].float() == torch.arange(90).bfloat16().float()).all()
    assert store.verify().whole
