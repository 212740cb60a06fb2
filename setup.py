"""Packaging: everything is read from settings.ini; `kernels/`, the book and the ledger travel inside the wheel."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

here = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(here / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]

extras = {name: cfg[f"{name}_requirements"].split() for name in cfg["extras"].split()}
sources = sorted(str(p.relative_to(here)) for p in (here / "kernels").glob("*.cpp"))


class PlainC(build_ext):
    "A shared library behind a plain C interface: opened with ctypes, tied to no Python and no torch version"

    def get_ext_filename(self, name):
        return str(Path(*name.split("."))) + ".so"

    def get_export_symbols(self, ext):
        return ext.export_symbols

    def build_extension(self, ext):
        "With OpenMP, so that kernels run on the threads that torch already has; without it where the compiler has none"
        plain, ext.extra_compile_args = ext.extra_compile_args, [*ext.extra_compile_args, "-fopenmp"]
        ext.extra_link_args = ["-fopenmp"]
        try:
            super().build_extension(ext)
        except (CompileError, LinkError):
            ext.extra_compile_args, ext.extra_link_args = plain, []
            super().build_extension(ext)


library = Extension(
    "lmlab.kernels._cpu",
    sources,
    depends=sorted(str(p.relative_to(here)) for p in (here / "kernels").glob("*.h")),
    # Never -march=native: instruction sets are chosen when a kernel runs. No contraction: every path returns the same bits.
    extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi"],
    language="c++",
    optional=True,  # no compiler: the package installs all the same and runs on the torch reference
)

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    packages=[*find_packages(include=["lmlab", "lmlab.*"]), "lmlab.kernels", "lmlab._book", "lmlab._results"],
    package_dir={"lmlab.kernels": "kernels", "lmlab._book": "nbs", "lmlab._results": "results"},
    package_data={
        "lmlab.kernels": ["*.cpp", "*.h"],
        "lmlab._book": ["catalogue.tsv", "*.ipynb", "*/*.ipynb"],
        "lmlab._results": ["*/*.json", "*/*.svg"],
    },
    ext_modules=[library] if sources else [],
    cmdclass={"build_ext": PlainC},
    entry_points={
        "console_scripts": ["lmlab=lmlab.cli:main"],
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
