"""`zoo serve` as a process: how it starts, what hundreds of requests at once do to it, and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.resources import files

import pytest

pytest.importorskip("gradio", reason="serving needs the serve extra")
pytest.importorskip("fastapi_offline", reason="serving needs the serve extra")

import httpx
from PIL import Image
from serving import encoded
from typer.testing import CliRunner

from zoo.cli import app

ROCKET = (files("zoo") / "samples/rocket.jpg").read_bytes()
REQUESTS = 200


@pytest.fixture(scope="module")
def server():
    """Its address, its process and the token, on a free port."""
    environment = os.environ | {"ZOO_SERVE_TOKEN": "token"}
    command = [sys.executable, "-m", "zoo", "serve", "--port", "0", "--device", "cpu", "--queue", "100"]
    command += ["--megapixels", "2", "--upload-mib", "1"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.match(r"Serving on (http://127\.0\.0\.1:\d+)$", line):
            break
    else:
        raise AssertionError("".join(lines))
    with httpx.Client(base_url=found[1], headers={"authorization": "Bearer token"}, timeout=30) as client:
        yield client, process
    process.kill()
    process.wait()


def resident(process):
    """Bytes of its memory."""
    with open(f"/proc/{process.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_hundreds_of_requests_at_once(server):
    """Good ones are answered or asked to come again; bad ones get their sentence; the server is as before."""
    client, process = server
    bomb = encoded(Image.new("1", (9000, 9000)))
    kinds = [
        (ROCKET, 200),
        (ROCKET, 200),
        (ROCKET[:5000], 422),
        (b"I am no picture", 422),
        (bomb, 422),
        (bytes(2**20), 413),
        (None, 401),
        (b"", 422),
    ]

    def ask(number):
        data, expected = kinds[number % len(kinds)]
        headers = {} if data is not None else {"authorization": "Bearer wrong"}
        start = time.monotonic()
        response = client.post("/api/classify", files={"image": data or b""}, headers=headers)
        return expected, response, time.monotonic() - start

    assert client.post("/api/classify", files={"image": ROCKET}).status_code == 200
    before = resident(process)
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, range(REQUESTS)))
    statuses = [(expected, response.status_code) for expected, response, _ in answers]
    assert {found for expected, found in statuses if expected == 200} <= {200, 503}
    assert statuses.count((200, 200)) >= 25
    assert all(found in (expected, 503) for expected, found in statuses)
    for _, response, _ in answers:
        if response.status_code == 200:
            assert response.json()["names"][0] == "rocket"
        else:
            assert response.json()["error"].endswith(".")
            assert ("retry-after" in response.headers) == (response.status_code == 503)
    assert client.post("/api/classify", files={"image": ROCKET}).json()["names"][0] == "rocket"
    assert resident(process) - before < 150 * 2**20


def test_the_page_is_behind_the_token(server):
    client, _ = server
    assert "gradio_config" in client.get("/").text
    assert client.get("/", headers={"authorization": ""}).status_code == 401


def test_what_is_no_http_does_no_harm(server):
    client, _ = server
    address = ("127.0.0.1", client.base_url.port)
    for data in (
        b"\x16\x03\x01\x02\x00",
        b"GET /" + b"a" * 10**6,
        b"POST /api/classify HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ):
        with socket.create_connection(address, timeout=10) as raw, suppress(OSError):  # it may hang up at once
            raw.sendall(data)
            raw.shutdown(socket.SHUT_WR)
            assert b" 200 " not in raw.recv(1000)
    assert client.get("/api/models").status_code == 200


def test_it_ends_at_sigterm(server):
    """The last test of the module."""
    _, process = server
    process.send_signal(signal.SIGTERM)
    process.wait(10)
    assert "Traceback" not in process.stderr.read()


def refusal(*arguments):
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2
    return result.output


def test_others_are_let_in_with_a_token_only():
    assert "Others may reach 0.0.0.0: set a token" in refusal("--host", "0.0.0.0")


def test_a_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in refusal("--port", str(taken.getsockname()[1]))


def test_an_unknown_model():
    assert "There is no model 'van_nan'; the nearest names are" in refusal("--port", "0", "--model", "van_nan")
