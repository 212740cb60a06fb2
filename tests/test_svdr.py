"""What the chapter on SVDR cannot show in one process: training over several, and an encoder as others load it."""

import os
import subprocess
import sys

import pytest
import torch

from lmlab.retrieval.svdr import (
    SVDRConfig,
    SVDREncoder,
    SVDRRetriever,
    across,
    semi_parametric_loss,
    symmetric_nll,
)

SIZE = dict(vocab_size=1200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


def views(n, v=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    emb = [torch.rand(m, v, generator=g) * 2 for m in (n, 2 * n)]
    return *emb, *((torch.rand(m, v, generator=g) < 0.1).float() for m in (n, 2 * n))


JOB = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, os.path.dirname({here!r}))
from test_svdr import views
from lmlab.retrieval.svdr import semi_parametric_loss
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{file}", rank=rank, world_size=2)
q, p, qb, pb = views(6)
mine = slice(3 * rank, 3 * rank + 3)
take = lambda t: torch.cat([o[mine] for o in t.split(6)])
q, p = q[mine].requires_grad_(), take(p).requires_grad_()
loss = semi_parametric_loss(q, p, qb[mine], take(pb), 9)
loss.backward()
torch.save([loss.detach(), q.grad, p.grad], "{out}" + str(rank))
"""


def test_two_processes_share_one_batch(tmp_path):
    "The loss over two processes is that of the whole batch, and gradients add up to its gradients (each process counts the whole loss, so twice)"
    code = JOB.format(here=os.path.abspath(__file__), file=tmp_path / "meet", out=str(tmp_path / "out"))
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    jobs = [subprocess.Popen([sys.executable, "-c", code, str(i)], env=env) for i in range(2)]
    assert [j.wait(timeout=120) for j in jobs] == [0, 0]
    q, p, qb, pb = views(6)
    q.requires_grad_(), p.requires_grad_()
    loss = semi_parametric_loss(q, p, qb, pb, 9)
    loss.backward()
    for rank in range(2):
        got, dq, dp = torch.load(tmp_path / f"out{rank}", weights_only=True)
        mine = slice(3 * rank, 3 * rank + 3)
        torch.testing.assert_close(got, loss.detach())
        torch.testing.assert_close(dq / 2, q.grad[mine])
        torch.testing.assert_close(dp / 2, torch.cat([o[mine] for o in p.grad.split(6)]))


def test_one_process_gathers_nothing():
    t = torch.rand(4, 3)
    assert across(t, 2) is t


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_is_masked_by_every_attention(attention):
    "A retriever made of encoders leaves their attention as it was: without a name the library masks nothing"
    torch.manual_seed(0)
    e = SVDREncoder(SVDRConfig(backbone=SIZE, topk=5)).eval()
    e.set_attn_implementation(attention)
    r = SVDRRetriever(e).eval()
    assert r.query.backbone.config._attn_implementation == attention
    ids = torch.randint(1000, 1200, (1, 9), generator=torch.Generator().manual_seed(0))
    padded, mask = torch.nn.functional.pad(ids, (0, 4)), torch.tensor([[1] * 9 + [0] * 4])
    with torch.no_grad():
        torch.testing.assert_close(r.query(padded, mask), r.query(ids), rtol=1e-5, atol=1e-6)


def test_any_bert_like_body(tmp_path):
    "DistilBERT and RoBERTa become encoders as BERT does; what is saved is read back to the bit"
    from transformers import AutoModel, DistilBertConfig, RobertaConfig

    ids = torch.randint(1000, 1200, (2, 7), generator=torch.Generator().manual_seed(0))
    small = dict(vocab_size=1200, max_position_embeddings=64)
    for config in (
        DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=2, **small),
        RobertaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, **small
        ),
    ):
        e = SVDREncoder(SVDRConfig(backbone=config, topk=5)).eval()
        e.save_pretrained(tmp_path / config.model_type)
        back = AutoModel.from_pretrained(tmp_path / config.model_type).eval()
        assert isinstance(back, SVDREncoder)
        with torch.no_grad():
            assert torch.equal(back(ids), e(ids))


def test_gradient_checkpointing_changes_nothing():
    torch.manual_seed(0)
    e = SVDREncoder(
        SVDRConfig(backbone=SIZE | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), topk=5)
    ).train()
    ids, grads = torch.randint(1000, 1200, (2, 7)), []
    for on in (False, True):
        if on:
            e.gradient_checkpointing_enable()
        e.zero_grad()
        e(ids).square().mean().backward()
        grads.append({k: p.grad.clone() for k, p in e.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for k, v in grads[0].items():
        torch.testing.assert_close(grads[1][k], v)


def test_scores_are_taken_in_float32():
    big = torch.full((3, 20_000), 30.0, dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        assert symmetric_nll(big, big.repeat(2, 1)).dtype == torch.float32


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(topk=300), "topk: got 300"),
        (dict(shift=1200, topk=0), "shift: got 1200"),
        (dict(max_length=2), "max_length: got 2"),
        (dict(pooling_topk=0), "pooling_topk: got 0"),
    ],
)
def test_bad_settings_are_refused(change, says):
    with pytest.raises(Exception, match=says):
        SVDRConfig(backbone=SIZE, **dict(topk=5) | change)


def test_parts_that_do_not_fit_are_refused():
    make = lambda **kw: SVDREncoder(SVDRConfig(backbone=SIZE, topk=5, **kw))
    with pytest.raises(Exception, match="shift 900"):
        SVDRRetriever(make(), make(shift=900))
    with pytest.raises(ValueError, match="tokenizer: got None"):
        make().encode(["a text"])
