"""Chats, transcripts, reports and the parser: a server of HTTP that fails on purpose, runs that are killed, answers in every phrasing."""

import contextlib
import email.utils
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmlab.prompting import common
from lmlab.prompting.common import (
    ChatError,
    Constant,
    Echo,
    Flaky,
    LocalChat,
    Reply,
    Scripted,
    ServerChat,
    Transcript,
    compare,
    final_answer,
    grade,
    majority,
    make_tasks,
    prompt,
    run,
    solve,
    wilson,
)

ASK = [dict(role="user", content="What is 2 + 2?")]
KEY = "sk-very-secret-0123456789"


# -- a server that speaks the protocol, and fails as it is told ------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *a):
        pass

    def do_GET(self):
        self.server.seen.append(("GET", self.path, dict(self.headers), None))
        self.answer(200, b"{}")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            n = len(self.server.seen)
            self.server.seen.append(("POST", self.path, dict(self.headers), json.loads(body)))
            plan = self.server.plan[n] if n < len(self.server.plan) else good
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            plan(self, json.loads(body))

    def answer(self, status, body, kind="application/json", length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for k, v in headers.items():
            self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        self.wfile.write(body)


def protocol(text, **changes):
    message = dict(role="assistant", content=text)
    choice = dict(index=0, message=message, finish_reason="stop")
    usage = dict(prompt_tokens=11, completion_tokens=3, total_tokens=14)
    return json.dumps(
        dict(id="x", object="chat.completion", choices=[choice], usage=usage) | changes
    ).encode()


def good(h, body):
    h.answer(200, protocol(f"heard {body['messages'][-1]['content']}"))


def status(code, message="on purpose", **headers):
    return lambda h, body: h.answer(code, json.dumps(dict(error=dict(message=message))).encode(), **headers)


def raw(body, **kw):
    return lambda h, _: h.answer(200, body, **kw)


def slow(seconds):
    return lambda h, body: (time.sleep(seconds), good(h, body))


def hangs_up(h, body):
    h.connection.close()


def breaks_off(h, body):
    out = protocol("a long answer that is cut off")
    h.answer(200, out[:30], length=len(out))
    h.connection.shutdown(2)


def drips(h, body):
    h.send_response(200)
    h.send_header("Content-Type", "application/json")
    h.send_header("Content-Length", "1000")
    h.end_headers()
    for _ in range(40):
        h.wfile.write(b" ")
        h.wfile.flush()
        time.sleep(0.05)


@pytest.fixture
def server():
    "Start a server on a free port of this machine; `plan` says what the first answers are"
    s = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.plan, s.seen, s.lock, s.slept = [], [], threading.Lock(), []
    s.daemon_threads = True
    t = threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True)
    t.start()
    s.url = f"http://127.0.0.1:{s.server_address[1]}/v1"
    s.chat = lambda **kw: ServerChat(s.url, "tiny", **(dict(sleep=s.slept.append, timeout=5) | kw))
    yield s
    s.shutdown()
    s.server_close()


def test_a_call_is_of_the_protocol(server):
    chat = server.chat(api_key=KEY, max_new_tokens=7, stop="\n", top_p=0.9, seed=5)
    reply = chat(ASK, temperature=0.5)
    assert reply == "heard What is 2 + 2?"
    assert (reply.prompt_tokens, reply.completion_tokens, reply.finish_reason) == (11, 3, "stop")
    assert reply.seconds > 0 and reply.raw["id"] == "x"
    method, path, headers, body = server.seen[0]
    assert (method, path, headers["Authorization"]) == ("POST", "/v1/chat/completions", f"Bearer {KEY}")
    want = dict(model="tiny", messages=ASK, temperature=0.5, seed=5, max_tokens=7, stop=["\n"], top_p=0.9)
    assert body == want
    assert chat.usage == dict(calls=1, prompt_tokens=11, completion_tokens=3)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_a_base_url_may_end_in_many_ways(server, end):
    base = server.url.removesuffix("/v1")
    assert ServerChat(base + end, "tiny")(ASK).startswith("heard")
    assert server.seen[0][1] == "/v1/chat/completions"


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(server, code):
    server.plan = [status(code), status(code)]
    chat = server.chat()
    assert chat(ASK) == "heard What is 2 + 2?"
    assert len(server.seen) == 3 and chat.usage["retries"] == 2
    assert server.seen[0][3] == server.seen[2][3]
    a, b = server.slept
    assert 0.25 <= a <= 0.5 <= b <= 1.0  # doubled, less a random half


@pytest.mark.parametrize("code", [400, 401, 403, 404, 422])
def test_a_refusal_is_final(server, code):
    server.plan = [status(code)]
    with pytest.raises(ChatError, match=f"status {code}: on purpose") as e:
        server.chat()(ASK)
    assert (len(server.seen), server.slept, e.value.status, e.value.attempts) == (1, [], code, 1)


def test_an_exhausted_quota_is_final(server):
    server.plan = [status(429, "insufficient_quota: buy more")]
    with pytest.raises(ChatError, match="insufficient_quota"):
        server.chat()(ASK)
    assert len(server.seen) == 1


def test_retries_come_to_an_end(server):
    server.plan = [status(503)] * 9
    with pytest.raises(ChatError, match=r"status 503: on purpose \(attempt 4\)") as e:
        server.chat(retries=3)(ASK)
    assert (len(server.seen), len(server.slept), e.value.attempts) == (4, 3, 4)


def test_pauses_are_doubled_and_bounded(server):
    server.plan = [status(500)] * 12
    server.chat(retries=12, backoff=1, max_wait=20)(ASK)
    for k, s in enumerate(server.slept):
        assert min(20, 2**k) / 2 <= s <= min(20, 2**k)
    assert len(set(server.slept)) == 12  # random


def test_jitter_differs_between_clients(server):
    server.plan = [status(500)] * 8
    for _ in range(8):
        with contextlib.suppress(ChatError):
            server.chat(retries=1)(ASK)
    assert len(set(server.slept)) == len(server.slept) > 2


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_the_server_says_how_long_to_wait(server, form):
    value = "7" if form == "seconds" else email.utils.formatdate(time.time() + 7.5, usegmt=True)
    server.plan = [status(429, Retry_After=value)]
    server.chat()(ASK)
    assert len(server.slept) == 1 and 5.5 <= server.slept[0] <= 7.5


def test_a_pause_that_is_too_long_is_an_error(server):
    server.plan = [status(429, Retry_After="3600")]
    with pytest.raises(ChatError, match="asks for a pause of 3600 s, max_wait is 60"):
        server.chat()(ASK)
    assert server.slept == []


@pytest.mark.parametrize("value", ["soon", "-3", "nan", "inf", ""])
def test_a_senseless_pause_is_ignored(server, value):
    server.plan = [status(429, Retry_After=value)]
    assert server.chat()(ASK).startswith("heard")
    assert server.slept[0] <= 0.5


@pytest.mark.parametrize(
    "broken",
    [hangs_up, breaks_off, raw(b'{"choices": [{"mess'), raw(b"", kind="application/json")],
    ids=["closed", "cut off", "truncated JSON", "empty"],
)
def test_a_broken_answer_is_asked_for_again(server, broken):
    server.plan = [broken]
    chat = server.chat()
    assert chat(ASK).startswith("heard")
    assert chat.usage["retries"] == 1


def test_a_slow_answer_is_asked_for_again(server):
    server.plan = [slow(1.0)]
    assert server.chat(timeout=0.3)(ASK).startswith("heard")
    assert len(server.slept) == 1


def test_a_dripping_answer_runs_out_of_time(server):
    server.plan = [drips]
    began = time.monotonic()
    assert server.chat(timeout=0.3)(ASK).startswith("heard")
    assert time.monotonic() - began < 1.5 and len(server.slept) == 1


@pytest.mark.parametrize(
    "broken,says",
    [
        (raw(b"<html>Welcome</html>", kind="text/html"), "type 'text/html' that is no JSON.*Is base_url right"),
        (raw(b"{}"), "not of the protocol"),
        (raw(b"[]"), "not of the protocol"),
        (raw(b"null"), "not of the protocol"),
        (raw(protocol("x", choices=[])), "not of the protocol"),
        (raw(protocol("x", choices=[dict(message=dict(content=5))])), "not of the protocol"),
        (raw(json.dumps(dict(error=dict(message="no such model", code=404))).encode()), "status 404: no such model"),
    ],
)  # fmt: skip
def test_an_answer_of_another_kind_is_an_error(server, broken, says):
    server.plan = [broken]
    with pytest.raises(ChatError, match=says):
        server.chat()(ASK)
    assert server.slept == []


def test_an_error_in_an_answer_of_status_200_may_pass(server):
    server.plan = [raw(json.dumps(dict(error=dict(message="overloaded", code=503))).encode())]
    assert server.chat()(ASK).startswith("heard")
    assert len(server.slept) == 1


@pytest.mark.parametrize(
    "content,want", [(None, ""), ("", ""), ([dict(type="text", text="a"), dict(type="text", text="b")], "ab")]
)
def test_content_has_several_forms(server, content, want):
    server.plan = [raw(protocol(content))]
    assert server.chat()(ASK) == want


def test_an_answer_without_usage_has_no_counts(server):
    server.plan = [raw(protocol("x", usage=None))]
    reply = server.chat()(ASK)
    assert (reply, reply.prompt_tokens, reply.completion_tokens) == ("x", None, None)


def test_a_redirect_is_not_followed(server):
    server.plan = [
        status(307, Location=f"{server.url}/elsewhere"),
        status(302, Location=f"{server.url}/elsewhere"),
    ]
    for code in (307, 302):
        with pytest.raises(ChatError, match=f"status {code}"):
            server.chat(api_key=KEY)(ASK)
    assert [o[1] for o in server.seen] == ["/v1/chat/completions"] * 2


def test_the_key_is_nowhere(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    chat = server.chat()
    server.plan = [
        status(401, f"Incorrect key {KEY}"),
        raw(f"<p>{KEY}".encode(), kind="text/html"),
        status(500, KEY),
        status(500, KEY),
    ]
    said = [repr(chat), chat.name]
    for _ in range(2):
        with pytest.raises(ChatError) as e:
            chat(ASK)
        said.append(str(e.value))
    with pytest.raises(ChatError) as e:
        server.chat(retries=1)(ASK)
    assert "***" in str(e.value) and "***" in said[2] and "***" in said[3]
    run(chat, make_tasks("sum", n=3), prompt, grade, setting="cot", transcript=tmp_path / "t.jsonl")
    said += [str(e.value), (tmp_path / "t.jsonl").read_text(), *capsys.readouterr()]
    assert server.seen[-1][2]["Authorization"] == f"Bearer {KEY}"
    assert not any(KEY in s for s in said)


def test_a_key_of_the_environment_is_not_sent_in_the_open(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert ServerChat("http://example.org", "m")._key is None
    assert ServerChat("https://example.org", "m")._key == KEY
    assert ServerChat("http://example.org", "m", api_key=KEY)._key == KEY


def test_an_environment_proxy_is_not_asked_for_this_machine(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert server.chat()(ASK).startswith("heard")


def test_nobody_listens():
    with pytest.raises(ChatError, match=r"ConnectionRefusedError.*\(attempt 3\)"):
        ServerChat("http://127.0.0.1:9", "m", retries=2, sleep=lambda s: None)(ASK)


@pytest.mark.parametrize(
    "kw,says",
    [
        (dict(base_url="localhost:8000"), "base_url"),
        (dict(base_url="ftp://x"), "base_url"),
        (dict(base_url=None), "base_url"),
        (dict(base_url="http://user:pw@x/v1"), "base_url"),
        (dict(model=""), "model"),
        (dict(model=None), "model"),
        (dict(api_key="a b"), "api_key"),
        (dict(timeout=-1), "timeout"),
        (dict(retries=1.5), "retries"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(temperature=-0.1), "temperature"),
        (dict(temperature=math.nan), "temperature"),
    ],
)
def test_a_bad_argument_of_a_server_is_refused(kw, says):
    with pytest.raises(ValueError, match=f"^{says}: got") as e:
        ServerChat(**(dict(base_url="http://localhost", model="m") | kw))
    assert "pw" not in str(e.value) and "a b" not in str(e.value)


@pytest.mark.parametrize("bad", [None, [], 5, [dict(role="user")], [dict(role="me", content="x")]])
def test_bad_messages_are_never_sent(server, bad):
    with pytest.raises(ValueError, match="messages"):
        server.chat()(bad)
    assert server.seen == []


def test_eight_workers_at_a_server_that_stumbles(server, tmp_path):
    "Half of the first forty calls fail; the report is that of a server in good health"
    tasks = make_tasks("sum", n=40)
    answers = {json.dumps(prompt(o, "direct")): solve(o, "direct") for o in tasks}
    at_once, most = [0], [0]

    def ok(h, body):
        with server.lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.01)
        with server.lock:
            at_once[0] -= 1
        h.answer(200, protocol(answers[json.dumps(body["messages"])]))

    server.plan = [(status(503), ok, hangs_up, ok)[i % 4] for i in range(40)] + [ok] * 80
    report = run(
        server.chat(retries=60), tasks, prompt, grade, setting="direct", workers=8, transcript=tmp_path
    )
    assert (report.accuracy, report.failures, report.items) == (1.0, 0, 40)
    assert report.total("completion_tokens") == 120 and report.tokens == 40 * 14
    assert 2 <= most[0] <= 8
    server.plan = []
    before = len(server.seen)
    again = run(
        server.chat(retries=60), tasks, prompt, grade, setting="direct", workers=1, transcript=tmp_path
    )
    assert len(server.seen) == before and again.rows == report.rows


# -- local models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    from lmlab.core import nano

    return nano.build("llama", "pico", max_position_embeddings=256).eval(), nano.tokenizer()


QUESTIONS = [[dict(role="user", content="hi " * k)] for k in (1, 9, 3, 25, 2, 5, 17)]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def test_batches_are_single_calls(tiny):
    chat = LocalChat(*tiny, max_new_tokens=9, batch=3)
    together = chat.many(QUESTIONS)
    assert together == [chat(q) for q in QUESTIONS]
    assert [r.completion_tokens for r in together] == [chat(q).completion_tokens for q in QUESTIONS]
    assert [r.prompt_tokens for r in together] == [
        len(f"User: {q[0]['content']}\n\nAssistant:") for q in QUESTIONS
    ]


def test_samples_do_not_depend_on_their_neighbours(tiny):
    chat, seeds = LocalChat(*tiny, max_new_tokens=9, batch=3), list(range(7))
    together = chat.many(QUESTIONS, temperature=1.0, seeds=seeds)
    assert together == [chat(q, temperature=1.0, seed=s) for q, s in zip(QUESTIONS, seeds, strict=True)]
    assert together != chat.many(QUESTIONS, temperature=1.0, seeds=seeds[::-1])
    assert together != chat.many(QUESTIONS)


def test_greedy_is_the_largest_logit(tiny):
    import torch

    model, tok = tiny
    reply = LocalChat(model, tok, max_new_tokens=6)(ASK)
    ids = torch.tensor([tok("User: What is 2 + 2?\n\nAssistant:", add_special_tokens=False)["input_ids"]])
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert reply == tok.decode(ids[0, -6:], skip_special_tokens=True).strip()


def test_draws_follow_the_softmax(tiny):
    import torch

    model, tok = tiny
    ids = torch.tensor([tok("User: hi \n\nAssistant:", add_special_tokens=False)["input_ids"]])
    logits = model(ids).logits[:, -1].detach()
    p = (logits[0] / 0.1).double().softmax(-1)
    gumbel = common._sampling(0.1, None, list(range(4000)), "cpu")
    scores = logits.expand(4000, -1)
    for f in gumbel:
        scores = f(None, scores)
    seen = torch.bincount(scores.argmax(-1), minlength=len(p)).double()
    few = torch.stack([o[p > 0.002] for o in (seen, 4000 * p)])
    few = torch.cat([few, torch.tensor([[4000.0 - few[0].sum()], [4000 - few[1].sum()]])], 1)
    chi2 = ((few[0] - few[1]) ** 2 / few[1].clamp(min=1e-9)).sum()
    assert torch.special.gammaincc(torch.tensor((few.shape[1] - 1) / 2).double(), chi2 / 2) > 1e-3


def test_a_stop_string_ends_a_row(tiny):
    chat = LocalChat(*tiny, max_new_tokens=40)
    free = chat.many(QUESTIONS, temperature=1.0, seeds=range(7))
    stop = next(c for c in "etaoinsr .,0123456789" if sum(c in str(r)[3:] for r in free) >= 2)
    ended = LocalChat(*tiny, max_new_tokens=40, stop=stop).many(QUESTIONS, temperature=1.0, seeds=range(7))
    for a, b in zip(free, ended, strict=True):
        assert b == str(a).split(stop)[0].strip() or stop not in a
        assert b.finish_reason == ("stop" if stop in a or a.finish_reason == "stop" else "length")
        assert b.completion_tokens <= a.completion_tokens
    assert any(b.completion_tokens < a.completion_tokens for a, b in zip(free, ended, strict=True))


def test_a_template_is_used(tiny):
    import copy

    model, tok = tiny[0], copy.deepcopy(tiny[1])
    tok.chat_template = TEMPLATE
    chat, two = LocalChat(model, tok, max_new_tokens=2), [dict(role="system", content="S"), *ASK]
    assert chat.prompt(two) == "<system>S<user>What is 2 + 2?<assistant>"
    assert chat(two).prompt_tokens == len(chat.prompt(two))  # bytes, and no token beside them
    tok.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    )
    assert chat.prompt(two) == "<user>S\n\nWhat is 2 + 2?<assistant>"


def test_a_pipeline_and_a_folder_are_chats(tiny, tmp_path):
    from transformers import pipeline

    want = LocalChat(*tiny, max_new_tokens=5)
    pipe = LocalChat(pipeline("text-generation", model=tiny[0], tokenizer=tiny[1]), max_new_tokens=5)
    tiny[0].save_pretrained(tmp_path), tiny[1].save_pretrained(tmp_path)
    folder = LocalChat(tmp_path, max_new_tokens=5)
    assert want(ASK) == pipe(ASK) == folder(ASK)
    assert want.name == pipe.name and want.name.split("@")[1] == folder.name.split("@")[1]


def test_other_weights_are_another_chat(tiny):
    import copy

    import torch

    model = copy.deepcopy(tiny[0])
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "q_proj" in n).mul_(1.01)
    assert LocalChat(model, tiny[1]).name != LocalChat(*tiny).name == LocalChat(*tiny).name


def test_a_chat_leaves_the_model_as_it_was(tiny):
    import torch

    tiny[0].train()
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in tiny[0].state_dict().items()}
    LocalChat(*tiny, max_new_tokens=3)(ASK, temperature=1.0, seed=1)
    assert tiny[0].training and torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(state[k], v) for k, v in tiny[0].state_dict().items())
    tiny[0].eval()


def test_a_question_that_is_too_long_fails_alone(tiny):
    chat = LocalChat(*tiny, max_new_tokens=8)
    with pytest.raises(ValueError, match="messages: got 418 tokens, allowed: at most 248: 256 positions"):
        chat([dict(role="user", content="x" * 400)])
    items = [dict(q="x" * (400 if i == 3 else i)) for i in range(9)]
    ask = lambda item: [dict(role="user", content=item["q"])]
    report = run(chat, items, ask, lambda item, reply: dict(correct=True, parse_fail=False))
    assert [r["status"] for r in report.rows] == ["failed" if i == 3 else "ok" for i in range(9)]
    assert "418 tokens" in report.rows[3]["error"]


@pytest.mark.parametrize(
    "args,kw,says",
    [
        ((5,), {}, "model"),
        (("MODEL",), {}, "tokenizer"),
        (("MODEL", "TOK"), dict(max_new_tokens=0), "max_new_tokens"),
        (("MODEL", "TOK"), dict(temperature=-1), "temperature"),
        (("MODEL", "TOK"), dict(stop=("",)), "stop"),
        (("MODEL", "TOK"), dict(batch=0), "batch"),
    ],
)
def test_a_bad_argument_of_a_local_chat_is_refused(tiny, args, kw, says):
    args = [dict(MODEL=tiny[0], TOK=tiny[1]).get(a, a) for a in args]
    with pytest.raises(ValueError, match=f"^{says}: got"):
        LocalChat(*args, **kw)


# -- runs and transcripts --------------------------------------------------------------------------------------------


def solver(tasks, setting="cot", fails=lambda i: False, wait=0.0):
    known = {json.dumps(prompt(o, setting)): (i, solve(o, setting)) for i, o in enumerate(tasks)}

    def say(messages):
        i, reply = known[json.dumps(messages)]
        time.sleep(wait * (i % 3))
        if fails(i):
            raise ConnectionError(f"no line for {i}")
        return reply

    return Scripted(say, "solver")


def go(chat, tasks, **kw):
    return run(chat, tasks, prompt, grade, **(dict(setting="cot", progress=False) | kw))


def test_a_run_counts_right_wrong_unreadable_and_failed_apart():
    tasks = make_tasks("sum", n=20)
    known = solver(tasks)

    def say(messages):
        i = json.loads(json.dumps([prompt(o, "cot") for o in tasks])).index(messages)
        if i < 5:
            raise TimeoutError("too slow")
        return known(messages) if i < 12 else "Answer: 9999" if i < 17 else "I cannot say."

    report = go(Scripted(say, "mixed"), tasks)
    assert (report.failures, report.items) == (5, 15)
    assert report.accuracy == pytest.approx(7 / 15)
    assert report.parse_failure_rate == pytest.approx(3 / 15)
    assert report.errors == {"TimeoutError: too slow": 5}
    assert report.interval == pytest.approx(wilson(7 / 15, 15))


@pytest.mark.parametrize("workers", [1, 3, 8, 64])
def test_the_order_is_that_of_the_items(workers):
    tasks = make_tasks("sum", n=30)
    report = go(solver(tasks, fails=lambda i: i % 7 == 3, wait=0.004), tasks, workers=workers)
    assert [r["item"] for r in report.rows] == list(range(30))
    assert [r["status"] for r in report.rows] == ["failed" if i % 7 == 3 else "ok" for i in range(30)]
    assert [r["text"] for r in report.of("ok")] == [
        solve(o, "cot") for i, o in enumerate(tasks) if i % 7 != 3
    ]


def test_a_bad_item_a_bad_grade_and_a_bad_reply_fail_alone():
    tasks = [dict(o) for o in make_tasks("sum", n=6)]
    items = [tasks[0], dict(kind="sum"), *tasks[1:]]
    chat = solver(tasks)
    report = go(chat, items)
    assert [r["status"] for r in report.rows] == ["ok", "failed", *["ok"] * 5]
    assert report.rows[1]["error"].startswith("ValueError: item: got")

    def strict(item, reply):
        if item == tasks[2]:
            raise RuntimeError("cannot grade")
        return grade(item, reply)

    report = run(chat, tasks, prompt, strict, setting="cot")
    assert report.errors == {"grade: RuntimeError: cannot grade": 1} and report.accuracy == 1.0
    report = go(lambda messages: 5, tasks)
    assert set(report.errors) == {"TypeError: the chat returned a int, allowed: a string"}
    report = go(lambda messages: None, tasks)
    assert (report.failures, report.parse_failure_rate) == (0, 1.0)


def test_a_prompt_that_always_fails_is_an_error():
    with pytest.raises(ValueError, match="setting: got 'vot'"):
        go(Echo(), make_tasks("sum", n=3), setting="vot")


def test_an_unreadable_answer_is_never_right():
    kind = lambda item, reply: dict(correct=True, parse_fail=True)
    report = run(Echo(), make_tasks("sum", n=4), prompt, kind, setting="cot")
    assert (report.accuracy, report.parse_failure_rate) == (0.0, 1.0)


def test_a_transcript_is_lines_of_json(tmp_path):
    tasks = make_tasks("sum", n=5)
    report = go(solver(tasks), tasks, transcript=tmp_path / "t.jsonl")
    head, *lines = [json.loads(o) for o in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert head == dict(
        lmlab="transcript", settings=dict(chat="solver", setting="cot", temperature=None, seed=0)
    )
    assert {o["text"] for o in lines} == {r["text"] for r in report.rows} and len(
        {o["key"] for o in lines}
    ) == 5


@pytest.mark.parametrize("done", [0, 1, 7, 20])
def test_a_resumed_run_asks_for_the_rest(tmp_path, done):
    tasks = make_tasks("sum", n=20)
    want = go(solver(tasks), tasks)
    go(solver(tasks), tasks.select(range(done)), transcript=tmp_path)
    rest = solver(tasks)
    assert go(rest, tasks, transcript=tmp_path).outcome() == want.outcome()
    assert rest.calls == 20 - done


def test_failures_are_tried_again(tmp_path):
    tasks = make_tasks("sum", n=20)
    first = go(solver(tasks, fails=lambda i: i < 6), tasks, transcript=tmp_path)
    assert first.failures == 6
    second = solver(tasks)
    assert go(second, tasks, transcript=tmp_path).failures == 0 and second.calls == 6


def test_a_torn_line_is_cut_off(tmp_path):
    tasks, path = make_tasks("sum", n=8), tmp_path / "t.jsonl"
    want = go(solver(tasks), tasks, transcript=path).outcome()
    text = path.read_bytes()
    last = text.rstrip(b"\n").rfind(b"\n") + 1
    for cut in (last + 1, last + 20, len(text) - 1):
        path.write_bytes(text[:cut])
        again = solver(tasks)
        assert go(again, tasks, transcript=path).outcome() == want and again.calls == 1
        assert len([json.loads(o) for o in path.read_text().splitlines()]) == 9
    path.write_bytes(text[:20])  # torn in the head
    again = solver(tasks)
    assert go(again, tasks, transcript=path).outcome() == want and again.calls == 8


def test_a_damaged_line_is_asked_for_again(tmp_path):
    tasks, path = make_tasks("sum", n=8), tmp_path / "t.jsonl"
    want = go(solver(tasks), tasks, transcript=path).outcome()
    lines = path.read_bytes().split(b"\n")
    lines[3] = lines[3][:10] + b"\x00\xff" + lines[3][12:]
    path.write_bytes(b"\n".join(lines))
    again = solver(tasks)
    with pytest.warns(UserWarning, match="line 4 is damaged"):
        assert go(again, tasks, transcript=path).outcome() == want
    assert again.calls == 1


@pytest.mark.parametrize(
    "change,says",
    [
        (dict(seed=1), "seed = 0"),
        (dict(setting="direct"), "setting = 'cot'"),
        (dict(temperature=0.5), "temperature = None"),
        (dict(chat=Constant("x")), "chat = 'solver'"),
    ],
)
def test_a_transcript_of_other_settings_is_refused(tmp_path, change, says):
    tasks, path = make_tasks("sum", n=3), tmp_path / "t.jsonl"
    go(solver(tasks), tasks, transcript=path)
    before = path.read_bytes()
    kw = dict(change)
    with pytest.raises(ValueError, match=f"transcript: got .*begun with {says}"):
        go(kw.pop("chat", solver(tasks)), tasks, transcript=path, **kw)
    assert path.read_bytes() == before


def test_a_folder_holds_a_transcript_for_every_setting(tmp_path):
    tasks = make_tasks("sum", n=3)
    for s in ("cot", "direct"):
        go(solver(tasks, s), tasks, setting=s, transcript=tmp_path)
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_another_file_is_not_overwritten(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text('{"my": "notes"}\n')
    with pytest.raises(ValueError, match="transcript: got .*allowed: a transcript of this program"):
        go(Echo(), make_tasks("sum", n=3), transcript=path)
    assert path.read_text() == '{"my": "notes"}\n'


def test_two_runs_do_not_share_a_file(tmp_path):
    held = Transcript(tmp_path / "t.jsonl", {})
    with pytest.raises(ValueError, match="no other run"):
        Transcript(tmp_path / "t.jsonl", {})
    held.close()
    Transcript(tmp_path / "t.jsonl", {}).close()


JOB = """
import json, os, sys, time
from lmlab.prompting.common import *
tasks = make_tasks("sum", n=40)
known = {json.dumps(prompt(o, "cot")): solve(o, "cot") for o in tasks}
def say(messages):
    time.sleep(float(sys.argv[2]))
    with open(sys.argv[1] + ".calls", "a") as f:
        f.write("x")
    return known[json.dumps(messages)]
report = run(Scripted(say, "solver"), tasks, prompt, grade, setting="cot", workers=3, transcript=sys.argv[1], progress=False)
print(json.dumps(report.outcome()))
"""


def job(path, wait, **kw):
    return subprocess.Popen(
        [sys.executable, "-c", JOB, str(path), str(wait)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kw,
    )


def lines_in(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_resumes_to_the_same_report(tmp_path, how):
    path = tmp_path / "t.jsonl"
    first, end = job(path, 0.1), time.monotonic() + 300
    while lines_in(path) < 8 and time.monotonic() < end:
        time.sleep(0.02)
    began = time.monotonic()
    first.send_signal(how)
    _, said = first.communicate(timeout=120)
    assert first.returncode != 0 and time.monotonic() - began < 60
    assert how == signal.SIGKILL or "KeyboardInterrupt" in said
    kept = lines_in(path) - 1
    assert 7 <= kept < 40
    before = Path(f"{path}.calls").stat().st_size
    assert before - kept <= 3  # in flight when it was killed, at most one a worker
    second = job(path, 0)
    out, said = second.communicate(timeout=300)
    assert second.returncode == 0, said
    assert Path(f"{path}.calls").stat().st_size - before == 40 - kept
    tasks = make_tasks("sum", n=40)
    assert json.loads(out) == json.loads(json.dumps(go(solver(tasks), tasks).outcome()))


def test_a_full_disk_ends_the_run(tmp_path, monkeypatch):
    def full(self, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Transcript, "add", full)
    tasks = make_tasks("sum", n=20)
    with pytest.raises(OSError, match="No space left"):
        go(solver(tasks), tasks, transcript=tmp_path)


def test_a_dead_server_ends_the_run():
    tasks = make_tasks("sum", n=60)
    chat = Flaky(Constant("x"), share=1.0)
    with pytest.raises(
        ChatError, match="10 calls in a row failed, the last with ConnectionError: refused on purpose"
    ):
        go(chat, tasks, give_up=10)
    assert chat.calls < 30
    assert go(chat, tasks, give_up=None).failures == 60


def test_flaky_fails_for_the_same_questions():
    tasks = make_tasks("sum", n=60)
    a, b = (go(Flaky(solver(tasks), 0.4, seed=3), tasks, workers=w).outcome() for w in (1, 8))
    assert a == b and 10 < sum(r["status"] == "failed" for r in a) < 40
    assert go(Flaky(solver(tasks), 0.4, seed=4), tasks).outcome() != a


@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.parametrize("before", [(), range(30, 40), range(5)])
def test_a_budget_covers_a_prefix(tmp_path, workers, before):
    tasks = make_tasks("sum", n=40)
    full = go(solver(tasks), tasks)
    each = [r["prompt_tokens"] + r["completion_tokens"] for r in full.rows]
    budget = sum(each[:17]) + 1
    if before:
        go(solver(tasks), tasks.select(before), transcript=tmp_path)
    chat = solver(tasks)
    report = go(chat, tasks, budget_tokens=budget, workers=workers, transcript=tmp_path)
    assert [r["status"] for r in report.rows] == ["ok"] * 17 + ["over budget"] * 23
    assert report.tokens == budget - 1 and report.items == 17
    assert chat.calls <= 17 + workers - sum(i < 17 for i in before)


def test_a_budget_needs_counts():
    with pytest.raises(ValueError, match="budget_tokens: got 100, allowed: None"):
        go(lambda messages: "x", make_tasks("sum", n=3), budget_tokens=100)


def test_samples_have_seeds_of_their_own():
    tasks, heard = make_tasks("sum", n=5), []
    chat = Scripted(lambda messages, seed, temperature: heard.append((seed, temperature)) or "Answer: 1", "s")
    report = go(chat, tasks, samples=4, temperature=0.5)
    assert len(report.rows) == 20 and report.items == 5
    assert len({s for s, _ in heard}) == 20 and {t for _, t in heard} == {0.5}
    first, heard[:] = sorted(heard), []
    go(chat, tasks.select(range(2, 5)), samples=4, temperature=0.5, workers=1)
    assert set(heard) < set(first)
    with pytest.raises(ValueError, match="samples: got 4 at temperature 0"):
        go(ServerChat("http://localhost", "m"), tasks, samples=4)


def test_repeated_items_are_asked_once():
    tasks = [dict(o) for o in make_tasks("sum", n=3)]
    chat = solver(tasks)
    report = go(chat, tasks * 4)
    assert chat.calls == 3 and report.items == 12 and report.accuracy == 1.0


@pytest.mark.parametrize(
    "kw,says",
    [
        (dict(samples=0), "samples"),
        (dict(workers=0), "workers"),
        (dict(seed=-1), "seed"),
        (dict(temperature=-1), "temperature"),
        (dict(budget_tokens=0), "budget_tokens"),
        (dict(give_up=0), "give_up"),
    ],
)
def test_a_bad_argument_of_a_run_is_refused(kw, says):
    with pytest.raises(ValueError, match=f"^{says}: got"):
        go(Echo(), make_tasks("sum", n=3), **kw)


def test_a_chat_that_takes_no_temperature_is_not_given_one():
    tasks = make_tasks("sum", n=3)
    assert go(lambda messages: "x", tasks).items == 3
    with pytest.raises(ValueError, match="temperature: got 0.5"):
        go(lambda messages: "x", tasks, temperature=0.5)
    with pytest.raises(ValueError, match="chat: got str"):
        go("gpt-4", tasks)


# -- reports ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(1, 60))
def test_wilson_inverts_the_test_of_a_proportion(right, n):
    right, z = min(right, n), 1.959964
    p = right / n
    low, high = wilson(p, n)
    assert 0 <= low <= p <= high <= 1 or math.isclose(low, p) or math.isclose(high, p)
    for bound in (low, high):
        if 1e-9 < bound < 1 - 1e-9:
            assert abs(p - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), rel=1e-6)


def test_wilson_has_the_values_of_scipy():
    binomtest = pytest.importorskip("scipy.stats").binomtest

    for right, n in ((0, 10), (1, 10), (5, 10), (10, 10), (37, 200)):
        ci = binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right / n, n) == pytest.approx((ci.low, ci.high), abs=1e-6)


def report_of(rights, **more):
    rows = [
        dict(item=i, sample=0, status="ok", correct=bool(c), parse_fail=False, error=None, text="x", prompt_tokens=10, completion_tokens=5, finish_reason="stop", seconds=0.5, fields=dict(level=i % 3), grades=dict(rate=c / 2))
        for i, c in enumerate(rights)
    ]  # fmt: skip
    return common.Report(rows)


def test_a_comparison_has_the_p_value_of_scipy():
    binomtest = pytest.importorskip("scipy.stats").binomtest

    a, b = report_of([1, 1, 1, 1, 1, 1, 1, 0, 0, 1]), report_of([0, 0, 0, 0, 0, 1, 1, 1, 0, 1])
    got = compare(a, b)
    assert (got["n"], got["better"], got["worse"]) == (10, 5, 1)
    assert got["difference"] == pytest.approx(0.4) and got["p"] == pytest.approx(binomtest(1, 6).pvalue)
    assert compare(a, a)["p"] == 1.0
    assert compare(report_of([1] * 5000), report_of([0] * 5000))["p"] >= 0.0


def test_a_report_knows_its_costs_and_groups():
    r = report_of([1, 0, 1, 1, 0, 0])
    assert r.cost(prompt=2.0, completion=10.0) == pytest.approx((60 * 2 + 30 * 10) / 1e6)
    assert {k: v.accuracy for k, v in r.groups("level").items()} == {0: 1.0, 1: 0.0, 2: 0.5}
    assert len(r.table(by="level").rows) == 4 and "level" in r.table(by="level")._repr_markdown_()
    assert r.mean("rate") == pytest.approx(0.25)
    with pytest.raises(ValueError, match="by: got 'levle'.*Did you mean 'level'"):
        r.groups("levle")


def test_an_empty_report_has_no_accuracy():
    r = common.Report([])
    assert math.isnan(r.accuracy) and r.tokens is None and math.isnan(r.cost(1, 1)) and "–" in repr(r)
    assert run(Echo(), [], prompt, grade, setting="cot").items == 0


def test_a_report_becomes_a_dataset(tmp_path):
    tasks = make_tasks("sum", n=6)
    ds = go(solver(tasks, fails=lambda i: i == 2), tasks).dataset()
    assert len(ds) == 6 and ds["correct"][:] == [True, True, False, True, True, True]
    assert ds["grade_answer"][2] is None and json.loads(ds["item_numbers"][0]) == tasks[0]["numbers"]
    ds.save_to_disk(tmp_path / "ds")


# -- majority --------------------------------------------------------------------------------------------------------


def votes(*answers):
    "A chat whose k-th sample to any question is the k-th answer"
    n = iter(answers)
    return Scripted(lambda messages, seed, temperature: next(n), "votes")


PARSE = lambda reply: final_answer(reply, pattern=r"\d+")


def test_the_most_frequent_answer_wins():
    reply = majority(votes("Answer: 1", "Answer: 2", "well, Answer: 2"), PARSE, samples=3)(ASK)
    assert reply == "Answer: 2" and reply.raw["votes"] == [["2", 2], ["1", 1]]
    assert (reply.prompt_tokens, reply.completion_tokens) == (3 * 5, 2 + 2 + 3)


def test_among_equals_the_first_wins():
    say = ("Answer: 3", "Answer: 2", "Answer: 2", "Answer: 3", "Answer: 1")
    assert {str(majority(votes(*say), PARSE, samples=5)(ASK)) for _ in range(5)} == {"Answer: 3"}


def test_the_unreadable_do_not_vote():
    assert majority(votes("I cannot.", "I cannot.", "Answer: 2"), PARSE, samples=3)(ASK) == "Answer: 2"
    assert majority(votes("I cannot.", "no", "..."), PARSE, samples=3)(ASK) == "I cannot."


def test_samples_end_with_the_tokens():
    chat = Scripted(lambda messages, seed, temperature: "a b c d e f g h Answer: 1", "ten")
    for tokens, calls in ((1, 1), (10, 1), (19, 1), (20, 2), (35, 3), (100, 10)):
        chat.calls = 0
        reply = majority(chat, PARSE, tokens=tokens)(ASK)
        assert chat.calls == calls == reply.raw["samples"] and reply.completion_tokens == 10 * calls


def test_a_vote_of_a_local_model_is_one_of_its_samples(tiny):
    chat = LocalChat(*tiny, max_new_tokens=6)
    vote = majority(chat, lambda r: str(r)[:1] or None, samples=5, temperature=1.0)
    tasks = make_tasks("sum", n=4)
    report = go(vote, tasks)
    assert [r["text"] for r in report.rows] == [
        vote.many([prompt(o, "cot")], seeds=[None])[0] for o in tasks
    ] or report.items == 4
    assert go(vote, tasks).outcome() == report.outcome()
    assert all(r["completion_tokens"] <= 30 for r in report.rows)


@pytest.mark.parametrize(
    "kw,says",
    [({}, "samples, tokens"), (dict(samples=0), "samples"), (dict(samples=3, temperature=0), "temperature")],
)
def test_a_bad_argument_of_a_vote_is_refused(kw, says):
    with pytest.raises(ValueError, match=f"^{says}: got"):
        majority(Echo(), PARSE, **kw)
    with pytest.raises(ValueError, match="chat: got .*takes seed and temperature"):
        majority(lambda messages: "x", PARSE, samples=3)


# -- the parser ------------------------------------------------------------------------------------------------------

WORDS = ("Up", "Left", "Down", "Right")
PHRASES = [
    "{L}", "({L})", "{L}.", "{L})", "[{L}]", "{L}. {W}", "({L}) {W}", "{L}: {W}", "{L} ({W})", "{W}", "{w}", "{W}.", "{W} ({L})", "**{L}**", "**{W}**", "**{L}. {W}**", "`{L}`",
    "The answer is {L}.", "The answer is ({L}).", "the answer is {w}", "The answer is: {W}", "The answer is **{L}**.", "So the answer is {L}. {W}", "The final answer is $\\boxed{{{L}}}$.", "\\boxed{{{W}}}",
    "\\boxed{{\\text{{{W}}}}}", "$\\boxed{{\\text{{{L}}}}}$", "Answer: {L}", "Answer: {W}", "answer: {w}", "**Answer:** {L}", "**Answer: {L}**", "Answer: ({L}) {W}", "Answer:\n{L}", "Answer:\n\n{W}", "ANSWER: {W}",
    "Final answer: {L}", "### Answer: {W}", "The correct answer is option {L}.", "The correct option is {L}, so the answer is {L}.", "Therefore, option {L}.", "The correct option is {L}.", "The best choice is ({L}) {W}.", "Answer: {W}, since it is free.", "The answer is {L}, because {W} is free.", "- {L}. {W}", "> {L}", "Move {w}.", "<think>The answer is D.</think>\n{L}", "Answer: “{W}”", "I choose ({L}).",
    "The answer is {L} because the other roads are closed.", "Answer: {W}, since the road ends there.", "The answer should be {W}.", "The answer to the question is {L}.", "Answer = {L}", "My answer: \"{W}\"", "Answer: '{L}'",
]  # fmt: skip
BEFORE = (
    "",
    "Let's think step by step. First I go up, then left, and then down.\n",
    "Which way? A. Up B. Left C. Down D. Right\n\n",
    "I am not sure at first. A wall is to the left.\n\n```\n. # .\n. o .\n```\n",
    "The answer is D. Wait, that is wrong: a wall is there.\n",
)
AFTER = ("", "\n", "  \n\n", "\u200b", "\r\n")


@pytest.mark.parametrize("phrase", PHRASES)
def test_every_phrasing_is_read(phrase):
    for before in BEFORE:
        for after in AFTER:
            for i, w in enumerate(WORDS):
                text = before + phrase.format(L="ABCD"[i], W=w, w=w.lower()) + after
                assert final_answer(text, WORDS) == w, repr(text)
                assert final_answer(text, dict(zip("ABCD", WORDS, strict=True))) == "ABCD"[i], repr(text)


NUMBERED = [
    "Answer: {n}",
    "The answer is {n}.",
    "\\boxed{{{n}}}",
    "**Answer:** {n}",
    "so 1 + 1 = 2.\nThe answer is {n}",
    "{n}",
    "{n}.",
    "Answer: {n} because 40 + 2 is that",
    "The answer is ${n}$.",
]


@given(
    st.integers(-(10**9), 10**9),
    st.sampled_from(NUMBERED),
    st.sampled_from(["", "We add 3 and 4, that is 7.\n", "Answer: 5? No.\n"]),
)
def test_numbers_are_read(n, phrase, before):
    assert final_answer(before + phrase.format(n=n), pattern=r"-?\d+") == str(n)


DOUBTFUL = [
    "A or B", "The answer is A or B.", "Answer: A, B", "Answer: A/B", "Answer: A and B", "Answer: (A) or (B)", "The answer is either Up or Left.", "Answer: Up or left", "A. Left", "Answer: B. Up", "The answer is A (Left).",
    "The answer is not A.", "It isn't left.", "Answer: neither", "Answer: E", "Answer:", "The answer is", "\\boxed{}", "\\boxed{A, B}", "Answer: A, B, C or D?", "Up, left, down, right", "A B C D", "Answer: <letter>", "Answer: X",
    "A road leads on.", "Left is blocked.", "A wall is to the left.", "<think>Answer: A", "The answer is D.\nB", "The answer is D. Wait, that is wrong.\nLeft is blocked.", "I think a wall is there.", "The answer is a road.", "The answer is B. Wait, that is wrong.", "Answer: B\nActually, no.", "Answer: B\n\nI cannot be sure; I don't know.", "The answer is B. Scratch that.",
]  # fmt: skip
REFUSED = [
    "I cannot answer this.",
    "I can't help with that: left or right.",
    "I'm sorry, but I don't know.",
    "There is not enough information to say left.",
    "The answer cannot be determined.",
    "As an AI, I go nowhere, not even up.",
    "I am unable to choose B.",
]


@pytest.mark.parametrize("text", DOUBTFUL + REFUSED + ["", " ", "\n", None, 5, b"A"])
def test_doubt_is_none(text):
    assert final_answer(text, WORDS) is None


@pytest.mark.parametrize("phrase", PHRASES)
@pytest.mark.parametrize(
    "tail", ["\nWait, that is wrong.", "\n\nI cannot answer this.", "\nActually, I am not sure."]
)
def test_what_is_taken_back_is_none(phrase, tail):
    for i, w in enumerate(WORDS):
        assert final_answer(phrase.format(L="ABCD"[i], W=w, w=w.lower()) + tail, WORDS) is None


@given(
    st.sampled_from(PHRASES),
    st.integers(0, 3),
    st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("L", "N")), max_size=30),
)
@settings(max_examples=150)
def test_signs_in_front_do_no_harm(phrase, i, noise):
    noise = noise.replace("{", "").replace("}", "").replace("\\", "")
    text = noise + "\n\n" + phrase.format(L="ABCD"[i], W=WORDS[i], w=WORDS[i].lower())
    assert final_answer(text, WORDS) == WORDS[i]


@given(st.text(max_size=300))
@settings(max_examples=300)
def test_any_text_is_survived(text):
    for how in (dict(choices=WORDS), dict(choices="ABCDE"[:1] and list("ABCDE")), dict(pattern=r"-?\d+"), {}):
        out = final_answer(text, **how)
        assert out is None or isinstance(out, str)
        assert out == final_answer(text, **how)


@given(
    st.lists(
        st.sampled_from(
            [
                "Up",
                "left",
                "A",
                "B.",
                "(C)",
                "or",
                "and",
                "not",
                "the answer is",
                "Answer:",
                "\n",
                "I cannot",
                "wait",
                ",",
            ]
        ),
        max_size=12,
    )
)
@settings(max_examples=300)
def test_an_answer_stands_in_the_text(parts):
    text = " ".join(parts)
    out = final_answer(text, WORDS)
    if out is not None:
        letter = "ABCD"[WORDS.index(out)]
        assert out.lower() in text.lower() or letter in text


@given(
    st.lists(
        st.text(alphabet="abcdefghij klmnop", min_size=2, max_size=12)
        .map(str.strip)
        .filter(lambda w: len(w) > 1),
        min_size=2,
        max_size=6,
        unique_by=str.casefold,
    ),
    st.data(),
)
@settings(max_examples=150)
def test_any_words_can_be_choices(words, data):
    i = data.draw(st.integers(0, len(words) - 1))
    for phrase in ("Answer: {L}", "The answer is ({L}).", "\\boxed{{{W}}}", "Answer: {W}"):
        text = phrase.format(L=chr(65 + i), W=words[i])
        assert final_answer(text, words) == words[i], (text, words)


@pytest.mark.parametrize("bad", [[], "ABC", [""], [1], ["a", "A"], ["x"] * 3, [str(i) for i in range(27)]])
def test_bad_choices_are_refused(bad):
    with pytest.raises(ValueError, match="^choices: got"):
        final_answer("A", bad)
    with pytest.raises(ValueError, match="^choices, pattern: got both"):
        final_answer("A", ["a", "b"], r"\d")


@pytest.mark.parametrize("kind", common.KINDS)
@pytest.mark.parametrize("setting", common.SETTINGS)
def test_an_echo_scores_nothing(kind, setting):
    report = run(Echo(), make_tasks(kind, n=40), prompt, grade, setting=setting)
    assert (report.accuracy, report.failures) == (0.0, 0)


# -- the rest --------------------------------------------------------------------------------------------------------


def test_importing_is_light(python):
    out = python(
        "import sys, lmlab.prompting.common; print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_a_reply_is_a_string():
    import copy
    import pickle

    r = Reply("x", 1, 2, "stop", 0.5, {"a": 1})
    assert r == "x" and type(r.text) is str and json.loads(json.dumps([r])) == ["x"]
    for other in (copy.copy(r), copy.deepcopy(r), pickle.loads(pickle.dumps(r))):
        assert other == r and other.completion_tokens == 2


def test_no_two_tasks_are_alike_and_too_many_are_refused():
    tasks = make_tasks("sum", n=400, terms=3)
    assert len({tuple(o) for o in tasks["numbers"]}) == 400
    with pytest.raises(ValueError, match="n: got 401, allowed: at most 400"):
        make_tasks("sum", n=401, terms=3)
