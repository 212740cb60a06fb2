"""The C++ library, opened with ctypes: finds it, says what it can do on this machine, and calls it on torch's tensors and threads.

The library shares torch's OpenMP runtime. Torch brings its own copy of libgomp; it is loaded before the library, which then resolves
to the same one, so the threads that torch already keeps do the work. A pool of our own would fight torch's for the cores: OpenMP workers
spin for a while after each parallel region, and whoever comes next finds every core taken.
"""

import ctypes
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

ABI = 4  # `lmlab_abi()` of the library this file was written for
_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_SIGNATURES = {
    "lmlab_abi": (_I, []),
    "lmlab_threads": (_I, []),
    "lmlab_level": (ctypes.c_char_p, []),
    "lmlab_levels": (ctypes.c_char_p, []),
    "lmlab_features": (ctypes.c_char_p, []),
    "lmlab_set_level": (_I, [ctypes.c_char_p]),
    "lmlab_read": (_L, [_P, _L, _I]),
    "lmlab_peak": (_L, [ctypes.c_char_p, _L, _I]),
}


def path() -> Path:  # beside this file, put there by `pip install` or `python setup.py build_ext --inplace`
    "Where the library should be"
    return Path(__file__).with_name("_cpu.so")


@cache
def _open():
    "(library, None), or (None, why not)"
    if not path().exists():
        return None, "the C++ library was not built (no compiler at installation?)"
    try:
        lib = ctypes.CDLL(str(path()))
        for name, (result, args) in _SIGNATURES.items():
            f = getattr(lib, name)
            f.restype, f.argtypes = result, args
    except (OSError, AttributeError) as e:
        return None, f"the C++ library does not load ({e}); reinstall lmlab"
    if lib.lmlab_abi() != ABI:
        return None, f"the C++ library has interface {lib.lmlab_abi()}, not {ABI}; reinstall lmlab"
    return lib, None


def library():  # `ctypes.CDLL`, or None
    "The library, opened once"
    return _open()[0]


def info() -> dict:  # plain strings and numbers
    "What the library runs on: the instruction set in use, those this machine offers, further features, OpenMP or not"
    lib, why = _open()
    if lib is None:
        return {"library": False, "why": why}
    return {
        "library": True,
        "level": lib.lmlab_level().decode(),
        "levels": lib.lmlab_levels().decode().split(),
        "features": lib.lmlab_features().decode().split(),
        "openmp": lib.lmlab_threads() > 0,
    }


@contextmanager
def level(
    name: str,  # one of `info()["levels"]`
):
    "Run on this instruction set inside the block (the whole process, for tests and comparisons)"
    lib, why = _open()
    if lib is None:
        raise RuntimeError(f"level: {why}")
    old = lib.lmlab_level()
    if lib.lmlab_set_level(name.encode()):
        raise ValueError(
            f"level: {name!r} does not run on this machine; allowed are {', '.join(info()['levels'])}"
        )
    try:
        yield name
    finally:
        lib.lmlab_set_level(old)


def missing() -> str | None:  # None when it is there
    "Why there is no library"
    return _open()[1]


@cache
def symbol(
    name: str,  # of a function of the library
    result,  # its ctypes type
    *args,  # the ctypes types of its arguments
):  # the function
    "A function of the library with its types said; call it only where `missing()` is None"
    f = getattr(library(), name)
    f.restype, f.argtypes = result, args
    return f


def plain_read(x):  # contiguous tensor
    """The library's read without the dispatcher around it, as a ceiling to time against; torch's sum where there is no library

    A custom operation costs 20 us a call, and ten times that right after a pass over memory has emptied the caches of its code.
    """
    if library() is None:
        return x.sum()
    return library().lmlab_read(x.data_ptr(), x.numel() * x.element_size(), torch.get_num_threads())
