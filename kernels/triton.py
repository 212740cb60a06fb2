"""Triton kernels for GPUs. None is written yet: this module answers the switch, so that asking for it falls back with a reason."""

from importlib.util import find_spec

OPS = {}  # name of the operation -> function


def function(op, device, dtype):  # None when this backend cannot run it
    "The function that runs `op` here"
    return OPS.get(op) if device == "cuda" and find_spec("triton") else None


def reason(op, device, dtype) -> str:
    "Why `function` is None"
    if op not in OPS:
        return "it has no Triton form yet"
    return (
        "triton is not installed"
        if not find_spec("triton")
        else f"its tensors are on {device!r}, not on a GPU"
    )


def expected(device) -> bool:
    "Nothing to mend"
    return False
