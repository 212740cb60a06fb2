"""Hand-written kernels behind one switch: each operation is defined in torch, and runs faster where the machine and the build allow.

    from lmlab.kernels import decay_scores        # picks what is fastest here
    decay_scores(scores, g, backend="reference")  # or says what to use, for one call,
    with backend("reference"): ...                # for a block,
    LMLAB_BACKEND=reference python ...            # or for a process.

`auto` takes Triton on a GPU, the C++ library on a CPU, and the torch reference where neither is there or the dtype is not
supported. A backend that was asked for and cannot run falls back to the reference, and says so once. Importing this package imports
neither torch nor the library. Each family of operations is a module of its own here: the definition, the C++ and the Triton form, `bench`.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

BACKENDS = ("auto", "reference", "cpu", "triton")
FAMILIES = (
    "attention",
    "decay",
    "decoder",
    "differential",
    "postings",
    "read",
    "retention",
    "sparse",
    "ternary",
    "vocab",
)  # each is a module with its operations and a `bench()`
_PUBLIC = {
    "decay_scores": "decay",
    "differential_attention": "differential",
    "gated_retention": "retention",
    "read_bytes": "read",
    "topk_sparsify": "sparse",
    "vocab_max": "vocab",
}

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


def absent(
    name: str,  # "cpu" or "triton"
    device: str,  # type of the device of the tensors, e.g. "cpu"
) -> str | None:  # why it cannot run there, None when it can
    "What keeps a backend from running on tensors of this device"
    if name == "cpu":
        from lmlab.kernels import cpu

        return f"its tensors are on {device!r}, not on the CPU" if device != "cpu" else cpu.missing()
    if not importlib.util.find_spec("triton"):
        return "triton is not installed"
    if device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"its tensors are on {device!r}, not on a GPU (TRITON_INTERPRET=1 lets Triton's interpreter run it on a CPU)"


@dataclass(frozen=True)
class Operation:
    "One operation: its definition in torch, and the faster forms it has; all take the same arguments"

    name: str
    reference: Callable
    cpu: Callable = None  # on the C++ library
    triton: Callable = None  # imports triton when it is called
    dtypes: tuple = None  # what the faster forms take; None: any

    def pick(
        self,
        asked: str,  # the argument of the call
        device: str,  # type of the device of its tensors
        dtype=None,  # torch dtype that decides whether a faster form can run
    ):  # (name of the backend, function)
        "What runs now"
        want = chosen(asked)
        name = want if want != "auto" else {"cuda": "triton", "cpu": "cpu"}.get(device, "reference")
        if name == "reference":
            return name, self.reference
        label = {"cpu": "C++", "triton": "Triton"}[name]
        form, reason, theirs = getattr(self, name), absent(name, device), False
        if form is None:
            reason, theirs = f"it has no {label} form", True
        elif self.dtypes and dtype not in self.dtypes:
            reason, theirs = reason or f"it has no {label} form for {dtype}", reason is None
        if reason is None:
            return name, form
        if want != "auto" or (
            name == "cpu" and not theirs
        ):  # a missing library is worth a word: the user can mend it
            say_once(f"{self.name} runs on the torch reference, because {reason}")
        return "reference", self.reference


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
