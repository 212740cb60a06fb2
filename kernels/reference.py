"""What each operation means, in torch: the definition that every other backend is tested against, on any device and dtype."""

import torch


def _wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _decay(g, like):
    g = g.to(_wide(like))
    below = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).tril()
    return (g[..., :, None] - g[..., None, :]).masked_fill(~below, -torch.inf).exp(), below


def decay_scores(scores, g):
    "`scores[i,j] * exp(g[i] - g[j])` on and below the diagonal, zero above"
    d, below = _decay(g, scores)
    return (scores.to(d.dtype) * d).masked_fill(~below, 0).to(scores.dtype)


def decay_scores_backward(grad, out, g):
    "Gradients of `decay_scores` for `scores` and `g`, from its output"
    d, below = _decay(g, grad)
    grad_scores = (grad.to(d.dtype) * d).masked_fill(~below, 0).to(grad.dtype)
    p = (grad.to(d.dtype) * out.to(d.dtype)).tril(-1)
    return grad_scores, (p.sum(-1) - p.sum(-2)).to(g.dtype)


def read_bytes(x):
    "The sum of `x`'s memory as 64-bit words, modulo 2**64; a last partial word is filled with zeros"
    flat = x.contiguous().view(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    last = flat.new_zeros(8)
    last[: flat.numel() - whole] = flat[whole:]
    return torch.cat([flat[:whole], last]).view(torch.int64).sum()
