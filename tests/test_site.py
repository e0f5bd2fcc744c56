"""The pages: every notebook is there, every link leads somewhere, and what is broken is told."""

import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The whole site, built once; (folder, what is broken in it)."""
    from build import build

    folder = tmp_path_factory.mktemp("site")
    return folder, build(folder)


def test_no_link_is_broken(site):
    assert not site[1], "\n".join(site[1])


def test_every_notebook_has_a_page(site):
    from build import url_of

    notebooks = [p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    assert len(notebooks) > 70 and any("tutorials" in p.parts for p in notebooks)
    for path in notebooks:
        page = site[0] / url_of(path.relative_to(ROOT).as_posix())
        text = page.read_text(encoding="utf-8")
        assert "<h1" in text and page.with_suffix(".md").stat().st_size > 200, path.name
        index = (site[0] / "index.html").read_text(encoding="utf-8")
        assert f'href="{page.relative_to(site[0]).as_posix()}"' in index, f"{path.name} is not in the sidebar"


def test_pages_need_no_network_and_name_no_machine(site):
    """Nothing is loaded from elsewhere: links may lead there, scripts, sheets and pictures may not."""
    for path in site[0].rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"<(script|img|iframe|source)[^>]*\ssrc=\"(https?:)?//|<link[^>]*stylesheet[^>]*//", text), path.name
        assert str(ROOT) not in text and str(Path.home()) + "/" not in text, f"{path.name} names a folder of this machine"
    assert not re.search(r"@import|url\((?!data:)", (site[0] / "site.css").read_text())


def test_formulas_are_mathml(site):
    text = (site[0] / "40_diffusion.html").read_text(encoding="utf-8")
    assert text.count("<math") > 20 and "$$" not in text and "\\frac" not in text


def test_api_index_names_everything_public(site):
    from difflit._modidx import d

    text = (site[0] / "api.html").read_text(encoding="utf-8")
    public = [name for names in d["syms"].values() for name in names if name.count(".") == 2 and not name.split(".")[2].startswith("_")]
    assert len(public) > 500
    missing = [name for name in public if f"#{name.split('.')[2]}\"" not in text]
    assert not missing, missing


def test_llms_text_lists_pages_that_there_are(site):
    from build import SITE

    text = (site[0] / "llms.txt").read_text(encoding="utf-8")
    assert re.match(r"# difflit\n\n> .+\n\n", text) and "## Training" in text
    targets = re.findall(rf"^- \[[^\]]+\]\({SITE}/([^)]+)\)", text, re.M)
    assert len(targets) > 70 and all((site[0] / target).is_file() for target in targets)


def test_broken_links_are_found(tmp_path):
    from build import broken_links

    links = '<a href="b.html">1</a><a href="b.html#here">2</a><a href="#top">3</a>'
    (tmp_path / "a.html").write_text(f'<h1 id="top">A</h1>{links}<code>&lt;a href="none.html"&gt;</code>')
    (tmp_path / "b.html").write_text('<h1 id="here">B</h1><a href="https://example.org/page">out</a>')
    assert broken_links(tmp_path) == []
    (tmp_path / "b.html").write_text('<h1 id="there">B</h1><h2 id="there">B</h2><img src="none.png"><a href="https://exa mple">out</a>')
    assert broken_links(tmp_path) == [
        "a.html: b.html#here has no such anchor", "b.html: two elements are called #there", "b.html: none.png leads nowhere",
        "b.html: https://exa mple is no address",
    ]


def test_a_link_to_a_missing_file_is_told(site):
    from build import Page, Site

    whole = Site()
    page = Page("nbs/40_diffusion.ipynb", "40_diffusion.html")
    assert whole.resolve("53_samplers.ipynb#heun", page) == "53_samplers.html#heun" and not whole.broken
    assert whole.resolve("../hpc/slurm.sh", page).endswith("/blob/main/hpc/slurm.sh") and not whole.broken
    whole.resolve("99_none.ipynb", page)
    assert whole.broken == ["nbs/40_diffusion.ipynb: 99_none.ipynb leads nowhere"]


def test_quarto_finds_what_it_is_told_of():
    """For those who have Quarto: the files that its project names exist, and it says of the project what settings.ini says."""
    import configparser

    import yaml

    project = yaml.safe_load((ROOT / "nbs" / "_quarto.yml").read_text(encoding="utf-8"))
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    said, site = settings["DEFAULT"], project["website"]
    named = [*project["metadata-files"], project["format"]["html"]["css"]]
    assert all((ROOT / "nbs" / name).is_file() for name in named), named
    assert (site["title"], site["description"], site["repo-url"]) == (said["title"], said["description"], said["git_url"])
    assert site["site-url"] == said["doc_host"] + said["doc_baseurl"] and project["project"]["output-dir"] == said["doc_path"]
