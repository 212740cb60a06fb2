"""Hand-written kernels behind one switch: each operation is defined in torch, and runs faster where the machine and the build allow.

    from lmlab.kernels import decay_scores        # picks what is fastest here
    decay_scores(scores, g, backend="reference")  # or says what to use, for one call,
    with backend("reference"): ...                # for a block,
    LMLAB_BACKEND=reference python ...            # or for a process.

`auto` takes Triton on a GPU, the C++ library on a CPU, and the torch reference where neither is there or the dtype is not
supported. A backend that was asked for and cannot run falls back to the reference, and says so once. Importing this package imports
neither torch nor the library.
"""

import importlib
import os
import warnings
from contextlib import contextmanager
from contextvars import ContextVar

BACKENDS = ("auto", "reference", "cpu", "triton")
FAMILIES = ("decay", "read", "ternary")  # each is a module here with its operations and a `bench()`
_PUBLIC = {"decay_scores": "decay", "read_bytes": "read"}

_choice = ContextVar("lmlab_backend", default=None)
_said = set()


class Fallback(UserWarning):
    "An operation runs on a slower backend than was asked for, or than this machine could offer"


def say_once(
    message: str,  # shown the first time only
):
    "One warning for each message and process"
    if message not in _said:
        _said.add(message)
        warnings.warn(f"lmlab.kernels: {message}", Fallback, stacklevel=3)


def _known(name, source):
    if name in BACKENDS:
        return name
    raise ValueError(f"{source}: {name!r} is no backend; allowed are {', '.join(BACKENDS)}")


@contextmanager
def backend(
    name: str,  # one of `BACKENDS`
):
    "Use this backend inside the block, on this thread"
    token = _choice.set(_known(name, "backend"))
    try:
        yield name
    finally:
        _choice.reset(token)


def chosen(
    asked: str = None,  # the argument of a call; None or "auto" leave it to the block, then to the environment
) -> str:  # one of `BACKENDS`
    "The backend that a call would ask for now"
    if asked not in (None, "auto"):
        return _known(asked, "backend")
    return _choice.get() or _known(
        os.environ.get("LMLAB_BACKEND") or "auto", "environment variable LMLAB_BACKEND"
    )


def pick(
    op: str,  # name of the operation
    asked: str,  # the argument of the call
    device: str,  # type of the device of its tensors, e.g. "cpu"
    dtype=None,  # torch dtype that decides whether a backend can run it
):  # (name of the backend, function)
    "What runs `op` now"
    want = chosen(asked)
    name = want if want != "auto" else {"cuda": "triton", "cpu": "cpu"}.get(device, "reference")
    if name != "reference":
        module = importlib.import_module(f"lmlab.kernels.{name}")
        if f := module.function(op, device, dtype):
            return name, f
        reason = module.reason(op, device, dtype)
        if want != "auto" or module.expected(device):
            say_once(f"{op} runs on the torch reference, because {reason}")
    return "reference", getattr(importlib.import_module("lmlab.kernels.reference"), op)


def family(
    name: str,  # one of `FAMILIES`
):  # its module
    "The module of an operation family, with its `bench`"
    if name not in FAMILIES:
        raise ValueError(f"name: there is no kernel family {name!r}; allowed are {', '.join(FAMILIES)}")
    return importlib.import_module(f"lmlab.kernels.{name}")


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"lmlab.kernels.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
