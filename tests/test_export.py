"""What is generated agrees with the notebooks: modules, README, the site's table of contents, the ledger; and the notebooks are clean."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lmlab.kernels import FAMILIES

from lmlab.core import ledger
from lmlab.core.ledger import book_dir, catalogue

ROOT = Path(__file__).resolve().parents[1]
PATHS = sorted(
    p
    for p in book_dir().rglob("*.ipynb")
    if not any(x.startswith((".", "_")) for x in p.relative_to(book_dir()).parts)
)
NAMES = {p.relative_to(book_dir()).with_suffix("").as_posix(): p for p in PATHS}
CHAPTERS = [p.stem for p in PATHS if p.stem in catalogue()]
load = lambda path: json.loads(path.read_text(encoding="utf-8"))
source = lambda cell: "".join(cell["source"])


def tool(*args, cwd=ROOT):
    p = subprocess.run([sys.executable, "-m", *map(str, args)], cwd=cwd, capture_output=True, text=True)
    assert p.returncode == 0, f"{' '.join(map(str, args))}\n{p.stdout[-3000:]}{p.stderr[-2000:]}"


def exported_to(path):
    "What `#| default_exp` says, None where a notebook exports nothing"
    found = [
        line.split()[-1]
        for c in load(path)["cells"]
        if c["cell_type"] == "code"
        for line in source(c).splitlines()
        if line.startswith("#| default_exp")
    ]
    assert len(found) <= 1, f"{path}: {len(found)} default_exp lines"
    return found[0] if found else None


def test_one_notebook_one_module():
    "Same place, same name; no module without a notebook, no notebook that overwrites another's module"
    made = {}
    for name, path in NAMES.items():
        if (module := exported_to(path)) is not None:
            assert module == name.replace("/", "."), f"nbs/{name}.ipynb exports to {module}"
            made[ROOT / "lmlab" / f"{name}.py"] = name
        for c in load(path)["cells"]:
            elsewhere = (
                re.search(r"^#\|[ \t]*exports?i?[ \t]+\S+", source(c), re.M)
                if c["cell_type"] == "code"
                else None
            )
            assert not elsewhere, f"{name}: {elsewhere[0]!r} exports into another module"
    there = {p for p in (ROOT / "lmlab").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")}
    assert there == set(made), f"differ: {sorted(str(p) for p in there ^ set(made))}"
    for name in CHAPTERS:
        assert exported_to(ledger.notebook(name)), f"{name} is a chapter and exports nothing"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "The export of the whole book, made again elsewhere"
    tmp = tmp_path_factory.mktemp("export")
    shutil.copy(ROOT / "settings.ini", tmp)
    shutil.copy(ROOT / ".ruff.toml", tmp)
    shutil.copytree(book_dir(), tmp / "nbs", ignore=shutil.ignore_patterns("_quarto.yml", ".*"))
    (tmp / "lmlab").mkdir()
    shutil.copy(ROOT / "lmlab" / "__init__.py", tmp / "lmlab")
    code = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    p = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "IN_TEST"}
        | dict(PYTHONPATH=""),  # with IN_TEST it exports nothing
    )
    assert p.returncode == 0, p.stderr
    assert (tmp / "lmlab" / "_modidx.py").exists(), "the export wrote nothing"
    (tmp / "kernels").mkdir(exist_ok=True)
    tool("ruff", "format", "-q", "lmlab", cwd=tmp)
    tool("ruff", "check", "-q", "--fix", "--exit-zero", "lmlab", cwd=tmp)
    return tmp / "lmlab"


def test_modules_are_what_the_notebooks_say(exported):
    "After an edit: make export"
    read = lambda folder: {
        p.relative_to(folder).as_posix(): p.read_text()
        for p in folder.rglob("*.py")
        if "kernels" not in p.parts
    }
    want, got = read(exported), read(ROOT / "lmlab")
    for files in (want, got):
        for name in [n for n, s in files.items() if n.endswith("__init__.py") and not s.strip()]:
            del files[name]
    assert sorted(want) == sorted(got), "`make export` was not run after a notebook was added or removed"
    for name in want:
        assert want[name] == got[name], (
            f"lmlab/{name} is not what its notebook exports: run `make export`, and never edit lmlab/ by hand"
        )


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_clean(name):
    "No counters, no editor metadata, no machine; `nbdev_clean` mends most of it"
    from nbdev.clean import clean_nb

    nb = load(NAMES[name])
    clean = json.loads(json.dumps(nb))
    clean_nb(clean, allowed_cell_metadata_keys=["tags"])
    for i, (a, b) in enumerate(zip(nb["cells"], clean["cells"], strict=True)):
        assert a == b, f"{name}, cell {i}: run `nbdev_clean`"
    assert nb["metadata"] == clean["metadata"] and (nb["nbformat"], nb["nbformat_minor"]) == (4, 5)
    ids = [c["id"] for c in nb["cells"]]
    assert len(set(ids)) == len(ids), f"{name}: two cells share an id"
    for i, c in enumerate(nb["cells"]):
        assert not {"injected-parameters"} & set(c["metadata"].get("tags", [])), (
            f"{name}, cell {i}: papermill's cell was committed"
        )
        for o in c.get("outputs", []):
            assert o["output_type"] != "error", f"{name}, cell {i}: the output is an error"
            if leak := machine_path(
                json.dumps(
                    {k: v for k, v in o.get("data", {}).items() if not k.startswith("image/p")}
                    | {"t": o.get("text", "")}
                )
            ):
                raise AssertionError(f"{name}, cell {i}: the output names a folder of a machine, {leak!r}")


def machine_path(text):
    "The first absolute path of somebody's machine in `text`, None where there is none"
    m = re.search(
        r"(?<![\w.~/:-])/(?:home|root|Users|tmp|work|private|var/folders|opt|mnt|workspace)/[\w.+-]+|[A-Z]:\\\\+Users",
        text,
    )
    return m and m[0]


def test_the_search_for_paths_finds_them():
    for bad in (
        "see /home/me/x",
        "'/home/ann/.cache'",
        "/Users/ann/lab",
        "(/tmp/a1/run)",
        r"C:\\Users\\me",
        '"/home/ann/book/nbs"',
    ):
        assert machine_path(bad), bad
    for good in ("~/.cache/lmlab", "./nbs/core", "https://arxiv.org/home/x", "a/home/b", "train/tmp/x"):
        assert not machine_path(good), good


@pytest.mark.parametrize("slug", CHAPTERS)
def test_committed_result_is_fresh(slug):
    "The committed page and the ledger show the chapter as it stands, measured at scale cpu"
    assert ledger.state(slug, "cpu") == "fresh", (
        f"{slug}: {ledger.state(slug, 'cpu')} result at cpu; run `lmlab run {slug} --scale cpu --save`"
    )
    outs = [o for c in load(ledger.notebook(slug))["cells"] for o in c.get("outputs", [])]
    kinds = {k for o in outs for k in o.get("data", {})}
    assert any(k.startswith("image/") for k in kinds), f"{slug}: the committed notebook shows no figure"
    assert "text/markdown" in kinds, f"{slug}: the committed notebook shows no claims table"
    shown = json.dumps([o.get("data", {}).get("text/markdown", "") for o in outs], ensure_ascii=False)
    for c in ledger.read_results(ledger.results_path(slug, "cpu"))["claims"]:
        assert f"{c['id']}:" in shown, f"{slug}: the committed notebook does not show claim {c['id']}"
        if (m := ledger.claim_row(c)["measured"]) != "–":
            assert ledger.markdown_table([dict(m=m)]).splitlines()[-1].strip("| ") in shown.replace(
                "\\\\", "\\"
            ), f"{slug}, {c['id']}: the ledger says {m}, the committed notebook shows another number"


def test_ledger_has_no_orphans():
    "Every results folder belongs to a written chapter and reads well; beside them stand the kernels' measurements"
    from lmlab.core.bench import saved

    assert "bench" not in catalogue()
    for file in sorted(ledger.results_dir().rglob("*.json")):
        if file.parent.name == "bench":
            assert saved(file.stem)["family"] == file.stem in FAMILIES, file
            continue
        res = ledger.read_results(file)
        assert (res["slug"], f"{res['scale']}.json") == (file.parent.name, file.name), file
        assert ledger.built(res["slug"]), f"{file}: results of a chapter that does not exist"


def test_readme_is_the_front_page():
    from lmlab.core.site import readme

    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), (
        "README.md is not what nbs/index.ipynb gives: run `make index`"
    )


def test_every_notebook_is_in_the_table_of_contents():
    import yaml

    def strings(o):
        if isinstance(o, str):
            yield o
        for v in o.values() if isinstance(o, dict) else o if isinstance(o, list) else ():
            yield from strings(v)

    listed = [
        s
        for s in strings(yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8")))
        if s.endswith(".ipynb")
    ]
    assert len(set(listed)) == len(listed), "a notebook stands twice in _quarto.yml"
    there = {f"{n}.ipynb" for n in NAMES}
    assert set(listed) == there, f"_quarto.yml and nbs/ differ: {sorted(set(listed) ^ there)}"
    assert (ROOT / "nbs" / "_quarto.yml").resolve() == ROOT / "_quarto.yml"


def test_top_level_is_small():
    "What a newcomer sees first; `git ls-files` where there is git, so that local folders do not count"
    p = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if p.returncode or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    allowed = {"README.md", "settings.ini", "setup.py", "_quarto.yml", "Makefile", "nbs", "lmlab", "kernels", "results", "tests",
               "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "MANIFEST.in"}  # fmt: skip
    there = {f.split("/")[0] for f in p.stdout.splitlines()}
    assert {t for t in there if not t.startswith(".")} <= allowed, sorted(there - allowed)


def test_ruff():
    tool("ruff", "check", "lmlab", "kernels", "tests", "setup.py")
    tool("ruff", "format", "--check", "lmlab", "kernels", "tests", "setup.py")


def test_dependencies_point_one_way():
    "chapter -> core -> kernels: core imports no chapter, kernels import neither"
    parts = {p.part for p in catalogue().values()}
    imports = lambda f: {
        m
        for n in ast.walk(ast.parse(f.read_text()))
        for m in (
            [n.module or ""]
            if isinstance(n, ast.ImportFrom)
            else [a.name for a in n.names]
            if isinstance(n, ast.Import)
            else []
        )
        if m.startswith("lmlab.")
    }
    for f in (ROOT / "lmlab" / "core").rglob("*.py"):
        assert not {m for m in imports(f) if m.split(".")[1] in parts}, f
    for f in (ROOT / "kernels").rglob("*.py"):
        assert not {m for m in imports(f) if m.split(".")[1] in parts}, f
