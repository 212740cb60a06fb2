"""Inverted lists of token ids: building them from passages, and the passages whose ids weigh most under a query.

    invert(ids, ptr, width, values=None, backend="auto") -> Lists     # one block of up to 65,536 passages
    search(lists, queries, k, backend="auto") -> (ids, scores)        # b k, best first, ties by lower id, padded with -1 and -inf

A list holds the passages of one block that have an id, as 16-bit numbers within the block; a list of 4096 passages or more is a bitmap of
the block instead, which is never larger. A score is the float32 sum of the query's weights over the ids that the passage has, added in
ascending order of ids; every backend, number of threads and instruction set returns the same bits.
"""

import contextlib
import ctypes
from dataclasses import dataclass, field

import numpy as np
import torch
from lmlab.kernels import Operation, cpu

BLOCK = 2**16  # passages in a block: their numbers fit into 16 bits, their scores into a core's cache
DENSE = BLOCK // 16  # passages from which a list is a bitmap, which takes as many 16-bit words


@dataclass
class Lists:
    "Inverted lists of blocks of passages"

    docs: np.ndarray  # entries  uint16: passages of a list in ascending order, or the words of a bitmap
    starts: np.ndarray  # blocks width+1  uint32: where each list begins within its block's part of `docs`
    n: int  # passages
    values: np.ndarray = (
        None  # entries  float16 or float32: a weight for each entry; then no list is a bitmap
    )
    empty: np.ndarray = field(
        default_factory=lambda: np.empty(0, np.int64)
    )  # passages without an id, never found

    @property
    def width(self):  # ids run from 0 to below it
        return self.starts.shape[1] - 1

    @property
    def nbytes(self):
        return sum(o.nbytes for o in (self.docs, self.starts, self.empty, self.values) if o is not None)


def invert_reference(ids, ptr, width, values=None):
    "As `invert`: a stable sort by id"
    lengths = np.diff(ptr)
    docs = np.repeat(np.arange(len(lengths), dtype=np.uint16), lengths)
    ids = np.asarray(ids)
    order = np.argsort(ids, kind="stable")
    docs, counts = docs[order], np.bincount(ids, minlength=width)
    starts = np.zeros(width + 1, np.int64)
    if values is not None:
        np.cumsum(counts, out=starts[1:])
        return docs, starts.astype(np.uint32), np.asarray(values)[order]
    dense = np.flatnonzero(counts >= DENSE)
    ends = np.cumsum(counts)
    parts, at = [], 0
    for v in dense:
        bits = np.zeros(BLOCK, np.uint8)
        bits[docs[ends[v] - counts[v] : ends[v]]] = 1
        parts += [docs[at : ends[v] - counts[v]], np.packbits(bits, bitorder="little").view("<u2")]
        at = ends[v]
    np.cumsum(np.minimum(counts, DENSE), out=starts[1:])
    return np.concatenate([*parts, docs[at:]]), starts.astype(np.uint32), None


def revert(
    lists: Lists,
    block: int,  # its number
) -> tuple:  # ids int64, ascending in each passage, and their values or None
    "The entries of a block in the order of its passages, as `invert` took them"
    first = int(lists.starts[:block, -1].sum(dtype=np.int64))
    edges = first + lists.starts[block].astype(np.int64)
    ids, docs, keep = [], [], np.ones(edges[-1] - first, bool)
    for v in np.flatnonzero(np.diff(edges) == DENSE) if lists.values is None else ():
        keep[edges[v] - first : edges[v + 1] - first] = False
        bits = np.unpackbits(
            lists.docs[edges[v] : edges[v + 1]].astype("<u2").view(np.uint8), bitorder="little"
        )
        docs.append(np.flatnonzero(bits))
        ids.append(np.full(len(docs[-1]), v))
    docs = np.concatenate([lists.docs[first : edges[-1]][keep].astype(np.int64), *docs])
    ids = np.concatenate([np.repeat(np.arange(lists.width), np.diff(edges))[keep], *ids])
    order = np.lexsort((ids, docs))
    return ids[order], None if lists.values is None else lists.values[first : edges[-1]][order]


def top(
    scores: np.ndarray,  # n  float32
    k: int,
    first: int = 0,  # the number of the first
) -> tuple:  # numbers, scores: at most k, -inf left out
    "The k largest, largest first, of equal ones the lower number"
    least = np.partition(scores, len(scores) - k)[len(scores) - k] if k < len(scores) else -np.inf
    at = np.flatnonzero((scores >= least) & (scores > -np.inf))
    at = at[np.lexsort((at, -scores[at]))[:k]]
    return at + first, scores[at]


def search_reference(lists, qptr, qids, qweights, k):
    "As `search`: one list after another"
    b = len(qptr) - 1
    ids, scores = np.full((b, k), -1, np.int64), np.full((b, k), -np.inf, np.float32)
    bases = np.append(0, np.cumsum(lists.starts[:, -1].astype(np.int64)))
    for i in range(b):
        found = [(np.empty(0, np.int64), np.empty(0, np.float32))]
        query = list(zip(qids[qptr[i] : qptr[i + 1]].tolist(), qweights[qptr[i] : qptr[i + 1]], strict=True))
        for block in range(len(lists.starts)):
            first = block * BLOCK
            acc = np.zeros(min(BLOCK, lists.n - first), np.float32)
            edges = bases[block] + lists.starts[block].astype(np.int64)
            for v, w in query:
                a, z = edges[v], edges[v + 1]
                if lists.values is not None:
                    acc[lists.docs[a:z]] += w * lists.values[a:z].astype(np.float32)
                elif z - a == DENSE:
                    bits = np.unpackbits(lists.docs[a:z].astype("<u2").view(np.uint8), bitorder="little")
                    acc[np.flatnonzero(bits[: len(acc)])] += w
                else:
                    acc[lists.docs[a:z]] += w
            lo, hi = np.searchsorted(lists.empty, (first, first + len(acc)))
            acc[lists.empty[lo:hi] - first] = -np.inf
            found.append(top(acc, k, first))
        at, s = (np.concatenate(o) for o in zip(*found, strict=True))
        order = np.lexsort((at, -s))[:k]
        ids[i, : len(order)], scores[i, : len(order)] = at[order], s[order]
    return ids, scores


# ---- in C++

_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class _Index(ctypes.Structure):
    "What `postings.cpp` takes lists for"

    _fields_ = [(name, _P) for name in ("docs", "starts", "bases", "values", "empty")] + [
        ("n", _L), ("width", _L), ("empties", _L), ("blocks", _L), ("half", ctypes.c_int32),
    ]  # fmt: skip


def _at(array):
    return None if array is None else array.ctypes.data


def invert_cpp(ids, ptr, width, values=None):
    "As `invert_reference`: two passes, the first one counts"
    ids, ptr = np.ascontiguousarray(ids), np.ascontiguousarray(ptr, np.int64)
    if ids.dtype not in (np.uint16, np.uint32):
        ids = ids.astype(np.uint32)
    values = None if values is None else np.ascontiguousarray(values)
    docs, starts = np.empty(len(ids), np.uint16), np.empty(width + 1, np.uint32)
    made, size = None if values is None else np.empty_like(values), 0 if values is None else values.itemsize
    call = cpu.symbol("lmlab_postings_invert", _L, _P, _I, _P, _L, _L, _P, _I, _P, _P, _P)
    total = call(
        _at(ids), ids.itemsize, _at(ptr), len(ptr) - 1, width, _at(values), size, _at(docs), _at(starts), _at(made)
    )  # fmt: skip
    if total < 0:
        raise ValueError(f"ids: up to {ids.max()}; allowed are ids below the width {width}")
    return docs[:total], starts, made


def search_cpp(lists, qptr, qids, qweights, k):
    "As `search_reference`: one block and query at a time"
    b = len(qptr) - 1
    ids, scores = np.empty((b, k), np.int64), np.empty((b, k), np.float32)
    bases = np.append(0, np.cumsum(lists.starts[:, -1].astype(np.int64)))
    arrays = (lists.docs, lists.starts, bases, lists.values, lists.empty)
    half = lists.values is not None and lists.values.itemsize == 2
    index = _Index(*map(_at, arrays), lists.n, lists.width, len(lists.empty), len(lists.starts), half)
    call = cpu.symbol("lmlab_postings_search", _I, _P, _P, _P, _P, _L, _L, _P, _P, _I)
    at_once = max(
        1, TOGETHER // max(1, len(lists.starts) * min(k, BLOCK))
    )  # bounds what the blocks have found
    for i in range(0, b, at_once):
        some = np.ascontiguousarray(qptr[i : i + at_once + 1])
        failed = call(
            ctypes.byref(index), _at(some), _at(qids), _at(qweights), len(some) - 1, k, _at(ids[i:]), _at(scores[i:]),
            torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the scores of a block")
    return ids, scores


TOGETHER = 2**24  # candidates of all blocks and queries that are kept at a time
INVERT = Operation("invert", invert_reference, invert_cpp)
SEARCH = Operation("search_postings", search_reference, search_cpp)


def invert(
    ids: np.ndarray,  # entries  any unsigned dtype, below `width`, ascending within a passage and no id twice
    ptr: np.ndarray,  # n+1  int64: the entries of passage i are ptr[i] to ptr[i+1]; n at most BLOCK
    width: int,
    values: np.ndarray = None,  # entries  float16 or float32
    backend: str = "auto",  # see `lmlab.kernels`
) -> tuple:  # docs uint16, starts uint32 of width+1, values or None
    "The lists of one block"
    return INVERT.pick(backend, "cpu")[1](ids, ptr, width, values)


def search(
    lists: Lists,
    qptr: np.ndarray,  # b+1  int64: the entries of query i are qptr[i] to qptr[i+1]
    qids: np.ndarray,  # entries  int32, ascending within a query and no id twice
    qweights: np.ndarray,  # entries  float32, finite
    k: int,
    backend: str = "auto",  # see `lmlab.kernels`
) -> tuple:  # b k  int64 and float32
    "The k passages with the largest sums"
    return SEARCH.pick(backend, "cpu")[1](lists, qptr, qids, qweights, k)


# ---- text to sets


class Memo:
    "Ids of words that were met before; a word is what stands between blanks, tabs and line ends"

    def __init__(
        self,
        ids_of,  # list of words -> list of lists of ids
        shift: int,  # ids below it are left out
        width: int,  # and those from shift + width on
        most: int = 2**21,  # words that are kept, before all are forgotten
    ):
        self.ids_of, self.shift, self.width, self.most, self.handle = ids_of, shift, width, most, None

    def _new(self):
        self.close()
        self.handle = cpu.symbol("lmlab_memo_new", _P)()
        self.known = 0

    def close(self):
        "Free the memory"
        if self.handle:
            cpu.symbol("lmlab_memo_free", None, _P)(self.handle)
        self.handle = None

    def __del__(self):
        with contextlib.suppress(Exception):  # the interpreter may be going down
            self.close()

    def _learn(self, words):
        rows = [np.asarray(r, np.uint32) for r in self.ids_of([w.decode() for w in words])]
        ends = lambda parts: np.append(0, np.cumsum([len(o) for o in parts])).astype(np.int64)
        text, wptr, iptr = b"".join(words), ends(words), ends(rows)
        ids = np.concatenate([np.empty(0, np.uint32), *rows])
        call = cpu.symbol("lmlab_memo_add", _L, _P, ctypes.c_char_p, _P, _L, _P, _P)
        self.known = call(self.handle, text, _at(wptr), len(words), _at(ids), _at(iptr))

    def sets(
        self,
        texts: list,  # of str
        room: int,  # tokens of a text that count
    ) -> tuple:  # ids of all texts, uint32, ascending in each; how many each has, int32
        "The set of each text's shifted ids"
        if self.handle is None or self.known > self.most:
            self._new()
        parts = [t.encode("utf-8", "replace") for t in texts]
        text, ptr = b"".join(parts), np.append(0, np.cumsum([len(p) for p in parts])).astype(np.int64)
        out, lengths = np.empty((len(texts), room), np.uint32), np.full(len(texts), -1, np.int32)
        unknown = np.empty((2**16, 2), np.int64)
        call = cpu.symbol(
            "lmlab_memo_sets", _L, _P, ctypes.c_char_p, _P, _L, _L, ctypes.c_uint32, _L, _P, _P, _P, _L, _I
        )
        while True:
            n = call(
                self.handle, text, _at(ptr), len(texts), room, self.shift, self.width, _at(out), _at(lengths),
                _at(unknown), len(unknown), torch.get_num_threads(),
            )  # fmt: skip
            if not n:
                break
            self._learn(list(dict.fromkeys(text[a : a + size] for a, size in unknown[:n].tolist())))
        return out[np.arange(room) < lengths[:, None]], lengths


# ---- races


def _passages(n, width, mean, seed=0):
    "Sets of ids with the frequencies of words: the r-th commonest in proportion to 1/r"
    rng = np.random.default_rng(seed)
    edges = np.cumsum(1 / np.arange(1, width + 1))
    drawn = np.searchsorted(edges, rng.random((n, mean)) * edges[-1]).astype(np.int64)
    entries = np.unique(np.arange(n)[:, None] * width + drawn)
    names = rng.permutation(width)  # how common an id is does not follow its number
    entries = np.sort(entries // width * width + names[entries % width])
    ptr = np.searchsorted(entries, np.arange(n + 1) * width)
    return (entries % width).astype(np.uint16), ptr.astype(np.int64)


def _lists(ids, ptr, width):
    made = []
    for a in range(0, len(ptr) - 1, BLOCK):
        p = ptr[a : a + BLOCK + 1]
        made.append(invert(ids[p[0] : p[-1]], p - p[0], width))
    return Lists(np.concatenate([o[0] for o in made]), np.stack([o[1] for o in made]), len(ptr) - 1)


def bench(
    quick: bool = False,  # fewer passages and rounds
) -> dict:  # name of the case -> (`Timing`, what was moved and computed)
    "Queries of 10 and of 768 ids, one at a time and 32 together, against torch's sparse matrix product; and the making of lists"
    from lmlab.core.bench import paired

    out, width, n = {}, 29_523, 20_000 if quick else 400_000
    ids, ptr = _passages(n, width, 120)
    lists = _lists(ids, ptr, width)
    sizes = (torch.from_numpy(ptr), torch.from_numpy(ids.astype(np.int64)), torch.ones(len(ids)))
    table = torch.sparse_csr_tensor(*sizes, (n, width), check_invariants=False)
    frequency, rng = np.bincount(ids, minlength=width), np.random.default_rng(1)
    rounds = dict(rounds=5 if quick else 15, budget=1 if quick else 4)
    for threads in sorted({1, torch.get_num_threads()}):
        for b, terms in ((1, 10), (1, 768), (32, 768)):
            picked = [
                np.sort(rng.choice(ids[rng.integers(len(ids), size=4 * terms)], terms)) for _ in range(b)
            ]
            picked = [np.unique(o) for o in picked]
            qptr = np.append(0, np.cumsum([len(o) for o in picked])).astype(np.int64)
            qids = np.concatenate(picked).astype(np.int32)
            weights = rng.random(len(qids), np.float32)
            dense = torch.zeros(b, width)
            for i in range(b):
                dense[i, qids[qptr[i] : qptr[i + 1]]] = torch.from_numpy(weights[qptr[i] : qptr[i + 1]])
            fns = {
                "kernel": lambda q=(qptr, qids, weights): search(lists, *q, 100),
                "sparse product": lambda q=dense: (table @ q.mT).topk(100, 0),
            }
            adds = int(frequency[qids].sum())
            name = f"{n:,} passages, {b} quer{'ies' if b > 1 else 'y'} of {terms} ids, {threads} thread{'s' * (threads > 1)}"
            out[name] = (
                paired(fns, threads=threads, **rounds),
                {"bytes": 2 * adds + 4 * n * b, "flops": adds},
            )
    p = ptr[: min(n, BLOCK) + 1]
    fns = {
        "kernel": lambda: invert(ids[: p[-1]], p, width),
        "stable sort": lambda: invert(ids[: p[-1]], p, width, backend="reference"),
    }
    work = {"bytes": 6 * int(p[-1]), "flops": int(p[-1])}
    out[f"lists of {len(p) - 1:,} passages, 1 thread"] = (paired(fns, threads=1, **rounds), work)
    return out
