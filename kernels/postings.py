"""Inverted lists of token ids: building them from passages, and the passages whose ids weigh most under a query.

    invert(ids, ptr, width, values=None, backend="auto") -> Lists     # one block of up to 65,536 passages
    search(lists, queries, k, backend="auto") -> (ids, scores)        # b k, best first, ties by lower id, padded with -1 and -inf

A list holds the passages of one block that have an id, as 16-bit numbers within the block; a list of 4096 passages or more is a bitmap of
the block instead, which is never larger. A score is the float32 sum of the query's weights over the ids that the passage has, added in
ascending order of ids; every backend, number of threads and instruction set returns the same bits.
"""

from dataclasses import dataclass, field

import numpy as np

BLOCK = 2**16  # passages in a block: their numbers fit into 16 bits, their scores into a core's cache
DENSE = BLOCK // 16  # passages from which a list is a bitmap, which takes as many 16-bit words


@dataclass
class Lists:
    "Inverted lists of blocks of passages"

    docs: np.ndarray  # entries  uint16: passages of a list in ascending order, or the words of a bitmap
    starts: np.ndarray  # blocks width+1  uint32: where each list begins within its block's part of `docs`
    n: int  # passages
    values: np.ndarray = None  # entries  float16 or float32: a weight for each entry; then no list is a bitmap
    empty: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # passages without an id, never found

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
    b, width = len(qptr) - 1, lists.width
    ids, scores = np.full((b, k), -1, np.int64), np.full((b, k), -np.inf, np.float32)
    bases = np.append(0, np.cumsum(lists.starts[:, -1].astype(np.int64)))
    for i in range(b):
        found = [(np.empty(0, np.int64), np.empty(0, np.float32))]
        query = list(zip(qids[qptr[i] : qptr[i + 1]].tolist(), qweights[qptr[i] : qptr[i + 1]]))
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
        at, s = (np.concatenate(o) for o in zip(*found))
        order = np.lexsort((at, -s))[:k]
        ids[i, : len(order)], scores[i, : len(order)] = at[order], s[order]
    return ids, scores


def invert(
    ids: np.ndarray,  # entries  any unsigned dtype, below `width`, ascending within a passage and no id twice
    ptr: np.ndarray,  # n+1  int64: the entries of passage i are ptr[i] to ptr[i+1]; n at most BLOCK
    width: int,
    values: np.ndarray = None,  # entries  float16 or float32
) -> tuple:  # docs uint16, starts uint32 of width+1, values or None
    "The lists of one block"
    return invert_reference(ids, ptr, width, values)


def search(
    lists: Lists,
    qptr: np.ndarray,  # b+1  int64: the entries of query i are qptr[i] to qptr[i+1]
    qids: np.ndarray,  # entries  int32, ascending within a query and no id twice
    qweights: np.ndarray,  # entries  float32, finite
    k: int,
) -> tuple:  # b k  int64 and float32
    "The k passages with the largest sums"
    return search_reference(lists, qptr, qids, qweights, k)
