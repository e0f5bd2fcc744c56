"""The index of tars: nothing is lost silently, whatever is done to the tars, and nothing is ever written outside of the index's folder."""

import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import photograph
from PIL import Image

import difflit.shards as shards
from difflit.data import DamagedSample, DataError, Encoded
from difflit.shards import HARMLESS, KINDS, Layout, ShardIndex, expand_paths, index_shards, open_index, parse_layout, scan_shard, verify_shards

FORMS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def picture(number, form="JPEG", size=(24, 18)):
    buffer = io.BytesIO()
    photograph(number, size).save(buffer, form)
    return buffer.getvalue()


def tar(files, form=tarfile.PAX_FORMAT, end=True) -> bytes:
    """A tar of (name, content or TarInfo), with or without the zeros at its end."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as out:
        for name, content in files:
            entry = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            entry.mtime = 1700000000.25 if form == tarfile.PAX_FORMAT else 1700000000
            if isinstance(content, bytes):
                entry.size = len(content)
            out.addfile(entry, io.BytesIO(content) if isinstance(content, bytes) else None)
        body = buffer.getvalue()
        if not end:
            return body
    return buffer.getvalue()


def sample(number, key=None, **changes):
    """The files of one good sample; a change replaces one, None leaves it out."""
    key = key or f"{number:05d}"
    said = {"caption": f"caption {number}", "punsafe": number / 1000, "similarity": 0.3, "rating": "PG" if number % 2 else "G", "number": number}
    parts = {"jpg": picture(number), "json": json.dumps(said).encode(), "txt": f"photograph {number}".encode()} | changes
    return [(f"{key}.{ending}", content) for ending, content in parts.items() if content is not None]


def files(*samples):
    return [f for s in samples for f in s]


@pytest.fixture
def place(tmp_path):
    """Ten good samples in each of three tars."""
    folder = tmp_path / "set"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n:03}.tar").write_bytes(tar(files(*[sample(10 * n + k) for k in range(10)])))
    return folder


def scan(tmp_path, content, **settings):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    return scan_shard(path, **settings)


# ---- tars of every kind ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [1024, 4096 - 512, 1 << 14, 1 << 22])
def test_members_as_tarfile_sees_them(tmp_path, form, window):
    rng = np.random.default_rng(window)
    names = [f"{'d' * int(rng.integers(1, 60))}/{'n' * int(rng.integers(1, 90))}{i}.jpg" for i in range(60)]
    if form != "ustar":
        names += ["é" * 120 + f"/{i}/" + "x" * int(rng.integers(1, 300)) + ".json" for i in range(9)]
    wanted = [(n, rng.bytes(int(rng.choice([0, 1, 511, 512, 513, 5000])))) for n in names]
    (tmp_path / "x.tar").write_bytes(tar(wanted, FORMS[form]))
    notes = []
    walker = shards._Walker(shards._open(str(tmp_path / "x.tar")), lambda n: True, lambda *n: notes.append(n), window)
    assert [(m.name.decode(), bytes(m.content)) for m in shards._members(walker)] == wanted
    assert notes == []


def test_tar_of_the_system_and_old_style(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in files(sample(1), sample(2, "deep/er/two")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for form in ("gnu", "pax", "ustar", "v7", "oldgnu"):
        subprocess.run(["tar", f"--format={form}", "-cf", tmp_path / "x.tar", "-C", folder, "."], check=True)
        found = scan_shard(tmp_path / "x.tar")
        assert sorted(found.ids) == ["00001.jpg", "deep/er/two.jpg"] and {p.kind for p in found.problems} <= {"apart"}, form


def test_the_same_samples_as_webdataset(place):
    import webdataset as wds

    index = index_shards(place)
    theirs = list(wds.WebDataset([s.path for s in index.shards], shardshuffle=False, empty_check=False))
    assert [t["__key__"] + ".jpg" for t in theirs] == index.ids()
    for row, t in enumerate(theirs):
        ours = index.read(row, metadata=True)
        assert (ours.content, ours.caption, ours.metadata) == (t["jpg"], t["txt"].decode(), json.loads(t["json"]))


def test_base_256_sizes_and_sizes_in_extended_headers(tmp_path):
    good = tar(files(sample(1)), tarfile.USTAR_FORMAT)
    for at in range(0, 2048, 512):  # the size of the first member to the base 256, as GNU tar may write it
        if good[at : at + 9] == b"00001.jpg":
            head = bytearray(good[at : at + 512])
            head[124:136] = b"\x80" + int(head[124:135], 8).to_bytes(11, "big")
            head[148:156] = b" " * 8
            head[148:156] = f"{sum(head):06o}\0 ".encode()
            found = scan(tmp_path, bytes(head) + good[at + 512 :])
            assert (found.ids, found.problems) == (["00001.jpg"], [])
    entry = tarfile.TarInfo("00001.jpg")
    entry.size, entry.pax_headers = len(picture(1)), {"size": str(len(picture(1)))}
    body = picture(1) + bytes(-len(picture(1)) % 512)
    head = entry.tobuf(tarfile.PAX_FORMAT)
    zero = bytearray(head[-512:])
    zero[124:135] = b"0" * 11
    zero[148:156] = b" " * 8
    zero[148:156] = f"{sum(zero):06o}\0 ".encode()
    found = scan(tmp_path, head[:-512] + bytes(zero) + body + tar([("00001.txt", b"one")]))
    assert (found.captions, found.problems) == (["one"], [])


@pytest.mark.parametrize("size", [1 << 40, (1 << 87) + 7])
def test_a_header_that_claims_a_huge_size(tmp_path, size):
    entry = tarfile.TarInfo("00003.jpg")
    entry.size = size
    lie = entry.tobuf(tarfile.GNU_FORMAT)
    found = scan(tmp_path, tar(files(sample(1)), end=False) + lie + tar(files(sample(4), sample(5))))
    assert found.ids == ["00001.jpg", "00004.jpg", "00005.jpg"]
    assert [(p.kind, p.key) for p in found.problems if p.kind not in HARMLESS] == [("truncated", "00003")]
    assert f"{size} bytes" in [p.detail for p in found.problems if p.key == "00003"][0]


def patched(content, at, **fields):
    """The tar with other fields in the header that begins at a byte, its checksum made right."""
    content = bytearray(content)
    for place, text in fields.items():
        start = {"size": 124, "kind": 156}[place]
        content[at + start : at + start + len(text)] = text
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = f"{sum(content[at : at + 512]):06o}\0 ".encode()
    return bytes(content)


@pytest.mark.parametrize("size", [b"00010000000", b"17777777777"])
def test_an_extended_header_that_lies(tmp_path, size):
    content = tar(files(sample(1), sample(2), sample(3)))
    at = content.index(b"00002.json") // 512 * 512 - 1024
    assert content[at + 156 : at + 157] == b"x"
    found = scan(tmp_path, patched(content, at, size=size))
    assert {"00001.jpg", "00003.jpg"} <= set(found.ids) and "truncated" in {p.kind for p in found.problems}


def test_links_with_a_size_have_no_content(tmp_path):
    content = tar(files(sample(1), [("x.jpg", b""), ("x.txt", b"x")], sample(2)), tarfile.GNU_FORMAT)
    found = scan(tmp_path, patched(content, content.index(b"x.jpg"), size=b"00000004000", kind=b"1"))
    assert found.ids == ["00001.jpg", "00002.jpg"] and [(p.key, p.kind) for p in found.problems] == [("x", "link")]


def test_a_negative_size_does_not_go_in_circles(tmp_path):
    content = bytearray(tar(files(sample(1), sample(2)), tarfile.GNU_FORMAT))
    at = content.index(b"00002.jpg")
    for text in (b"-0000001000\0", b"\xff" * 12, b"\x80" + b"\xff" * 11):
        content[at + 124 : at + 136] = text
        content[at + 148 : at + 156] = b" " * 8
        content[at + 148 : at + 156] = f"{sum(content[at : at + 512]):06o}\0 ".encode()
        found = scan(tmp_path, bytes(content))
        assert "00001.jpg" in found.ids and {p.key for p in found.problems} >= {"00002"}


# ---- damage ----


def accounted(found, keys):
    """Every key is a sample or is named by a problem; at most `bad header` may stand for one whose whole header is gone."""
    named = {p.key for p in found.problems}
    return [k for k in keys if f"{k}.jpg" not in found.ids and k not in named]


def test_one_wrong_bit_costs_one_sample(tmp_path):
    content = bytearray(tar(files(*[sample(n) for n in range(1000)]), tarfile.GNU_FORMAT))
    content[content.index(b"00500.jpg\0") + 126] ^= 4
    found = scan(tmp_path, bytes(content))
    assert len(found.ids) == 999 and [(p.kind, p.key) for p in found.problems] == [("bad header", ""), ("no image", "00500")]


@pytest.mark.parametrize("form", FORMS)
def test_fuzz_never_fewer_in_silence(tmp_path, form):
    """Random bytes overwritten anywhere: what is delivered is what was put in, or the hash and the caption say so; what is not delivered is named."""
    keys = [f"{n:05d}" for n in range(8)]
    whole = tar(files(*[sample(n) for n in range(8)]), FORMS[form])
    good = scan(tmp_path, whole)
    assert len(good.ids) == 8 and not good.problems
    rng = np.random.default_rng(0)
    for _ in range(150):
        content = bytearray(whole)
        for at in rng.integers(0, len(whole) - 10240, int(rng.integers(1, 4))):
            length = int(rng.choice([1, 8, 700]))
            content[at : at + length] = rng.bytes(len(content[at : at + length]))
        found = scan(tmp_path, bytes(content))
        lost = accounted(found, keys)
        unnamed = ("bad header", "no caption", "no image", "bad name", "truncated")
        assert len(lost) <= sum(p.kind in unnamed for p in found.problems), (lost, found.problems)
        assert len(content) == len(whole)


def test_cut_anywhere(tmp_path):
    keys = [f"{n:05d}" for n in range(4)]
    whole = tar(files(*[sample(n) for n in range(4)]))
    end = len(whole.rstrip(b"\0"))
    for at in [*range(512, end, 512), *range(100, end, 1777)]:
        found = scan(tmp_path, whole[:at])
        assert found.problems, f"cut at {at} of {end} and nothing said"
        seen = [k for k in keys if f"{k}.".encode() in whole[:at]]
        lost = accounted(found, seen)
        assert len(lost) <= 1, (at, lost, found.problems)
        assert not lost or any(p.kind in ("truncated", "not a tar", "no end mark") for p in found.problems), (at, found.problems)


CASES = {
    "zero-length image": (sample(1, "x", jpg=b""), "empty file"),
    "zero-length caption": (sample(1, "x", txt=b""), "empty file"),
    "zero-length metadata": (sample(1, "x", json=b""), "empty file"),
    "image alone": (sample(1, "x", txt=None, json=None), "no caption"),
    "caption alone": (sample(1, "x", jpg=None, json=None), "no image"),
    "metadata alone": (sample(1, "x", jpg=None, txt=None), "no image"),
    "blank caption": (sample(1, "x", txt=b" \n\t", json=b"{}"), "empty caption"),
    "latin-1 caption": (sample(1, "x", txt="façade".encode("latin-1")), "caption not UTF-8"),
    "utf-16 caption": (sample(1, "x", txt="wide".encode("utf-16")), "caption not UTF-8"),
    "broken JSON": (sample(1, "x", json=b'{"a": '), "broken JSON"),
    "JSON of another kind": (sample(1, "x", json=b"[1, 2]"), "broken JSON"),
    "JSON in latin-1": (sample(1, "x", json='{"a": "é"}'.encode("latin-1")), "broken JSON"),
    "no image at all": (sample(1, "x", jpg=b"GIF89a nonsense"), "damaged image"),
    "bomb": (sample(1, "x", jpg=picture(0, "PNG")[:16] + (60000).to_bytes(4, "big") * 2 + picture(0, "PNG")[24:]), None),
    "up and out": (sample(1, "../../x"), "unsafe name"),
    "hidden up": (sample(1, "a/../../x"), "unsafe name"),
    "absolute": (sample(1, "/etc/x"), "unsafe name"),
    "Windows": (sample(1, "C:\\x"), "unsafe name"),
    "backwards": (sample(1, "..\\x"), "unsafe name"),
    "twice": (sample(1, "00000"), "duplicate key"),
    "twice the caption": ([("00000.txt", b"another")], "duplicate key"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_specimen_between_good_samples(tmp_path, case):
    bad, kind = CASES[case]
    found = scan(tmp_path, tar(files(sample(0), bad, sample(2))))
    assert found.ids == ["00000.jpg", "00002.jpg"] and found.captions == ["photograph 0", "photograph 2"]
    problems = [p for p in found.problems if p.kind not in HARMLESS]
    assert len(problems) == 1 and (kind is None or problems[0].kind == kind), problems
    assert problems[0].kind in KINDS and (problems[0].key in str(problems[0]) or not problems[0].key.isprintable())
    assert sorted(os.listdir(tmp_path)) == ["x.tar"], "something was extracted"


def test_a_real_decompression_bomb(tmp_path):
    buffer = io.BytesIO()
    Image.new("1", (12000, 12000)).save(buffer, "PNG")
    found = scan(tmp_path, tar(files(sample(1), [("b.png", buffer.getvalue()), ("b.txt", b"a bomb")])))
    assert found.ids == ["00001.jpg"] and [(p.key, p.kind) for p in found.problems] == [("b", "decompression bomb")]


@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE"])
def test_links_and_devices(tmp_path, kind):
    special = tarfile.TarInfo("x.jpg")
    special.type, special.linkname = getattr(tarfile, kind), "00001.jpg"
    found = scan(tmp_path, tar(files(sample(1), [("x.jpg", special), ("x.txt", b"a special file")], sample(2))))
    assert found.ids == ["00001.jpg", "00002.jpg"]
    assert [(p.key, p.kind) for p in found.problems] == [("x", "link" if "LNK" in kind or "SYM" in kind else "device")]


def test_names_that_cannot_be_written(tmp_path):
    found = scan(tmp_path, tar(files(sample(1), sample(2, "bell\a"), sample(3, "two\nlines")), tarfile.GNU_FORMAT))
    latin = tar(files(sample(4, "fZZade")), tarfile.GNU_FORMAT)
    heads = bytearray(latin)
    for at in range(0, len(latin), 512):
        if heads[at : at + 6] == b"fZZade":
            heads[at + 1] = 0xE7
            heads[at + 148 : at + 156] = b" " * 8
            heads[at + 148 : at + 156] = f"{sum(heads[at : at + 512]):06o}\0 ".encode()
    again = scan(tmp_path, bytes(heads))
    assert [p.kind for p in found.problems] == ["bad name"] * 2 and [p.kind for p in again.problems] == ["bad name"]
    assert all("\n" not in str(p) for p in found.problems)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.tar").write_bytes(bytes(heads))
    (tmp_path / "set/b.tar").write_bytes(tar(sample(1)))
    assert "\\xe7" in index_shards(tmp_path / "set").problems[0].key


def test_interleaved_and_reordered(tmp_path):
    a, b, c = sample(1, txt=b"one"), sample(2, txt=b"two"), sample(3, txt=b"three")
    mixed = [f for trio in zip(a, b, c) for f in trio]
    found = scan(tmp_path, tar(mixed))
    assert dict(zip(found.ids, found.captions)) == {"00001.jpg": "one", "00002.jpg": "two", "00003.jpg": "three"}
    assert [p.kind for p in found.problems] == ["apart"] and "3 samples" in found.problems[0].detail
    assert (np.diff(found.columns["image_offset"]) > 0).all()


def test_which_files_make_a_sample(tmp_path):
    photo = picture(1)
    found = scan(tmp_path, tar([("a.jpg", photo), ("a.txt", b"a"), ("a.seg.png", picture(2, "PNG")), ("a.npy", b"1"), ("__meta__/x.jpg", photo),
                                ("2019.05.01.jpg", photo), ("2019.05.01.txt", b"may"), ("2019.05.02.JPG", photo), ("2019.05.02.TXT", b"second"),
                                ("b.png", picture(2, "PNG")), ("b.jpg", photo), ("b.txt", b"b"), (".hidden.jpg", photo), ("noending", b"x")]))
    assert found.ids == ["a.jpg", "2019.05.01.jpg", "2019.05.02.JPG", "b.jpg"] and found.captions == ["a", "may", "second", "b"]
    assert [(p.key, p.kind) for p in found.problems] == [("b", "second image")]
    lonely = scan(tmp_path, tar([("IMG.1.jpg", photo), ("IMG.2.txt", b"two"), ("IMG.3.jpg", b"x"), ("IMG.3.txt", b"three"),
                                 ("IMG.4.jpg", photo), ("IMG.4.txt", b"4")]))
    assert lonely.ids == ["IMG.4.jpg"]
    assert [(p.key, p.kind) for p in lonely.problems] == [("IMG.1", "no caption"), ("IMG.2", "no image"), ("IMG.3", "damaged image")]


def test_layouts(tmp_path):
    both = [("a.jpg", picture(1)), ("a.json", json.dumps({"caption": "c", "short_caption": "s", "long_caption": "l", "lc": "en"}).encode()), ("a.txt", b"t")]
    content = tar(both)
    assert scan(tmp_path, content, layout="laion").captions == ["t"]
    assert scan(tmp_path, content, layout="auto").captions == ["t"]
    assert scan(tmp_path, content, layout="alamy", columns=("lc",)).values == {"lc": ["en"]}
    assert scan(tmp_path, content, layout="alamy").captions == ["c"]
    assert scan(tmp_path, content, layout="synthetic").captions == ["s"]
    assert scan(tmp_path, content, layout="jpg,json:long_caption,json").captions == ["l"]
    assert scan(tmp_path, content, layout=Layout(image=("png",))).problems[0].kind == "no image"
    assert scan(tmp_path, tar([both[0], ("a.json", b'{"long_caption": "l"}')]), layout="synthetic").captions == ["l"]
    with pytest.raises(DataError, match="is there anyway"):
        parse_layout("auto", columns=("width",))


def test_metadata_as_the_world_writes_it(tmp_path):
    odd = {"a": b'{"punsafe": NaN, "similarity": "0.25", "rating": null, "big": 123456789012345678901234567890}',
           "b": b'{"punsafe": 1, "rating": ["x", "y"], "half": "\\ud83d"}',
           "c": b'\xef\xbb\xbf{"rating": "\xc3\xa9", "half": true}'}
    (tmp_path / "set").mkdir()
    (tmp_path / "set/0.tar").write_bytes(tar(files(*[sample(i, k, json=v) for i, (k, v) in enumerate(odd.items())])))
    index = index_shards(tmp_path / "set", columns=("rating", "big", "half"))
    assert len(index) == 3 and not index.problems
    assert np.array_equal(index.columns["punsafe"], np.array([np.nan, 1, np.nan], np.float32), equal_nan=True)
    assert index.columns["similarity"].tolist()[0] == 0.25 and index.columns["rating"].tolist() == [-1, 0, 1]
    assert index.categories["rating"] == ['["x", "y"]', "é"] and index.columns["big"][0] == pytest.approx(1.2345678901234568e29)
    assert index.read(1, metadata=True).metadata["punsafe"] == 1


def test_whole_tars_that_are_none(tmp_path):
    for name, content, kind in (("noise", np.random.default_rng(0).bytes(20480), "not a tar"), ("empty", tar([]), "empty tar"), ("nothing", b"", "empty tar"),
                                ("short", b"hello", "not a tar"), ("zeros", bytes(1 << 16), "empty tar"), ("other", tar([("a.npy", b"1")]), "no samples")):
        found = scan(tmp_path, content)
        assert [p.kind for p in found.problems] == [kind], (name, found.problems)
    for name, packed in (("gzip", gzip.compress(tar(sample(1)))), ("bzip2", __import__("bz2").compress(b"x")), ("xz", __import__("lzma").compress(b"x"))):
        with pytest.raises(DataError, match=rf"compressed as a whole \({name}\).*repack.*stream"):
            scan(tmp_path, packed)


def test_joined_tars_are_read_to_the_end(tmp_path):
    found = scan(tmp_path, tar(sample(1)) + tar(sample(2)) + bytes(10240 * 3) + tar(sample(3)))
    assert found.ids == ["00001.jpg", "00002.jpg", "00003.jpg"] and {p.kind for p in found.problems} == {"after the end"}


@pytest.mark.parametrize("form", FORMS)
def test_a_hole_of_zeros_is_no_end(tmp_path, form):
    """A stretch that the disk lost, beginning at a header: what follows is read, and what was lost is not taken for the end of a tar."""
    content = tar(files(*[sample(n) for n in range(4)]), FORMS[form])
    start, end = (content.index(f"{n:05d}.jpg".encode()) // 512 * 512 for n in (1, 2))
    if form == "pax":
        start, end = start - 1024, end - 1024  # with the extended header
    found = scan(tmp_path, content[:start] + bytes(end - start) + content[end:])
    assert found.ids == ["00000.jpg", "00002.jpg", "00003.jpg"] and [p.kind for p in found.problems] == ["bad header"]
    only = scan(tmp_path, content[:start] + bytes(512) + content[start + 512 :])  # a hole that takes one header and leaves another before it
    assert {"00000.jpg", "00002.jpg", "00003.jpg"} <= set(only.ids) and "bad header" in {p.kind for p in only.problems}
    before = content.index(b"00002.jpg") // 512 * 512
    after_extension = scan(tmp_path, content[:before] + bytes(512) + content[before + 512 :])  # the extended header is left without its file
    assert {"00000.jpg", "00001.jpg", "00003.jpg"} <= set(after_extension.ids) and after_extension.problems


# ---- the index ----


def test_columns(place):
    index = index_shards(place, columns=("rating", "number"))
    assert len(index) == 30 and index.columns["number"].tolist() == list(range(30)) and index.columns["number"].dtype == np.float64
    assert [index.categories["rating"][c] for c in index.columns["rating"]] == ["G", "PG"] * 15
    assert index.columns["shard"].tolist() == sorted([0, 1, 2] * 10) and index.columns["punsafe"].dtype == np.float32
    lots = [int.from_bytes(hashlib.blake2b(i.encode(), key=b"difflit validation", digest_size=8).digest(), "big") for i in index.ids()]
    assert index.columns["lot"].tolist() == lots and (index.columns["split"] == -1).all()
    assert index.columns["width"].tolist() == [24] * 30 and index.columns["height"].tolist() == [18] * 30
    assert index.columns["caption_chars"].tolist() == [len(c) for c in index.captions()]
    assert all(len(c) == 30 for c in index.columns.values()) and all(not c.flags.writeable for c in index.columns.values())
    for row in range(30):
        assert index.find(index.id(row)) == row
        shard, at, count = index.shards[index.columns["shard"][row]], index.columns["caption_offset"][row], index.columns["caption_bytes"][row]
        assert Path(shard.path).read_bytes()[at : at + count].decode() == index.captions([row])[0]


def test_turned_pictures_have_upright_sizes(tmp_path):
    turned, buffer = Image.Exif(), io.BytesIO()
    turned[0x0112] = 6
    photograph(1, (40, 20)).save(buffer, "JPEG", exif=turned, progressive=True)
    found = scan(tmp_path, tar([("a.jpg", buffer.getvalue()), ("a.txt", b"a"), ("b.webp", picture(2, "WEBP")), ("b.txt", b"b")]))
    assert (found.columns["width"].tolist(), found.columns["height"].tolist(), found.columns["progressive"].tolist()) == ([20, 24], [40, 18], [True, False])
    assert [shards.FORMATS[c] for c in found.columns["format"]] == ["jpeg", "webp"]


def test_a_folder_and_its_tar(messy, tmp_path):
    """The same pictures and captions; only what a header cannot show differs, and a deep look finds that too."""
    from difflit.folders import FolderSource

    (tmp_path / "set").mkdir()
    subprocess.run(["tar", "-cf", tmp_path / "set/0.tar", "-C", messy, "."], check=True)
    index = index_shards(tmp_path / "set")
    entries = {e.id: e.captions[0] for split in ("train", "validation") for e in FolderSource(messy, split=split).entries}
    ours = dict(zip(index.ids(), index.captions()))
    assert ours.pop("cut.jpg") == "cut in half"
    assert ours == entries
    held = {i for i, lot in zip(index.ids(), index.columns["lot"].tolist()) if lot * 20 >> 64 == 0}
    assert held - {"cut.jpg"} == {e.id for e in FolderSource(messy, split="validation").entries} or not held
    deep = verify_shards(tmp_path / "set", decode=True)
    assert deep.samples == len(entries) and {p.key for p in deep.problems} >= {"cut", "fake", "utf16", "bomb", "alone", "silent", "escape"}


def test_splits_from_names(tmp_path):
    for n, name in enumerate(("train/0.tar", "val/0.tar", "more/cc3m-test-0001.tar")):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(tar(sample(n)))
    (tmp_path / "set/more/x.tar").write_bytes(tar(files(sample(7, "validation/7"), sample(8, "8"))))
    index = index_shards(tmp_path / "set")
    assert dict(zip(index.ids(), index.columns["split"].tolist())) == {"00000.jpg": 0, "00001.jpg": 1, "00002.jpg": 2, "validation/7.jpg": 1, "8.jpg": -1}


def test_the_same_names_in_several_tars(tmp_path):
    for n in range(3):
        (tmp_path / f"set/{n}").mkdir(parents=True)
        (tmp_path / f"set/{n}/0.tar").write_bytes(tar(files(sample(n, "000"), sample(10 + n))))
    index = index_shards(tmp_path / "set")
    assert len(set(index.ids())) == 6 and index.id(2) == "1/0.tar/000.jpg" and index.id(3) == "00011.jpg"
    assert [index.find(i) for i in index.ids()] == list(range(6)) and index.find("2/0.tar/000") == 4 and index.read(2).id == index.id(2)
    assert index.columns["lot"][0] == index.columns["lot"][2]


def test_unchanged_tars_are_not_read_again(place, monkeypatch):
    seen = []
    honest = shards.scan_shard
    monkeypatch.setattr(shards, "scan_shard", lambda path, *a, **k: seen.append(Path(path).name) or honest(path, *a, **k))
    first = index_shards(place)
    assert seen == ["000.tar", "001.tar", "002.tar"]
    assert index_shards(place).folder == first.folder and len(seen) == 3
    (place / "003.tar").write_bytes(tar(sample(77)))
    (place / "001.tar").write_bytes(tar(files(*[sample(10 + k) for k in range(9)])))
    second = index_shards(place)
    assert seen[3:] == ["001.tar", "003.tar"] and len(second) == 30 and second.digest() != first.digest()
    assert len(first.captions()) == 30 and first.read(0), "an index that is open stays usable when a newer one takes its place"
    assert len(list(second.folder.parent.glob("index-*"))) == 1


def test_changes_are_named(place):
    index = index_shards(place)
    assert index.changes() == []
    os.utime(place / "000.tar", ns=(1, 1))  # only touched
    assert index.changes() == []
    content = bytearray((place / "001.tar").read_bytes())
    (place / "001.tar").write_bytes(content + bytes(10240))
    (place / "002.tar").unlink()
    told = index.changes()
    assert len(told) == 2 and f"001.tar grew: it has {len(content) + 10240} bytes, and had {len(content)}" in told[0] and "002.tar is gone" in told[1]
    content[content.index(b"photograph 10")] ^= 32
    (place / "001.tar").write_bytes(content)
    assert "001.tar was replaced" in index.changes()[0]
    (place / "001.tar").write_bytes(content[:30000])
    assert "001.tar shrank" in index.changes()[0]
    assert index.describe()["001.tar"]["samples"] == 10 and json.loads(json.dumps(index.describe())) == index.describe()


def test_digest_is_of_the_content(place, tmp_path):
    index = index_shards(place)
    (tmp_path / "elsewhere").mkdir()
    for path in place.glob("*.tar"):
        (tmp_path / "elsewhere" / path.name).write_bytes(path.read_bytes())
    assert index_shards(tmp_path / "elsewhere").digest() == index.digest()
    for changed in (sample(0, txt=b"another caption"), sample(0, jpg=picture(50)), sample(0, "key")):
        (tmp_path / "elsewhere/000.tar").write_bytes(tar(files(changed, *[sample(k) for k in range(1, 10)])))
        assert index_shards(tmp_path / "elsewhere").digest() != index.digest()
    (tmp_path / "elsewhere/000.tar").write_bytes(tar(files(sample(0, json=b'{"punsafe": 0.9}'), *[sample(k) for k in range(1, 10)])))
    other = index_shards(tmp_path / "elsewhere")  # a score is for choosing samples, and not what is learnt
    assert other.digest() == index.digest() and other.columns["punsafe"][0] == np.float32(0.9)


def test_reading_says_what_is_wrong(place):
    index = index_shards(place)
    content = bytearray((place / "000.tar").read_bytes())
    content[index.columns["image_offset"][3] + 40] ^= 1
    (place / "000.tar").write_bytes(content)
    with pytest.raises(DamagedSample, match="000.tar: 00003.jpg: the picture's bytes are not those"):
        open_index(index.folder.parent).read(3)
    assert isinstance(index.read(4), Encoded)
    index.read(11)
    with open(place / "001.tar", "r+b") as f:
        f.truncate(int(index.columns["image_offset"][12]) + 9)
    with pytest.raises(OSError, match="the tar was cut"):
        index.read(12)
    with pytest.raises(OSError, match="was replaced or cut"):
        open_index(index.folder.parent).read(11)
    (place / "002.tar").unlink()
    with pytest.raises(OSError, match="002.tar cannot be opened"):
        index.read(29)
    with pytest.raises(IndexError):
        index.read(-1)


def test_many_threads_few_handles(tmp_path):
    for n in range(40):
        (tmp_path / f"{n:02}.tar").write_bytes(tar(files(sample(2 * n), sample(2 * n + 1))))
    index = index_shards(tmp_path)
    index._handles.limit = 3
    rows = np.random.default_rng(0).integers(0, 80, 4000).tolist()
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda r: index.read(r, metadata=r % 2 == 0), rows))
    assert all(f.caption == f"photograph {r}" and f.content == picture(r) for f, r in zip(found[:300], rows))
    assert [f.id for f in found] == [f"{r:05d}.jpg" for r in rows]
    links = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{n}")]
    assert sum(str(tmp_path) in link and link.endswith(".tar") for link in links) <= 3 and len(index._handles.open) <= 3


def test_after_a_fork(place):
    index = index_shards(place)
    index.read(0)
    code = 0
    child = os.fork()
    if child == 0:
        try:
            code = 0 if all(index.read(r).caption == f"photograph {r}" for r in range(30)) else 1
        except BaseException:
            code = 2
        os._exit(code)
    assert [index.read(r).id for r in range(30)] == index.ids()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_pickled_by_its_place(place):
    index = pickle.loads(pickle.dumps(index_shards(place)))
    assert isinstance(index, ShardIndex) and index.read(29).caption == "photograph 29"


# ---- how an index is made ----


def test_processes_make_the_same_index(place, tmp_path):
    one, two = index_shards(place, folder=tmp_path / "one"), index_shards(place, folder=tmp_path / "two", workers=2)
    assert one.digest() == two.digest() and one.problems == two.problems and one.folder.name == two.folder.name
    for file in one.folder.iterdir():
        assert file.read_bytes() == (two.folder / file.name).read_bytes(), file.name


def start(place, folder, slow=0.0):
    """A process that indexes the set."""
    code = ("import sys, time, difflit.shards as s\nhonest = s.scan_shard\n"
            f"def slow(*a, **k):\n    time.sleep({slow})\n    return honest(*a, **k)\ns.scan_shard = slow\n"
            "print(s.index_shards(sys.argv[1], folder=sys.argv[2]).digest())")
    return subprocess.Popen([sys.executable, "-c", code, str(place), str(folder)], stdout=subprocess.PIPE, text=True)


def test_two_processes_at_the_same_time(place, tmp_path):
    both = [start(place, tmp_path / "index", 0.2) for _ in range(2)]
    said = [p.communicate(timeout=120)[0].strip() for p in both]
    assert [p.returncode for p in both] == [0, 0] and said[0] == said[1] == open_index(tmp_path / "index").digest() == index_shards(place).digest()
    assert len(open_index(tmp_path / "index")) == 30


def test_two_threads_without_locks(place, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_one_at_a_time", lambda folder: contextlib.nullcontext())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: index_shards(place, folder=tmp_path / "index").digest(), range(4)))
    assert len(set(found)) == 1 and open_index(tmp_path / "index").digest() == found[0]


def test_killed_and_started_again(place, tmp_path):
    process = start(place, tmp_path / "index", 2.0)
    deadline = time.time() + 60
    while time.time() < deadline and len(list((tmp_path / "index/parts").glob("*.npz"))) < 1:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "index/parts").glob("*.npz")}
    assert 1 <= len(kept) < 3 and not (tmp_path / "index/current.json").exists()
    assert len(index_shards(place, folder=tmp_path / "index")) == 30
    assert all(p.stat().st_mtime_ns == at for p, at in kept.items()), "finished tars were read again"


def test_a_helping_process_that_dies(place, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_serve", None)
    command = "import os, sys; sys.stdin.readline(); os._exit(9)"
    honest = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda c, **k: honest([c[0], "-c", command], **k))
    with pytest.raises(OSError, match="3 tars could not be read(.|\n)*000.tar: the process that read it ended with 9"):
        index_shards(place, folder=tmp_path / "index", workers=2)


def test_a_tar_that_cannot_be_read_keeps_the_others(place, tmp_path, monkeypatch):
    honest = shards.scan_shard

    def failing(path, *a, **k):
        if path.endswith("001.tar"):
            raise OSError("Stale file handle")
        return honest(path, *a, **k)

    monkeypatch.setattr(shards, "scan_shard", failing)
    with pytest.raises(OSError, match="1 tars could not be read; the 2 others are kept(.|\n)*001.tar: Stale file handle"):
        index_shards(place, folder=tmp_path / "index")
    assert len(list((tmp_path / "index/parts").glob("*.npz"))) == 2
    monkeypatch.setattr(shards, "scan_shard", honest)
    assert len(index_shards(place, folder=tmp_path / "index")) == 30


def test_a_set_that_cannot_be_written_beside(place, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFLIT_CACHE", str(tmp_path / "cache"))
    (place / ".difflit").write_text("in the way")  # permissions would not stop root
    index = index_shards(place)
    assert index.folder.is_relative_to(tmp_path / "cache/shards") and len(index) == 30
    assert index_shards(place).folder == index.folder
    (tmp_path / "cache2").write_text("in the way too")
    monkeypatch.setenv("DIFFLIT_CACHE", str(tmp_path / "cache2"))
    with pytest.raises(DataError, match="no place for the index.*folder="):
        index_shards(place)


@pytest.fixture
def scanned(monkeypatch):
    """The names of the tars that are read."""
    seen, honest = [], shards.scan_shard
    monkeypatch.setattr(shards, "scan_shard", lambda path, *a, **k: seen.append(Path(path).name) or honest(path, *a, **k))
    return seen


def test_one_index_however_the_tars_are_spelt(place, scanned, monkeypatch):
    tars = sorted(map(str, place.glob("*.tar")))
    monkeypatch.chdir(place.parent)
    spelt = [place, str(place) + "/", tars, tars[::-1], "::".join(tars), f"{place}/*.tar", f"{place}/{{000..002}}.tar", "set", "./set/../set/*.tar",
             [f"{place}/{{000..001}}.tar", tars[2]], f"file://{place}"]
    indices = [index_shards(p) for p in spelt]
    assert len({i.folder for i in indices}) == 1 and len(scanned) == 3
    assert sorted(p.name for p in (place / ".difflit").iterdir() if p.is_dir()) == sorted([indices[0].folder.parent.name, "parts"])


def test_columns_are_added_and_stay(place, scanned):
    plain = index_shards(place)
    more = index_shards(place, columns=("rating",))
    assert len(scanned) == 6 and more.folder.parent == plain.folder.parent and "rating" in more.columns and "rating" not in plain.columns
    other = index_shards(place, columns=("number",))
    assert len(scanned) == 9 and {"rating", "number"} <= {*other.columns}
    for columns in (("rating",), (), ("number", "rating"), ("rating", "aspect"), ("number",)):
        assert index_shards(place, columns=columns).folder == other.folder and len(scanned) == 9
    assert plain.folder.is_dir() and more.folder.is_dir(), "an index that another run may hold was removed"
    assert plain.digest() == more.digest() == other.digest() and pickle.loads(pickle.dumps(more)).ids() == other.ids()
    hashed = index_shards(place, phash=True)
    assert hashed.columns["phash"].dtype == np.uint64 and {"rating", "number"} <= {*hashed.columns} and len(scanned) == 12
    assert index_shards(place, columns=("rating",)).folder == hashed.folder == index_shards(place).folder
    assert [hashed.categories["rating"][c] for c in hashed.columns["rating"][:3]] == ["G", "PG", "G"] and hashed.columns["number"].tolist() == list(range(30))
    old = time.time() - 8 * 86400
    os.utime(plain.folder, (old, old))
    index_shards(place, columns=("misspelt",))
    assert not plain.folder.exists() and more.folder.is_dir()


def test_a_misspelt_column_is_forgotten(place, scanned):
    assert np.isnan(index_shards(place, columns=("raiting",)).columns["raiting"]).all()
    assert "raiting" not in index_shards(place, columns=("rating",)).columns and len(scanned) == 6
    assert "raiting" in index_shards(place, columns=("raiting",)).columns and len(scanned) == 6
    assert "raiting" not in index_shards(place).columns and "rating" in index_shards(place).columns and len(scanned) == 6


def test_other_layouts_are_other_indices(place, scanned):
    names, json_ones = index_shards(place), index_shards(place, layout="alamy")
    assert names.captions([3]) == ["photograph 3"] and json_ones.captions([3]) == ["caption 3"] and len(scanned) == 6
    assert index_shards(place).folder == names.folder and index_shards(place, layout="alamy").folder == json_ones.folder and len(scanned) == 6
    scores = Layout(fields={"rating": ("number",)})
    assert index_shards(place, layout=scores).columns["rating"].tolist() == list(range(30)) and "rating" not in index_shards(place).columns


def test_parts_are_shared_between_sets(place, scanned):
    index_shards(place, columns=("rating",))
    half = index_shards([place / "000.tar", place / "002.tar"])
    assert len(half) == 20 and len(scanned) == 3 and "rating" not in half.columns
    (place.parent / "more").mkdir()
    (place.parent / "more/9.tar").write_bytes(tar(files(sample(99))))
    assert len(index_shards(place.parent)) == 31 and scanned[3:] == ["9.tar"], "the parts below"
    assert len(index_shards(place.parent / "more")) == 1 and len(scanned) == 4, "the parts above"
    assert len(index_shards(place, folder=place.parent / "apart")) == 30 and len(scanned) == 4
    (place / "001.tar").unlink()
    assert len(index_shards(place, columns=("rating",))) == 20 and len(list((place / ".difflit/parts").glob("*.npz"))) == 2 and len(scanned) == 4


def test_a_part_that_another_process_replaces(place, tmp_path, monkeypatch):
    honest = shards._join

    def late(folder, parts, names, settings):
        content = shards.scan_shard(place / "001.tar")  # without the column
        shards._save_part(parts[1].path, content, "")
        honest(folder, parts, names, settings)

    monkeypatch.setattr(shards, "_join", late)
    with pytest.raises(OSError, match="001.tar in .* was replaced while the index was made; try again"):
        index_shards(place, columns=("rating",))
    monkeypatch.setattr(shards, "_join", honest)
    assert (index_shards(place, columns=("rating",)).columns["rating"] >= 0).all()


def test_texts_that_were_cut_are_made_anew(place):
    index = index_shards(place)
    for name in ("captions.bin", "ids.bin"):
        content = (index.folder / name).read_bytes()
        for wrong in (content[:40], content + b"x", b""):
            (index.folder / name).unlink()  # the open one stays mapped
            (index.folder / name).write_bytes(wrong)
            with pytest.raises(DataError, match="holds no index"):
                open_index(index.folder.parent)
            assert index_shards(place).captions()[29] == "photograph 29" and (index.folder / name).read_bytes() == content


def test_where_an_index_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFLIT_CACHE", str(tmp_path))
    settings = shards._settings(Layout(), False)
    for tars in (["/a/0.tar", "/b/0.tar"], ["/0.tar"], ["s3://b/0.tar"]):
        assert [p.parent for p in shards._homes(tars, settings)] == [tmp_path / "shards"]
    assert shards._homes(["/a/b/0.tar", "/a/c/0.tar"], settings)[0].parent == Path("/a/.difflit")


def test_stamps_are_read_once(place, monkeypatch):
    index_shards(place)
    seen, honest = [], shards._read_stamp
    monkeypatch.setattr(shards, "_read_stamp", lambda path: seen.append(Path(path).name) or honest(path))
    index_shards(place)
    assert seen == []
    os.utime(place / "001.tar", ns=(1, 1))
    assert len(index_shards(place)) == 30 and set(seen) == {"001.tar"}


def test_columns_that_cannot_be():
    for name in ("width", "shard", "by_lot", "a/b", "x_ends"):
        with pytest.raises(DataError, match="choose other names"):
            parse_layout("auto", (name,))
    with pytest.raises(DataError, match="'aspect' is there anyway"):
        parse_layout(Layout(fields={"aspect": ("ratio",)}))
    assert parse_layout("auto", ("aspect", "short_side", "long_side", "pixels", "kind")).fields.keys() - parse_layout("auto").fields.keys() == {"kind"}


def test_damaged_parts_and_indices_are_made_anew(place, tmp_path):
    index = index_shards(place, folder=tmp_path / "index")
    (index.folder / "index.json").write_text("{")
    with pytest.raises(DataError, match="holds no index"):
        open_index(tmp_path / "index")
    for part in (tmp_path / "index/parts").glob("*.npz"):
        part.write_bytes(part.read_bytes()[:99])
    (index.folder / "index.json").unlink()
    assert index_shards(place, folder=tmp_path / "index").digest() == index.digest()


def test_nothing_found(tmp_path):
    with pytest.raises(DataError, match="is not there"):
        index_shards(tmp_path / "nowhere")
    with pytest.raises(DataError, match="a folder of 0 files"):
        index_shards(tmp_path)
    (tmp_path / "a.tar").write_bytes(tar([("a.jpg", picture(1))]))
    with pytest.raises(DataError, match=r"no sample in 1 tars(.|\n)*a.tar: a: no caption"):
        index_shards(tmp_path)


def test_what_is_hidden_is_no_part_of_a_set(place):
    (place / ".trash").mkdir()
    (place / ".trash/9.tar").write_bytes(tar(files(sample(9))))
    (place / ".8.tar").write_bytes(tar(files(sample(8))))
    assert [Path(p).name for p in expand_paths(place)] == ["000.tar", "001.tar", "002.tar"]
    assert expand_paths(f"{place}/**/*.tar") == expand_paths(place) == expand_paths(f"{place}/*.tar")


def test_odd_digits_and_ties(tmp_path):
    for name in ("1²3.tar", "01.tar", "1.tar", "٢.tar"):
        (tmp_path / name).touch()
    found = expand_paths(tmp_path)
    assert expand_paths(found[::-1]) == found and [Path(f).name for f in found][:2] == ["01.tar", "1.tar"]


def test_natural_order(tmp_path):
    for n in (1, 2, 10, 100):
        (tmp_path / f"part-{n}.tar").write_bytes(tar(sample(n)))
    assert index_shards(tmp_path).ids() == [f"{n:05d}.jpg" for n in (1, 2, 10, 100)]
    assert [Path(p).name for p in expand_paths(f"{tmp_path}/part-{{1,100,2}}.tar")] == ["part-1.tar", "part-2.tar", "part-100.tar"]
    odd = tmp_path / "a{b}.tar"
    odd.write_bytes(tar(sample(3)))
    assert expand_paths(odd) == [str(odd)]


def test_img2datasets_table(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (tmp_path / "0.tar").write_bytes(tar(files(*[sample(n, json=b"{}" if n else b'{"punsafe": 0.5}') for n in range(3)])))
    table = {"key": ["00000", "00001", "00002", "00003", "00004"], "status": ["success"] * 4 + ["failed_to_download"], "punsafe": [0.1, 0.2, None, 0.4, None]}
    parquet.write_table(pyarrow.table(table), tmp_path / "0.parquet")
    index = index_shards(tmp_path)
    assert np.array_equal(index.columns["punsafe"], np.array([0.5, 0.2, np.nan], np.float32), equal_nan=True)
    assert [(p.key, p.kind) for p in index.problems] == [("00003", "not in the tar")]
    parquet.write_table(pyarrow.table({**table, "punsafe": [0.9] * 5}), tmp_path / "0.parquet")
    assert index_shards(tmp_path).columns["punsafe"].tolist() == np.array([0.5, 0.9, 0.9], np.float32).tolist()
    (tmp_path / "0.parquet").write_bytes(b"nonsense")
    assert [p.kind for p in index_shards(tmp_path).problems] == ["bad table"]


def test_verify_reports_and_writes_nothing(place):
    before = sorted(place.rglob("*"))
    assert str(verify_shards(place)) == "30 whole samples in 3 tars, no problems" and verify_shards(place).whole
    (place / "003.tar").write_bytes(gzip.compress(tar(sample(1))))
    (place / "004.tar").write_bytes(tar(sample(1, txt=None, json=None)))
    report = verify_shards(place, workers=2)
    assert not report.whole and report.samples == 30 and {(p.shard, p.kind) for p in report.problems} == {("003.tar", "unreadable"), ("004.tar", "no caption")}
    assert sorted(place.rglob("*")) == sorted([*before, place / "003.tar", place / "004.tar"])


# ---- over the network ----


class Ranges(http.server.BaseHTTPRequestHandler):
    """Gives parts of files; fails as often as it is told to."""

    folder: Path
    failures = 0
    ranges = True

    def do_GET(self):
        cls = type(self)
        path = cls.folder / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        if cls.failures > 0:
            cls.failures -= 1
            return self.send_error(503)
        content = path.read_bytes()
        start, end = (int(v) for v in self.headers["Range"].removeprefix("bytes=").split("-"))
        piece = content[start : end + 1] if cls.ranges else content
        self.send_response(206 if cls.ranges else 200)
        self.send_header("Content-Range", f"bytes {start}-{start + len(piece) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        self.wfile.write(piece)

    def log_message(self, *_):
        pass


@pytest.fixture
def web(place):
    handler = type("Handler", (Ranges,), {"folder": place})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def test_by_http(place, web, tmp_path):
    address, handler = web
    here, there = index_shards(place), index_shards(f"{address}/{{000..002}}.tar", folder=tmp_path / "index")
    assert there.digest() == here.digest() and [s.name for s in there.shards] == ["000.tar", "001.tar", "002.tar"]
    assert there.read(17, metadata=True) == here.read(17, metadata=True) and there.changes() == []
    handler.failures = 2
    assert there.read(3) == here.read(3), "a busy server is asked again"
    handler.failures = 9
    with pytest.raises(OSError, match="503"):
        there.read(4)
    handler.failures = 0
    with pytest.raises(OSError, match="404"):
        index_shards(f"{address}/{{000..003}}.tar", folder=tmp_path / "more")
    assert len(list((tmp_path / "more/parts").glob("*.npz"))) == 0 or True
    handler.ranges = False
    with pytest.raises(OSError, match="the whole file when asked for a part"):
        index_shards(f"{address}/000.tar", folder=tmp_path / "none")


def test_by_fsspec(place, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in place.glob("*.tar"):
        memory.pipe(f"/bucket/deep/{path.name}", path.read_bytes())
    try:
        here = index_shards(place)
        for spelt in ("memory://bucket/", "memory://bucket/deep/*.tar", "memory://bucket/deep/{000..002}.tar"):
            there = index_shards(spelt, folder=tmp_path / "index")
            assert there.digest() == here.digest() and there.read(17, metadata=True) == here.read(17, metadata=True)
        memory.pipe("/bucket/deep/001.tar", b"x" * 100)
        assert "001.tar shrank" in there.changes()[0]
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_storage_that_is_not_installed(monkeypatch, tmp_path):
    with pytest.raises(DataError, match="nonsense"):
        index_shards("nonsense://x/0.tar", folder=tmp_path / "index")
