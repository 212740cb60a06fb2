"""What an adapter must do in several processes; everything else stands in its notebooks and in the shared checker."""

import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from lmlab.adapters.common import load_adapter, modules_of
from lmlab.core.check import tiny_llama


def test_two_processes_train_as_one(tmp_path):
    job = Path(__file__).parent / "_adapter_job.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(job), str(tmp_path)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "world 2, 10 tensors trained" in done.stdout, done.stdout
    model = load_adapter(LlamaForCausalLM(tiny_llama()), tmp_path)
    assert len(modules_of(model, "default")) == 5
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(
        torch.equal(p, torch.zeros_like(p))
        for m in modules_of(model, "default").values()
        for p in m.parameters()
    )
