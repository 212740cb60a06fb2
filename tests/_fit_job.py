"""Training runs that need processes of their own, for test_fit.py.

`python _fit_job.py crash OUT` kills runs at every file operation of a save and at random moments, resumes each, and writes
what it saw to OUT. It is one warm interpreter that forks a child per run. `torchrun … _fit_job.py world OUT` trains in two processes.
"""

import json
import mmap
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lmlab.core import fit as lab

SEED = 20


class Tiny(nn.Module):
    "Tied weights, dropout, a norm, a buffer that training changes"

    def __init__(self, vocab=32, d=16, drop=0.0):
        super().__init__()
        self.embed, self.mix, self.norm = nn.Embedding(vocab, d), nn.Linear(d, d), nn.LayerNorm(d)
        self.drop, self.head = nn.Dropout(drop), nn.Linear(d, vocab, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, ids):
        self.calls += self.training
        return self.head(self.drop(self.norm(torch.tanh(self.mix(self.embed(ids))))))


def tiny(**kw):
    torch.manual_seed(0)
    return Tiny(**kw)


def next_token(model, batch):
    logits, labels = model(batch["input_ids"])[:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def rows(n=24, length=9, vocab=32, keep=0.5):
    "Rows with unequal numbers of labels that count; the first has one, so some micro-batches have next to none"
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab, (n, length), generator=g)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=g) > keep, -100)
    labels[: n // 3] = -100
    labels[:, -1] = ids[:, -1]
    return {"input_ids": ids, "labels": labels}


def noisy(batch):
    "A collator that draws from all three generators"
    out = {k: torch.stack([r[k] for r in batch]) for k in batch[0]}
    spot = (torch.rand(out["input_ids"].shape) + np.random.rand() + random.random()) > 2.2
    return dict(out, input_ids=out["input_ids"].masked_fill(spot, 0))


def losses(out):
    return [h["loss"] for h in out.history]


# killed at a save, killed at random


def train(folder, steps, save_every, keep=2, loss=next_token):
    return lab.fit(
        tiny(drop=0.2),
        rows(),
        steps=steps,
        batch_size=4,
        accumulate=2,
        lr=1e-2,
        loss=loss,
        collate=noisy,
        checkpoint=folder,
        save_every=save_every,
        keep=keep,
        progress=False,
    )


def fork(work):
    "Start `work` in a child process; its pid"
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid):
    "How the child ended: negative for a signal"
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Fuse:
    """Counts the file operations of the saves and dies of SIGKILL just before number `blow`.

    The machine loses power, too: what was written and not flushed is cut in half before the process dies."""

    def __init__(self, folder, blow=None, torn=False):
        self.folder, self.blow, self.torn, self.seen = Path(folder), blow, torn, []
        self.safe = {p.stat().st_ino for p in self.folder.rglob("*") if p.is_file()}
        for module, name in [(os, o) for o in ("mkdir", "fsync", "rename", "unlink", "rmdir")]:
            setattr(module, name, self.wrap(name, getattr(module, name)))
        import safetensors.torch

        safetensors.torch.save_file = self.wrap("save_file", safetensors.torch.save_file, path=1)
        Path.write_text = self.wrap("write_text", Path.write_text, path=0)

    def wrap(self, name, real, path=None):
        def counted(*args, **kw):
            now = self.blow == len(self.seen)
            self.seen.append(name)
            if now and path is not None and self.torn:
                real(*args, **kw)  # not flushed, so cut below
            if now:
                self.die()
            out = real(*args, **kw)
            if name == "fsync":
                self.safe.add(os.fstat(args[0]).st_ino)
            return out

        return counted

    def die(self):
        for p in self.folder.rglob("*"):
            if p.is_file() and p.stat().st_ino not in self.safe:
                os.truncate(p, p.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def fingerprints(folder):
    "step -> hashes of weights and optimiser, of the checkpoints that verify"
    out = {}
    for step, p in lab.saved_steps(folder):
        try:
            files = lab.verify(p)
        except lab.CheckpointError:
            continue
        out[step] = [files["model.safetensors"][1], files["optimizer.safetensors"][1]]
    return out


def resumed(folder, result, **run):
    "In a child: what the newest checkpoint is, then the losses of the run that resumes from it"

    def work():
        latest = lab.latest_checkpoint(folder)
        step = int(latest.name[5:]) if latest else 0
        found = fingerprints(folder).get(step)
        out = train(folder, **run)
        result.write_text(
            json.dumps([step, found, losses(out), out.resumed, fingerprints(folder)[run["steps"]]])
        )

    assert wait(fork(work)) == 0, f"resuming failed in {folder}"
    return json.loads(result.read_text())


def crash(out):
    torch.set_num_threads(1)
    lab.progress_bar(True).close()  # what a run imports, imported once, here
    lab.adamw(tiny(), 1e-2).zero_grad()
    import accelerate.utils  # noqa: F401
    import safetensors.torch  # noqa: F401

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    report = {"saves": [], "moments": []}

    def reference(name, **run):
        result = out / f"{name}.json"

        def work():
            f = train(out / name, **{**run, "keep": 99})
            result.write_text(json.dumps([losses(f), fingerprints(out / name)]))

        assert wait(fork(work)) == 0
        want, states = json.loads(result.read_text())
        return want, {int(k): v for k, v in states.items()}

    # 1. at each file operation of two saves, of which the second also removes the first
    run = dict(steps=6, save_every=3, keep=1)
    want, states = reference("ref-save", **run)

    def dry():
        fuse = Fuse(out / "dry")
        train(out / "dry", **run)
        (out / "ops.json").write_text(json.dumps(fuse.seen))

    assert wait(fork(dry)) == 0
    ops = json.loads((out / "ops.json").read_text())
    report["ops"] = ops
    points = [(k, False) for k in range(len(ops))]
    points += [(k, True) for k, name in enumerate(ops) if name in ("save_file", "write_text")]
    for k, torn in points:
        folder = out / f"save-{k}-{torn}"

        def work(folder=folder, k=k, torn=torn):
            Fuse(folder, k, torn)
            train(folder, **run)

        code = wait(fork(work))
        step, found, got, at, last = resumed(folder, out / "r.json", **run)
        report["saves"].append(
            dict(
                op=ops[k],
                killed=code == -signal.SIGKILL,
                torn=torn,
                step=step,
                expected=3 * ops[:k].count("rename"),
                resumed_there=at == step,
                pure=step == 0 or found == states[step],
                exact=got == want,
                same_end=last == states[6],
            )
        )

    # 2. at random moments: after a random number of micro-batches, and then a random time
    run = dict(steps=24, save_every=3)
    want, states = reference("ref-moments", **run)
    chance, tries, beat = random.Random(SEED), 0, mmap.mmap(-1, 8)

    def counted(folder):
        def loss(model, batch):
            beat[:8] = (int.from_bytes(beat[:8], "little") + 1).to_bytes(8, "little")
            return next_token(model, batch)

        train(folder, **run, loss=loss)

    while len(report["moments"]) < 20 and tries < 100:
        tries += 1
        folder, after = out / f"moment-{tries}", chance.randrange(2 * run["steps"])
        beat[:8] = bytes(8)
        pid = fork(lambda folder=folder: counted(folder))
        while int.from_bytes(beat[:8], "little") < after:
            time.sleep(2e-4)
        time.sleep(0.03 * chance.random() ** 3)
        os.kill(pid, signal.SIGKILL)
        if wait(pid) == 0:
            continue  # it was faster
        step, found, got, at, last = resumed(folder, out / "r.json", **run)
        report["moments"].append(
            dict(
                step=step,
                resumed_there=at == step,
                pure=step == 0 or found == states[step],
                exact=got == want,
                same_end=last == states[24],
            )
        )
    (out / "report.json").write_text(json.dumps(report))


# two processes


def weights(model):
    return {k: p.detach().tolist() for k, p in model.named_parameters()}


def world_runs(out=None):
    "What one process and two must agree on"
    run = dict(steps=8, batch_size=6, accumulate=2, lr=1e-2, loss=next_token, progress=False)
    model = tiny()
    f = lab.fit(model, rows(), **run, checkpoint=out and Path(out) / "ck", save_every=4)
    return {"losses": losses(f), "weights": weights(model), "tokens": f.history[-1]["tokens"]}


def world(out):
    "Under torchrun"
    torch.set_num_threads(1)
    from accelerate import PartialState

    state, out = PartialState(cpu=True), Path(out)
    assert state.num_processes == 2 and torch.distributed.get_backend() == "gloo", state
    got = world_runs(out)
    drop = dict(
        steps=8, batch_size=5, accumulate=2, lr=1e-2, loss=next_token, progress=False
    )  # shares of 3 and 2
    got["dropout"] = losses(lab.fit(tiny(drop=0.3), rows(), **drop, checkpoint=out / "drop", save_every=4))
    if state.is_main_process:
        import shutil

        shutil.rmtree(out / "drop" / "step-00000008")
    state.wait_for_everyone()
    again = lab.fit(tiny(drop=0.3), rows(), **drop, checkpoint=out / "drop", save_every=4)
    got["dropout_resumed"], got["resumed_at"] = losses(again), again.resumed
    got["sharded"] = sharded()
    try:
        lab.fit(tiny(), rows(), **dict(drop, batch_size=1))
    except ValueError as e:
        got["refused"] = str(e)
    if state.is_main_process:
        (out / "world.json").write_text(json.dumps(got))
    state.wait_for_everyone()
    state.destroy_process_group()


def sharded():
    "Weights spread over two processes are gathered whole, saved, and dealt again"
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))

    def trained(steps):
        model = tiny()
        fully_shard(model, mesh=mesh)
        opt = lab.adamw(model, 1e-2)
        for _ in range(steps):
            next_token(model, rows()).backward()
            opt.step()
            opt.zero_grad()
        return model, opt

    model, opt = trained(2)
    plain = tiny()
    plain_opt = lab.adamw(plain, 1e-2)
    for _ in range(2):
        next_token(plain, rows()).backward()
        plain_opt.step()
        plain_opt.zero_grad()
    got, want = lab.captured(model, opt), lab.captured(plain, plain_opt)
    gap = max((got[s][k] - want[s][k]).abs().max().item() for s in want for k in want[s])
    fresh, fresh_opt = trained(0)
    lab.restore(fresh, fresh_opt, got)
    back = lab.captured(fresh, fresh_opt)
    same = all(torch.equal(back[s][k], got[s][k]) for s in got for k in got[s])
    helps = all(v is None for s in lab.captured(model, opt, keep=False).values() for v in s.values())
    return dict(gap=gap, names=[s for s in want if got[s].keys() != want[s].keys()], same=same, helps=helps)


if __name__ == "__main__":
    {"crash": crash, "world": world}[sys.argv[1]](sys.argv[2])
