"""The site: built with warnings as errors, every link followed, nothing loaded from elsewhere, and looked at in a browser."""

import ast
import functools
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lmlab.core import site as S
from lmlab.core.ledger import book_dir, built, catalogue

pytest.importorskip("myst_nb", reason="the site needs the docs extra: pip install -e '.[docs]'")
pytestmark = pytest.mark.xdist_group("docs")


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    return S.build(tmp_path_factory.mktemp("site") / "html", builder="sphinx")


def text_of(page):
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


# the table of contents


def test_toc_lists_every_page_once():
    assert S.toc_problems(S.toc(), S.generated_pages()) == []


def test_quarto_settings():
    config = S.quarto_config()
    assert config["project"] == {"type": "website", "output-dir": "_docs"}
    assert config["execute"] == {"enabled": False}
    assert config["format"]["html"]["html-math-method"] == "mathml"
    assert config["website"]["search"] is True and "metadata-files" not in config
    link = book_dir() / "_quarto.yml"
    assert link.is_symlink() and os.readlink(link) == "../_quarto.yml"


def test_nbdev_hides_the_same_cells():
    from execnb.nbio import dict2nb
    from nbdev import processors as P
    from nbdev.process import NBProcessor

    index, code = (
        S.api_index(),
        lambda cells: [
            S.directives(c["source"])[1] for c in cells if c["cell_type"] == "code" and c.get("source")
        ],
    )
    for path in S.notebooks():
        nb = json.loads((book_dir() / path).read_text(encoding="utf-8"))
        theirs = NBProcessor(
            nb=dict2nb(nb), procs=[P.populate_language, P.hide_line, P.rm_export, P.clean_magics, P.hide_]
        )
        theirs.process()
        got = code(S.stage(path, index)["cells"])
        unseen = {
            S.directives("".join(c["source"]))[1]
            for c in nb["cells"]
            if c["cell_type"] == "code"
            and not c["outputs"]
            and re.search(r"^#\|\s*echo: false", "".join(c["source"]), re.M)
        }
        assert [c for c in code(theirs.nb.cells) if c.strip() and c not in unseen] == got, path


# the pages


def test_every_page_is_there(site):
    pages = {str(Path(p).with_suffix(".html")) for p in S.pages(S.toc())}
    made = {p.relative_to(site).as_posix() for p in site.rglob("*.html")} - {"search.html", "genindex.html"}
    assert made == pages
    assert (site / "searchindex.js").stat().st_size > 10_000


def test_links_resolve_and_nothing_loads_from_elsewhere(site):
    assert S.site_problems(site) == []


def test_no_directive_in_sight(site):
    shown = {
        p.relative_to(site).as_posix(): re.findall(r"^\s*#\|.*", text_of(p), re.M)
        for p in site.rglob("*.html")
    }
    del shown["core/site.html"]  # the chapter that explains them
    shown.pop("contributing.html", None)
    assert {k: v for k, v in shown.items() if v} == {}


def test_every_paper_is_listed(site):
    page = text_of(site / "papers.html")
    assert len(catalogue()) >= 142
    assert [p.slug for p in catalogue().values() if p.arxiv not in page or p.name not in page] == []


def test_every_result_is_on_the_ledger(site):
    page = (site / "ledger.html").read_text(encoding="utf-8")
    assert [s for s in S.largest() if f'id="ledger-{s.replace("_", "-")}"' not in page] == []


def test_tables_of_the_index_pages_are_current():
    "The tables of the index pages are what the ledger says now"
    for path in (p for p in S.notebooks() if Path(p).name == "index.ipynb"):
        for c in json.loads((book_dir() / path).read_text(encoding="utf-8"))["cells"]:
            d, code = S.directives("".join(c["source"]))
            if c["cell_type"] != "code" or d.get("echo") != "false":
                continue
            *body, last = ast.parse(code).body
            names = {}
            exec(compile(ast.Module(body, []), path, "exec"), names)
            table = eval(compile(ast.Expression(last.value), path, "eval"), names)
            shown = "".join(c["outputs"][0]["data"].get("text/markdown", "")) if c["outputs"] else None
            assert shown == table._repr_markdown_(), f"{path} is behind the ledger: run `make index`"


def test_readme_links():
    text = S.readme()
    links = [u.split("#")[0] for u in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:|#", u)]
    assert links and [u for u in links if not (S.root() / u).exists()] == []


# faults planted on purpose


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A book of two pages; returns a function that builds it with the given text on the second"
    md = lambda s: dict(cell_type="markdown", metadata={}, source=s, id=f"i{abs(hash(s)) % 10**6}")
    (tmp_path / "nbs/core").mkdir(parents=True)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "lmlab").mkdir()
    shutil.copy(book_dir() / "lmlab.css", tmp_path / "nbs")

    def write(path, *cells):
        nb = dict(cells=list(cells), metadata={}, nbformat=4, nbformat_minor=5)
        (tmp_path / "nbs" / path).write_text(json.dumps(nb))

    def build(text, builder="sphinx", extra=(), **kw):
        write("index.ipynb", md("# Book\n\n> A book.\n\nSee [one](core/one.ipynb)."))
        write("core/one.ipynb", md("# One\n\n> A page."), md(text), *extra)
        (tmp_path / "_quarto.yml").write_text(json.dumps(sidebar))  # JSON is YAML
        return S.build(tmp_path / "out", builder=builder, **kw)

    sidebar = {
        "project": {"type": "website", "output-dir": "_docs"},
        "website": {
            "title": "Book",
            "repo-url": "https://example.org/book",
            "sidebar": {
                "contents": ["index.ipynb", "core/one.ipynb", "papers.md", "ledger.md", "api/index.md"]
            },
        },
    }
    monkeypatch.setattr(S, "book_dir", lambda: tmp_path / "nbs")
    monkeypatch.setattr(S, "built", lambda slug: False)
    monkeypatch.setattr(S, "all_results", dict)
    build.config, build.folder = sidebar, tmp_path
    return build


GOOD = r"""## A section {#sec-a}

Inline $\operatorname{softmax}(x)\in\mathbb{R}^d$, and

$$
\begin{aligned} S_n &= \gamma_n S_{n-1} \\ D &= \begin{cases} 1 & n\ge m \\ 0 & \text{otherwise}\end{cases} \end{aligned}
$$ {#eq-state}

which is @eq-state of @sec-a.

::: {.callout-note}
A note.
:::
"""


def test_small_book(small):
    page = (small(GOOD) / "core/one.html").read_text(encoding="utf-8")
    assert page.count("<math") == 2 and 'class="eqno">(1)' in page and 'href="#equation-eq-state"' in page
    assert "admonition note" in page and ">A section</a>" in page and "callout" not in page


def test_planted_faults_are_caught(small):
    "All in one build, for every one is reported"
    faults = {
        r"Where $\unheardof{x}$ is.": r"core/one.ipynb, cell 2 of the page, line 1: WARNING: maths: unknown macro \unheardof",
        r"$$a & b$$": "cell 2 of the page, line 3: WARNING: maths: & outside an environment",
        "See [it](gone.ipynb).": "target not found: 'gone.ipynb'",
        "See [it](../index.ipynb#nowhere).": "'nowhere'",
        "See [it](#nothing).": "'nothing'",
        '<img src="https://example.org/a.png">': "core/one.html loads https://example.org/a.png from elsewhere",
        '<a href="../gone.html">x</a>': "core/one.html links to ../gone.html, which does not exist",
        "![x](gone.png)": "image file not readable: core/gone.png",
    }
    with pytest.raises(S.SiteError) as e:
        small("\n\n".join(faults))
    assert [said for said in faults.values() if said not in str(e.value)] == [], str(e.value)
    assert not (small.folder / "out").exists()


@pytest.mark.parametrize(
    "text, said",
    {
        "See @fig-gone.": "core/one.ipynb: @fig-gone refers to no label",
        "[It](../../gone.txt)": "'../../gone.txt', which does not exist",
    }.items(),
)
def test_references_that_lead_nowhere(small, text, said):
    with pytest.raises(S.SiteError, match=re.escape(said)):
        small(text)


def test_a_page_that_is_not_listed_is_caught(small):
    small.config["website"]["sidebar"]["contents"].remove("core/one.ipynb")
    with pytest.raises(S.SiteError, match="'core/one.ipynb' is not listed"):
        small("x")


def test_stderr_and_widgets_stay_off_the_page(small):
    widget = {
        "application/vnd.jupyter.widget-view+json": {"model_id": "0"},
        "application/javascript": "alert(1)",
    }
    outputs = [
        dict(output_type="stream", name="stderr", text="90%|####"),
        dict(output_type="stream", name="stdout", text="\x1b[31mred\x1b[0m"),
        dict(output_type="display_data", metadata={}, data=widget),
    ]
    cell = dict(
        cell_type="code",
        id="w",
        metadata={},
        execution_count=None,
        source="#| echo: false\nrun()",
        outputs=outputs,
    )
    page = (small("x", extra=[cell]) / "core/one.html").read_text(encoding="utf-8")
    assert "red" in page and not any(s in page for s in ("90%", "alert(1)", "widget", "run()", "\x1b"))


def test_quarto_gets_clean_pages(small, tmp_path, monkeypatch):
    "A stand-in for Quarto: what it is called with and what lies in its folder"
    fake = tmp_path / "bin/quarto"
    fake.parent.mkdir()
    fake.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, shutil, sys\n"
        "assert sys.argv[1] == 'render' and sys.argv[3:] == ['--no-execute'], sys.argv\n"
        "src = pathlib.Path(sys.argv[2]); cfg = json.loads((src/'_quarto.yml').read_text())\n"
        "for p in cfg['website']['sidebar']['contents']:\n"
        "    to = (src/'_docs'/p).with_suffix('.html'); to.parent.mkdir(parents=True, exist_ok=True)\n"
        "    to.write_text('<pre>' + (src/p).read_text().replace('<', '&lt;') + '</pre>')\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    cell = dict(
        cell_type="code", id="w", metadata={}, execution_count=None, source="#| hide\nsecret = 1", outputs=[]
    )
    shown = dict(
        cell_type="code",
        id="v",
        metadata={},
        execution_count=None,
        source="#| exports\n#| label: fig-a\nx = 1",
        outputs=[],
    )
    out = small(GOOD, builder="auto", extra=[cell, shown])
    nb = json.loads(html.unescape((out / "core/one.html").read_text()[5:-6]))
    assert nb["cells"][0]["cell_type"] == "raw" and 'title: "One"' in nb["cells"][0]["source"]
    assert [c["source"] for c in nb["cells"] if c["cell_type"] == "code"] == ["#| label: fig-a\nx = 1"]
    assert "@eq-state" in str(nb) and "{#sec-a}" in str(nb)


# the browser

FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()

PROBE = """<!doctype html><title>probe</title><pre id="out">nothing</pre>
<iframe id="f" src="%s" style="width:%dpx;height:2000px"></iframe>
<script>
document.getElementById("f").onload = async () => {
  const w = document.getElementById("f").contentWindow, d = w.document
  await d.fonts.ready
  for (let i = 0; i < 50 && w.location.pathname.endsWith("search.html") && !/finished/.test(d.querySelector(".search-summary")?.innerText); i++)
    await new Promise(r => setTimeout(r, 100))
  const size = e => { const r = e.getBoundingClientRect(); return [r.width, r.height] }
  document.getElementById("out").textContent = JSON.stringify({
    title: d.title,
    images: [...d.querySelectorAll("article img")].map(e => [e.naturalWidth, ...size(e)]),
    tables: [...d.querySelectorAll("article table")].map(e => [e.innerText.slice(0, 200), ...size(e)]),
    maths: [...d.querySelectorAll("article math")].map(size),
    found: [...d.querySelectorAll("ul.search li a")].map(e => e.innerText),
    overflow: d.documentElement.scrollWidth - d.documentElement.clientWidth,
    loaded: w.performance.getEntriesByType("resource").map(e => e.name),
  })
}
</script>"""


def chromium(tmp_path, *args):
    "Run a browser with a new profile"
    profile = tmp_path / f"profile{len(list(tmp_path.glob('profile*')))}"
    profile.mkdir()
    run = [
        shutil.which("chromium"),
        *FLAGS,
        f"--user-data-dir={profile}",
        "--virtual-time-budget=20000",
        *args,
    ]
    return subprocess.run(run, capture_output=True, text=True, timeout=600).stdout


@pytest.fixture(scope="session")
def served(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def look(site, served, tmp_path, page, width=1400):
    "What a browser makes of a page"
    probe = site / "_static" / f"probe{width}.htm"
    probe.write_text(PROBE % (f"/{page}", width))
    try:
        dom = chromium(tmp_path, "--window-size=1500,2200", "--dump-dom", f"{served}/_static/{probe.name}")
    finally:
        probe.unlink()
    return json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', dom, re.S)[1]))


needs_browser = pytest.mark.skipif(
    not shutil.which("chromium"), reason="no chromium on the PATH: the pages were not looked at in a browser"
)


@needs_browser
def test_browser_draws_the_chapter(site, served, tmp_path):
    if not built("yoco"):
        pytest.skip("the YOCO chapter is not there yet")
    seen = look(site, served, tmp_path, "architectures/yoco.html")
    assert "YOCO" in seen["title"]
    assert seen["images"] and all(min(i) > 0 for i in seen["images"])
    claims = [t for t in seen["tables"] if "C1" in t[0] and "verdict" in t[0]]
    assert claims and all(w > 0 and h > 0 for _, w, h in claims)
    assert len(seen["maths"]) > 10 and all(w > 0 and h > 0 for w, h in seen["maths"])
    assert [u for u in seen["loaded"] if not u.startswith(served)] == []


@needs_browser
@pytest.mark.parametrize("page", ["index.html", "ledger.html", "core/site.html"])
def test_pages_fit_a_telephone(site, served, tmp_path, page):
    assert look(site, served, tmp_path, page, width=390)["overflow"] <= 0


@needs_browser
def test_search_finds(site, served, tmp_path):
    found = look(site, served, tmp_path, "search.html?q=ledger")["found"]
    assert any("ledger" in title for title in found), found


@needs_browser
def test_screenshot_is_not_blank(site, tmp_path):
    from PIL import Image

    shot = tmp_path / "page.png"
    chromium(tmp_path, "--window-size=1200,900", f"--screenshot={shot}", f"file://{site}/index.html")
    assert len(Image.open(shot).convert("RGB").getcolors(1 << 24)) > 50
