"""What does not fit a notebook: mutated files through every loader, other processes, two processes that train once."""

import gzip
import json
import os
import random
import subprocess
import sys
import time

import pytest

from lmlab.core.corpora import load

N = 40  # mutations of each kind of file


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "One good file of each kind, 40 documents each"
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path_factory.mktemp("good")
    docs = [f"Document {i}: naïve café, “quoted”,\n{'lorem ipsum ' * i}\n" for i in range(40)]
    lines = "".join(json.dumps(dict(text=t, n=i), ensure_ascii=i % 2 == 0) + "\n" for i, t in enumerate(docs))
    quoted = "".join(f'"{t}",{i}\n' for i, t in enumerate(docs))
    body = {
        "a.txt": "\n\n".join(d * 60 for d in docs).encode(),
        "a.jsonl": lines.encode(),
        "a.csv": f"text,n\n{quoted}".encode(),
        "a.json": json.dumps([dict(text=t) for t in docs]).encode(),
    }
    body |= {"b.txt.gz": gzip.compress(body["a.txt"]), "b.jsonl.gz": gzip.compress(body["a.jsonl"])}
    for name, b in body.items():
        (root / name).write_bytes(b)
    for codec in ("NONE", "SNAPPY"):
        pq.write_table(
            pa.table(dict(text=docs, n=list(range(40)))), root / f"{codec.lower()}.parquet", compression=codec
        )
    return sorted(root.iterdir())


def mutate(b, r):
    "Cut, drop, flip, double, insert rubbish, or put zeros"
    i, j = sorted(r.sample(range(len(b)), 2))
    j = min(j, i + 64)
    k = r.randrange(7)
    if k == 0:
        return b[:i]
    if k == 1:
        return b[:i] + b[j:]
    if k == 2:
        out = bytearray(b)
        for _ in range(r.choice((1, 8))):
            out[r.randrange(len(b))] ^= 1 << r.randrange(8)
        return bytes(out)
    if k == 3:
        return b[:j] + b[i:]
    if k == 4:
        return b[:i] + r.randbytes(r.choice((1, 16))) + b[i:]
    if k == 5:
        return b[:i] + b"\0" * (j - i) + b[j:]
    return r.randbytes(len(b) // 4)


def test_good_files_load(files):
    for f in files:
        assert len(load(f, split="all")) >= 40, f


def test_mutated_files(files, tmp_path):
    "Each either loads or is one ValueError that names the argument and the file, within two seconds"
    r, refused, slow = random.Random(0), 0, []
    for f in files:
        good = f.read_bytes()
        for i in range(N):
            p = tmp_path / f.name
            p.write_bytes(mutate(good, r))
            t = time.process_time()
            try:
                ds = load(p)
                assert set(ds) == {"train", "validation", "test"} and all(
                    isinstance(x, str) for x in ds["train"]["text"]
                )
            except ValueError as e:
                refused += 1
                assert (
                    type(e) is ValueError and str(e).startswith(("source: ", "text: ")) and "\n" not in str(e)
                ), (f.name, i, repr(e))
            slow.append(time.process_time() - t)
    assert len(slow) == N * len(files) >= 200 and max(slow) < 2
    assert refused > len(slow) // 3


@pytest.mark.parametrize(
    "name,body,says",
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\xff\xfea\0", "not UTF-8"),
        ("a.jsonl", b"[1]\n", "not an object"),
        ("a.jsonl", b'{"text": 1}\n', "holds int"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "not valid Unicode"),
        ("a.jsonl", b"[" * 100_000, "not JSON"),
        ("a.csv", b"", "not a readable csv"),
        ("a.csv", b"x,y\n1,2\n", "its columns are ['x', 'y']"),
        ("a.parquet", b"PAR1", "not a readable parquet"),
        ("a.gz", b"\x1f\x8b", "cannot be read"),
        ("a.json", b"3", "not an object"),
    ],
)
def test_broken_files(name, body, says, tmp_path):
    (tmp_path / name).write_bytes(body)
    with pytest.raises(ValueError) as e:
        load(tmp_path / name)
    assert says in str(e.value) and len(str(e.value)) < 600


def python(code, **env):
    return subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | env, stdout=subprocess.PIPE, text=True
    )


def test_same_in_every_process(tmp_path):
    "Neither the hash seed nor the order in which files were made changes a split or an order"
    names = [f"{i}.txt" for i in range(30)]
    for part, order in (("a", names), ("b", names[::-1])):
        (tmp_path / part).mkdir()
        for n in order:
            (tmp_path / part / n).write_text(f"text of {n}\n")
    code = "import sys; from lmlab.core.corpora import load; print({s: list(d['text']) for s, d in load(sys.argv[1], seed=3).items()})"
    runs = [
        python(f"import sys; sys.argv = ['', {str(tmp_path / p)!r}]; {code}", PYTHONHASHSEED=h)
        for p, h in (("a", "1"), ("b", "2"))
    ]
    a, b = (r.communicate(timeout=600)[0] for r in runs)
    assert a == b and "text of 0.txt" in a


def test_two_processes_train_once(tmp_path):
    code = """
from lmlab.core import nano
train = nano._train
def counted(*args): print("trained"); train(*args)
nano._train = counted
model, tok = nano.nano_lm(size="pico", steps=2, source="pydoc", progress=False)
print("weight", sum(p.double().sum().item() for p in model.parameters()))
"""
    runs = [python(code, LMLAB_CACHE=str(tmp_path)) for _ in range(2)]
    out = "".join(r.communicate(timeout=900)[0] for r in runs).split("\n")
    assert [r.returncode for r in runs] == [0, 0]
    assert out.count("trained") == 1
    weights = [line for line in out if line.startswith("weight")]
    assert len(weights) == 2 and weights[0] == weights[1]
