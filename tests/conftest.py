"""Settings of the whole suite: two workers, one math thread each, longest first, no network, one shared cache.

`pytest tests` runs everything on two workers; `pytest tests/test_cli.py` runs in this process, easier to debug; `-n` decides otherwise.
`pytest tests --timings` also writes tests/timings.json, by which the longest tests are started first.
"""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
os.environ |= dict.fromkeys(THREADS, "1")  # read when torch is imported, so before anything else
os.environ |= dict(IN_TEST="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ |= dict(JUPYTER_PLATFORM_DIRS="1", PYDEVD_DISABLE_FILE_VALIDATION="1")  # else every kernel warns
if not shutil.which("nvidia-smi"):
    os.environ["TRITON_INTERPRET"] = "1"  # no GPU: Triton kernels run in its interpreter, on the CPU
for name in ("LMLAB_OUT", "LMLAB_DATA", "LMLAB_RUN"):
    os.environ.pop(name, None)

# A shell starts what runs in the background with interrupts ignored, and the runs that tests interrupt would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if not WORKER:  # the workers inherit the folder: a nano model is trained once for all of them
    KEPT = os.environ.get("LMLAB_TEST_CACHE")
    os.environ["LMLAB_CACHE"] = KEPT or tempfile.mkdtemp(prefix="lmlab-tests-")
    if KEPT:
        Path(KEPT).mkdir(parents=True, exist_ok=True)

import json  # noqa: E402

import pytest  # noqa: E402

TIMINGS = Path(__file__).parent / "timings.json"
UNKNOWN = 20.0  # seconds for a test that was never timed: early, but behind the long ones
ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    parser.addoption("--timings", action="store_true", help="bring tests/timings.json up to date")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    "Two workers for a folder, unless the command line says otherwise or pytest-xdist is not there"
    if WORKER:
        return  # a worker comes by here too, and must not start workers of its own
    folder = any(Path(a.split("::")[0]).is_dir() for a in config.args)
    if config.pluginmanager.hasplugin("xdist") and folder and config.getoption("numprocesses", None) is None:
        if not (config.option.usepdb or config.option.collectonly):
            config.option.numprocesses = min(2, os.cpu_count() or 1)
            if config.option.maxschedchunk is None:
                config.option.maxschedchunk = 1  # hand out tests one by one, or the order below means little


def pytest_collection_modifyitems(items):
    "Longest first; every worker must see the same order, so ties keep theirs"
    took = json.loads(TIMINGS.read_text()) if TIMINGS.exists() else {}
    items.sort(key=lambda i: -took.get(i.nodeid, UNKNOWN))


class Timer:
    "How long each test took, its set-up included"

    def __init__(self):
        self.took = {}

    def pytest_runtest_logreport(self, report):
        self.took[report.nodeid] = self.took.get(report.nodeid, 0) + report.duration

    def pytest_sessionfinish(self, session):
        old = json.loads(TIMINGS.read_text()) if TIMINGS.exists() else {}
        here = {n: s for n, s in old.items() if (TIMINGS.parent / n.split("::")[0]).exists()}
        now = here | {n: round(s, 1) for n, s in self.took.items()}
        TIMINGS.write_text(json.dumps(dict(sorted(now.items())), indent=0) + "\n")


def pytest_configure(config):
    if config.getoption("--timings") and not WORKER:
        config.pluginmanager.register(Timer())


def pytest_unconfigure(config):
    if not WORKER and not KEPT:
        shutil.rmtree(os.environ["LMLAB_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def root():
    "The checkout"
    return ROOT


@pytest.fixture
def python():
    "Run Python code in a fresh interpreter outside the checkout; its standard output"
    import subprocess

    def run(code, **env):
        full = os.environ | {k: v for k, v in env.items() if v is not None}
        p = subprocess.run(
            [sys.executable, "-c", code],
            env=full,
            cwd=tempfile.gettempdir(),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert p.returncode == 0, p.stderr
        return p.stdout

    return run
