"""Filters that cannot harm, duplicates that do not depend on the order of tars, selections that are shared and survive damage."""

import io
import json
import random
import string
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import CAPTIONS, photograph, save

from difflit.data import DataError
from difflit.folders import FolderSource
from difflit.selection import (
    Records, RuleError, SeenBefore, ShardSource, exact_duplicates, near_duplicates, parse_rules, select, statistics, statistics_picture,
)
from difflit.shards import index_shards


def jpeg(number: int, size=(90, 60), quality: int = 85) -> bytes:
    buffer = io.BytesIO()
    photograph(number, (90, 60)).resize(size).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_tar(path: Path, samples: dict[str, tuple]) -> Path:
    "A tar of key → (picture's bytes, caption, metadata)."
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, (content, caption, said) in samples.items():
            for ending, data in {"jpg": content, "txt": caption.encode(), "json": json.dumps(said).encode()}.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def samples(numbers, copies=()) -> dict[str, tuple]:
    "Photographs; those in `copies` are copies of number − 1, at another size and quality."
    captions = list(CAPTIONS.values())
    said = {n: {"punsafe": n / 100, "class": "odd" if n % 2 else "even", "clip score": n} for n in numbers}
    return {f"{n:05d}": (jpeg(n - 1, (80, 54), 70) if n in copies else jpeg(n), captions[n % 10], said[n]) for n in numbers}


# ---------------------------------------------------------------- the language


HOSTILE = [
    "__import__('os').system('touch /tmp/harm')", "().__class__.__bases__[0].__subclasses__()", "(lambda: 1)()", "[x for x in (1,)]",
    "print(1)", "open('/etc/passwd')", "punsafe.__class__", "f'{punsafe}'", "punsafe < (yield)", "(punsafe := 1) < 2",
    "punsafe if 1 else 2", "*punsafe", "{1: 2}", "b'x' in caption", "punsafe < 1j", "punsafe < ...", "punsafe < None", "punsafe[0] < 1",
    "2 ** 99999999 > punsafe", "punsafe << 3 > 1", "punsafe @ 2 > 1", "punsafe % 2 > 1", "punsafe // 2 > 1", "~punsafe > 1",
    "matches(caption, caption)", "matches(caption, r'a', 3)", "matches(caption, pattern=r'a')", "missing('punsafe')",
    "missing(punsafe, width)", "column(punsafe) > 1", "matches(matches(caption, 'a'), 'b')", "await punsafe", "punsafe < 1; import os",
    "punsafe < 1\nimport os", "exec('1')", "punsafe is None", "(" * 500 + "punsafe" + ")" * 500 + " < 1", "-" * 20_000 + "punsafe < 1",
    "not " * 3000 + "progressive", "punsafe < " + "1" * 10_000, "a" * 60_000, "'''", "\\", "punsafe < 1 and", "and", ")", "(", "punsafe <",
    "== 1", "punsafe < 1 )", "punsafe ! 1", "$", "\0", "\ud800", "punsafe < 1 or ()", "{}", "[]", "punsafe in {}",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_not_in_the_language_is_refused(text: str) -> None:
    table = Records([{"punsafe": 0.5, "width": 3, "caption": "x"}])
    with pytest.raises(RuleError, match="the filter "):
        parse_rules(text).accept(table)
    assert not Path("/tmp/harm").exists()


def test_random_text_raises_nothing_else() -> None:
    rng = random.Random(0)
    words = ["punsafe", "width", "caption", "class", "<", ">=", "==", "!=", "in", "not", "and", "or", "(", ")", ",", "0.5", "3", "'cat'", "r'\\d'",
             "matches(", "missing(", "column(", "+", "-", "*", "/", " is ", "lambda", "if", "\n", "#", "[", "]", "aspect"]
    table = Records([{"punsafe": 0.5, "width": 3, "height": 4, "caption": "x", "class": "cat"}, {"punsafe": None, "class": None, "width": 9, "height": 4}])
    understood = 0
    for _ in range(4000):
        text = " ".join(rng.choice(words) for _ in range(rng.randint(1, 9))) if rng.random() < 0.9 else "".join(rng.choices(string.printable, k=12))
        try:
            assert parse_rules(text).accept(table).shape == (2,)
            understood += 1
        except RuleError:
            pass
    assert understood > 50


def test_the_place_is_shown() -> None:
    with pytest.raises(RuleError) as caught:
        parse_rules("width > 3\n  and ünsafe < 0.5 # Größe\n  and height > 2").accept(Records([{"width": 3, "height": 2, "punsafe": 1}]))
    assert str(caught.value).split("\n")[1:] == ["    and ünsafe < 0.5 # Größe", "        ^^^^^^"]
    assert "did you mean 'punsafe'" in str(caught.value)
    long = " and ".join(["width > 3"] * 60) + " and hight > 2"
    with pytest.raises(RuleError) as caught:
        parse_rules(long).accept(Records([{"width": 3, "height": 2}]))
    line, marks = str(caught.value).split("\n")[1:]
    assert len(line) < 160 and line[marks.index("^") : marks.rindex("^") + 1] == "hight"


def test_columns_of_any_name() -> None:
    table = Records([{"class": "a", "from": 1, "clip score": 3, "größe": 2}, {"class": "b", "from": 5, "clip score": 4, "größe": 1}])
    assert parse_rules("class == 'a' and from < 3 and column('clip score') <= 3 and größe == 2").accept(table).tolist() == [True, False]
    assert parse_rules("'class' != class and \"from\" not in class").accept(table).tolist() == [True, True]
    assert parse_rules("class in ['b'] or (from - 1) * 2 < -3").accept(table).tolist() == [False, True]
    assert set(parse_rules("class == 'a' and column('clip score') > 1 or aspect > 1").names) == {"class", "clip score", "aspect"}


@pytest.mark.parametrize("count", [1, 65_535, 65_536, 65_537, 200_000])
def test_stretches_join_without_a_seam(count: int) -> None:
    class Table:
        categories = {"class": ["a", "b"]}
        columns = {"score": np.linspace(0, 1, count, dtype=np.float32), "class": (np.arange(count) % 3 - 1).astype(np.int32)}

        def __len__(self) -> int:
            return count

    Table.columns["score"][::7] = np.nan
    score, codes = Table.columns["score"], Table.columns["class"]
    mask, table = parse_rules("not score > 0.5 and class != 'a'").count(Table())
    assert (mask == ((score <= 0.5) & (codes == 1))).all()
    assert [(c.alone, c.missing) for c in table[1:]] == [((score <= 0.5).sum(), np.isnan(score).sum()), ((codes == 1).sum(), (codes == -1).sum())]
    ids = np.random.default_rng(0).integers(0, count, 100_000)
    assert (parse_rules("not score > 0.5 and class != 'a'").accept(Table(), ids) == mask[ids]).all()


def test_numbers_are_compared_in_the_columns_precision() -> None:
    class Table(Records):
        def __init__(self) -> None:
            super().__init__([{}])
            self.columns = {"score": np.array([0.3], np.float32), "width": np.array([100_000], np.int32), "height": np.array([100_000], np.int32)}

    for text in ("score <= 0.3", "score >= 0.3", "score == 0.3", "score in (0.1, 0.3)", "pixels == 10_000_000_000", "width * height > 9e9",
                 "width < 99999999999999999999"):
        assert parse_rules(text).accept(Table())[0], text
    with pytest.raises(RuleError, match="cannot compute"):
        parse_rules("width + 99999999999999999999 > 1").accept(Table())


# ---------------------------------------------------------------- duplicates


def test_near_duplicates_match_their_definition() -> None:
    rng = np.random.default_rng(3)
    base = rng.integers(0, 2**64, 1500, np.uint64, endpoint=False)
    for distance in (1, 4, 6, 12):
        flips = np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, (1500, distance)).astype(np.uint64), axis=1)
        hashes = np.concatenate([base, base ^ flips, base[:50]])
        ranks = rng.permutation(len(hashes)).astype(np.uint64)
        close = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= distance
        expected = np.zeros(len(hashes), bool)
        for i in np.argsort(ranks):
            expected[i] = not (expected & close[i]).any()
        assert (near_duplicates(hashes, distance, rank=lambda ids, ranks=ranks: ranks[ids]) == expected).all()
    assert exact_duplicates(hashes).sum() == len(set(hashes.tolist()))


def test_who_stays_does_not_depend_on_the_tars(tmp_path: Path) -> None:
    copies = {n for n in range(1, 60, 4)}
    whole = samples(range(60), copies)
    keys = list(whole)
    kinds = {"one": {"0.tar": keys}, "three": {"0.tar": keys[40:], "1.tar": keys[:15], "2.tar": keys[15:40]},
             "shuffled": {"0.tar": random.Random(0).sample(keys, 60)}}
    for name, tars in kinds.items():
        for tar, members in tars.items():
            write_tar(tmp_path / name / tar, {k: whole[k] for k in members})
    chosen = {}
    for name in kinds:
        index = index_shards(tmp_path / name, phash=True)
        for settings in ({"unique": "exact"}, {"unique": "near"}, {"limit": 9}, {"limit": 9, "seed": 4}, {"split": "validation"},
                         {"unique": "near", "split": "train", "limit": 20}):
            chosen.setdefault(str(settings), []).append(sorted(index.ids(select(index, **settings).ids)))
    assert all(found[0] == found[1] == found[2] for found in chosen.values())
    assert len(chosen["{'unique': 'near'}"][0]) <= 60 - len(copies) // 2 and len(chosen["{'unique': 'exact'}"][0]) == 60


def test_no_copy_of_a_validation_picture_is_trained_on(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", samples(range(40)))
    write_tar(tmp_path / "val.tar", {f"v{k}": v for k, v in samples(range(30, 45)).items()})
    for unique in ("exact", "near"):
        parts = {split: ShardSource(tmp_path, split=split, unique=unique) for split in ("train", "validation")}
        contents = {split: {source.encoded(i).content for i in range(len(source))} for split, source in parts.items()}
        assert len(parts["validation"]) == 15 and len(parts["train"]) == 30 and not contents["train"] & contents["validation"]
    index = index_shards(tmp_path, folder=tmp_path / "apart")
    with pytest.raises(DataError, match="phash=True"):
        select(index, unique="near")


# ---------------------------------------------------------------- selections and sources


def test_selections_are_kept_shared_and_remade(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", samples(range(50)))
    index = index_shards(tmp_path, columns=["class", "clip score"])
    first = select(index, "punsafe < 0.3 and class == 'even'", split="train")
    expected, folder = first.ids.tolist(), index.folder / "selections"
    program = ("import sys; from difflit.selection import select; from difflit.shards import open_index; "
               "s = select(open_index(sys.argv[1]), \"punsafe < 0.3 and class == 'even'\", split='train'); print(s.digest, s.ids.tolist())")
    runs = [subprocess.Popen([sys.executable, "-c", program, str(index.folder.parent)], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert {run.communicate()[0] for run in runs} == {f"{first.digest} {expected}\n"}
    for content in (b"", b"\x80\x04K\x00.", b"{}"):
        for file in folder.iterdir():
            file.unlink()
            file.write_bytes(content)
        assert select(index, "punsafe < 0.3 and class == 'even'", split="train").ids.tolist() == expected
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: select(index, f"punsafe < 0.{n % 4 + 1}").ids.tolist(), range(40)))
    assert all(f == list(range(n % 4 * 10 + 10)) for n, f in enumerate(found))
    assert not list(folder.glob(".*.partial"))


def test_a_changed_tar_gives_another_selection(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", samples(range(30)))
    before = ShardSource(tmp_path, where="punsafe < 0.2")
    assert ShardSource(tmp_path, where="punsafe<0.20").digest() == before.digest()
    assert ShardSource(tmp_path, where="punsafe < 0.21").digest() != before.digest()
    write_tar(tmp_path / "0.tar", samples(range(5, 35)))
    after = ShardSource(tmp_path, where="punsafe < 0.2")
    assert after.digest() != before.digest() and set(after.labels("id")) != set(before.labels("id"))


def test_a_selection_of_nothing_is_an_error_with_the_table(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", samples(range(10)))
    with pytest.raises(DataError) as caught:
        ShardSource(tmp_path, where="punsafe < 0.05 and similarity > 0.1 and width > 3")
    rows = str(caught.value).split("\n")
    assert rows[0] == "this filter accepts none of 10 samples"
    assert [r.split()[-3:] for r in rows[3:]] == [["0.05", "5", "5"], ["0", "0", "10"], ["3", "10", "0"]]
    for settings, why in (({"split": "test"}, "split 'test'"), ({"limit": 0}, "at least 1"), ({"unique": "all"}, "none of none"),
                          ({"distance": 99, "unique": "near"}, "distance")):
        with pytest.raises(ValueError, match=why):
            ShardSource(tmp_path, **settings)


@pytest.mark.parametrize("layout", ["plain", "by folder"])
def test_a_folder_and_its_tar_are_the_same_source(tmp_path: Path, layout: str) -> None:
    folder, tops = tmp_path / "folder", ("train", "val") if layout == "by folder" else ("a", "ü b")
    for n in range(40):
        save(folder, f"{tops[n % 5 == 4]}/{n:02d}.{('jpg', 'png', 'webp')[n % 3]}", photograph(n, (60 + n, 50)), list(CAPTIONS.values())[n % 10])
    with tarfile.open(tmp_path / "folder.tar", "w") as tar:
        for path in sorted(folder.rglob("*.*"), key=lambda p: p.relative_to(folder).as_posix()):
            tar.add(path, path.relative_to(folder).as_posix())
    for settings in ({}, {"split": "validation"}, {"limit": 6}, {"limit": 1, "split": "validation", "seed": 3}):
        loose, packed = (kind(path, image_size=24, **settings) for kind, path in ((FolderSource, folder), (ShardSource, tmp_path / "folder.tar")))
        assert [s.id for s in loose] == [s.id for s in packed] and [s.caption for s in loose] == [s.caption for s in packed]
        assert all(np.array_equal(np.asarray(a.image), np.asarray(b.image)) for a, b in zip(loose, packed))
        assert loose.captions() == packed.captions() and np.array_equal(loose.sizes(), packed.sizes())
        assert all(loose.encoded(i).content == packed.encoded(i).content for i in range(len(loose)))


def test_threads_read_what_one_reads(tmp_path: Path) -> None:
    for tar in range(4):
        write_tar(tmp_path / f"{tar}.tar", samples(range(tar * 20, tar * 20 + 20)))
    source = ShardSource(tmp_path, columns=["class"])
    alone = [source.encoded(i) for i in range(len(source))]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.encoded, list(range(len(source))) * 5)) == alone * 5
    assert [e.metadata["class"] for e in alone] == source.labels("class").tolist()
    assert json.loads(json.dumps(source.describe()))["(selection)"]["samples"] == len(source)


def test_labels_are_whole(tmp_path: Path) -> None:
    for n, known in enumerate(({"label": 1, "kind": "a", "odd name": 0.5}, {"label": 0, "kind": "b", "odd name": 1}, {"kind": "b"})):
        write_tar(tmp_path / f"train-{n}.tar", {str(n): (jpeg(n), f"number {n}", known)})
    write_tar(tmp_path / "val.tar", {"9": (jpeg(9), "number 9", {})})
    every = {"split": "train", "columns": ["label", "kind", "lable", "odd name", "aspect"]}
    source = ShardSource(tmp_path, **every)
    assert source.labels("kind").tolist() == ["a", "b", "b"] and source.labels("split").tolist() == ["train"] * 3
    assert source.labels("aspect").tolist() == (source.sizes()[:, 0] / source.sizes()[:, 1]).tolist()
    for key, why in (("label", "1 of 3 samples have no 'label'"), ("lable", "3 of 3 samples have no 'lable'; did you mean 'label'"),
                     ("odd name", r"not missing\(column\('odd name'\)\)"), ("punsafe", "3 of 3 samples")):
        with pytest.raises(DataError, match=why):
            source.labels(key)
    some = ShardSource(tmp_path, where="not missing(label)", **every)
    assert some.labels("label").tolist() == [1, 0] and some.labels("label").dtype == np.int64 and some.labels("odd name").tolist() == [0.5, 1]


def test_a_column_more_is_the_same_source(tmp_path: Path) -> None:
    write_tar(tmp_path / "set" / "0.tar", samples(range(30)))
    plain, more = ShardSource(tmp_path / "set", where="punsafe < 0.2"), ShardSource(tmp_path / "set", where="punsafe < 0.2", columns=["class"])
    assert plain.digest() == more.digest() and plain.describe() == more.describe()
    assert ShardSource(tmp_path / "set", where="punsafe < 0.2", columns=["class"], unique="near").index.digest() == plain.index.digest()


def test_an_index_by_its_folder(tmp_path: Path) -> None:
    write_tar(tmp_path / "set" / "0.tar", samples(range(30)))
    made = index_shards(tmp_path / "set", folder=tmp_path / "apart")
    for spelt in (tmp_path / "apart", str(tmp_path / "apart"), [str(tmp_path / "apart")], (tmp_path / "apart",)):
        assert ShardSource(spelt).index.folder == made.folder
    more = ShardSource([str(tmp_path / "apart")], columns=["class"], unique="near")
    assert more.index.folder.parent == tmp_path / "apart" and {"class", "phash"} <= {*more.index.columns} and more.index.digest() == made.digest()
    assert set(more.labels("class")) == {"even", "odd"}
    with pytest.raises(DataError, match="not there"):
        ShardSource(f"{tmp_path}/{{{','.join(str(n) for n in range(200))}}}.tar")  # longer than a name may be


def test_statistics_of_a_set_without_scores(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"1": (jpeg(1), "one", {})})
    index = index_shards(tmp_path)
    found = json.loads(json.dumps(statistics(index)))
    assert found["columns"]["punsafe"] == {"missing": 1} and found["columns"]["width"]["median"] == 90
    assert statistics_picture(index).png()[:4] == b"\x89PNG"


def test_what_was_seen_survives_another_process(tmp_path: Path) -> None:
    seen = SeenBefore(1000, 0.001)
    for n in range(500):
        seen.add(str(n).encode())
    seen.save(tmp_path / "seen")
    program = ("import sys; from difflit.selection import SeenBefore; s = SeenBefore.load(sys.argv[1]); "
               "print(len(s), all(str(n).encode() in s for n in range(500)), b'x' in s)")
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path / "seen")], capture_output=True, text=True).stdout == f"{len(seen)} True False\n"
    with pytest.raises(DataError, match="not written by"):
        (tmp_path / "other").write_bytes(b"PK\x03\x04")
        SeenBefore.load(tmp_path / "other")
