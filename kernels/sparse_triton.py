"""The selection of `lmlab.kernels.sparse` for GPUs: one program for each token, the bits of the smallest magnitude that stays found from the highest down."""

import torch
import triton
import triton.language as tl


@triton.jit
def _stay(keys, keep, axis: tl.constexpr):
    "True for the `keep` largest keys along the last axis, of equal ones the first; keys that are -1 never stay before others"
    t = tl.sum(keys * 0, axis)[:, None]  # the smallest key that stays
    for i in range(31):
        candidate = t | (1 << (30 - i))
        t = tl.where(tl.sum((keys >= candidate).to(tl.int32), axis)[:, None] >= keep, candidate, t)
    above, equal = keys > t, (keys == t).to(tl.int32)
    room = keep - tl.sum(above.to(tl.int32), axis)[:, None]
    return above | ((equal > 0) & (tl.cumsum(equal, axis) <= room))


@triton.jit
def _select(
    x_ptr, source_ptr, out_ptr, keep, groups, group,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr, SQUARE: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * groups * group
    g, m = tl.arange(0, GROUPS)[:, None], tl.arange(0, GROUP)[None, :]
    at, inside = token + g * group + m, (g < groups) & (m < group)
    x = tl.load(x_ptr + at, inside, 0.0)
    nan = tl.max(tl.max((x != x).to(tl.int32), 1), 0) > 0
    x = x.to(tl.float32)
    if SQUARE:
        r = tl.maximum(x, 0.0)
        x = r * r
        if (
            x_ptr.dtype.element_ty == tl.bfloat16
        ):  # to nearest, ties to even, also where a cast does otherwise
            u = x.to(tl.int32, bitcast=True)
            x = ((u + 0x7FFF + ((u >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    keys = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if BLOCKS:  # sums in float64, as in the definition
        sums = tl.sum(tl.abs(x.to(tl.float64)), 1)
        score = (sums / group).to(tl.float32).to(tl.int32, bitcast=True)
        score = tl.where(tl.arange(0, GROUPS) < groups, score, -1)
        stays = tl.trans(_stay(score[None, :], keep, 1))
    else:
        stays = _stay(tl.where(inside, keys, -1), keep, 1)
    value = tl.load(source_ptr + at, inside, 0.0) if SOURCE else x
    value = tl.where(nan, float("nan"), tl.where(stays, value, 0.0))
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), inside)


def sparsify(x, source, keep, structure, group, square_relu):
    "As `lmlab.kernels.sparse.reference`; a token that holds a NaN becomes NaN"
    x = x.contiguous()
    source = x if source is None else source.to(x.dtype).contiguous()
    out, d = torch.empty_like(x), x.shape[-1]
    group = group or d
    if out.numel():
        width = triton.next_power_of_2(d)
        _select[(x.numel() // d,)](
            x, source, out, keep, d // group, group, triton.next_power_of_2(d // group), triton.next_power_of_2(group),
            structure == "block", square_relu, source is not x, num_warps=min(16, max(1, width // 256)),
        )  # fmt: skip
    return out
