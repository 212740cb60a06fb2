"""Run under `torchrun` by test_adapters.py: an adapted model trained by two processes against the same by one."""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from lmlab.adapters.common import LoraConfig, get_lora_model
from lmlab.core.check import test_rel, tiny_llama


def adapted():
    "The same model in every process; its second adapter trains, the first waits"
    torch.manual_seed(0)
    model = get_lora_model(LlamaForCausalLM(tiny_llama()), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "down_proj", "embed_tokens"]))
    return model


def train(model, ids):
    "Three steps on `ids`"
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        opt.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        opt.step()


def main(out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    assert world == 2, f"{world} processes"
    ids = torch.randint(3, 61, (6, 7), generator=torch.Generator().manual_seed(0))
    one, two = adapted(), adapted()
    start = {n: p.detach().clone() for n, p in two.named_parameters()}
    train(one, ids)
    train(DistributedDataParallel(two), ids[rank::world].contiguous())
    want, worst, moved = dict(one.named_parameters()), 0.0, 0
    for n, p in two.named_parameters():
        if p.requires_grad:
            worst = max(worst, test_rel(p, want[n], 1e-5))
            moved += not torch.equal(p, start[n])
        else:
            assert torch.equal(p, start[n]), n
    if rank == 0:
        two.save_pretrained(out)
        print(f"world {world}, {moved} tensors trained, worst {worst:.2g}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)
