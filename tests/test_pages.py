"""Reports, pages and archives of runs, real and damaged ones; nothing that comes from a run is believed."""

import io
import json
import re
import tarfile

import nbformat
import pytest
import test_survival
from PIL import Image
from test_overview import DAMAGE, make, notebook, picture

from difflit.checkpoints import list_checkpoints, load_checkpoint
from difflit.config import SettingsError
from difflit.files import read_json, write_json
from difflit.overview import read_run
from difflit.pages import (
    archive_run,
    notebook_bytes,
    read_report,
    report_paths,
    shrink,
    stitch,
    thumbnail,
    unpack_archive,
    verify_archive,
    write_index,
    write_page,
)

registered = test_survival.registered  # the micro network, and a task that is trained in milliseconds


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_report_is_read_and_stitched(tmp_path, damage):
    run = make(tmp_path / "run")
    text = json.dumps(notebook(5), indent=1).encode()
    (run / "report.1.ipynb").write_bytes(DAMAGE[damage](text))
    report = read_report(run / "report.1.ipynb")
    assert report.fault and len(report.cells) in ((2, 3) if damage in ("half", "zeros") else (0,))
    story = stitch(run)
    nbformat.validate(nbformat.from_dict(story))
    assert "did 2" in json.dumps(story) and report.fault.split(",")[0] in json.dumps(story)


def test_every_cut_of_a_notebook_is_read(tmp_path):
    """Whole cells are kept, half ones are not, and more bytes never give fewer cells."""
    text, counts = json.dumps(notebook(4), indent=1), []
    for cut in range(0, len(text), 7):
        (tmp_path / "report.ipynb").write_text(text[:cut])
        counts.append(len(read_report(tmp_path / "report.ipynb").cells))
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 4
    assert [path.name for path in report_paths(tmp_path)] == ["report.ipynb"]


def test_missing_parts_are_named_and_many_are_in_order(tmp_path):
    for number in (0, 1, 3, 10):
        (tmp_path / (f"report.{number}.ipynb" if number else "report.ipynb")).write_text(json.dumps(notebook(1)))
    assert [path.name for path in report_paths(tmp_path)][-1] == "report.10.ipynb"
    (tmp_path / "report.10.ipynb").unlink()
    assert [path.name for path in report_paths(tmp_path)] == ["report.ipynb", "report.1.ipynb", "report.2.ipynb", "report.3.ipynb"]
    assert "it is missing" in json.dumps(stitch(tmp_path))


def test_outputs_shrink_below_any_limit(tmp_path):
    cells = notebook(40)
    for cell in cells["cells"]:
        cell["outputs"][0]["text"] = ["x" * 200_000]
        cell["source"] = "\n".join(f"y = {i}" for i in range(2000))
    for limit in (2_900_000, 300_000, 100_000):
        small = shrink(cells, limit)
        assert len(notebook_bytes(small)) <= limit
    assert cells["cells"][0]["outputs"][0]["text"] == ["x" * 200_000], "what was given stays as it is"


@pytest.fixture(scope="module")
def real(tmp_path_factory, registered):
    """A run of the micro network, pre-empted at step 5 and resumed."""
    run = tmp_path_factory.mktemp("real") / "micro"
    test_survival.run(run, stop_after=5, best_by="val_loss")
    (run / "report.ipynb").write_text(json.dumps(notebook(3)))
    test_survival.run(run, resume="auto")
    (run / "report.1.ipynb").write_text(json.dumps(notebook(4)))
    return run


def test_a_real_run_preempted_and_resumed(real):
    row = read_run(real)
    assert (row.state, row.step, row.steps, row.faults) == ("done", 8, 8, []) and row.val_loss > 0 and row.gpu_hours is None
    status = read_json(real / "status.json")
    assert status["earlier_seconds"] >= 0 and status["processes"] == 1
    story = stitch(real)
    nbformat.validate(nbformat.from_dict(story))
    said = "".join(cell["source"] for cell in story["cells"])
    assert "preempted; it went on from step-00000004" in said and "Part 2 of 2" in said and "3 cells as before" in said
    assert Image.open(io.BytesIO(thumbnail(real))).height == 64


def test_a_real_run_archived_and_back(real, tmp_path):
    """What comes back is a run: its checkpoint is whole, and it goes on."""
    for name in ("a.tar", "a.tar.gz"):
        packed = archive_run(real, tmp_path / name)
        assert verify_archive(packed) == []
    back = unpack_archive(packed, tmp_path / "back")
    (kept,) = list_checkpoints(back / "checkpoints")
    assert load_checkpoint(kept).path.name in [path.name for path in list_checkpoints(real / "checkpoints")]
    assert (back / "metrics.csv").read_bytes() == (real / "metrics.csv").read_bytes() and read_run(back).state == "done"
    with pytest.raises(SettingsError, match="exists"):
        unpack_archive(packed, back)
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"


def test_an_altered_archive_is_found(real, tmp_path):
    packed = archive_run(real, tmp_path / "a.tar")
    data = bytearray(packed.read_bytes())
    for place in (3000, len(data) // 2, len(data) - 11_000):
        wrong = bytearray(data)
        wrong[place] ^= 1
        (tmp_path / "b.tar").write_bytes(wrong)
        assert verify_archive(tmp_path / "b.tar"), place
    for cut in (0, 100, 512, 10_240, len(data) // 2, len(data) - 12_000):
        (tmp_path / "b.tar").write_bytes(data[:cut])
        assert verify_archive(tmp_path / "b.tar"), cut
        with pytest.raises(SettingsError, match="was not unpacked"):
            unpack_archive(tmp_path / "b.tar", tmp_path / "out")
    assert not (tmp_path / "out").exists()


KINDS = {"../evil": tarfile.REGTYPE, "/etc/evil": tarfile.REGTYPE, "run/../../evil": tarfile.REGTYPE, "other/file": tarfile.REGTYPE,
         "run/status.json": tarfile.REGTYPE, "run/link": tarfile.SYMTYPE, "run/hard": tarfile.LNKTYPE, "run/pipe": tarfile.FIFOTYPE}


@pytest.mark.parametrize("name, kind", KINDS.items())
def test_an_archive_cannot_climb_out(tmp_path, name, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("run/status.json"), io.BytesIO())
        tar.addfile(member, io.BytesIO())
    assert len(verify_archive(tmp_path / "a.tar")) == 1
    with pytest.raises(SettingsError, match="was not unpacked"):
        unpack_archive(tmp_path / "a.tar", tmp_path / "deep" / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "deep"]


def test_the_page_believes_nothing(tmp_path):
    """Names, reasons, settings and faults are texts; a page asks no one for anything."""
    evil = "\"><script>alert(1)</script><img src=x onerror=alert(2)> | `x` [a](javascript:x)"
    run = make(tmp_path / "runs" / "a", "failed", lr=1.0, data=evil)
    write_json(run / "status.json", read_json(run / "status.json") | {"reason": evil, "preset": evil})
    write_json(run / "scores.json", {evil: {"value": 1.0}})
    make(tmp_path / "runs" / "a<i>&'b", lr=2.0, data="x")
    make(tmp_path / "runs" / "torn").joinpath("status.json").write_text("{")
    for i in range(3):
        picture(tmp_path / "runs" / "torn" / "samples" / f"step-{i:08}.png", seed=i)
    (tmp_path / "runs" / "torn" / "samples" / "step-00000002.png").write_bytes(b"no picture")
    page = write_page(tmp_path / "runs").read_text()
    assert page.count("<script>") == 1 and "<img src=x" not in page and page.count("<article") == 3 and page.count("data:image/webp") == 1
    assert not re.search(r"""(src|href)=["']?(https?:|//|javascript:)""", page)
    index = json.loads(write_index(tmp_path / "runs").read_text())
    nbformat.validate(nbformat.from_dict(index))
    text = "".join(cell["source"] for cell in index["cells"])
    assert "<script" not in text and "[a](javascript" not in text and sum(len(cell.get("attachments", {})) for cell in index["cells"]) == 1
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, "a | in a text is no border"
