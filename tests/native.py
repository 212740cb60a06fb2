"""C++ kernels without Python: a driver of its own compiled with them, run under sanitizers, and on ARM where that can be done."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from lmlab.kernels import cpu

KERNELS = Path(cpu.__file__).resolve().parent
SANITIZERS = ["-O0", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c++17", "-ffp-contract=off", "-Wno-psabi", "-w", f"-I{KERNELS}"]


def compiled(
    tmp_path,  # folder for the program
    driver: str,  # C++ source with a `main` that prints how much it found wrong
    kernels: tuple,  # names of the C++ files it is compiled with
    flags: list,  # of the compiler
    compiler: str | None = None,  # default: $CXX, g++ or clang++
) -> Path:  # the program
    "The driver with the kernels, or a skip where this compiler cannot do it"
    compiler = compiler or os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or not shutil.which(compiler.split()[0]):
        pytest.skip(f"{compiler or 'a C++ compiler'} is not there")
    probe, source, program = (tmp_path / name for name in ("probe.cpp", "driver.cpp", "driver"))
    probe.write_text("int main() { return 0; }")
    source.write_text(driver)
    build = lambda *files: subprocess.run(
        [*compiler.split(), *flags, *FLAGS, *map(str, files)], capture_output=True, text=True
    )
    if build(probe, "-o", tmp_path / "probe").returncode:
        pytest.skip(f"{compiler} does not know {' '.join(flags)}")
    made = build(*(KERNELS / f"{name}.cpp" for name in ("machine", *kernels)), source, "-o", program)
    assert made.returncode == 0, made.stderr
    return program


def finds_nothing_wrong(command: list, **env):
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=600)
    assert ran.returncode == 0 and ran.stdout.endswith("wrong 0\n"), ran.stdout + ran.stderr
    return ran.stdout


def under_sanitizers(tmp_path, driver: str, kernels: tuple):
    "No byte outside its memory is touched and nothing undefined happens"
    program = compiled(tmp_path, driver, kernels, SANITIZERS)
    settings = dict(ASAN_OPTIONS="detect_leaks=1", UBSAN_OPTIONS="print_stacktrace=1", OMP_NUM_THREADS="2")
    finds_nothing_wrong([program], **settings)


def on_arm(tmp_path, driver: str, kernels: tuple):
    "Compiles for ARM, and runs there, where a cross compiler and an emulator are at hand"
    program = compiled(tmp_path, driver, kernels, ["-O2", "-static"], "aarch64-linux-gnu-g++")
    if emulator := shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64"):
        assert "neon" in finds_nothing_wrong([emulator, program])
