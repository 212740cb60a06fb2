"""The checker of retrievers passes a healthy one and catches, by name, a twin broken on purpose: one for each of its checks."""

import hashlib
import json
import pickle
import random
import socket
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lmlab.core import check_retriever as retrievers
from lmlab.core.check import ContractError, check_retriever
from lmlab.core.check_retriever import WORDS

torch.set_num_threads(1)
NUMBER = {w: i for i, w in enumerate(WORDS)}


class Weigh(nn.Module):
    "A weight for each word, and dropout"

    def __init__(self):
        super().__init__()
        self.weight, self.drop = nn.Parameter(torch.linspace(1, 2, len(WORDS))), nn.Dropout(0.1)

    def forward(self, counts):
        return self.drop(counts * self.weight)


MODEL = Weigh().eval()


def listed(texts, what="texts"):
    if isinstance(texts, str):
        raise ValueError(f"{what}: got one str, allowed: a list of str")
    texts = list(texts)
    if not all(isinstance(t, str) for t in texts):
        raise ValueError(f"{what}: got something else, allowed: a list of str")
    return texts


@torch.no_grad()
def encode(texts, batch_size=4):
    texts, was = listed(texts), MODEL.training
    counts = torch.zeros(len(texts), len(WORDS))
    for i, t in enumerate(texts):
        for w in set(t.split()) & set(NUMBER):
            counts[i, NUMBER[w]] = 1.0
    MODEL.eval()
    try:
        return torch.cat([MODEL(c) for c in counts.split(batch_size)]) if len(texts) else counts
    finally:
        MODEL.train(was)


class Index:
    def __init__(self, matrix):
        self.matrix = matrix
        if empty := int((self.matrix.sum(1) == 0).sum()):
            warnings.warn(f"{empty} passages have no token", stacklevel=2)


def build(texts, shards=1):
    return Index(encode(texts))


def top(scores, k):
    scores = torch.nn.functional.pad(scores, (0, max(0, k - scores.shape[1])), value=-torch.inf)
    found = scores.sort(dim=1, descending=True, stable=True)
    ids = found.indices.masked_fill(found.values == -torch.inf, -1)
    return SimpleNamespace(ids=ids[:, :k], scores=found.values[:, :k])


def scored(index, queries):
    q = encode(listed(queries, "queries"))
    s = (
        torch.stack([(index.matrix * row).sum(1) for row in q])
        if len(index.matrix)
        else torch.zeros(len(q), 0)
    )
    return s.masked_fill(index.matrix.sum(1) == 0, -torch.inf)


def whole(k):
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k: got {k!r}, allowed: a whole number, 1 or more")
    return k


def search(index, queries, k):
    return top(scored(index, queries), whole(k))


def score(queries, texts):
    p = encode(texts)
    return (encode(queries) @ p.T).masked_fill(p.sum(1) == 0, -torch.inf)


def jaccard(queries, texts):
    words = lambda t: set(t.split()) | {"."}
    return torch.tensor(
        [[len(words(q) & words(t)) / len(words(q) | words(t)) for t in texts] for q in queries]
    )


def rerank(index, queries, k, m, texts):
    first = search(index, queries, m)
    new = torch.full_like(first.scores, -torch.inf)
    ids, scores = torch.full((len(queries), k), -1), torch.full((len(queries), k), -torch.inf)
    for i, row in enumerate(first.ids):
        real = row[row >= 0]
        new = jaccard([queries[i]], [texts[j] for j in real.tolist()])[0]
        order = new.sort(descending=True, stable=True).indices[:k]
        ids[i, : len(order)], scores[i, : len(order)] = real[order], new[order]
    return SimpleNamespace(ids=ids, scores=scores)


def add(index, texts):
    return Index(torch.cat([torch.as_tensor(index.matrix), encode(texts)]))


def save(index, path):
    path = Path(path)
    path.mkdir(parents=True)
    data = np.ascontiguousarray(index.matrix.numpy()).tobytes()
    (path / "matrix").write_bytes(data)
    about = json.dumps(dict(rows=len(index.matrix), sha=hashlib.sha256(data).hexdigest()))
    (path / "about.json").write_text(json.dumps([about, hashlib.sha256(about.encode()).hexdigest()]))


def load(path):
    path = Path(path)
    try:
        about, sha = json.loads((path / "about.json").read_text())
        if hashlib.sha256(about.encode()).hexdigest() != sha:
            raise ValueError("about.json was changed")
        about = json.loads(about)
        if hashlib.sha256((path / "matrix").read_bytes()).hexdigest() != about["sha"]:
            raise ValueError("matrix was changed")
    except (ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} holds no sound index: {e}") from e
    mapped = np.memmap(path / "matrix", np.float32, "c", shape=(about["rows"], len(WORDS)))
    return Index(torch.from_numpy(mapped))


def other_vocabulary():
    raise ValueError("vocabulary: another one")


HEALTHY = dict(
    build=build, search=search, score=score, encode=encode, add=add, save=save, load=load, rerank=rerank, rerank_score=jaccard, model=MODEL
)  # fmt: skip
DECLARED = dict(
    options=dict(encode=(dict(batch_size=1), dict(batch_size=50)), build=(dict(shards=3),)),
    refuses={"another vocabulary": other_vocabulary}, empty="never", streams=True, mapped=True,
)  # fmt: skip


def run(declared=None, **functions):
    return lambda **kw: check_retriever(
        SimpleNamespace(**{**HEALTHY, **functions}), **DECLARED | (declared or {}), **kw
    )


# ---- twins


def float64_scores(index, queries, k):
    hits = search(index, queries, k)
    return SimpleNamespace(ids=hits.ids, scores=hits.scores.double())


def last_among_equals(index, queries, k):
    s = scored(index, queries).flip(1)
    hits = top(s, whole(k))
    return SimpleNamespace(ids=torch.where(hits.ids >= 0, s.shape[1] - 1 - hits.ids, -1), scores=hits.scores)


def other_when_few(index, queries, k):
    s = scored(index, queries)
    return top(s * (1 + (k < 5) * torch.arange(s.shape[1]).remainder(3)), whole(k))


def cut_short(index, queries, k):
    return search(index, queries, min(whole(k), len(index.matrix)))


def ten_percent_off(index, queries, k):
    hits = search(index, queries, k)
    return SimpleNamespace(ids=hits.ids, scores=hits.scores * 1.1)


def deduplicates(texts):
    return build(list(dict.fromkeys(listed(texts))))


def by_place(texts):
    index = build(texts)
    index.matrix = index.matrix * (1 + torch.arange(len(index.matrix))[:, None] / 1000)
    return index


def drops_a_shard(texts):
    texts = listed(texts)
    return build(texts[: len(texts) - 1] + texts[:1] * (len(texts) > 1))


def scaled_by_batch(index, queries, k):
    hits = search(index, queries, k)
    return SimpleNamespace(ids=hits.ids, scores=hits.scores / len(queries))


def old_scores(index, queries, k, m, texts):
    hits, first = rerank(index, queries, k, m, texts), search(index, queries, k)
    return SimpleNamespace(ids=hits.ids, scores=first.scores)


def nan_when_empty(index, queries, k):
    hits = search(index, queries, k)
    bad = torch.tensor([not q.strip() for q in queries])
    return SimpleNamespace(ids=hits.ids, scores=hits.scores.masked_fill(bad[:, None], torch.nan))


class FindsEmpty(Index):
    def __init__(self, matrix):
        self.matrix = matrix


def silent(texts):
    return FindsEmpty(encode(texts))


def needs_two(texts):
    if len(listed(texts)) == 1:
        raise RuntimeError("two at least")
    return build(texts)


def any_k(index, queries, k):
    return top(scored(index, queries), max(1, int(k)))


def letters(texts):
    return build(list(texts))


def reads_twice(texts):
    if not hasattr(texts, "__len__"):
        next(iter(texts), None)
    return build(texts)


def padded_by_longest(texts, batch_size=4):
    return encode(texts) * (1 + max((len(t) for t in listed(texts)), default=0) / 10_000)


def by_batch(texts, batch_size=4):
    return encode(texts) * (1 + batch_size / 1000)


@torch.no_grad()
def drops(texts, batch_size=4):
    return MODEL(encode(texts) / MODEL.weight)


def leaves_eval(texts, batch_size=4):
    out = encode(texts)
    MODEL.eval()
    return out


def draws(texts):
    index = build(texts)
    index.matrix = index.matrix * (1 + np.random.rand() / 100)
    return index


def by_threads(index, queries, k):
    hits = search(index, queries, k)
    return SimpleNamespace(ids=hits.ids, scores=hits.scores * (1 + torch.get_num_threads() / 100))


def remembers(index, queries, k):
    index.matrix = index.matrix * 1.01
    return search(index, queries, k)


def asks_home(texts):
    try:
        socket.create_connection(("127.0.0.1", 9), timeout=0.01)
    except OSError:
        pass
    return build(texts)


def adds_in_front(index, texts):
    return Index(torch.cat([encode(texts), index.matrix]))


def saves_rounded(index, path):
    save(Index(index.matrix.half().float() * 1.001), path)


def reads_all(path):
    return Index(load(path).matrix.clone())


def trusts(path):
    data = np.frombuffer((Path(path) / "matrix").read_bytes(), np.float32)
    rows = data[: len(data) // len(WORDS) * len(WORDS)].reshape(-1, len(WORDS)).copy()
    return Index(torch.from_numpy(rows))


def pickles(index, path):
    Path(path).mkdir()
    (Path(path) / "index").write_bytes(pickle.dumps(index.matrix.numpy()))


def reads_pickle(path):
    return Index(torch.from_numpy(pickle.loads((Path(path) / "index").read_bytes())))


def stamps(index, path):
    save(index, path)
    (Path(path) / "made").write_text(str(random.SystemRandom().random()))


TWINS = {
    "an_answer_is_well_formed": [run(search=float64_scores)],
    "ties_go_to_the_lower_number": [run(search=last_among_equals)],
    "a_shorter_answer_is_the_start": [run(search=other_when_few)],
    "more_than_there_are": [run(search=cut_short)],
    "scores_are_the_definition": [run(search=ten_percent_off), run(build=drops_a_shard)],
    "duplicates_score_the_same": [run(build=deduplicates)],
    "order_of_passages_does_not_matter": [run(build=by_place)],
    "queries_do_not_meet": [run(search=scaled_by_batch)],
    "reranked_by_what_is_shown": [run(rerank=old_scores)],
    "odd_texts_do_no_harm": [run(search=nan_when_empty)],
    "a_passage_without_words_is_never_found": [run(build=silent)],
    "one_passage_is_a_corpus": [run(build=needs_two)],
    "wrong_arguments_are_refused": [run(search=any_k), run(build=letters)],
    "what_does_not_fit_is_refused": [run(dict(refuses={"another vocabulary": lambda: None}))],
    "a_stream_is_a_list": [run(build=reads_twice)],
    "an_embedding_is_of_its_text": [run(encode=padded_by_longest)],
    "options_change_nothing": [run(encode=by_batch)],
    "training_does_not_leak": [run(encode=drops), run(encode=leaves_eval)],
    "chance_is_left_alone": [run(build=draws)],
    "threads_change_nothing": [run(search=by_threads)],
    "a_search_leaves_no_trace": [run(search=remembers)],
    "nothing_goes_online": [run(build=asks_home)],
    "added_is_built": [run(add=adds_in_front)],
    "saved_and_loaded_is_the_same": [run(save=saves_rounded), run(save=stamps)],
    "a_loaded_index_is_mapped": [run(load=reads_all)],
    "damage_is_refused": [run(load=trusts)],
    "nothing_is_pickled": [run(save=pickles, load=reads_pickle)],
}


def test_every_check_has_a_twin():
    assert set(TWINS) == set(retrievers.retriever_kind.checks)


@pytest.mark.parametrize("name,twin", [(k, t) for k, ts in TWINS.items() for t in ts])
def test_a_broken_retriever_is_caught(name, twin):
    with pytest.raises(ContractError) as e:
        twin(only=(name,))
    failed = e.value.report.of("failed")
    assert {r.check for r in failed} == {name} and all(r.note for r in failed) and name in str(e.value)


def test_a_healthy_retriever_passes():
    report = run()()
    assert {r.status for r in report.runs} == {"passed"}, report


def test_a_retriever_needs_two_functions():
    with pytest.raises(ValueError, match="no search"):
        check_retriever(SimpleNamespace(build=build))
    with pytest.raises(ValueError, match="empty"):
        check_retriever(SimpleNamespace(build=build, search=search), empty="perhaps")
