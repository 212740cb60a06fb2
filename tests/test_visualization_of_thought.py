"Visualization-of-Thought: what must be refused, and graders and trackers that are broken on purpose must be caught"

import random

import numpy as np
import pytest
import torch

from lmlab.prompting import visualization_of_thought as vot

KINDS = ("route", "next_step", "tiling", "nl_nav")


def some(kind, n=12, **kw):
    return [dict(o) for o in vot.make_tasks(kind, 0, n=n, **kw)]


@pytest.mark.parametrize(
    "bad, word",
    [
        (dict(kind="maze"), "kind"),
        (dict(kind=None), "kind"),
        (dict(kind="route", levels=[1]), "level"),
        (dict(kind="route", levels=[9]), "level"),
        (dict(kind="route", levels=[2.5]), "level"),
        (dict(kind="route", levels=[]), "levels"),
        (dict(kind="route", skin="klingon"), "skin"),
        (dict(kind="route", seed=-1), "seed"),
        (dict(kind="route", n=0), "n"),
        (dict(kind="tiling", masks=[4]), "masked"),
        (dict(kind="tiling", masks=[0]), "masked"),
        (dict(kind="tiling", cols=3), "pieces"),
        (dict(kind="tiling", rows=3, cols=3), "pieces"),
        (dict(kind="tiling", pieces="TTLIX"), "pieces"),
        (dict(kind="tiling", pieces=""), "pieces"),
        (dict(kind="nl_nav", size=1), "size"),
        (dict(kind="nl_nav", size=99), "size"),
        (dict(kind="nl_nav", steps=0), "steps"),
    ],
)
def test_tasks_that_cannot_be(bad, word):
    with pytest.raises(ValueError, match=rf"^{word}: got .*allowed: "):
        vot.make_tasks(**bad)


@pytest.mark.parametrize("kind", KINDS)
def test_items_that_cannot_be(kind):
    item = some(kind, 1)[0]
    for call in (vot.prompt, lambda o: vot.grade(o, "A"), lambda o: vot.track(o, "A")):
        for bad in (None, {}, "x", item | dict(map=None), item | dict(kind="maze")):
            with pytest.raises(ValueError, match="^item: got "):
                call(bad)
    for call in (vot.prompt, vot.solve):
        with pytest.raises(ValueError, match="^setting: got 'dreams'"):
            call(item, "dreams")


def test_start_must_be_there_and_maps_rectangular():
    with pytest.raises(ValueError, match="start at 'unicorn'"):
        vot.prompt(some("nl_nav", 1)[0] | dict(start="unicorn"))
    item = some("route", 1)[0]
    with pytest.raises(ValueError, match="rows of one length"):
        vot.prompt(item | dict(map=item["map"] + "\n⬜"))
    with pytest.raises(ValueError, match="rows of one length"):
        vot.image("⬜⬜\n⬜")


def test_pictures_need_eyes():
    with pytest.raises(ValueError, match="text only"):
        vot.evaluate(lambda m: "A", some("tiling", 2), "multimodal")
    with pytest.raises(ValueError, match="no picture"):
        vot.prompt(some("nl_nav", 1)[0], "multimodal")


@pytest.mark.parametrize("trace", vot.TRACES)
def test_a_trace_is_of_the_same_questions(trace):
    a, b = (vot.trace_ids(9, 4, t, np.random.default_rng(3)) for t in (trace, "answer"))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1][:, -2:], b[1][:, -2:])
    assert torch.equal(a[1][:, ~a[2]], b[1][:, ~b[2]])  # what is told is the same
    with pytest.raises(ValueError, match="^trace: got 'poem'"):
        vot.trace_ids(1, 1, "poem", np.random.default_rng(0))
    with pytest.raises(ValueError, match="^world: got 'torus'"):
        vot.trace_ids(1, 1, trace, np.random.default_rng(0), "torus")


def test_shuffled_pictures_say_nothing():
    "The marks of another walk agree with the true ones as often as chance lets two walks agree"
    n, k = 4000, 6
    true, other = (
        vot.trace_ids(n, k, t, np.random.default_rng(5))[1][:, : 10 * k].view(n, k, 10)[:, :, 1:]
        for t in ("vot", "shuffled")
    )
    at, far = ((o == vot.MARK).int().argmax(2) for o in (true, other))
    apart = at[torch.randperm(n)]
    assert abs((at == far).float().mean() - (at == apart).float().mean()) < 0.02
    assert torch.equal(other, true.roll(1, 0))


def _walls_forgotten(rows, at, move):
    out = []
    while 0 <= (at := vot.ahead(at, move))[0] < len(rows) and 0 <= at[1] < len(rows[0]):
        out.append(at)
    return out


TWINS = {  # name -> (what is replaced, by what, kinds on which it must be noticed)
    "moves go through walls": ("slide", _walls_forgotten, ("route", "next_step")),
    "every drawing complies": ("keeps", lambda item, drawing: True, ("tiling",)),
    "a mark anywhere is right": ("shows", lambda *a: True, ("route", "next_step")),
    "no drawing is a copy": ("copies", lambda item: set(), KINDS),
    "wrong moves are remembered": (
        "completing",
        lambda steps, route: sum(a == b for a, b in zip(steps, route, strict=False)),
        ("route",),
    ),
}


def _sound(kind):
    "What must be true of the graders of a kind, on good and on bad replies"
    for item in some(kind):
        states = item["states"]
        gold = vot.solve(item, "vot")
        t = vot.track(item, gold)
        assert t["complete"] and t["last"] and all(t["accuracy"])
        assert vot.track(item, f"{item['map']}\n\n{gold}") == t
        if kind == "tiling":
            fixed = next(i for i, o in enumerate(item["map"]) if o not in "⬜\n")
            other = next(o for o in item["symbols"] if o != item["symbol"])  # the asked piece keeps its form
            broken = states[-1][:fixed] + other + states[-1][fixed + 1 :]
            assert (
                vot.drawn_option(item, states[-1]) == item["answer"]
                and vot.drawn_option(item, broken) is None
            )
        if kind in ("route", "next_step"):
            steps = item["moves"][:1]
            wrong = f"I move {steps[0]}.\n{vot.marked(item['map'], vot.find_square(item['map'].split(chr(10)), '🏢'), '🚶')}"
            assert vot.track(item, wrong)["accuracy"] == [False]
        if kind == "route":
            assert vot.grade(item, "Answer: " + ", ".join([*item["moves"][:1], *item["moves"]]))["correct"]
            detour = [item["moves"][0], vot.OPPOSITE[item["moves"][0]], *item["moves"]]
            assert vot.grade(item, "Answer: " + ", ".join(detour))["correct"]


@pytest.mark.parametrize("kind", KINDS)
def test_graders_are_sound(kind):
    _sound(kind)


@pytest.mark.parametrize("name", TWINS)
def test_broken_graders_are_caught(name, monkeypatch):
    what, by, kinds = TWINS[name]
    items = {k: some(k) for k in kinds}  # gold states are made before anything is broken
    monkeypatch.setattr(vot, "make_tasks", lambda kind, seed, n: items[kind])
    monkeypatch.setattr(vot, what, by)
    for kind in kinds:
        with pytest.raises(AssertionError):
            _sound(kind)


@pytest.mark.parametrize("kind", ("route", "next_step"))
def test_a_trail_is_a_drawing_of_the_state(kind):
    for item in some(kind):
        rows = item["map"].split("\n")
        walls = vot.canonical(item["map"]).split("\n")
        at, drawing, reply = vot.find_square(rows, "🏠"), item["map"], ""
        for move in item["moves"][: item["given"] or None]:
            for square in vot.slide(walls, at, move):
                drawing, at = vot.marked(drawing, square, "🔵"), square
            reply += f"I move {move}.\n{drawing}\n\n"
        t = vot.track(item, reply)
        assert t["complete"] and all(t["accuracy"]) and t["last"]
        gap = vot.marked(drawing, vot.slide(walls, vot.find_square(rows, "🏠"), item["moves"][0])[0], "⬜")
        if item["given"] != 1:  # a trail with a gap is none
            assert not vot.track(item, reply.replace(drawing, gap))["last"]


def test_global_generators_are_left_alone():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for kind in KINDS:
        some(kind)
    case = vot.trace_ids(2, 2, "vot", np.random.default_rng(0))
    vot.decode(vot.small_model(width=16, layers=1), *case, temperature=0.7)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_decoding_with_a_cache_is_decoding_without():
    model = vot.small_model(width=16, layers=2).eval()
    ask, say, own = vot.trace_ids(7, 3, "vot", np.random.default_rng(0))
    fast, now = vot.decode(model, ask, say, own), ask
    with torch.no_grad():
        for i, mine in enumerate(own):
            now = torch.cat(
                [now, model(input_ids=now).logits[:, -1:].argmax(-1) if mine else say[:, i : i + 1]], 1
            )
    assert torch.equal(fast, now[:, ask.shape[1] :])
    assert not torch.equal(fast, say) and torch.equal(fast[:, ~own], say[:, ~own])


def test_the_last_drawing_of_a_tiling_has_to_be_a_filling():
    for item in some("tiling"):
        gold = item["states"][-1]
        assert vot.track(item, f"Done:\n{gold}")["last"] is True
        i = next(i for i, o in enumerate(item["map"]) if o not in "⬜\n")  # a square that was given
        for paint in sorted(set(item["symbols"]) - {gold[i]}):
            assert not vot.track(item, f"Done:\n{gold[:i] + paint + gold[i + 1 :]}")["last"]
        holed = gold[:i] + "⬜" + gold[i + 1 :]
        assert not vot.track(item, f"Done:\n{gold}\nNo:\n{holed}")["last"]  # it is the last that counts
