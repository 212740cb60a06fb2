"""`check_prompting` passes a healthy environment and catches, by name, a twin broken on purpose: one or more for each of its checks."""

import datetime
import itertools
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import concatenate_datasets

from lmlab.core import check_prompting as promptings
from lmlab.core.check import ContractError, check_prompting
from lmlab.prompting import common
from lmlab.prompting.common import KINDS, SETTINGS, grade, make_tasks, prompt, run, solve

HOW = dict(
    kinds=KINDS, settings=SETTINGS, chance=dict(sum=1 / 40, compare=1 / 3),
    constants=dict(compare=("A", "B", "C")), needs=("kind", "numbers", "other", "answer"), make=dict(sum=dict(n=30), compare=dict(n=30)),
)  # fmt: skip
RUN = itertools.count()


def env(**functions):
    "Run the checker on the toy with some of its functions exchanged, and arguments of the checker"
    own = {k: functions.pop(k) for k in list(functions) if k in (*promptings.NEEDED, "evaluate")}
    healthy = dict(make_tasks=make_tasks, prompt=prompt, grade=grade, solve=solve) | own

    def evaluate(chat, tasks, **kw):
        return run(chat, tasks, healthy["prompt"], healthy["grade"], **kw)

    f = SimpleNamespace(**dict(evaluate=evaluate) | healthy)
    return lambda only: check_prompting(f, only=only, **HOW | functions)


def caught(run, name):
    "The run fails in the check `name`, with a reason"
    with pytest.raises(ContractError) as e:
        run(only=(name,))
    failed = e.value.report.of("failed")
    assert {r.check for r in failed} == {name} and all(r.note for r in failed)
    assert not any(r.note.startswith(("AttributeError", "NameError", "UnboundLocalError")) for r in failed), (
        e.value
    )


def user(text):
    return [dict(role="user", content=text)]


def with_column(**values):
    return lambda kind, **kw: make_tasks(kind, **kw).map(lambda r: values)


def moves_numpy(kind, **kw):
    np.random.seed(0)
    return make_tasks(kind, **kw)


def asks_python(item, setting):
    return prompt(item, setting) + [dict(role="assistant", content="?")] * random.randrange(2)


def upper(batch):
    return {
        k: [x.upper() if isinstance(x, str) and k == "answer" else x for x in v] for k, v in batch.items()
    }


def shared(item, setting, kept={}):  # noqa: B006
    return kept.setdefault((str(item), setting), prompt(item, setting))


def changes_the_item(item, setting):
    item["asked"] = item.get("asked", 0) + 1
    return prompt({k: v for k, v in item.items() if k != "asked"}, setting)


def hints(item, setting):
    first = dict(role="system", content=f"It is not {int(item['answer'] == 'less')}.")
    return [first, *prompt(item, setting)]


def numbered(item, setting):
    return user(f"Question {next(RUN)}. " + prompt(item, setting)[0]["content"])


def sloppy(item, setting):
    return solve(item | dict(numbers=[1, 1], answer="2" if item["kind"] == "sum" else "less"), setting) if item["numbers"][0] % 7 == 3 else solve(item, setting)  # fmt: skip


def graded(read):
    "A grader that takes the answer a function of the reply and the item gives; None: unreadable"

    def fn(item, reply):
        common._numbers(item)
        got = read(reply, item)
        return dict(correct=got == item["answer"], parse_fail=got is None, answer=got)

    return fn


def last_line(reply, item):
    return healthy(reply.split("\n")[-1], item) if reply else None


def healthy(reply, item):
    return grade(item, reply)["answer"]


def first_answer(reply, item):
    found = re.search(r"Answer: (\S+)", reply or "")
    return found and healthy(f"Answer: {found[1]}", item)


def last_answer(reply, item):
    found = re.findall(r"Answer: (\w+)", reply or "")
    return healthy(f"Answer: {found[-1]}", item) if found else None


def contains(reply, item):
    return item["answer"] if item["answer"] in (reply or "") else None


def kind_to_all(reply, item):
    return healthy(reply, item) and item["answer"]


def any_digit(reply, item):
    return item["answer"] if re.search(r"\d", reply or "") else healthy(reply, item)


def no_zero(reply, item):
    if "\x00" in (reply or ""):
        raise OSError("a zero byte")
    return healthy(reply, item)


def slow(reply, item):
    if len(reply or "") > 40_000:
        sum(i * i for i in range(30_000_000))
    return healthy(reply, item)


def says_zero(item, reply):
    out = grade(item, reply)
    return out if reply and reply.strip() else out | dict(parse_fail=False)


def refusals_are_wrong(item, reply):
    return grade(item, reply) | dict(parse_fail=False)


def as_numbers(item, reply):
    return {k: int(v) if isinstance(v, bool) else v for k, v in grade(item, reply).items()}


def fewer_names(item, reply):
    return {k: v for k, v in grade(item, reply).items() if v is not None}


def infinite(item, reply):
    return grade(item, reply) | dict(rate=float("nan"))


def pops(item, reply):
    out = grade(item, reply)
    item["seen"] = True
    return out


def every_other(item, reply):
    return grade(item, reply) | dict(turn=next(RUN) % 7)


def one_sided(kind, **kw):
    ds = make_tasks(kind, **kw)
    return ds.filter(lambda r: r["answer"] != "greater") if kind == "compare" else ds


def anything(item, reply):
    return (
        grade(item, reply)
        if isinstance(item, dict) and "answer" in item
        else dict(correct=False, parse_fail=True, answer=None)
    )


def any_setting(item, setting):
    return prompt(item, setting if setting in SETTINGS else "cot")


def any_prompt(item, setting):
    return prompt(item, setting) if isinstance(item, dict) and item.get("numbers") else user("?")


def unordered(chat, tasks, workers=8, **kw):
    out = run(chat, tasks, prompt, grade, workers=workers, **kw)
    return common.Report(out.rows[::-1] if workers > 1 else out.rows, out.settings)


def forgets(chat, tasks, transcript=None, **kw):
    return run(chat, tasks, prompt, grade, **kw)


def never_changes(kind, n=30, seed=0):
    common.whole("seed", seed, 0)
    return make_tasks(kind, n=n)


TWINS = [
    (env(make_tasks=lambda kind, n=30, seed=0: make_tasks(kind, n=n, seed=next(RUN))), "one_seed_one_set"),
    (env(make_tasks=lambda kind, **kw: make_tasks(kind, **kw).to_list()), "one_seed_one_set"),
    (env(make_tasks=never_changes), "the_seed_matters_where_declared"),
    (env(random=()), "the_seed_matters_where_declared"),
    (env(make_tasks=moves_numpy), "global_generators_are_left_alone"),
    (env(prompt=asks_python), "global_generators_are_left_alone"),
    (env(make_tasks=with_column(when=datetime.datetime(2024, 1, 1))), "items_are_plain_values"),
    (env(make_tasks=with_column(x=float("nan"))), "items_are_plain_values"),
    (env(make_tasks=lambda kind, **kw: make_tasks(kind, **kw).with_transform(upper)), "tasks_survive_the_disk"),
    (env(make_tasks=lambda kind, **kw: concatenate_datasets([make_tasks(kind, **kw)] * 2)), "no_question_twice"),
    (env(prompt=lambda item, s: prompt(item, s) + [dict(role="assistant", content="Answer:")]), "prompts_are_messages"),
    (env(prompt=lambda item, s: prompt(item, s)[0]["content"]), "prompts_are_messages"),
    (env(prompt=lambda item, s: user(" ") + prompt(item, s)), "prompts_are_messages"),
    (env(prompt=lambda item, s: prompt(item, "cot")), "settings_ask_differently"),
    (env(prompt=shared), "prompts_are_pure"),
    (env(prompt=changes_the_item), "prompts_are_pure"),
    (env(prompt=numbered), "prompts_are_pure"),
    (env(prompt=hints), "the_answer_is_not_in_the_prompt"),
    (env(solve=sloppy), "a_perfect_reply_is_right"),
    (env(solve=lambda item, s: None), "a_perfect_reply_is_right"),
    (env(grade=graded(last_line)), "layout_does_not_matter"),
    (env(grade=graded(first_answer)), "after_the_question_it_is_right"),
    (env(grade=as_numbers), "grades_say_what_they_must"),
    (env(grade=fewer_names), "grades_say_what_they_must"),
    (env(grade=infinite), "grades_say_what_they_must"),
    (env(grade=pops), "grading_is_pure"),
    (env(grade=every_other), "grading_is_pure"),
    (env(grade=says_zero), "silence_is_unreadable"),
    (env(grade=refusals_are_wrong), "silence_is_unreadable"),
    (env(grade=graded(lambda r, i: contains(r, i) or healthy(r, i))), "the_question_is_no_answer"),
    (env(grade=graded(last_answer)), "a_retraction_counts"),
    (env(grade=graded(kind_to_all)), "another_items_reply_is_chance"),
    (env(make_tasks=one_sided), "a_constant_is_chance"),
    (env(constants=dict(compare=("A", "B"))), "a_constant_is_chance"),
    (env(constants=dict(compare=("A", "B", "C", "D"))), "a_constant_is_chance"),
    (env(grade=graded(no_zero)), "noise_is_survived"),
    (env(grade=graded(any_digit)), "noise_is_survived"),
    (env(grade=graded(slow), kind=("sum",)), "noise_is_survived"),
    (env(grade=refusals_are_wrong), "a_solver_scores_one"),
    (env(solve=sloppy), "a_solver_scores_one"),
    (env(grade=every_other), "workers_change_nothing"),
    (env(evaluate=unordered), "workers_change_nothing"),
    (env(prompt=numbered), "resumed_is_straight"),
    (env(evaluate=forgets), "resumed_is_straight"),
    (env(make_tasks=lambda kind, **kw: make_tasks(kind if kind in KINDS else "sum", **kw)), "an_unknown_kind_is_refused"),
    (env(prompt=any_setting), "an_unknown_setting_is_refused"),
    (env(grade=anything), "a_bad_item_is_refused"),
    (env(prompt=any_prompt), "a_bad_item_is_refused"),
    (env(make_tasks=lambda kind, n=30, seed=0: make_tasks(kind, n=n, seed=abs(int(seed or 0)))), "a_bad_size_is_refused"),
]  # fmt: skip


def test_every_check_has_a_twin():
    assert {t[1] for t in TWINS} == set(promptings.prompting.checks)


@pytest.mark.parametrize("run,name", TWINS)
def test_a_broken_environment_is_caught(run, name):
    caught(run, name)


def test_a_healthy_environment_passes():
    report = env()(only=())
    assert {r.check for r in report.of("n/a")} == {
        "a_constant_is_chance"
    }  # of sums, whose answers cannot be listed
    assert len(report.checks) >= 25


def test_without_evaluate_the_runs_do_not_apply():
    report = check_prompting(
        SimpleNamespace(make_tasks=make_tasks, prompt=prompt, grade=grade, solve=solve),
        **HOW,
        only=("resumed_is_straight",),
    )
    assert {r.note for r in report.of("n/a")} == {"hands over no evaluate"}


def test_a_healthy_module_passes_too():
    check_prompting(common, **HOW, only=("a_perfect_reply_is_right", "resumed_is_straight"), kind=("sum",))


@pytest.mark.parametrize(
    "change,says",
    [
        (dict(functions=SimpleNamespace(prompt=prompt)), "functions: no make_tasks, grade, solve"),
        (dict(kinds="sum"), "kinds: 'sum'"),
        (dict(settings=()), "settings: ()"),
        (dict(chance=dict(sum=0.1)), "chance: nothing for"),
        (dict(chance=dict(sum=0.1, compare=0.3, other=1)), "chance: has"),
        (dict(make=dict(other={})), "make: has"),
    ],
)
def test_the_checker_refuses_bad_arguments(change, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        check_prompting(**dict(functions=common) | HOW | change)
