"""A plain read of memory, the bandwidth ceiling that every memory-bound kernel is held against, and the smallest example of a kernel."""

import torch
from lmlab.kernels import Operation
from torch import Tensor


def reference(x):
    "The sum of `x`'s memory as 64-bit words, modulo 2**64; a last partial word is filled with zeros"
    flat = x.contiguous().view(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    last = flat.new_zeros(8)
    last[: flat.numel() - whole] = flat[whole:]
    return torch.cat([flat[:whole], last]).view(torch.int64).sum()


def on_cpu(x):
    "The same in C++"
    from lmlab.kernels.cpu import plain_read

    return torch.tensor(plain_read(x.contiguous()))


READ = Operation("read_bytes", reference, on_cpu)


@torch.library.custom_op("lmlab::read_bytes", mutates_args=())
def _read_bytes(x: Tensor, backend: str) -> Tensor:
    return READ.pick(backend, x.device.type, x.dtype)[1](x)


@_read_bytes.register_fake
def _(x, backend):
    return x.new_empty((), dtype=torch.int64)


def read_bytes(
    x: Tensor,  # any dtype, any shape
    backend: str = "auto",  # see `lmlab.kernels`
) -> Tensor:  # int64 scalar
    "Touch every byte once: the sum of the memory as 64-bit words, modulo 2**64"
    return _read_bytes(x.detach(), backend)


def bench(
    quick: bool = False,  # fewer rounds
) -> dict:  # name -> `lmlab.core.bench.Timing`
    "The plain read against torch's own sum, cold"
    from lmlab.kernels.cpu import plain_read

    from lmlab.core.bench import cold, paired

    out, size = {}, 64 * 2**20
    following = cold(lambda: torch.zeros(size // 8, dtype=torch.int64))
    fns = {
        "plain read": lambda: plain_read(following()),
        "the same as an operation": lambda: read_bytes(following()),
        "torch.sum": lambda: following().sum(),
    }
    for threads in sorted({1, torch.get_num_threads()}):
        timing = paired(fns, rounds=11 if quick else 41, threads=threads)
        out[f"64 MB from memory, {threads} thread{'s' * (threads > 1)}"] = (
            timing,
            {"bytes": size, "flops": 0},
        )
    return out
