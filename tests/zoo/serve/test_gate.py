"""The front door: who comes in, how much at once, and for how long."""

import base64
import logging
import math
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import pytest

pytest.importorskip("gradio", reason="serving needs the serve extra")
pytest.importorskip("fastapi_offline", reason="serving needs the serve extra")

from gradio import routes
from serving import encoded, error_of, picture, post, serving

from zoo.serve import Limits
from zoo.serve.gate import OPEN, Gate, is_loopback
from zoo.serve.work import Workers

TOKEN = "s3cret-ü"


def basic(password, user="reader"):
    return {"authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def bearer(token):
    return {"authorization": f"Bearer {token}".encode()}


PAGES = ("/", "/theme.css", "/docs", "/openapi.json", "/samples/rocket.jpg", "/api/models")


def test_a_token_protects_the_page_and_the_api(classifier):
    with serving(classifier, token=TOKEN) as client:
        for path in PAGES:
            refused = client.get(path)
            assert "token is needed" in error_of(refused, 401)
            assert refused.headers["www-authenticate"].startswith("Basic ")
            for headers in (
                bearer("wrong"),
                bearer(""),
                basic("wrong"),
                basic("", TOKEN),
                {"authorization": TOKEN.encode()},
            ):
                error_of(client.get(path, headers=headers), 401)
            for headers in (bearer(TOKEN), basic(TOKEN), basic(TOKEN, "")):
                assert client.get(path, headers=headers).status_code == 200
        error_of(client.get("/api/models", headers={"authorization": "Basic !!"}), 401)
        error_of(post(client, encoded()), 401)
        client.headers.update(basic(TOKEN))
        assert post(client, encoded()).status_code == 200


def test_tokens_are_compared_in_constant_time(classifier, monkeypatch):
    import hmac

    seen, compare = [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *pair: seen.append(pair) or compare(*pair))
    with serving(classifier, token=TOKEN) as client:
        client.get("/", headers=bearer("guess"))
    assert seen == [(b"guess", TOKEN.encode())]


def test_without_a_token_it_is_open(client):
    for path in PAGES:
        assert client.get(path).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.2", ""])
def test_other_names_for_the_server_are_refused(client, host):
    assert "not called" in error_of(client.get("/", headers={"host": host}), 421)


def test_its_own_names_are_known(client, classifier):
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:7860", "[::1]:7860"):
        assert client.get("/api/models", headers={"host": host}).status_code == 200
    with serving(classifier, hosts=None) as anywhere:
        assert anywhere.get("/api/models", headers={"host": "zoo.example"}).status_code == 200


def test_pages_of_other_sites_may_not_ask(client):
    for origin in ("http://evil.example", "null", "http://localhost:81", ""):
        refused = client.post("/api/classify", files={"image": encoded()}, headers={"origin": origin})
        assert "other sites" in error_of(refused, 403)
    own = client.post("/api/classify", files={"image": encoded()}, headers={"origin": "http://localhost"})
    assert own.status_code == 200


CLOSED = [
    *("/config", "/info", "/gradio_api/info", "/gradio_api/startup-events", "/gradio_api/heartbeat/abc", "/monitoring"),
    *("/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/file/etc/passwd", "/gradio_api/file=http://127.0.0.1:1/"),
    *("/gradio_api/proxy=http://127.0.0.1:1/", "/proxy=http://127.0.0.1:1/", "/gradio_api/upload_progress?upload_id=a"),
    *("/gradio_api/queue/data?session_hash=a", "/gradio_api/queue/status", "/gradio_api/call/predict/a", "/dev/reload"),
    *("/custom_component/a/client/component/index.js", "/gradio_api/deep_link", "/profiling/traces", "/vibe-code/"),
    *(
        "/svelte/svelte.js",
        "/pwa_icon",
        "/manifest.json",
        "/robots.txt",
        "/runs",
        "/token",
        "/app_id",
        "/user",
        "/redoc",
    ),
    *("/static/../../../../etc/passwd", "/static/%2e%2e/%2e%2e/etc/passwd", "/static/..%2f..%2fetc%2fpasswd"),
    *("/assets/..%2findex.html", "/assets/%2fetc%2fpasswd", "/static/js/..%5c..%5cindex.html", "/assets/a%00.js"),
    *(
        "/samples/..%2fATTRIBUTION.md",
        "/samples/../weights/README.md",
        "//etc/passwd",
        "/assets/",
        "/static-offline-docs",
    ),
]


@pytest.mark.parametrize("path", CLOSED)
def test_the_routes_that_the_page_does_not_need_are_closed(client, path):
    assert "nothing at this address" in error_of(client.get(path), 404)


@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/call/predict"),
        *("/gradio_api/component_server", "/gradio_api/cancel", "/gradio_api/reset", "/gradio_api/stream/a"),
        *("/gradio_api/process_recording", "/login", "/run-history/connect", "/vibe-edit", "/profiling/clear"),
    ],
)
def test_nothing_but_the_api_takes_posts(client, path):
    for body in ({"json": {"data": ["/etc/passwd"]}}, {"files": {"files": b"x"}}):
        assert "nothing at this address" in error_of(client.post(path, **body), 404)


def test_every_other_route_of_gradio_is_closed(client):
    """Also those of versions to come: of all that it has, only these are open, and the third is ours."""
    source = Path(routes.__file__).read_text(encoding="utf-8")
    paths = set(re.findall(r'@(?:app|router)\.(?:get|post|head|put|delete)\(\s*"([^"]+)"', source))
    assert len(paths) > 40
    assert {path for path in paths if OPEN.fullmatch(path)} == {"/", "/theme.css", "/openapi.json", "/favicon.ico"}
    for path in ("/", "/theme.css", "/docs"):
        assert "not allowed" in error_of(client.post(path), 405)


def test_gradio_is_shown_no_query(client, monkeypatch):
    assert client.get("/?deep_link=../../etc/passwd&session_hash=a").status_code == 200
    assert client.get("/?deep_link=../../etc/passwd").text == client.get("/").text


def test_a_sample_and_what_is_none(client):
    assert client.get("/samples/rocket.jpg").content[:3] == b"\xff\xd8\xff"
    assert "no such sample" in error_of(client.get("/samples/ATTRIBUTION.md"), 404)


def test_every_answer_protects_the_browser(client):
    for response in (client.get("/"), client.get("/nothing"), client.get("/api/models"), post(client, b"hello")):
        assert response.headers["x-content-type-options"] == "nosniff"
        policy = response.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "http" not in policy


def test_the_size_of_an_upload(classifier):
    with serving(classifier, Limits(upload_bytes=4000)) as client:
        assert post(client, encoded(picture(0, (20, 20)), "JPEG")).status_code == 200
        assert "larger than" in error_of(post(client, bytes(4000)), 413)
        parts = (b"x" * 500 for _ in range(20))  # chunks, whose number is not told
        assert "larger than" in error_of(client.post("/api/classify", content=parts), 413)
        huge = client.post("/api/classify", content=b"x", headers={"content-length": "9" * 3000})
        assert "larger than" in error_of(huge, 413)


def at_once(count, work):
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: work(), range(count)))


def until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


def test_a_full_queue(waiting):
    with serving(waiting, Limits(queue=3, concurrency=1)) as client, ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(post, client, encoded()) for _ in range(12)]
        until(lambda: sum(one.done() for one in asked) == 8)
        for refused in [one.result() for one in asked if one.done()]:
            assert "queue is full" in error_of(refused, 503)
            assert refused.headers["retry-after"] == "1"
        assert client.get("/api/models").status_code == 200  # which needs no model
        waiting.let.set()
        assert sorted(one.result().status_code for one in asked) == [200] * 4 + [503] * 8
        assert post(client, encoded()).status_code == 200
        assert waiting.most == 1


def test_what_is_no_picture_does_not_wait_for_a_model(waiting):
    with serving(waiting, Limits(queue=8, concurrency=1)) as client, ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(post, client, encoded()) for _ in range(3)]
        until(lambda: waiting.running == 1)
        for _ in range(50):
            error_of(post(client, b"hello"), 422)
        assert waiting.done == 0
        waiting.let.set()
        assert [one.result().status_code for one in asked] == [200] * 3


def test_a_request_that_takes_too_long(waiting):
    with serving(waiting, Limits(seconds=1.0, concurrency=1)) as client:
        start = time.monotonic()
        answers = at_once(4, lambda: post(client, encoded()))
        assert 0.9 < time.monotonic() - start < 10
        for answer in answers:
            assert "longer than 1 seconds" in error_of(answer, 504)
        assert waiting.running == 1  # a thread cannot be stopped, and no second one computes in its place
        waiting.let.set()
        until(lambda: post(client, encoded()).status_code == 200)
        assert waiting.done == 2 and waiting.most == 1  # those that were given up in the queue were not computed


def test_at_most_so_many_are_computed_at_once(waiting):
    with serving(waiting, Limits(concurrency=3)) as client, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(post, client, encoded()) for _ in range(8)]
        until(lambda: waiting.running == 3)
        time.sleep(0.1)
        waiting.let.set()
        assert [one.result().status_code for one in asked] == [200] * 8
        assert waiting.most == 3


def test_an_error_of_ours_is_json_and_in_the_log(classifier, monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("a secret of the house")

    monkeypatch.setattr("zoo.serve.tasks.classify", fail)
    with serving(classifier) as client, caplog.at_level(logging.ERROR):
        text = error_of(post(client, encoded()), 500)
    assert "secret" not in text
    assert "a secret of the house" in caplog.text


def upload():
    """The scope of a POST."""
    headers = [(b"host", b"localhost")]
    return {"type": "http", "method": "POST", "path": "/api/classify", "query_string": b"", "headers": headers}


def client_of(*bodies, ended=True, leaves=math.inf):
    """What an application receives: parts of a body, and after so many seconds that the client has left."""
    parts = [{"type": "http.request", "body": body, "more_body": True} for body in bodies]
    parts[-1]["more_body"] = not ended

    async def receive():
        if not parts:
            await anyio.sleep(leaves)
            return {"type": "http.disconnect"}
        return parts.pop(0)

    return receive


def call(gate, receive):
    """What the gate sends."""
    sent = []

    async def send(message):
        sent.append(message)

    anyio.run(gate, upload(), receive, send)
    return sent


def test_an_upload_that_stands_still(monkeypatch):
    monkeypatch.setattr("zoo.serve.gate.PATIENCE", 0.1)
    monkeypatch.setattr("zoo.serve.gate.LINGER", 0.1)

    async def app(scope, receive, send):
        raise AssertionError("it was let in")

    start = time.monotonic()
    sent = call(Gate(app, Limits()), client_of(b"x" * 100, ended=False))
    assert sent[0]["status"] == 408 and b"slower" in sent[1]["body"]
    assert time.monotonic() - start < 3


def test_uploads_do_not_take_the_places_of_those_that_wait(monkeypatch):
    """Nor are there more of them than twice the queue."""
    monkeypatch.setattr("zoo.serve.gate.LINGER", 0.1)
    let_in, sent = [], []

    async def app(scope, receive, send):
        let_in.append((await receive())["body"])

    async def send(message):
        sent.append(message.get("status"))

    async def run():
        gate = Gate(app, Limits(queue=2, concurrency=1))
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(gate, upload(), client_of(b"x", ended=False), send)
            await anyio.sleep(0.05)
            await gate(upload(), client_of(b"whole"), send)
            assert let_in == [b"whole"] and sent == []
            group.start_soon(gate, upload(), client_of(b"x", ended=False), send)
            await anyio.sleep(0.05)
            await gate(upload(), client_of(b"one too many"), send)
            assert let_in == [b"whole"] and sent[0] == 503
            group.cancel_scope.cancel()

    anyio.run(run)


def test_who_leaves_is_not_answered():
    """The work of a client that is gone is ended, and nothing is sent."""
    seen = []

    async def app(scope, receive, send):
        assert (await receive())["body"] == b"whole"
        try:
            await anyio.sleep(5)
        except anyio.get_cancelled_exc_class():
            seen.append("ended")
            raise

    start = time.monotonic()
    assert call(Gate(app, Limits()), client_of(b"wh", b"ole", leaves=0.05)) == []
    assert call(Gate(app, Limits()), client_of(b"wh", ended=False, leaves=0.05)) == []
    assert seen == ["ended"] and time.monotonic() - start < 3


def test_a_request_that_is_given_up_leaves_the_line():
    done = []

    async def run():
        workers, hold = Workers(Limits(concurrency=1)), threading.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(workers.compute, hold.wait, 10)
            await anyio.sleep(0.05)
            with anyio.move_on_after(0.05):
                await workers.compute(done.append, "given up")
            hold.set()
            await workers.compute(done.append, "answered")
        workers.close()

    anyio.run(run)
    assert done == ["answered"]


@pytest.mark.parametrize("field", ["upload_bytes", "pixels", "queue", "concurrency", "seconds"])
def test_limits_are_checked(field):
    with pytest.raises(ValueError, match=f"The limit {field} is 0, expected more than 0"):
        Limits(**{field: 0})


def test_loopback():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.3.2.1", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "example.org", "")))
