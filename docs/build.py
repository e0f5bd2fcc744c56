"""The notebooks as a web site: static HTML that needs no network, no server and no Quarto.

    python docs/build.py                 # writes _docs and checks every link; exit code 1 and a line for each broken one
    python docs/build.py --out folder

Pages stand in the order of nbs/sidebar.yml; notebooks that it does not name come behind it, by folder. A notebook keeps its number in its address, for
`search.ipynb` and `78_search.ipynb` are two pages. Formulas become MathML here, which browsers draw by themselves; search reads an index that is a script.
Beside each page lies its text in Markdown, and `llms.txt` (llmstxt.org) lists those.

This is a script and no module: only who looks after the pages needs it.
"""

import argparse
import ast
import base64
import html
import json
import posixpath
import re
import shutil
import struct
import sys
import time
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from urllib.parse import quote, unquote, urlparse

import yaml
from jinja2 import Environment, FileSystemLoader
from latex2mathml.converter import convert as mathml
from nbconvert.filters import ansi2html
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import Token
from pygments.util import ClassNotFound

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SETTINGS = dict(re.findall(r"^(\w+) = (.*)$", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.M))
REPOSITORY = SETTINGS["git_url"]
SITE = SETTINGS["doc_host"] + SETTINGS["doc_baseurl"]
PAGES = {"CONTRIBUTING.md": "contributing.html", "CHANGELOG.md": "changelog.html", "hpc/README.md": "hpc.html", "reports/README.md": "reports/index.html"}
PICTURES = {"image/png": "png", "image/jpeg": "jpg", "image/svg+xml": "svg"}


@dataclass
class Name:
    "Something public of a module."

    name: str
    module: str
    kind: str  # class, function or value
    says: str = ""  # first line of its docstring
    shape: str = ""  # its head with docments, or the fields of a class


@dataclass(eq=False)
class Page:
    "A page on its way from its source to HTML."

    path: str  # of the source, seen from the repository's top
    url: str  # seen from the site's top
    group: str = ""
    title: str = ""
    subtitle: str = ""
    number: str = ""  # of a numbered notebook
    module: str = ""  # that it exports
    body: str = ""
    markdown: str = ""
    headings: list[tuple[int, str, str]] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)  # ids on the page
    pictures: dict[str, bytes] = field(default_factory=dict)  # drawn by its cells, by file name


# --- what there is -----------------------------------------------------------------------------------------------------------------------------------


def cells_of(path: Path) -> list[dict]:
    "The cells of a notebook, each source as one text."
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in found]


def url_of(path: str) -> str:
    "Where the page of a source lies."
    return PAGES.get(path) or path.removeprefix("nbs/").removesuffix(".ipynb") + ".html"


def in_order() -> list[Page]:
    "All pages in reading order. Raises `SystemExit` if the sidebar names a notebook that there is not."
    contents = yaml.safe_load((ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    places: list[tuple[str, str]] = []
    for entry in contents:
        group, names = ("", [entry]) if isinstance(entry, str) else (entry["section"], entry["contents"])
        places += [(group, f"nbs/{name}") for name in names]
    if missing := [path for _, path in places if not (ROOT / path).is_file()]:
        raise SystemExit(f"nbs/sidebar.yml names what there is not: {', '.join(missing)}")
    named = {path for _, path in places}
    others = [p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
    for path in others:
        if path not in named:
            places.append(("Tutorials" if path.startswith("nbs/tutorials/") else "More notebooks", path))
    places += [("Kept reports", p) for p in ("reports/README.md", *(f.relative_to(ROOT).as_posix() for f in sorted((ROOT / "reports").glob("*.ipynb"))))]
    places += [("The project", p) for p in ("hpc/README.md", "CONTRIBUTING.md", "CHANGELOG.md") if (ROOT / p).is_file()]
    order = list(dict.fromkeys(group for group, _ in places))
    return [_page(group, path) for group, path in sorted(places, key=lambda place: order.index(place[0]))]


def _page(group: str, path: str) -> Page:
    "A page with its title, not yet rendered."
    page = Page(path, "index.html" if path == "nbs/index.ipynb" else url_of(path), group)
    if path.endswith(".ipynb"):
        cells = cells_of(ROOT / path)
        text = next((c["source"] for c in cells if c["cell_type"] == "markdown"), "")
        exported = next((m[1] for c in cells if (m := re.search(r"^#\|\s*default_exp\s+(\w+)", c["source"], re.M))), "")
        page.module, page.number = exported, path.split("/")[-1][:2] if exported else ""
    else:
        text = (ROOT / path).read_text(encoding="utf-8")
    title, subtitle = re.search(r"^# (.+)$", text, re.M), re.search(r"^> (.+)$", text, re.M)
    page.title = title[1].replace("`", "") if title else Path(path).stem
    page.subtitle = subtitle[1] if subtitle else ""
    return page


def public_names(modules: list[str]) -> list[Name]:
    "What each module says is public (`__all__`), in the order of its source; nothing is imported."
    found = []
    for module in modules:
        source = (ROOT / "difflit" / f"{module}.py").read_text(encoding="utf-8")
        lines, tree = source.splitlines(), ast.parse(source)
        public = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"), [])
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in public:
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                says = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
                found.append(Name(node.name, module, kind, says, _shape(node, lines)))
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name) and target.id in public and not target.id.startswith("_"):
                        comment = re.search(r"(?<=  # ).*$", lines[node.lineno - 1])
                        found.append(Name(target.id, module, "value", comment[0] if comment else ""))
    return found


def _shape(node: ast.FunctionDef | ast.ClassDef, lines: list[str]) -> str:
    "The head of a function with its docments; the fields of a class."
    if isinstance(node, ast.FunctionDef):
        return "\n".join(lines[node.lineno - 1 : max(node.lineno, node.body[0].lineno - 1)])
    fields = ["\n".join(lines[n.lineno - 1 : n.end_lineno]) for n in node.body if isinstance(n, ast.AnnAssign)]
    return "\n".join([lines[node.lineno - 1], *fields]) if fields else ""


# --- Markdown ----------------------------------------------------------------------------------------------------------------------------------------


@cache
def formula(latex: str, display: str) -> str:
    "MathML of LaTeX. Raises `ValueError` on what would reach the reader as a backslash."
    made = mathml(re.sub(r"(\\big[lr])?\\[lr]Vert(?![A-Za-z])", r"\\Vert ", latex.strip()), display=display)
    if re.search(r"\\[A-Za-z]+|<merror", made):
        raise ValueError(f"this formula cannot be shown: {latex}")
    return made


def slug_of(text: str) -> str:
    "The anchor of a heading, as GitHub makes it."
    return re.sub(r"[^\w\- ]", "", html.unescape(re.sub(r"<[^>]+>", "", text)).lower()).replace(" ", "-")


@cache
def _lexer(language: str) -> Lexer:
    "What knows a language; plain text for one that nothing knows."
    try:
        return get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return get_lexer_by_name("text")


COLOURS = [
    (Token.Comment, "c"), (Token.Literal.String, "s"), (Token.Literal.Number, "m"), (Token.Keyword.Constant, "m"), (Token.Keyword, "k"),
    (Token.Operator.Word, "k"), (Token.Name.Function, "f"), (Token.Name.Class, "f"), (Token.Name.Decorator, "f"),
    (Token.Name.Builtin, "b"), (Token.Name.Variable, "b"),
]


@cache
def _colour(kind) -> str:
    "The class of a kind of token; none for most, which keep the page small."
    return next((name for token, name in COLOURS if kind in token), "")


def coloured(code: str, language: str) -> str:
    "Code as HTML with classes for its colours."
    parts = []
    for name, tokens in groupby(_lexer(language).get_tokens(code.rstrip()), key=lambda token: _colour(token[0])):
        text = html.escape("".join(text for _, text in tokens), quote=False)
        parts.append(f'<span class="{name}">{text}</span>' if name else text)
    return f'<div class="highlight"><pre><code>{"".join(parts).rstrip()}</code></pre></div>'


class Renderer(IPythonRenderer):
    "nbconvert's Markdown, with formulas as MathML, anchors as GitHub has them, and links that lead to pages of the site."

    def __init__(self, page: Page, site: "Site", contents: bool = True):
        super().__init__(escape=False)
        self.page, self.site, self.contents = page, site, contents

    def block_code(self, code: str, info: str | None = None) -> str:
        return coloured(code, (info or "text").split()[0])

    def inline_math(self, body: str) -> str:
        return formula(body, "inline")

    def block_math(self, body: str) -> str:
        return formula(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        return formula(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")

    def heading(self, text: str, level: int, **attrs) -> str:
        slug = base = slug_of(text) or "section"
        count = 0
        while slug in self.page.taken:
            count += 1
            slug = f"{base}-{count}"
        self.page.taken.add(slug)
        if self.contents and level in (2, 3):
            self.page.headings.append((level, slug, html.unescape(re.sub(r"<[^>]+>", "", text))))
        mark = f'<a class="anchor" href="#{slug}" aria-label="Link to this heading">#</a>' if level > 1 else ""
        return f'<h{level} id="{slug}">{text}{mark}</h{level}>\n'

    def codespan(self, text: str) -> str:
        shown = f"<code>{html.escape(html.unescape(text), quote=False)}</code>"
        name = self.site.lookup(html.unescape(text), self.page)
        return f'<a class="api" href="{self.site.link_to(name, self.page)}">{shown}</a>' if name else shown

    def link(self, text: str, url: str, title: str | None = None) -> str:
        text = re.sub(r'<a class="api"[^>]*>(.*?)</a>', r"\1", text)  # a link within a link is none
        return f'<a href="{html.escape(self.site.resolve(url, self.page))}">{text}</a>'

    def image(self, text: str, url: str, title: str | None = None) -> str:
        return f'<img src="{html.escape(self.site.resolve(url, self.page))}" alt="{html.escape(html.unescape(text))}" loading="lazy">'

    def table(self, text: str) -> str:
        return f'<div class="table"><table>{text}</table></div>\n'


# --- the site ----------------------------------------------------------------------------------------------------------------------------------------


class Site:
    "All pages, and what one has to know of the others."

    def __init__(self):
        self.pages = in_order()
        self.by_path = {page.path: page for page in self.pages}
        self.by_path["README.md"] = self.by_path["nbs/index.ipynb"]
        self.modules = {page.module: page for page in self.pages if page.module}
        self.names = public_names([*self.modules])
        self.by_name: dict[str, list[Name]] = {}
        for name in self.names:
            self.by_name.setdefault(name.name, []).append(name)
        self.files: set[str] = set()  # of the repository that the pages show
        self.broken: list[str] = []

    def lookup(self, text: str, page: Page) -> Name | None:
        "What a word in code letters means: a public name of the page's own module, or the only one of that name anywhere."
        match = re.fullmatch(r"(?:difflit\.)?(?:(\w+)\.)?(\w{3,})(?:\(\))?", text)
        found = [name for name in self.by_name.get(match[2], []) if match[1] in (None, name.module)] if match else []
        own = [name for name in found if name.module == page.module]
        return own[0] if own else found[0] if len(found) == 1 and (match[1] or re.search(r"[A-Z_(]", text)) else None

    def link_to(self, name: Name, page: Page) -> str:
        return posixpath.relpath(self.modules[name.module].url, posixpath.dirname(page.url) or ".") + f"#{name.name}"

    def resolve(self, target: str, page: Page) -> str:
        "A link of a source as a link of its page: to a page, a picture beside it, or a file of the repository on the web."
        if re.match(r"[a-z]+:|#", target):
            return target
        path, _, anchor = target.partition("#")
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(page.path), unquote(path)))
        top = posixpath.dirname(page.url) or "."
        if inside in self.by_path:
            return posixpath.relpath(self.by_path[inside].url, top) + (f"#{anchor}" if anchor else "")
        if not (ROOT / inside).exists() or inside.startswith(".."):
            self.broken.append(f"{page.path}: {target} leads nowhere")
            return target
        if Path(inside).suffix in (".png", ".jpg", ".svg", ".gif", ".webp"):
            self.files.add(inside)
            return posixpath.relpath(f"files/{inside}", top)
        return f"{REPOSITORY}/{'tree' if (ROOT / inside).is_dir() else 'blob'}/{SETTINGS['branch']}/{quote(inside)}"

    def markdown(self, text: str, page: Page, contents: bool = True) -> str:
        try:
            return _reader(page, self, contents).render(text)
        except ValueError as error:
            self.broken.append(f"{page.path}: {error}")
            return f"<pre>{html.escape(text)}</pre>"


@lru_cache(maxsize=2)
def _reader(page: Page, site: Site, contents: bool) -> MarkdownWithMath:
    "What reads Markdown for a page; it is dear to make."
    return MarkdownWithMath(renderer=Renderer(page, site, contents))


def without_front_matter(text: str) -> str:
    "A first cell without what it tells nbdev: `- skip_exec: true`."
    return re.sub(r"^- [a-z_]+: .*\n?", "", text, flags=re.M) if re.match(r"# .+", text) else text


def render(page: Page, site: Site) -> None:
    "Fill in the page's body and its text in Markdown."
    if not page.path.endswith(".ipynb"):
        text = (ROOT / page.path).read_text(encoding="utf-8")
        page.body, page.markdown = site.markdown(text, page), text
        return
    page.taken |= _names_of(site, page.module)
    parts, texts, placed = [], [], set()
    for number, cell in enumerate(cells_of(ROOT / page.path)):
        source = cell["source"]
        if cell["cell_type"] != "code":
            text = without_front_matter(source) if number == 0 else source
            parts.append(site.markdown(text, page))
            texts.append(text)
        elif not re.search(r"^#\|\s*(hide|default_exp)\s*", source, re.M) and source.strip():
            parts.append(code_cell(cell, number, page, site, placed))
            texts.append("```python\n" + re.sub(r"^#\|.*\n", "", source, flags=re.M).strip() + "\n```" + plain_outputs(cell))
    page.body, page.markdown = "\n".join(parts), "\n\n".join(texts) + "\n"


def code_cell(cell: dict, number: int, page: Page, site: Site, placed: set[str]) -> str:
    "A code cell and its outputs; names that it exports are anchors."
    marks = re.findall(r"^#\|\s*(\w+)", cell["source"], re.M)
    source = re.sub(r"^#\|.*\n?", "", cell["source"], flags=re.M).strip("\n")
    parts = [f'<span class="tag">{says}</span>' for mark, says in (("cuda", "needs a GPU"), ("slow", "takes minutes")) if mark in marks]
    shown = coloured(source, "python")
    if "export" in marks:
        defined = re.findall(r"^(?:def|class) (\w+)|^(\w+)(?:: [^=\n]+)? = ", source, re.M)
        anchors = dict.fromkeys(name for pair in defined for name in pair if name in _names_of(site, page.module) and name not in placed)
        placed.update(anchors)
        marked = "".join(f'<a id="{name}"></a>' for name in anchors)
        link = f"{REPOSITORY}/blob/{SETTINGS['branch']}/difflit/{page.module}.py"
        shown = f'{marked}<div class="file"><a href="{link}">difflit/{page.module}.py</a></div>{shown}'
        if all(re.match(r"(from|import|    |\)|#|$)", line) for line in source.splitlines()):
            shown = f'<details class="imports"><summary>Imports of the module</summary>{shown}</details>'
    parts.append(f'<div class="source">{shown}</div>' if source else "")
    for place, output in enumerate(cell.get("outputs", [])):
        if made := output_html(output, f"{number}-{place}", page, site):
            parts.append(f'<div class="output">{made}</div>')
    kind = "cell export" if "export" in marks and "imports" not in shown else "cell"
    return f'<div class="{kind}">{"".join(parts)}</div>'


@cache
def _names_of(site: Site, module: str) -> frozenset[str]:
    "Public names of a module."
    return frozenset(name.name for name in site.names if name.module == module)


def output_html(output: dict, place: str, page: Page, site: Site) -> str:
    "One output: a picture, Markdown, HTML or text, whichever says most."
    if output["output_type"] == "stream":
        return f"<pre>{ansi2html(''.join(output['text']))}</pre>"
    data = output.get("data", {})
    for kind, ending in PICTURES.items():
        if kind in data:
            text = "".join(data[kind])
            content = text.encode() if ending == "svg" else base64.b64decode(text)
            name = f"{Path(page.url).stem}-{place}.{ending}"
            page.pictures[posixpath.join(posixpath.dirname(page.url), "pictures", name)] = content
            size = ' width="{}" height="{}"'.format(*struct.unpack(">II", content[16:24])) if ending == "png" else ""
            return f'<img src="pictures/{name}"{size} alt="What the cell above draws" loading="lazy">'
    if "text/markdown" in data:
        return site.markdown("".join(data["text/markdown"]), page, contents=False)
    if "text/html" in data:
        return "".join(data["text/html"])
    return f"<pre>{ansi2html(''.join(data.get('text/plain', '')))}</pre>"


def plain_outputs(cell: dict) -> str:
    "The outputs of a cell as Markdown, pictures left out."
    said = ""
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        text = "".join(output.get("text", data.get("text/markdown", data.get("text/plain", ""))))
        if text and not set(data) & set(PICTURES):
            said += f"\n\n{text.strip()}" if "text/markdown" in data else f"\n\n```\n{text.rstrip()}\n```"
    return said


def api_page(site: Site) -> Page:
    "Every public name: where it is explained, and what it says of itself."
    subtitle = f"The {len(site.names):,} public names of {len(site.modules)} modules; each leads to the cell that defines it"
    page = Page("difflit", "api.html", "The project", "API index", subtitle)
    parts = [f'<h1 id="api-index">{page.title}</h1><blockquote><p>{page.subtitle}</p></blockquote>']
    texts = [f"# {page.title}", f"> {page.subtitle}"]
    for module, home in site.modules.items():
        page.headings.append((2, module, module))
        page.taken.add(module)
        parts.append(f'<h2 id="{module}"><a href="{home.url}">difflit.{module}</a></h2><p>{html.escape(home.subtitle)}</p><dl class="api">')
        lines = []
        for name in (name for name in site.names if name.module == module):
            says = re.sub(r"^<p>|</p>\s*$", "", site.markdown(name.says, page, contents=False)) if name.says else ""
            kind = "parameters" if name.kind == "function" else "fields"
            shape = f"<details><summary>{kind}</summary>{coloured(name.shape, 'python')}</details>" if name.shape else ""
            parts.append(f'<dt><a href="{site.link_to(name, page)}"><code>{name.name}</code></a><small>{name.kind}</small></dt><dd>{says}{shape}</dd>')
            lines.append(f"- `{name.name}`" + (f": {name.says}" if name.says else ""))
        parts.append("</dl>")
        texts += [f"## difflit.{module}", "\n".join(lines)]
    page.body, page.markdown = "\n".join(parts), "\n\n".join(texts) + "\n"
    return page


def search_index(site: Site, pages: list[Page]) -> str:
    "A script with one line for each page, heading and public name: title, address, where it is, what it says."
    entries = []
    for page in pages:
        entries.append([page.title, page.url, page.group, page.subtitle])
        entries += [[text, f"{page.url}#{slug}", page.title, ""] for _, slug, text in page.headings if page.url != "api.html"]
    entries += [[n.name, f"{site.modules[n.module].url}#{n.name}", f"difflit.{n.module}", n.says] for n in site.names]
    return "var INDEX = [\n" + ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries) + "\n]\n"


def llms_text(pages: list[Page]) -> str:
    "The table of contents for language models, as llmstxt.org describes it: a title, a summary, and lists of links to Markdown."
    parts = [f"# difflit\n\n> {SETTINGS['description']}.", (
        "The source is a set of numbered notebooks: nbs/NN_name.ipynb is exported to difflit/name.py, and each explains, defines, shows and tests one subject. "
        "Runs are notebooks too, executed by papermill (`papermill nbs/train.ipynb out.ipynb -p preset shapes`) or by the command `difflit`.")]
    for group in dict.fromkeys(page.group for page in pages):
        inside = [page for page in pages if page.group == group]
        lines = [f"- [{p.title}]({SITE}/{p.url.removesuffix('.html')}.md)" + (f": {p.subtitle}" if p.subtitle else "") for p in inside]
        parts.append(f"## {group or 'Begin here'}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def build(out: Path) -> list[str]:
    "Write the site; what is broken in it."
    site = Site()
    for page in site.pages:
        render(page, site)
    pages = [*site.pages, api_page(site)]
    groups = [(group, [p for p in pages if p.group == group]) for group in dict.fromkeys(p.group for p in pages)]
    template = Environment(loader=FileSystemLoader(HERE), autoescape=False, trim_blocks=True).get_template("page.html")
    for number, page in enumerate(pages):
        top = "../" * page.url.count("/")
        sources = [("Notebook" if page.path.endswith(".ipynb") else "Source", f"{REPOSITORY}/blob/{SETTINGS['branch']}/{page.path}")]
        sources += [(f"difflit/{page.module}.py", f"{REPOSITORY}/blob/{SETTINGS['branch']}/difflit/{page.module}.py")] if page.module else []
        markdown = Path(page.url).stem + ".md"
        text = template.render(
            page=page, top=top, body=page.body, groups=groups, markdown=markdown, headings=[(n, slug, html.escape(text)) for n, slug, text in page.headings],
            repository=REPOSITORY, sources=[*sources, ("This page in Markdown", markdown)], before=pages[number - 1] if number else None,
            after=pages[number + 1] if number + 1 < len(pages) else None)
        _write(out / page.url, text)
        _write((out / page.url).with_suffix(".md"), page.markdown)
        for name, content in page.pictures.items():
            _write(out / name, content)
    for name in site.files:
        _write(out / "files" / name, (ROOT / name).read_bytes())
    for name in ("site.css", "site.js"):
        _write(out / name, (HERE / name).read_bytes())
    _write(out / "search.js", search_index(site, pages))
    _write(out / "llms.txt", llms_text(pages))
    _write(out / ".nojekyll", "")
    return site.broken + broken_links(out)


def _write(path: Path, content: str | bytes) -> None:
    "A file and the folders above it."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


# --- links -------------------------------------------------------------------------------------------------------------------------------------------


def anchors_and_targets(text: str) -> tuple[list[str], list[str]]:
    "The ids of a page and where it leads. A `<` in a text is written `&lt;`, so that tags can be found without a parser, which takes ten times as long."
    tags = "".join(tag for tag in re.findall(r"<\w[^<>]*>", text) if not tag.startswith("<span"))
    return re.findall(r'\sid="([^"]+)"', tags), [html.unescape(target) for target in re.findall(r'\s(?:href|src)="([^"]+)"', tags)]


def broken_links(folder: Path) -> list[str]:
    "What is wrong with the links of all pages of a folder: a file or an anchor that there is not, two anchors of one name, an address that is none."
    folder = folder.resolve()
    pages = {path: anchors_and_targets(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, (ids, targets) in pages.items():
        where = path.relative_to(folder).as_posix()
        found += [f"{where}: two elements are called #{name}" for name in sorted({i for i in ids if ids.count(i) > 1})]
        for target in dict.fromkeys(targets):
            parsed = urlparse(target)
            if parsed.scheme:
                if parsed.scheme in ("http", "https") and (not re.fullmatch(r"[\w.-]+\.\w+(:\d+)?", parsed.netloc) or re.search(r"\s", target)):
                    found.append(f"{where}: {target} is no address")
                continue
            other = (path.parent / unquote(parsed.path)).resolve() if parsed.path else path
            if not other.is_file():
                found.append(f"{where}: {target} leads nowhere")
            elif parsed.fragment and unquote(parsed.fragment) not in pages.get(other, ([], []))[0]:
                found.append(f"{where}: {target} has no such anchor")
    return found


def main() -> int:
    "Build into a folder that is made anew; 1 if a link is broken."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / SETTINGS["doc_path"], help="folder of the site, replaced (default: %(default)s)")
    out = parser.parse_args().out
    began = time.perf_counter()
    if out.exists() and any(out.iterdir()) and not (out / ".nojekyll").exists():
        raise SystemExit(f"{out} is no site of an earlier build: remove it yourself, or choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    broken = build(out)
    print(f"{len(list(out.rglob('*.html')))} pages in {out} after {time.perf_counter() - began:.0f} s; {len(broken)} broken links", *broken, sep="\n")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
