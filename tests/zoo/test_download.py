"""Downloads against a local server that dies, throttles, lies and changes its mind."""

import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from zoo import download as module
from zoo.download import download, file_sha256, resolve

DATA = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(DATA).hexdigest()
SLEEP = time.sleep  # the fixture replaces it for the downloader


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``server.files``; ``server.script`` holds what to do wrong with each of the next requests."""

    def do_GET(self):
        fault = self.server.script.pop(0) if self.server.script else None
        self.server.requests.append((self.path, self.headers.get("Range")))
        data, etag = self.server.files.get(self.path, (None, None))
        if isinstance(fault, int):
            return self.send_error(fault)
        if data is None:
            return self.send_error(404)
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(start[1]) if start and fault != "ignore range" else 0
        if start >= len(data) > 0:
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if etag:
            self.send_header("ETag", etag)
        if fault != "no length":
            self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = data[start:]
        if fault == "die":
            body = body[: len(body) // 2]
        step = 1 << 14
        for offset in range(0, len(body), step):
            self.wfile.write(body[offset : offset + step])
            if self.server.throttle:
                SLEEP(self.server.throttle)
        if fault == "die":
            self.wfile.flush()
            self.connection.close()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: server.slept.append(seconds))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {"/models/van.pth": (DATA, '"v1"')}
    server.script, server.requests, server.slept, server.throttle = [], [], [], 0
    server.url = f"http://127.0.0.1:{server.server_port}/models/van.pth"
    server.handle_error = lambda *_: None  # a client that was killed is part of the tests
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def left(folder):
    return {path.name for path in folder.iterdir()} - {"van.pth.lock"}


def test_download_once_and_keep(server, tmp_path, capfd):
    path = download(server.url, folder=tmp_path)
    assert path == tmp_path / "van.pth"
    assert path.read_bytes() == DATA
    assert download(server.url, folder=tmp_path) == path
    assert server.requests == [("/models/van.pth", None)]
    assert left(tmp_path) == {"van.pth", "van.pth.origin"}
    assert capfd.readouterr() == ("", "")  # no bar where nobody looks


def test_the_cache_is_where_torch_hub_and_timm_look(server, tmp_path, monkeypatch):
    from timm.models._hub import check_cached_file

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    assert resolve(server.url) == tmp_path / "hub/checkpoints/van.pth"
    assert check_cached_file(server.url)


def test_a_connection_that_dies_is_taken_up_where_it_stopped(server, tmp_path):
    server.script = ["die", "die", "die", "die", "die", "die"]  # more often than ATTEMPTS: each brings something
    assert download(server.url, folder=tmp_path, sha256=SHA256).read_bytes() == DATA
    ranges = [int(text[6:-1]) for _, text in server.requests[1:]]
    assert ranges == sorted(set(ranges))
    assert ranges[0] == len(DATA) // 2


def test_a_killed_download_is_taken_up_by_the_next_process(server, tmp_path):
    server.throttle = 0.02
    program = f"import pathlib, zoo.download as d; d.download({server.url!r}, folder=pathlib.Path({str(tmp_path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", program])
    part = tmp_path / "van.pth.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 100_000):
        assert time.monotonic() < deadline
        assert process.poll() is None
        SLEEP(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = part.stat().st_size
    assert 100_000 < kept < len(DATA)
    server.throttle = 0
    assert download(server.url, folder=tmp_path).read_bytes() == DATA
    assert server.requests[-1] == ("/models/van.pth", f"bytes={kept}-")


def test_a_server_that_ignores_range_restarts_cleanly(server, tmp_path):
    server.script = ["die", "ignore range"]
    assert download(server.url, folder=tmp_path).read_bytes() == DATA
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "changed",
    [(DATA[::-1], '"v2"'), (DATA + b"more", '"v1"'), (DATA[:-5], '"v1"'), (DATA[: len(DATA) // 4], '"v1"')],
    ids=["etag", "longer", "shorter", "shorter than what is there"],
)
def test_a_file_that_changed_on_the_server_restarts(server, tmp_path, changed):
    server.script = ["die", *[503] * module.ATTEMPTS]
    with pytest.raises(ConnectionError, match="503"):
        download(server.url, folder=tmp_path)
    assert (tmp_path / "van.pth.part").stat().st_size == len(DATA) // 2
    server.files["/models/van.pth"] = changed
    assert download(server.url, folder=tmp_path).read_bytes() == changed[0]


def test_transient_errors_are_retried_with_growing_pauses(server, tmp_path):
    server.script = [503, 429, 500]
    assert download(server.url, folder=tmp_path).read_bytes() == DATA
    assert server.slept == [0.5, 1, 2]


@pytest.mark.parametrize(
    ("status", "error"), [(404, FileNotFoundError), (410, FileNotFoundError), (403, ConnectionError)]
)
def test_final_errors_are_not_retried(server, tmp_path, status, error):
    server.script = [status]
    with pytest.raises(error, match=str(status)) as caught:
        download(server.url, folder=tmp_path)
    assert server.url in str(caught.value)
    assert len(server.requests) == 1
    assert not (tmp_path / "van.pth").exists()


def test_no_server_at_all_is_one_sentence(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match="Cannot download http://127"):
        download(server.url, folder=tmp_path)


def test_the_hash_is_checked_and_nothing_wrong_is_kept(server, tmp_path):
    with pytest.raises(ValueError, match=f"has the SHA-256 {SHA256}, not 00000000"):
        download(server.url, folder=tmp_path, sha256="0" * 64)
    assert left(tmp_path) == {"van.pth.origin"}
    assert download(server.url, folder=tmp_path, sha256=SHA256[:8].upper()).read_bytes() == DATA
    with pytest.raises(ValueError, match="not 8 to 64 hex digits"):
        download(server.url, folder=tmp_path, sha256="nonsense")


def test_the_hash_in_the_url_and_in_the_name(server, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    assert resolve(f"{server.url}#sha256={SHA256}").read_bytes() == DATA
    with pytest.raises(ValueError, match="SHA-256"):
        resolve(f"{server.url}#sha256={'0' * 64}")
    folder = server.url.rpartition("/")[0]
    server.files[f"/models/van-{SHA256[:8]}.pth"] = server.files["/models/van-deadbeef.pth"] = (DATA, None)
    assert resolve(f"{folder}/van-{SHA256[:8]}.pth").read_bytes() == DATA
    with pytest.raises(ValueError, match="not deadbeef"):
        resolve(f"{folder}/van-deadbeef.pth")


def test_a_damaged_file_in_the_cache_is_replaced(server, tmp_path):
    (tmp_path / "van.pth").write_bytes(b"cut off")
    assert download(server.url, folder=tmp_path).read_bytes() == b"cut off"  # no hash: taken as it is, as timm does
    assert download(server.url, folder=tmp_path, sha256=SHA256).read_bytes() == DATA


def test_two_urls_with_one_file_name_get_two_files(server, tmp_path):
    server.files["/other/van.pth"] = (b"other", '"v1"')
    first = download(server.url, folder=tmp_path)
    second = download(server.url.replace("models", "other"), folder=tmp_path)
    assert (first.read_bytes(), second.read_bytes()) == (DATA, b"other")
    assert download(server.url, folder=tmp_path) == first
    assert download(server.url.replace("models", "other"), folder=tmp_path) == second


def test_an_unfinished_file_of_another_url_is_not_continued(server, tmp_path):
    (tmp_path / "van.pth.part").write_bytes(b"something else")
    assert download(server.url, folder=tmp_path).read_bytes() == DATA
    assert server.requests == [("/models/van.pth", None)]


def test_several_at_once_download_once(server, tmp_path):
    server.throttle = 0.005  # a third of a second in all
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: download(server.url, folder=tmp_path, sha256=SHA256), range(4)))
    assert paths == [tmp_path / "van.pth"] * 4
    assert len(server.requests) == 1


def test_a_read_only_cache_is_used(server, tmp_path):
    path = download(server.url, folder=tmp_path)
    (tmp_path / "van.pth.lock").unlink(missing_ok=True)
    (tmp_path / "van.pth.lock").mkdir()  # no lock can be taken, even by root
    assert download(server.url, folder=tmp_path) == path


@pytest.mark.parametrize("path", ["", "/", "/..", "/a/..%2F", "/%00"])
def test_a_url_without_a_file_name(path):
    with pytest.raises(ValueError, match="does not end in a file name"):
        download(f"http://127.0.0.1:1{path}")


def test_a_name_cannot_leave_the_cache(server, tmp_path):
    server.files["/a/..%2F..%2Fevil.pth"] = (b"x", None)
    assert (
        download(server.url.replace("/models/van.pth", "/a/..%2F..%2Fevil.pth"), folder=tmp_path)
        == tmp_path / "evil.pth"
    )


def test_an_empty_file_and_one_of_unknown_length(server, tmp_path):
    server.files["/models/van.pth"] = (b"", '"v1"')
    assert download(server.url, folder=tmp_path / "empty").read_bytes() == b""
    server.files["/models/van.pth"] = (DATA, None)
    server.script = ["no length"]
    assert download(server.url, folder=tmp_path / "unknown").read_bytes() == DATA


def test_paths(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    path.write_bytes(DATA)
    assert resolve(path) == path
    assert resolve(f"{path}#sha256={SHA256}") == path
    assert resolve(path, sha256=SHA256[:10]) == path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/x.pth") == path
    with pytest.raises(ValueError, match="SHA-256"):
        resolve(path, sha256="0" * 8)
    for wrong in (tmp_path, tmp_path / "y.pth", "ftp://host/x.pth", ""):
        with pytest.raises(FileNotFoundError, match="give the path of a file"):
            resolve(wrong)
    assert file_sha256(path) == SHA256


class Hub:
    """Stands in for ``hf_hub_download``."""

    def __init__(self, folder, files):
        self.folder, self.files, self.asked = folder, files, []

    def __call__(self, repo, file, revision=None):
        from huggingface_hub.errors import LocalEntryNotFoundError

        self.asked.append((repo, file, revision))
        if file not in self.files:
            raise LocalEntryNotFoundError("Cannot find the file.\nMore text.")
        (self.folder / "blob").write_bytes(DATA)
        return str(self.folder / "blob")


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hf-hub:owner/repo/van.pth", ("owner/repo", "van.pth", None)),
        ("hf_hub:owner/repo/sub/van.pth", ("owner/repo", "sub/van.pth", None)),
        ("hf-hub:owner/repo@v1.0/van.pth", ("owner/repo", "van.pth", "v1.0")),
        ("hf-hub:owner/repo@refs%2Fpr%2F1/van.pth", ("owner/repo", "van.pth", "refs/pr/1")),
        ("hf-hub:owner/repo", ("owner/repo", "pytorch_model.bin", None)),
        ("hf-hub:owner/repo@main", ("owner/repo", "pytorch_model.bin", "main")),
    ],
)
def test_the_syntax_of_hub_sources(tmp_path, monkeypatch, source, asked):
    import huggingface_hub

    hub = Hub(tmp_path, {"van.pth", "sub/van.pth", "pytorch_model.bin"})
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    assert resolve(f"{source}#sha256={SHA256}").read_bytes() == DATA
    assert hub.asked[-1] == asked


def test_hub_errors_are_one_sentence(tmp_path, monkeypatch):
    import huggingface_hub

    hub = Hub(tmp_path, set())
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors or pytorch_model\.bin in owner/repo") as caught:
        resolve("hf-hub:owner/repo")
    assert "\n" not in str(caught.value)
    assert [file for _, file, _ in hub.asked] == ["model.safetensors", "pytorch_model.bin"]
    for wrong in ("hf-hub:repo", "hf-hub:", "hf-hub:a/b@", "hf-hub:a/b:c"):
        with pytest.raises(ValueError, match="not of the form"):
            resolve(wrong)


def test_the_offline_switch_of_the_hub_is_honoured(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what the environment variable sets
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"There is no x\.pth in owner/repo, or none can be reached"):
        resolve("hf-hub:owner/repo/x.pth")


def test_the_sidecar_says_where_a_file_is_from(server, tmp_path):
    download(server.url, folder=tmp_path)
    origin = json.loads(Path(tmp_path, "van.pth.origin").read_text())
    assert origin == {"url": server.url, "version": '"v1"', "size": len(DATA)}
