"lmlab.core.fit: what survives a kill, what two processes agree on, and independent oracles for the rest"

import contextlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from lmlab.core import fit as lab

sys.path.insert(0, str(Path(__file__).parent))
import _fit_job as job  # noqa: E402

JOB = Path(job.__file__)


def start(*argv, **env):
    env = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", LMLAB_QUIET="1") | env
    p = subprocess.run(
        [sys.executable, *map(str, argv)], env=env, capture_output=True, text=True, timeout=900
    )
    assert p.returncode == 0, p.stdout[-2000:] + p.stderr[-4000:]


def gap(got, want):
    return max((torch.tensor(got[k]) - torch.tensor(want[k])).abs().max().item() for k in want)


# kill -9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_every_file_operation_and_at_random_moments(tmp_path):
    start(JOB, "crash", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    saves, moments = report["saves"], report["moments"]
    assert len(saves) >= 32 and len(moments) == 20
    assert {"mkdir", "save_file", "write_text", "fsync", "rename", "unlink", "rmdir"} == set(report["ops"])
    for s in saves:
        assert s["killed"], s
        assert s["step"] == s["expected"], s  # the previous state until the rename, the new one from then on
    for s in saves + moments:
        assert s["pure"], s  # weights and averages are those the unbroken run had at that step
        assert s["resumed_there"] and s["exact"] and s["same_end"], s
    assert len({s["step"] for s in saves}) == 3
    assert len({s["step"] for s in moments}) >= 5, moments


def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    seen = []

    def fsync(fd, real=os.fsync):
        seen.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")) if sys.platform == "linux" else "?")
        real(fd)

    def rename(a, b, real=os.rename):
        seen.append("rename")
        real(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    lab.save_checkpoint(tmp_path / "ck", 1, {"model": {"w": torch.ones(3)}}, {})
    before, after = seen[: seen.index("rename")], seen[seen.index("rename") + 1 :]
    assert len(before) == 4 and len(after) == 1
    if sys.platform == "linux":
        assert set(before[:-1]) == {"model.safetensors", "state.json", "manifest.json"}
        assert before[-1].startswith(".tmp-") and after == ["ck"]


# two processes


def test_two_processes_are_one(tmp_path):
    start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", JOB, "world", tmp_path)
    two, one = json.loads((tmp_path / "world.json").read_text()), job.world_runs()
    assert max(abs(a - b) for a, b in zip(two["losses"], one["losses"], strict=True)) < 1e-6
    assert gap(two["weights"], one["weights"]) < 1e-6
    assert two["tokens"] == one["tokens"] == 8 * 12 * 9
    assert two["resumed_at"] == 4 and two["dropout_resumed"] == two["dropout"]
    assert two["sharded"]["gap"] < 1e-6 and two["sharded"]["same"] and two["sharded"]["helps"]
    assert not two["sharded"]["names"]
    assert "batch_size: got 1" in two["refused"]
    shutil.rmtree(tmp_path / "ck" / "step-00000008")  # one process goes on where two stopped
    alone = job.world_runs(tmp_path)
    assert max(abs(a - b) for a, b in zip(alone["losses"], one["losses"], strict=True)) < 1e-6
    assert gap(alone["weights"], one["weights"]) < 1e-6


# accumulation


@pytest.mark.parametrize("rows,parts", [(2, 4), (1, 8), (4, 2)])
def test_accumulation_is_one_batch(rows, parts):
    def run(b, a):
        model = job.tiny().double()
        out = lab.fit(
            model,
            job.rows(),
            steps=10,
            batch_size=b,
            accumulate=a,
            lr=1e-2,
            loss=job.next_token,
            progress=False,
        )
        return job.losses(out), job.weights(model)

    (l8, w8), (l2, w2) = run(8, 1), run(rows, parts)
    assert max(abs(a - b) for a, b in zip(l8, l2, strict=True)) < 1e-13
    assert gap(w2, w8) < 1e-10


def test_micro_batch_without_a_label_has_no_part():
    data = {k: v[:8].clone() for k, v in job.rows(keep=0.9).items()}
    data["labels"][:, 1:] = data["input_ids"][:, 1:]
    data["labels"][::2] = -100

    def run(b, a):
        model = job.tiny().double()
        out = lab.fit(
            model, data, steps=6, batch_size=b, accumulate=a, lr=1e-2, loss=job.next_token, progress=False
        )
        return job.losses(out), job.weights(model)

    (l8, w8), (l1, w1) = run(8, 1), run(1, 8)
    assert max(abs(a - b) for a, b in zip(l8, l1, strict=True)) < 1e-13 and gap(w1, w8) < 1e-10


# damaged files


def mutants(path, other, chance):
    "Endless ways to damage one file of a checkpoint"
    data = path.read_bytes()
    kind = chance.choice(
        ["bit", "bit", "bit", "cut", "grow", "empty", "garbage", "missing", "swap", "zeros", "folder"]
    )
    if kind == "bit":
        i = chance.randrange(len(data))
        new = data[:i] + bytes([data[i] ^ (1 << chance.randrange(8))]) + data[i + 1 :]
    elif kind == "cut":
        new = data[: chance.randrange(len(data))]
    elif kind == "grow":
        new = data + chance.randbytes(chance.randrange(1, 9))
    elif kind == "zeros":
        new = bytes(len(data))
    elif kind == "empty":
        new = b""
    elif kind == "swap":
        new = (other / path.name).read_bytes()
    elif kind == "garbage":
        new = chance.choice(
            [
                b"[" * 100000,
                b"{}",
                b"null",
                b'{"files": 3, "sha256": ""}',
                b'{"files": {"state.json": [1]}}',
                b"\xff\xfe",
            ]
        )
    if kind == "missing":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(new)
    return kind, kind not in ("missing", "folder") and new == data


def test_damaged_checkpoints_are_never_loaded(tmp_path):
    chance, home = random.Random(7), tmp_path / "ck"
    run = dict(steps=4, batch_size=4, lr=1e-2, loss=job.next_token, save_every=2, progress=False)
    lab.fit(job.tiny(), job.rows(), **run, checkpoint=home)
    old, new = home / "step-00000002", home / "step-00000004"
    files, kept = sorted(p.name for p in new.iterdir()), tmp_path / "kept"
    assert files == [
        "history.safetensors",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    shutil.copytree(home, kept)
    kinds, slowest = set(), 0
    for i in range(400):
        name = files[i % len(files)]
        kind, harmless = mutants(new / name, kept / old.name, chance)
        kinds.add((kind, name))
        if not harmless:
            begun = time.perf_counter()
            with pytest.raises(lab.CheckpointError, match="step-00000004 is damaged"):
                lab.load_checkpoint(new)
            with pytest.warns(UserWarning, match="damaged.*using step-00000002"):
                assert lab.latest_checkpoint(home) == old
            slowest = max(slowest, time.perf_counter() - begun)
        shutil.rmtree(new / name) if (new / name).is_dir() else (new / name).unlink(missing_ok=True)
        shutil.copy(kept / new.name / name, new / name)
    assert len(kinds) > 40 and slowest < 2
    assert lab.latest_checkpoint(home) == new

    (new / "model.safetensors").write_bytes(b"")  # a run falls back to the older one, and repairs the newer
    with pytest.warns(UserWarning, match="damaged"):
        out = lab.fit(job.tiny(), job.rows(), **run, checkpoint=home)
    assert out.resumed == 2 and lab.latest_checkpoint(home) == new
    for p in (old, new):
        (p / "model.safetensors").write_bytes(b"")
    with pytest.raises(lab.CheckpointError, match="None is sound"):
        lab.fit(job.tiny(), job.rows(), **run, checkpoint=home)


def test_forged_manifest_cannot_make_safetensors_of_anything(tmp_path):
    "Files that hash right and are not what they claim: a clear error all the same"
    p = lab.save_checkpoint(tmp_path, 1, {"model": {"w": torch.ones(2)}}, {})
    for name, data in (("model.safetensors", b"\x80\x04junk"), ("state.json", b"{")):
        q = shutil.copytree(p, tmp_path / f"forged-{name}")
        (q / name).write_bytes(data)
        files = {f.name: [f.stat().st_size, lab.digest(f)] for f in q.iterdir() if f.name != "manifest.json"}
        (q / "manifest.json").write_text(json.dumps({"files": files, "sha256": lab.seal(files)}))
        with pytest.raises(lab.CheckpointError, match="cannot be read"):
            lab.load_checkpoint(q)


def test_checkpoint_of_something_else(tmp_path):
    run = dict(steps=2, batch_size=4, lr=1e-2, loss=job.next_token, progress=False)
    lab.fit(job.tiny(), job.rows(), **run, checkpoint=tmp_path)
    for k, v in dict(
        batch_size=2, lr=1e-3, steps=3, seed=1, schedule="linear", clip=None, betas=(0.9, 0.99)
    ).items():
        with pytest.raises(lab.CheckpointError, match=f"{k}: got "):
            lab.fit(job.tiny(), job.rows(), **{**run, k: v}, checkpoint=tmp_path)
    model = job.tiny(d=8)
    before = job.weights(model)
    with pytest.raises(lab.CheckpointError, match="in the checkpoint"):
        lab.fit(model, job.rows(), **run, checkpoint=tmp_path)
    assert job.weights(model) == before
    with pytest.raises(FileExistsError):
        lab.save_checkpoint(tmp_path, 2, {}, {})


def test_longer_run_of_a_constant_schedule_continues(tmp_path):
    run = dict(batch_size=4, lr=1e-2, loss=job.next_token, schedule="constant", warmup=1, progress=False)
    straight = lab.fit(job.tiny(), job.rows(), steps=6, **run)
    lab.fit(job.tiny(), job.rows(), steps=3, **run, checkpoint=tmp_path)
    longer = lab.fit(job.tiny(), job.rows(), steps=6, **run, checkpoint=tmp_path)
    assert longer.resumed == 3 and job.losses(longer) == job.losses(straight)


def test_frozen_weights_views_and_non_persistent_buffers(tmp_path):
    def model():
        m = job.tiny()
        m.embed.requires_grad_(False)
        m.register_buffer("view", m.mix.weight.detach()[:2])
        return m

    run = dict(steps=4, batch_size=4, lr=1e-2, loss=job.next_token, save_every=2, progress=False)
    a = model()
    f = lab.fit(a, job.rows(), **run, checkpoint=tmp_path)
    assert "embed.weight" not in lab.load_checkpoint(lab.latest_checkpoint(tmp_path))[0]["model"]
    shutil.rmtree(tmp_path / "step-00000004")
    b = model()
    g = lab.fit(b, job.rows(), **run, checkpoint=tmp_path)
    assert g.resumed == 2 and job.losses(f) == job.losses(g) and job.weights(a) == job.weights(b)
    assert a.calls == b.calls == 4


# oracles


@pytest.mark.parametrize("steps,warmup", [(20, 0), (20, 3), (100, 0.05), (7, 7), (1, 0), (33, 30)])
def test_schedules_are_those_of_transformers(steps, warmup):
    from transformers import get_scheduler
    from transformers.optimization import get_wsd_schedule

    warm = lab.warmup_steps(warmup, steps)
    decay = max(1, min(math.ceil(0.2 * steps), steps - warm))
    for ours, theirs in dict(
        constant="constant_with_warmup", cosine="cosine", linear="linear", wsd=None
    ).items():
        opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.5)
        if theirs:
            sched = get_scheduler(theirs, opt, num_warmup_steps=warm, num_training_steps=steps)
        else:
            sched = get_wsd_schedule(
                opt,
                num_warmup_steps=warm,
                num_decay_steps=decay,
                num_stable_steps=max(0, steps - warm - decay),
                decay_type="1-sqrt",
            )
        for step in range(steps):
            assert 0.5 * lab.rate(step, steps, ours, warm) == pytest.approx(
                sched.get_last_lr()[0], abs=1e-12
            ), (ours, step)
            opt.step()
            sched.step()


def test_trajectory_is_that_of_a_plain_torch_loop():
    from transformers import get_scheduler

    data, steps = job.rows(), 12
    model, plain = job.tiny().double(), job.tiny().double()
    out = lab.fit(
        model,
        data,
        steps=steps,
        batch_size=5,
        lr=3e-2,
        warmup=2,
        clip=0.5,
        loss=job.next_token,
        seed=3,
        progress=False,
    )
    named = list(plain.named_parameters())
    opt = torch.optim.AdamW(
        [
            {
                "params": [p for k, p in named if k.endswith("weight") and "norm" not in k],
                "weight_decay": 0.1,
            },
            {"params": [p for k, p in named if k.endswith("bias") or "norm" in k], "weight_decay": 0.0},
        ],
        lr=3e-2,
        betas=(0.9, 0.95),
        foreach=False,
        fused=False,
    )
    sched, want = get_scheduler("cosine", opt, num_warmup_steps=2, num_training_steps=steps), []
    plain.train()
    for step in range(steps):
        r = lab.stretch(24, 5 * step, 5 * step + 5, 3)
        loss = job.next_token(plain, {k: v[r] for k, v in data.items()})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        opt.step()
        sched.step()
        opt.zero_grad()
        want.append(loss.item())
    assert max(abs(a - b) for a, b in zip(job.losses(out), want, strict=True)) < 1e-12
    assert gap(job.weights(model), job.weights(plain)) < 1e-12


def llama(**kw):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **size, **kw))


def test_trajectory_is_that_of_transformers_trainer(tmp_path):
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    data = job.rows()
    data["labels"][:, 0] = -100  # never predicted, but the Trainer counts it
    model, theirs, steps = llama(), llama(), 6
    out = lab.fit(model, data, steps=steps, batch_size=2, accumulate=2, lr=1e-2, warmup=1, progress=False)
    order = lab.stretch(24, 0, 4 * steps, 0).tolist()

    class InOrder(Trainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        warmup_steps=1,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = InOrder(theirs, args, train_dataset=[{k: v[i] for k, v in data.items()} for i in order])
    with contextlib.redirect_stdout(None):
        trainer.train()
    want = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    assert max(abs(a - b) for a, b in zip(job.losses(out), want, strict=True)) < 1e-4  # their log is rounded
    assert gap(job.weights(model), job.weights(theirs)) < 2e-6


# data


def test_every_form_of_data_is_the_same_run():
    from datasets import Dataset

    ids = job.rows()["input_ids"]
    plain = Dataset.from_dict({"input_ids": ids.tolist()})
    forms = [
        {"input_ids": ids, "labels": ids},
        {"input_ids": ids.to(torch.uint8).numpy()},
        [{"input_ids": r} for r in ids],
        plain,
        plain.with_format("torch"),
        torch.utils.data.Subset([{"input_ids": r.tolist()} for r in ids], range(24)),
    ]
    want = None
    for data in forms:
        got = job.losses(lab.fit(llama(), data, steps=3, batch_size=4, lr=1e-2, progress=False))
        assert want is None or got == want, type(data)
        want = got


def test_padding_is_not_learnt_without_labels():
    ids, mask = torch.randint(0, 32, (8, 9)), torch.ones(8, 9, dtype=torch.long)
    mask[:, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    run = dict(steps=2, batch_size=4, lr=1e-2, progress=False)
    a = lab.fit(llama(), {"input_ids": ids, "attention_mask": mask}, **run)
    b = lab.fit(llama(), {"input_ids": ids, "attention_mask": mask, "labels": labels}, **run)
    assert job.losses(a) == job.losses(b)


BAD = [
    ("steps", 0),
    ("steps", 2.0),
    ("batch_size", -1),
    ("accumulate", 0),
    ("keep", 0),
    ("lr", 0.0),
    ("lr", "1e-3"),
    ("schedule", "cosin"),
    ("warmup", 1.5),
    ("warmup", 99),
    ("weight_decay", -0.1),
    ("betas", (0.9, 1.0)),
    ("betas", 0.9),
    ("clip", 0),
    ("precision", "fp16"),
    ("eval_every", 0),
    ("save_every", -1),
    ("seed", -1),
    ("data", []),
    ("data", {}),
    ("data", {"input_ids": torch.zeros(0, 4)}),
    ("data", {"input_ids": torch.zeros(3, 4), "labels": torch.zeros(2, 4)}),
    ("data", iter([])),
    ("data", "corpus.txt"),
    ("data", ["text"]),
    ("data", [{"text": "abc"}]),
    ("data", {"ids": torch.zeros(3, 4)}),
]


@pytest.mark.parametrize("name,value", BAD, ids=lambda o: str(o)[:20])
def test_wrong_arguments_are_refused(name, value):
    model = job.tiny()
    before, args = job.weights(model), dict(data=job.rows(), steps=2, batch_size=2, lr=1e-3)
    with pytest.raises(ValueError, match=f"^{name}: .*allowed"):
        lab.fit(model, **{**args, name: value}, progress=False)
    assert job.weights(model) == before


def test_datasetdict_and_models_without_a_loss_are_refused():
    from datasets import Dataset, DatasetDict

    run = dict(steps=1, batch_size=1, lr=1e-3, progress=False)
    with pytest.raises(ValueError, match="one split"):
        lab.fit(job.tiny(), DatasetDict(train=Dataset.from_dict({"input_ids": [[1, 2]]})), **run)
    lin = torch.nn.Linear(2, 2)
    lin.forward = lambda input_ids, labels: input_ids
    with pytest.raises(ValueError, match="model: got no loss"):
        lab.fit(lin, job.rows(), **run)
    with pytest.raises(ValueError, match="requires grad"):
        lab.fit(torch.nn.Linear(2, 2).requires_grad_(False), job.rows(), **run)
    with pytest.raises(ValueError, match="loss: got a float"):
        lab.fit(job.tiny(), job.rows(), **run, loss=lambda m, b: 1.0)


# the loop's manners


def test_the_caller_is_not_disturbed():
    model = job.tiny(drop=0.5).eval()
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    run = dict(steps=6, batch_size=4, lr=1e-2, loss=job.next_token, collate=job.noisy, progress=False)
    quiet = lab.fit(model, job.rows(), **run)
    assert torch.equal(torch.rand(3), want) and not model.training
    assert all(p.grad is None for p in model.parameters())

    def noisy_look(m):
        assert not m.training and not torch.is_grad_enabled()
        return {"x": torch.rand(()).item()}

    looked = lab.fit(job.tiny(drop=0.5), job.rows(), **run, evaluate=noisy_look, eval_every=4)
    assert job.losses(looked) == job.losses(quiet)
    assert [e["step"] for e in looked.evals] == [4, 6]
    assert lab.fit(job.tiny(), job.rows(), **run, evaluate=lambda m: 1).evals == [{"step": 6, "value": 1.0}]


def test_bar_is_silent_for_short_runs_and_shows_loss_speed_and_time_left(capsys, monkeypatch):
    run = dict(batch_size=4, lr=1e-2, loss=job.next_token)
    monkeypatch.delenv("LMLAB_QUIET", raising=False)
    lab.fit(job.tiny(), job.rows(), steps=5, **run)
    assert capsys.readouterr().err == ""
    tqdm = sys.modules["tqdm.auto"].tqdm
    monkeypatch.setattr(
        sys.modules["tqdm.auto"], "tqdm", lambda **kw: tqdm(**{**kw, "delay": 0, "mininterval": 0})
    )
    lab.fit(job.tiny(), job.rows(), steps=5, **run)
    shown = capsys.readouterr().err
    assert re.search(r"5/5 \[\d\d:\d\d<\d\d:\d\d.*loss \d\.\d{4}, [\d,]+ tokens/s", shown)
    lab.fit(job.tiny(), job.rows(), steps=5, **run, progress=False)
    assert capsys.readouterr().err == ""


def test_a_loss_that_is_no_number_leaves_the_checkpoint(tmp_path):
    calls = iter(range(99))

    def loss(model, batch):
        return job.next_token(model, batch) * (math.inf if next(calls) == 7 else 1)

    model = job.tiny()
    with pytest.raises(FloatingPointError, match="step 8: loss inf.*untouched.*lower lr"):
        lab.fit(
            model, job.rows(), steps=9, batch_size=4, lr=1e-2, loss=loss, checkpoint=tmp_path, save_every=3
        )
    assert lab.latest_checkpoint(tmp_path).name == "step-00000006"
    assert all(p.isfinite().all() for p in model.parameters())


def test_bf16_keeps_float32_weights():
    model = llama()
    half = lab.fit(model, job.rows(), steps=4, batch_size=4, lr=1e-2, precision="bf16", progress=False)
    full = lab.fit(llama(), job.rows(), steps=4, batch_size=4, lr=1e-2, progress=False)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert job.losses(half) != job.losses(full) and job.losses(half) == pytest.approx(
        job.losses(full), abs=0.05
    )


def test_nothing_is_pickled(tmp_path, monkeypatch):
    import pickle

    for name in ("dumps", "dump", "loads", "load"):
        monkeypatch.setattr(pickle, name, lambda *a, **k: pytest.fail("pickled"))
    monkeypatch.setattr(torch, "save", lambda *a, **k: pytest.fail("torch.save"))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load"))
    run = dict(batch_size=4, lr=1e-2, loss=job.next_token, schedule="constant", warmup=0, progress=False)
    lab.fit(job.tiny(), job.rows(), steps=2, **run, checkpoint=tmp_path)
    assert lab.fit(job.tiny(), job.rows(), steps=3, **run, checkpoint=tmp_path).resumed == 2
    assert {p.suffix for p in lab.latest_checkpoint(tmp_path).iterdir()} == {".safetensors", ".json"}


# sweeps


def half(x):
    if x == 3:
        raise KeyError("three")
    if x == 4:
        os._exit(1)
    return {"half": x / 2, "threads": torch.get_num_threads(), "pid": os.getpid()}


def test_sweep(monkeypatch):
    got = lab.sweep(half, [{"x": i} for i in (9, 0, 7, 1)], jobs=2)
    assert [(r["x"], r["half"], r["threads"]) for r in got] == [
        (9, 4.5, 1),
        (0, 0, 1),
        (7, 3.5, 1),
        (1, 0.5, 1),
    ]
    assert os.getpid() not in {r["pid"] for r in got}
    with pytest.raises(
        lab.SweepError, match=r"1 of 3 settings failed, the first is \{'x': 3\}: KeyError"
    ) as e:
        lab.sweep(half, [{"x": i} for i in (2, 3, 8)], jobs=2)
    assert [r and r["half"] for r in e.value.results] == [1, None, 4]
    with pytest.raises(lab.SweepError, match="worker process|unexpectedly|Terminated"):
        lab.sweep(half, [{"x": 4}, {"x": 4}], jobs=2)
    assert lab.sweep(half, [{"x": 2}], jobs=2)[0]["half"] == 1  # the pool recovers
    assert lab.sweep(half, [{"x": 2}], jobs=1)[0]["pid"] == os.getpid()
    assert lab.sweep(half, []) == []
    monkeypatch.setenv("LMLAB_JOBS", "1")
    assert lab.sweep(half, [{"x": 2}, {"x": 5}])[1]["pid"] == os.getpid()
    for jobs, name in ((0, "jobs"), (1.5, "jobs")):
        with pytest.raises(ValueError, match=f"{name}: got"):
            lab.sweep(half, [{"x": 1}], jobs=jobs)
    monkeypatch.setenv("LMLAB_JOBS", "many")
    with pytest.raises(ValueError, match="LMLAB_JOBS: got 'many'"):
        lab.sweep(half, [{"x": 1}])
    with pytest.raises(ValueError, match="settings: got"):
        lab.sweep(half, [3], jobs=1)
    with pytest.raises(lab.SweepError, match="returns a dict"):
        lab.sweep(lambda x: x, [{"x": 1}], jobs=1)


def test_overhead_of_a_step():
    "Under a millisecond of processor time on top of a tiny model's own step; on a slow machine, under one and a half of its steps"
    data, run = job.rows(), dict(batch_size=4, lr=1e-2, loss=job.next_token, progress=False)

    def bare(steps):
        model = job.tiny()
        opt = lab.adamw(model, 1e-2)
        for s in range(steps):
            r = lab.stretch(24, 4 * s, 4 * s + 4, 0)
            job.next_token(model, {k: v[r] for k, v in data.items()}).backward()
            opt.step()
            opt.zero_grad()

    def ms(f):
        begun = time.process_time()
        f(100)
        return (time.process_time() - begun) * 10

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = [
            (ms(bare), ms(lambda steps: lab.fit(job.tiny(), data, steps=steps, **run))) for _ in range(4)
        ]
    bare_ms, fit_ms = (min(p[i] for p in pairs) for i in (0, 1))
    assert fit_ms - bare_ms < max(1, 1.5 * bare_ms), pairs
