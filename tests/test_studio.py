"""The studio behind the page: its pictures are those of `difflit sample`, to the bit; users queue, stop, and hand in nonsense."""

import json
import shlex
import threading
import time

import numpy as np
import pytest
from PIL import Image
from studios import save_enlarger, save_judge, save_model, save_run, save_runs
from typer.testing import CliRunner

import difflit.studio
from difflit.albums import read_picture
from difflit.cli import app
from difflit.config import SettingsError
from difflit.studio import MOST_SIDE, Cancelled, Shelf, Studio, check_wanted, draw_wanted, find_models, painted_mask


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    root = save_runs(tmp_path_factory.mktemp("studio") / "runs")
    judge = save_judge(root.parent, "studio-judge")
    enlargers = [str(save_enlarger(root.parent / f"x{factor}", factor)) for factor in (2, 4)]
    made = Studio(root, out=root.parent / "pictures", device="cpu", precision="fp32", enlargers=enlargers, **judge)
    yield made
    made.close()


def draw(studio, image=None, mask=None, **values):
    "The last news of each model."
    wanted = check_wanted(studio.models, **{"model": "shapes-a", "prompt": "a red circle", **values})
    return [news for news in draw_wanted(studio, wanted, image=image, mask=mask) if news.pictures]


def photo(size=(40, 30)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8))


def half(size=(40, 30)):
    layer = Image.new("RGBA", size)
    layer.paste((255, 0, 0, 200), (0, 0, size[0] // 2, size[1]))
    return painted_mask([layer])


CASES = {
    "plain": {},
    "settings": dict(count=3, seed=5, steps=7, sampler="dpmpp_2m", spacing="karras", guidance=3.5, negative="dull"),
    "noise of its own": dict(count=2, sampler="euler_a", steps=5),
    "an older checkpoint": dict(model="shapes-a, step 10"),
    "two stages": dict(count=2, upsampler="upsampler"),
    "three stages": dict(count=2, upsampler="upsampler", factor=8),
    "enlarged further": dict(factor=4),
    "the best of some": dict(count=2, candidates=5),
    "filled in": dict(image=photo(), mask=half()),
    "changed": dict(image=photo(), strength=0.5, steps=6),
    "long words": dict(prompt="it's a \"red\" circle; $HOME `ls` --prompt x\nand so on"),
}


OFTEN = ("plain", "settings", "filled in", "enlarged further")  # the others take minutes together


@pytest.mark.parametrize("name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_the_command_draws_the_same_bits(studio, tmp_path, name):
    news, = draw(studio, **CASES[name])
    words = shlex.split(news.command)
    assert words[:2] == ["difflit", "sample"]
    result = CliRunner().invoke(app, [*words[1:], "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output + str(result.exception)
    for path in news.pictures:
        other = tmp_path / "out" / path.name
        assert path.read_bytes() == other.read_bytes(), "the picture or what it says of itself differs"
    assert len([p for p in (tmp_path / "out").glob("*.png") if p.name != "grid.png"]) == len(news.pictures)


def test_side_by_side_has_the_same_seeds(studio):
    first, second = draw(studio, against="shapes-b", count=2, seed=3)
    assert (first.model, second.model) == ("shapes-a", "shapes-b")
    for one, other in zip(first.pictures, second.pictures, strict=True):
        assert read_picture(one)["seed"] == read_picture(other)["seed"]
        assert read_picture(one)["weights"] != read_picture(other)["weights"]


def test_filled_in_keeps_what_was_not_painted(studio):
    plain = Image.new("RGB", (40, 40), (0, 0, 255))
    picture = np.array(Image.open(draw(studio, image=plain, mask=half((40, 40)))[0].pictures[0]))
    blue = (picture == (0, 0, 255)).all(-1)
    assert blue[:, 9:].all() and blue[:, :7].mean() < 0.5


def test_two_users_draw_one_after_the_other(studio, monkeypatch):
    "The second waits until the first is done, and both get the pictures that they would have got alone."
    alone = draw(studio, seed=9, steps=30)[0].pictures[0].read_bytes()
    seen, told, drawn, draw_one = [], threading.Lock(), [], difflit.studio._draw_one

    def timed(*args):
        begun = time.monotonic()
        draw_one(*args)
        drawn.append((begun, time.monotonic()))

    monkeypatch.setattr(difflit.studio, "_draw_one", timed)

    def user(name, **values):
        wanted = check_wanted(studio.models, model="shapes-a", prompt="a red circle", **values)
        for news in draw_wanted(studio, wanted):
            with told:
                seen.append((name, news))

    asked = {"a": dict(steps=60, count=4), "b": dict(seed=9, steps=30)}
    users = [threading.Thread(target=user, args=(name,), kwargs=values) for name, values in asked.items()]
    users[0].start()
    while not any(news.state == "drawing" for _, news in seen):
        time.sleep(0.005)
    users[1].start()
    for each in users:
        each.join()
    assert ("b", "waiting") in [(name, news.state) for name, news in seen]
    assert drawn[0][0] < drawn[0][1] <= drawn[1][0] < drawn[1][1]
    assert next(news for name, news in seen if name == "b" and news.pictures).pictures[0].read_bytes() == alone


def test_cancelled_at_the_next_step_and_the_line_goes_on(studio):
    stop = threading.Event()
    news = draw_wanted(studio, check_wanted(studio.models, model="shapes-a", prompt="a red circle", steps=500, count=16), cancel=stop)
    while next(news).state != "drawing":
        pass
    stop.set()
    begun = time.monotonic()
    with pytest.raises(Cancelled):
        list(news)
    assert time.monotonic() - begun < 5
    assert draw(studio)[0].pictures and len(studio.line) == 0


@pytest.fixture
def slow_disk(studio, monkeypatch):
    "A studio whose models come from a disk that answers when it is told to."
    ready, asked = threading.Event(), []
    read = studio.shelf._load

    def load(path, device):
        asked.append(str(path))
        assert ready.wait(60)
        return read(path, device)

    draw(studio, model="shapes-a")  # stands on the shelf when the others come
    monkeypatch.setattr(studio, "shelf", Shelf(load=load))
    ready.set()
    draw(studio, model="shapes-a")
    ready.clear()
    asked.clear()
    yield ready, asked
    ready.set()


def test_cancelled_while_a_model_is_loaded(studio, slow_disk):
    "At once, although the disk still hangs; others draw on, and the model is there for the next request without a second load."
    ready, asked = slow_disk
    stop = threading.Event()
    news = draw_wanted(studio, check_wanted(studio.models, model="shapes-b", prompt="a red circle"), cancel=stop)
    assert next(news).state == "loading"
    while not asked:
        time.sleep(0.01)
    begun = time.monotonic()
    stop.set()
    with pytest.raises(Cancelled):
        list(news)
    assert time.monotonic() - begun < 20 and len(studio.line) == 0 and not ready.is_set()  # the disk hangs for a minute
    assert draw(studio, model="shapes-a")[0].pictures, "what stands on the shelf is not held up"
    stop = threading.Event()
    other = draw_wanted(studio, check_wanted(studio.models, model="shapes-a, step 10", prompt="a red circle"), cancel=stop)
    assert next(other).state == "loading"
    other.close()
    while len(studio.line):
        time.sleep(0.01)
    ready.set()
    assert draw(studio, model="shapes-b")[0].pictures
    assert asked == [studio.models["shapes-b"].path], "loaded once, and what nobody waited for not at all"
    loaders = [thread for thread in threading.enumerate() if thread.name == "difflit-load"]
    for thread in loaders:
        thread.join(10)
    assert not any(thread.is_alive() for thread in loaders), "no thread stays behind"


def test_cancelled_between_two_tiles(studio):
    stop = threading.Event()
    wanted = check_wanted(studio.models, model="shapes-a", prompt="a red circle", upsampler="upsampler", count=16, factor=8)
    news = draw_wanted(studio, wanted, cancel=stop)
    while next(news).state != "enlarging":
        pass
    stop.set()
    with pytest.raises(Cancelled):
        list(news)
    with pytest.raises(SettingsError, match="8 times 1024 pixels along a side are more than 4096"):
        models = {**studio.models, "large": studio.models["shapes-a"].__class__("large", "large", side=1024)}
        studio_of_large = type("Large", (), {"models": models, "factors": studio.factors})()
        list(draw_wanted(studio_of_large, check_wanted(models, model="large", prompt="a red circle", factor=8)))


def test_a_new_checkpoint_is_found_and_a_half_written_one_is_not(tmp_path):
    save_run(tmp_path / "runs" / "a", steps=(10,))
    studio = Studio(tmp_path / "runs", device="cpu", precision="fp32")
    assert [*studio.models] == ["a"]
    half_done = tmp_path / "runs" / "a" / "checkpoints" / "step-00000020"
    half_done.mkdir()
    (half_done / "config.json").write_text("{")
    assert studio.look()["a"].path.endswith("step-00000010")
    (half_done / "config.json").unlink()
    half_done.rmdir()
    save_model(half_done, seed=5)
    assert studio.look()["a"].path.endswith("step-00000020") and "a, step 10" in studio.models
    studio.close()


def test_damaged_runs_are_passed_over(tmp_path):
    save_run(tmp_path / "good", steps=(10,))
    for name, text in (("torn", "{"), ("list", "[]"), ("clip", json.dumps({"family": "clip", "config": {}, "diffusion": {}, "image_size": 16}))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text("{}")
        (tmp_path / name / "config.json").write_text(text)
    assert [*find_models(tmp_path)] == ["good"]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "shapes-a/../shapes-a", "shapes-a/checkpoints/step-00000020", "", "upsampler", "\x00"])
def test_names_are_only_looked_up(studio, name):
    with pytest.raises(SettingsError, match="there is no model|model="):
        check_wanted(studio.models, model=name, prompt="a red circle")


def test_what_the_model_refuses_reaches_the_one_who_asked(studio):
    for values, message in ((dict(spacing="karas"), "karras"), (dict(negative="dull", guidance=1), "does nothing with guidance 1"),
                            (dict(image=photo()), "strength"), (dict(image=Image.new("1", (MOST_SIDE + 1, 1)), strength=0.5), "4096 along a side")):
        with pytest.raises(SettingsError, match=message):
            draw(studio, **values)
    assert len(studio.line) == 0
