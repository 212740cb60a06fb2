"""The indexes: the same bytes however they are built, whole after a kill, damage refused by name, bounded memory, and search that is a matrix product."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import native
import numpy as np
import pytest
import torch
from datasets import Dataset
from lmlab.kernels import backend, cpu, postings

from lmlab.core.check import math_threads, poisoned_memory
from lmlab.core.check_loader import check_loader
from lmlab.retrieval import common as R

built = pytest.mark.skipif(cpu.library() is None, reason=f"no C++ library: {cpu.missing()}")
FORMS = ["reference", pytest.param("cpu", marks=built)]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    "A WordPiece of BERT's kind with 100 ids below the shift, from no download"
    from transformers import BertTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [f"w{c}" for c in "abcdefghij"] + ["the", "cat", "sat", "##s", "mat", "dog"]
    letters = [p + c for c in "abcdefghijklmnopqrstuvwxyz0123456789.,-" for p in ("", "##")]
    filler = [f"[unused{i}]" for i in range(100 - len(special))]
    path = tmp_path_factory.mktemp("tok") / "vocab.txt"
    path.write_text("\n".join([*special, *filler, *words, *letters]) + "\n")
    return BertTokenizerFast(str(path), do_lower_case=True)


def corpus(n, seed=0):
    rng = np.random.default_rng(seed)
    words = "the cat cats sat mat dog dogs wa wb wc wd we wf wg wh wi wj x1 zebra q-7 [SEP]".split() + [
        "\n",
        "Ünïcode",
        "中",
    ]
    return [" ".join(rng.choice(words, rng.integers(0, 12))) for _ in range(n)]


def index(texts, tok, **how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are empty
        return R.BinaryTokenIndex.build(texts, tok, shift=100, progress=False, **how)


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


# ---- building


def test_however_it_is_built_the_bytes_are_the_same(tok, tmp_path):
    "Shards, processes, a stream, a dataset's column, a folder, a merge, a growing index"
    texts = corpus(5001)
    index(texts, tok).save(tmp_path / "plain")
    want = files(tmp_path / "plain")
    made = dict(
        shards=index(texts, tok, shards=7),
        workers=index(texts, tok, workers=2, shards=9),
        stream=index((t for t in texts), tok),
        column=index(Dataset.from_dict(dict(text=texts))["text"], tok),
        folder=index(texts, tok, folder=tmp_path / "built"),
        merged=R.BinaryTokenIndex.merge(
            [index(texts[a:b], tok) for a, b in ((0, 1), (1, 3000), (3000, 5001))]
        ),
        grown=index(texts[:1234], tok).add(texts[1234:], tok),
        loaded=R.BinaryTokenIndex.load(tmp_path / "plain"),
    )
    assert files(tmp_path / "built") == want
    for name, idx in made.items():
        idx.save(tmp_path / name)
        assert files(tmp_path / name) == want, name


@built
def test_without_the_library_the_bytes_are_the_same(tok, tmp_path, monkeypatch):
    texts = corpus(999)
    index(texts, tok).save(tmp_path / "a")
    monkeypatch.setattr(
        R.TokenSets.__init__, "__defaults__", (*R.TokenSets.__init__.__defaults__[:-1], False)
    )
    with backend("reference"):
        index(texts, tok).save(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_order_and_repetition_do_not_matter(tok, tmp_path):
    texts = corpus(300)
    shuffled = [" ".join(np.random.default_rng(i).permutation(t.split(" ") * 2)) for i, t in enumerate(texts)]
    index(texts, tok).save(tmp_path / "a")
    index(shuffled, tok).save(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert index(["cat dog"], tok).tokens(0).tolist() == sorted(tok.convert_tokens_to_ids(["cat", "dog"]))


def test_blocks_are_crossed(tmp_path, tok):
    "More passages than a block has: growing, merging and bitmaps agree with one go"
    texts = [
        ("the " if i % 3 else "") + "cat " * (i % 5) + "w" + "abcdefghij"[i % 10]
        for i in range(postings.BLOCK + 500)
    ]
    whole = index(texts, tok)
    assert len(whole.lists.starts) == 2
    assert (np.diff(whole.lists.starts.astype(np.int64)) == postings.DENSE).any()
    whole.save(tmp_path / "whole")
    for name, cut in (("late", postings.BLOCK + 7), ("early", 4321)):
        index(texts[:cut], tok).add(texts[cut:], tok).save(tmp_path / name)
        assert files(tmp_path / name) == files(tmp_path / "whole")
    ids, ptr = postings.revert(whole.lists, 1)[0], whole.ptr[postings.BLOCK :]
    assert np.array_equal(ids, whole.ids[ptr[0] : ptr[-1]])
    the = tok.convert_tokens_to_ids("the") - 100
    hits = whole.search([([the], [1.0])], len(texts))
    assert hits.ids[0, (hits.scores[0] == 1)].tolist() == [i for i in range(len(texts)) if i % 3]


def test_a_stream_is_built_in_bounded_memory(tmp_path):
    "200,000 passages of 100 words to disk: what stays is less than half the text, and does not grow with it"
    script = """
        import sys, numpy as np
        from lmlab.core.bench import peak_memory
        from lmlab.retrieval import common as R
        from test_retrieval import small_tokenizer
        tok, rng = small_tokenizer(sys.argv[1]), np.random.default_rng(0)
        pool = [" ".join(rng.choice([f"{a}{b}" for a in "abcdefghij" for b in "klmnop"], 20)) for _ in range(500)]
        def stream(n):
            for i in range(n):
                yield " ".join(pool[(i * 7 + 31 * j) % 500] for j in range(5))
        build = lambda n: R.BinaryTokenIndex.build(stream(n), tok, shift=100, folder=f"{sys.argv[1]}/{n}", progress=False)
        build(5000)
        for n in (20_000, 200_000):
            idx = []
            used = peak_memory(lambda: idx.append(build(n)), "process")
            print(used, idx[0].ids.nbytes + idx[0].lists.docs.nbytes)
    """
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parent), OMP_NUM_THREADS="1")
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        env=env,
    )
    assert out.returncode == 0, out.stderr
    few, many = ([int(o) for o in line.split()] for line in out.stdout.strip().splitlines())
    text = 200_000 * 300
    assert many[0] - many[1] < text / 2 + 2**26, (few, many)  # mapped files, which are counted, taken off
    assert many[0] - many[1] < few[0] - few[1] + 2**26, (few, many)


def small_tokenizer(folder):
    "As the fixture, for a process of its own"
    from transformers import BertTokenizerFast

    letters = [p + c for c in "abcdefghijklmnopqrstuvwxyz" for p in ("", "##")]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    path = Path(folder, "vocab.txt")
    path.write_text("\n".join([*special, *(f"[unused{i}]" for i in range(95)), *letters]) + "\n")
    return BertTokenizerFast(str(path))


# ---- on disk


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_killed_in_the_middle_of_a_save(tok, tmp_path, after):
    "The old index is whole, the next save succeeds and leaves nothing behind"
    folder, texts = tmp_path / "index", corpus(500)
    index(texts[:200], tok).save(folder)
    old = files(folder)
    fresh = index(texts, tok)
    if not (child := os.fork()):
        done, real = 0, R._Sink.write

        def write(self, array):
            nonlocal done
            if done == after:
                self.file.write(b"half")
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            real(self, array)

        R._Sink.write = write
        if after == 4:  # all arrays are there, the header is not
            R.write_json = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
        try:
            fresh.save(folder)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    again = R.BinaryTokenIndex.load(folder)
    assert len(again) == 200
    assert {k: v for k, v in files(folder).items() if k in old} == old
    index(texts, tok).save(folder)
    index(texts, tok).save(tmp_path / "clean")
    assert files(folder) == files(tmp_path / "clean")


def damaged(folder, what):
    "Do something to an index on disk; the file that is to be named"
    header = folder / "index.json"
    path = next(folder.glob(f"{what.split()[-1]}-*.bin")) if "file" not in what else header
    if what.startswith("cut"):
        path.write_bytes(path.read_bytes()[:-1])
    elif what.startswith("flip"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif what.startswith("lose"):
        path.unlink()
    elif what == "header file":
        header.write_text(header.read_text()[:-20])
    else:
        about = json.loads(header.read_text())
        if what == "kind file":
            about["about"]["kind"] = "embeddings"
        elif what == "dtype file":
            about["arrays"]["ids"]["dtype"] = "|O"
        elif what == "array file":
            del about["arrays"]["ptr"]
        header.write_text(json.dumps(about))
    return path.name


@pytest.mark.parametrize(
    "what",
    [
        "cut ids",
        "flip docs",
        "flip starts",
        "flip ptr",
        "lose docs",
        "header file",
        "kind file",
        "dtype file",
        "array file",
    ],
)
def test_damage_is_refused_by_name(tok, tmp_path, what):
    index(corpus(300), tok).save(tmp_path / "index")
    name = damaged(tmp_path / "index", what)
    with pytest.raises(ValueError, match=name):
        R.BinaryTokenIndex.load(tmp_path / "index")


def test_arrays_that_do_not_fit_are_refused_even_unverified(tok, tmp_path):
    "No list may lead out of its file"
    index(corpus(300), tok).save(tmp_path / "index")
    path = next((tmp_path / "index").glob("starts-*.bin"))
    starts = np.frombuffer(path.read_bytes(), np.uint32).copy()
    starts[5] = 2**31
    path.write_bytes(starts.tobytes())
    with pytest.raises(ValueError, match="do not fit together"):
        R.BinaryTokenIndex.load(tmp_path / "index", verify=False)


@pytest.mark.parametrize("kind", ["tokens", "sparse", "dense"])
def test_mutated_files_are_refused_or_load_as_they_were(tok, tmp_path, kind):
    "Some hundred ways to break a folder: one clear error each, or the same index"
    folder = tmp_path / "index"
    vectors = torch.randn(20, 30) * (torch.rand(20, 30) < 0.5)
    made = index(corpus(30), tok) if kind == "tokens" else R.EmbeddingIndex.build(vectors, kind)
    made.save(folder)

    def state(path):
        idx = type(made).load(path)
        arrays = [
            getattr(idx, "ids", None),
            idx.ptr,
            *([] if idx.lists is None else [idx.lists.docs, idx.lists.starts, idx.lists.values]),
        ]
        arrays.append(getattr(idx, "dense", None))
        return {
            str(i): torch.from_numpy(np.array(a).astype(np.float64))
            for i, a in enumerate(arrays)
            if a is not None
        } | {"about": torch.tensor(list(json.dumps(idx.about, sort_keys=True).encode()))}

    with poisoned_memory():  # what it imports is not the first load's time
        state(folder)
    check_loader(state, folder, cases=300, protected=tuple(p.name for p in folder.glob("*.bin")))


def test_saving_where_something_else_is(tok, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="folder"):
        index(corpus(3), tok).save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match=r"index\.json"):
        R.BinaryTokenIndex.load(tmp_path)


# ---- search


def random_lists(rng, n, width, mean, values):
    "Random passages as lists and as a matrix"
    table = np.where(rng.random((n, width)) < mean / width * 2 * rng.random((1, width)), 1, 0).astype(
        np.float32
    )
    table[rng.random(n) < 0.1] = 0
    if values:
        table *= rng.integers(-5, 6, table.shape)
    row, column = np.nonzero(table)
    ptr = np.searchsorted(row, np.arange(n + 1)).astype(np.int64)
    v = table[row, column].astype(values) if values else None
    docs, starts, v = postings.invert(column.astype(np.uint16), ptr, width, v)
    return postings.Lists(docs, starts[None], n, v, np.flatnonzero(np.diff(ptr) == 0)), table


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("values", [None, "float16", "float32"])
def test_search_is_a_dense_product(how, values):
    "Whole-number weights are exact: the same ids, ties and all; odd sizes, more passages asked for than there are"
    rng = np.random.default_rng(0)
    for n, width, mean in ((1, 1, 1), (7, 5, 2), (63, 100, 9), (1000, 33, 20), (9001, 64, 40)):
        lists, table = random_lists(rng, n, width, mean, values)
        queries = rng.integers(-2, 4, (5, width)).astype(np.float32) * (rng.random((5, width)) < 0.7)
        scores = queries @ table.T
        scores[:, lists.empty] = -np.inf
        for k in (1, 10, n + 3):
            want = R.Hits.top(scores, k)
            for threads in (1, 2):
                with math_threads(threads), backend(how):
                    got = R._searched(lists, torch.from_numpy(queries), k)
                assert torch.equal(got.ids, want.ids), (n, width, k)
                assert torch.equal(got.scores, want.scores)


@built
@pytest.mark.parametrize("values", [None, "float16", "float32"])
def test_every_path_returns_the_same_bits(values):
    "Any weights: the reference, each instruction set and number of threads; the sum is the product to 1e-5"
    rng = np.random.default_rng(1)
    lists, table = random_lists(rng, 9001, 64, 40, values)
    queries = rng.normal(size=(3, 64)).astype(np.float32)
    with backend("reference"):
        want = R._searched(lists, torch.from_numpy(queries), 100)
    for name in cpu.info()["levels"]:
        for threads in (1, 2, 3):
            with cpu.level(name), math_threads(threads):
                got = R._searched(lists, torch.from_numpy(queries), 100)
            assert torch.equal(got.ids, want.ids)
            assert torch.equal(got.scores, want.scores)
    exact = queries.astype(np.float64) @ table.T.astype(np.float64)
    picked = np.take_along_axis(exact, want.ids.numpy(), 1)
    assert np.abs(picked - want.scores.numpy()).max() < 1e-5 * np.abs(queries).sum() * np.abs(table).max()


@built
def test_lists_are_the_reference_s():
    rng = np.random.default_rng(2)
    for n, width, mean, values in (
        (1, 1, 1, None),
        (63, 100, 9, "float32"),
        (9001, 64, 40, None),
        (9001, 64, 40, "float16"),
    ):
        lists, _ = random_lists(rng, n, width, mean, values)
        ids, v = postings.revert(lists, 0)
        lengths = np.bincount(
            np.concatenate(
                [
                    np.flatnonzero(np.unpackbits(w.view(np.uint8), bitorder="little"))
                    if len(w) == postings.DENSE and v is None
                    else w
                    for w in np.split(lists.docs, lists.starts[0, 1:-1])
                ]
            ).astype(int),
            minlength=n,
        )
        ptr = np.append(0, np.cumsum(lengths))
        for a, b in zip(
            postings.invert(ids, ptr, width, v, "cpu"),
            postings.invert(ids, ptr, width, v, "reference"),
            strict=True,
        ):
            assert (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b))
    with pytest.raises(ValueError, match="ids: up to 9"):
        postings.invert(np.array([9], np.uint16), np.array([0, 1]), 9, backend="cpu")


def test_pairs_and_tensors_are_the_same_queries(tok):
    idx = index(corpus(500), tok)
    dense = torch.randn(3, idx.width) * (torch.rand(3, idx.width) < 0.5)
    pairs = [(q.nonzero()[:, 0].flip(0).tolist(), q[q != 0].flip(0).tolist()) for q in dense]
    a, b = idx.search(dense, 9), idx.search(pairs, 9)
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.scores, b.scores)
    assert idx.search(torch.zeros(idx.width), 2).ids.tolist() == [
        [i for i in range(500) if len(idx.tokens(i))][:2]
    ]
    assert index([], tok).search(dense, 2).ids.tolist() == [[-1, -1]] * 3


# ---- what is refused


def test_what_building_refuses(tok):
    class Odd:
        pass

    for texts in ("one text", dict(text=["a"]), Odd(), [None], ["a", 3], Dataset.from_dict(dict(text=["a"]))):
        with pytest.raises(ValueError, match="texts"):
            index(texts, tok)
    for how, says in (
        (dict(max_len=2), "max_len"),
        (dict(vocab=50), "vocab"),
        (dict(vocab=len(tok) - 1), "vocab"),
        (dict(workers=0), "workers"),
        (dict(shards=0), "shards"),
    ):
        with pytest.raises(ValueError, match=says):
            index(["a"], tok, **how)
    with pytest.raises(ValueError, match="shards.*a stream"):
        index(iter(["a"]), tok, shards=2)
    with pytest.raises(ValueError, match=r"special ids .*not below shift 3"):
        R.BinaryTokenIndex.build(["a"], tok, shift=3)
    with pytest.raises(ValueError, match="shift"):
        R.BinaryTokenIndex.build(["a"], tok, shift=len(tok))
    masked = R.BinaryTokenIndex.build(["[SEP] a"], tok, shift=3, special=(3, 4))
    assert masked.tokens(0).tolist() == [tok.convert_tokens_to_ids("a")]
    with pytest.warns(UserWarning, match="2 of 3 passages have no token"):
        R.BinaryTokenIndex.build(["", "a", "[SEP]"], tok, shift=100)


def test_what_search_refuses(tok):
    idx = index(corpus(50), tok)
    for queries, says in (
        ("cat", "embed the texts"),
        (["cat"], "embed the texts"),
        (torch.zeros(1, idx.width + 1), "is the shift the same"),
        (torch.full((1, idx.width), math.nan), "not finite"),
        ([([0, 0], [1.0, 2.0])], "twice"),
        ([([idx.width], [1.0])], "shifted ids"),
        ([([0], [1.0, 2.0])], "one weight an id"),
    ):
        with pytest.raises(ValueError, match=says):
            idx.search(queries, 3)
    with pytest.raises(ValueError, match="k"):
        idx.search(torch.zeros(1, idx.width), 0)
    with pytest.raises(ValueError, match="shift: got 999"):
        idx.check(shift=999)
    idx.check(tok, 100, len(tok))
    other = copy.deepcopy(tok)
    other.add_tokens(["zyzzyva"])
    with pytest.raises(ValueError, match="tokenizer"):
        idx.search(torch.zeros(1, idx.width), 3, tokenizer=other)
    with pytest.raises(ValueError, match="tokenizer"):
        idx.add(["a"], other)


# ---- questions


def test_questions_in_a_folder_of_beir_s_layout(tmp_path):
    line = lambda **o: json.dumps(o) + "\n"
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text(
        "".join(
            line(_id=f"d{i}", title=f"T{i % 2}", text=t)
            for i, t in enumerate(("a b", "c d", "a b", "e " * 300))
        )
    )
    (tmp_path / "queries.jsonl").write_text(
        "".join(line(_id=f"q{i}", text=f"question {i}") for i in range(3))
    )
    (tmp_path / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td2\t1\nq2\td3\t2\nq0\td1\t0\n")
    q, p, r = R.qa(tmp_path, "test")
    assert q["text"][:] == ["question 2"]
    assert len(p) == 3  # two were the same
    assert r == {0: {0: 1, 2: 2}}
    assert max(len(t.split()) for t in p["text"]) <= 100
    with pytest.raises(ValueError, match="train.*there are: test"):
        R.qa(tmp_path, "train")
    with pytest.raises(ValueError, match="BEIR"):
        R.qa(tmp_path / "qrels", "test")


def test_questions_of_files_by_their_public_names(tmp_path, monkeypatch):
    monkeypatch.delenv("LMLAB_DATA", raising=False)
    with pytest.raises(ValueError, match="LMLAB_DATA"):
        R.qa("nq")
    monkeypatch.setenv("LMLAB_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"no file 'xquad\.en\.dev\.json\.gz'"):
        R.qa("xquad")
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(ValueError, match="SQuAD's format"):
        R.qa(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        R.qa(tmp_path / "bad.json")


def test_metrics_and_negatives():
    pytest.importorskip("ir_measures")
    pytest.importorskip("bm25s")
    hits = R.Hits(
        torch.tensor([[3, 1, 2], [0, -1, -1]]), torch.tensor([[3.0, 2, 1], [1, -math.inf, -math.inf]])
    )
    got = R.evaluate(hits, {0: {1: 1}, 1: {2: 1}}, ("Success@1", "Success@5", "RR@10", "nDCG@10"), each=True)
    assert got == {
        "Success@1": [0, 0],
        "Success@5": [1, 0],
        "RR@10": [0.5, 0],
        "nDCG@10": [pytest.approx(1 / math.log2(3)), 0],
    }
    for bad in (dict(qrels={0: {1: 1}}), dict(measures=("Sucess@1",)), dict(ids=[0])):
        with pytest.raises(ValueError, match=next(iter(bad))):
            R.evaluate(hits, **(dict(qrels={0: {1: 1}, 1: {2: 1}}) | bad))
    texts = ["red apple", "red pear", "green apple tree", "blue sky"]
    negatives = R.hard_negatives(R.Bm25(texts), ["red apple", "sky"], {0: {0: 1}, 1: {3: 1}}, 2)
    assert not (negatives == torch.tensor([[0], [3]])).any()
    assert set(negatives[0].tolist()) == {1, 2}


# ---- C++ without Python

DRIVER = r"""
#include "common.h"
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>
using namespace lmlab;
extern "C" {
int64_t lmlab_postings_invert(const void*, int, const int64_t*, int64_t, int64_t, const void*, int, uint16_t*, uint32_t*, void*);
int lmlab_postings_search(const void*, const int64_t*, const int32_t*, const float*, int64_t, int64_t, int64_t*, float*, int);
void* lmlab_memo_new();
void lmlab_memo_free(void*);
int64_t lmlab_memo_add(void*, const char*, const int64_t*, int64_t, const uint32_t*, const int64_t*);
int64_t lmlab_memo_sets(void*, const char*, const int64_t*, int64_t, int64_t, uint32_t, int64_t, uint32_t*, int32_t*, int64_t*, int64_t, int);
const char* lmlab_levels();
}
struct Index { const uint16_t* docs; const uint32_t* starts; const int64_t* bases; const void* values; const int64_t* empty; int64_t n, width, empties, blocks; int32_t half; };
static uint32_t seed = 1;
static uint32_t next() { return seed = seed * 1664525 + 1013904223, seed >> 8; }

static int round(int64_t n, int64_t width, bool weighted, int64_t k) {
    std::vector<std::vector<float>> table(n, std::vector<float>(width));
    std::vector<uint16_t> ids;
    std::vector<float> values;
    std::vector<int64_t> ptr = {0}, empty;
    for (int64_t i = 0; i < n; i++) {
        for (int64_t v = 0; v < width; v++)
            if (next() % (1 + v) == 0 && next() % 8) {
                table[i][v] = weighted ? (float)(next() % 7) - 3 : 1;
                ids.push_back(v), values.push_back(table[i][v]);
            }
        if ((int64_t)ids.size() == ptr.back()) empty.push_back(i);
        ptr.push_back(ids.size());
    }
    std::vector<uint16_t> docs(ids.size());
    std::vector<uint32_t> starts(width + 1);
    std::vector<float> sorted(ids.size());
    int64_t total = lmlab_postings_invert(ids.data(), 2, ptr.data(), n, width, weighted ? values.data() : nullptr, weighted ? 4 : 0, docs.data(), starts.data(), sorted.data());
    docs.resize(total), docs.shrink_to_fit();
    int64_t base = 0;
    Index index = {docs.data(), starts.data(), &base, weighted ? sorted.data() : nullptr, empty.data(), n, width, (int64_t)empty.size(), 1, 0};
    std::vector<int64_t> qptr = {0, 0};
    std::vector<int32_t> qids;
    std::vector<float> weights;
    for (int64_t v = 0; v < width; v += 2) qids.push_back(v), weights.push_back((float)(next() % 5) - 1);
    qptr.push_back(qids.size());
    std::vector<int64_t> found(2 * k);
    std::vector<float> scores(2 * k);
    int wrong = lmlab_postings_search(&index, qptr.data(), qids.data(), weights.data(), 2, k, found.data(), scores.data(), 2) != 0;
    std::vector<std::pair<float, int64_t>> want;
    for (int64_t i = 0; i < n; i++) {
        float s = 0;
        for (size_t j = 0; j < qids.size(); j++) s += table[i][qids[j]] * weights[j];
        if (!std::binary_search(empty.begin(), empty.end(), i)) want.push_back({-s, i});
    }
    std::sort(want.begin(), want.end());
    for (int64_t j = 0; j < k; j++) wrong += found[k + j] != (j < (int64_t)want.size() ? want[j].second : -1);
    return wrong;
}

int main() {
    int wrong = 0;
    for (int64_t n : {1, 7, 100, 5000, 9001})
        for (int weighted = 0; weighted < 2; weighted++)
            for (int64_t k : {1, 10}) wrong += round(n, 33, weighted, k);
    void* memo = lmlab_memo_new();
    std::string text;
    std::vector<int64_t> ptr = {0};
    for (int i = 0; i < 500; i++) text += "word" + std::to_string(i) + (i % 7 ? " " : "\n"), ptr.push_back(text.size());
    std::vector<uint32_t> out(500 * 3);
    std::vector<int32_t> lengths(500, -1);
    std::vector<int64_t> unknown(2 * 100);
    int rounds = 0;
    while (int64_t n = lmlab_memo_sets(memo, text.data(), ptr.data(), 500, 3, 2, 50, out.data(), lengths.data(), unknown.data(), 100, 2)) {
        for (int64_t j = 0; j < n; j++) {
            uint32_t ids[] = {(uint32_t)j % 60, 7, 7, 1};
            int64_t words[] = {0, unknown[2 * j + 1]}, all[] = {0, 4};
            lmlab_memo_add(memo, text.data() + unknown[2 * j], words, 1, ids, all);
        }
        wrong += ++rounds > 9;
        if (rounds > 9) break;
    }
    for (int l : lengths) wrong += l < 1 || l > 2;
    lmlab_memo_free(memo);
    printf("%s\nwrong %d\n", lmlab_levels(), wrong);
    return 0;
}
"""


def test_sanitizers(tmp_path):
    native.under_sanitizers(tmp_path, DRIVER, ("postings",))


def test_arm(tmp_path):
    native.on_arm(tmp_path, DRIVER, ("postings",))
