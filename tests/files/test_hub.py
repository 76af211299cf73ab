"""Models of the Hugging Face hub: which file is taken, and one line for every refusal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest

from gemloom.errors import GemloomError, OptionError, SourceError
from gemloom.files import source
from small_gguf import SMALL, refusal

REPOSITORIES = {
    "only": ["README.md", "mmproj-f16.gguf", "mtp-Q4_0.gguf", "model-BF16.gguf"],
    "preferred": ["m-Q4_0.gguf", "m-IQ4_0.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "m-Q4_K_S.gguf"],
    "old": ["gemma-3-1b-it-q4_0.gguf", "gemma-3-1b-it-f16.gguf", "mmproj-model-Q4_K_M.gguf"],
    "split": ["Q4_K_M/m-Q4_K_M-00001-of-00002.gguf", "Q4_K_M/m-Q4_K_M-00002-of-00002.gguf", "a"],
    "choices": ["a-Q8_0.gguf", "b-BF16.gguf"],
    "twice": ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf", "a-Q4_0.gguf"],
    "sealed": ["m-Q4_0.gguf.sealed"],
    "drafter": ["gemma-4-E2B-it-assistant-Q8_0.gguf"],
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A hub of the repositories above; the names of the files downloaded from it."""
    downloaded: list[str] = []

    def download(repo: str, file: str) -> str:
        downloaded.append(file)
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(SMALL)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: REPOSITORIES[repo[2:]])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return downloaded


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("hf:o/only", ["model-BF16.gguf"]),
        ("hf:o/preferred", ["m-Q4_K_M.gguf"]),
        ("hf:o/preferred:Q4_0", ["m-Q4_0.gguf"]),
        ("hf:o/preferred:q8_0", ["m-Q8_0.gguf"]),
        ("hf:o/preferred:m-Q4_K_S.gguf", ["m-Q4_K_S.gguf"]),
        ("hf:o/old", ["gemma-3-1b-it-q4_0.gguf"]),
        ("hf:o/split", REPOSITORIES["split"][:2]),
        ("hf:o/split:" + REPOSITORIES["split"][0], REPOSITORIES["split"][:2]),
        ("hf:o/sealed:m-Q4_0.gguf.sealed", REPOSITORIES["sealed"]),
        ("hf:o/drafter:gemma-4-E2B-it-assistant-Q8_0.gguf", REPOSITORIES["drafter"]),
    ],
)
def test_hub_file_is_chosen(name: str, files: list[str], hub: list[str]) -> None:
    blobs = source.resolve(name)
    assert hub == files
    assert [blob.name for blob in blobs] == [f"{':'.join(name.split(':')[:2])}:{f}" for f in files]
    assert bytes(blobs[0].view(0, blobs[0].size)) == SMALL


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("hf:o/choices", SourceError, "name one model, as .*:FILE, of a-Q8_0.gguf, b-BF16.gguf$"),
        ("hf:o/preferred:Q4_K", SourceError, "name one model"),
        ("hf:o/split:Q4_K", SourceError, "name one model"),
        ("hf:o/only:Q4_K_M", SourceError, "name one model, .* of model-BF16.gguf$"),
        ("hf:o/twice", SourceError, "of a-Q4_0.gguf, a-Q4_K_M.gguf, b-Q4_K_M.gguf$"),
        ("hf:o/drafter", SourceError, "no GGUF model in this repository"),
        (
            "hf:o/split:" + REPOSITORIES["split"][1],
            SourceError,
            "name its first part, hf:o/split:Q4_K_M",
        ),
        ("hf:model", OptionError, "write hf:owner/repo or hf:owner/repo:file.gguf"),
        ("hf:o/r:", OptionError, "write hf:owner/repo"),
        ("hf:a/b/c", OptionError, "write hf:owner/repo"),
    ],
)
def test_hub_names_that_fit_no_file(
    name: str, kind: type[GemloomError], message: str, hub: list[str]
) -> None:
    found, text = refusal(name)
    assert found is kind
    assert text.startswith("hf:")
    assert re.search(message, text)
    assert hub == []


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for: a listing, and one file of one repository."""

    refusals: ClassVar[dict[str, tuple[int, dict[str, str]]]] = {
        "gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access restricted."}),
        "unknown": (401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Not found"}),
        "token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
        "teapot": (418, {}),
    }

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def _answer(self) -> bytes:
        asked = re.match(r"(?:/api/models)?/o/(\w+)/(?:tree|resolve)/main", self.path)
        if asked is None:  # the hub package asks for other things too, and takes a no
            self.send_error(404)
            return b""
        status, headers = self.refusals.get(asked[1], (200, {}))
        body = b""
        if status == 200 and self.path.startswith("/api"):
            entry = {"type": "file", "path": "m.gguf", "size": len(SMALL), "oid": "0" * 40}
            body, headers = json.dumps([entry]).encode(), {"Content-Type": "application/json"}
        elif status == 200 and self.path.endswith("/m.gguf"):
            body, headers = SMALL, {"ETag": '"abc"', "X-Repo-Commit": "1" * 40}
        elif status == 200:
            status, headers = 404, {"X-Error-Code": "EntryNotFound"}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        return body

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


ASK = """
import json, sys
from gemloom.files import source
from gemloom.errors import GemloomError
for name in sys.argv[1:]:
    try:
        answer = source.resolve(name)[0].size
    except GemloomError as error:
        answer = str(error)
    print(json.dumps(answer))
"""
TOKEN = "hf_" + "secret" * 5


def ask(names: list[str], folder: Path, **environment: str) -> tuple[list[Any], str]:
    """What the real hub package makes of the names, in a process with this environment."""
    child = subprocess.run(
        [sys.executable, "-c", ASK, *names],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        | {"HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "NO_PROXY": "*"}
        | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert TOKEN not in child.stdout + child.stderr
    return [json.loads(line) for line in child.stdout.splitlines()], child.stderr


def test_real_hub_package_with_a_local_hub(server: str, tmp_path: Path) -> None:
    names = ["o/real", "o/gated", "o/unknown", "o/unknown:m.gguf", "o/token", "o/teapot"]
    names = [f"hf:{name}" for name in [*names, "o/real:n.gguf", "o/token:m.gguf"]]
    answers, _ = ask(names, tmp_path, HF_ENDPOINT=server)
    token = "the hub refuses the token; set HF_TOKEN to a valid one, or unset it"
    unknown = "no such repository, or private; for that set HF_TOKEN"
    assert answers == [
        len(SMALL),
        "hf:o/gated: gated; accept its terms on its page, then set HF_TOKEN",
        f"hf:o/unknown: {unknown}",
        f"hf:o/unknown:m.gguf: {unknown}",
        f"hf:o/token: {token}",
        "hf:o/teapot: the hub answered with HTTP status 418; try again later",
        "hf:o/real:n.gguf: no such file in the repository",
        f"hf:o/token:m.gguf: {token}",
    ]
    names = ["hf:o/real", "hf:o/real:m.gguf", "hf:o/other", "hf:o/real:n.gguf"]
    answers, _ = ask(names, tmp_path, HF_ENDPOINT=server, HF_HUB_OFFLINE="1")
    offline = "not in the hub's cache, and HF_HUB_OFFLINE is set; unset it to download"
    assert answers == [
        len(SMALL), len(SMALL), f"hf:o/other: {offline}", f"hf:o/real:n.gguf: {offline}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("Name or service not known"),
            r"no answer .*\(ConnectionError: Name or s",
        ),
        (OSError(28, "No space left on device"), r"the cache: No space left on device$"),
        (PermissionError(13, "Permission denied", "/cache"), r"/cache: Permission denied$"),
        (
            ValueError(f"Illegal header value b'Bearer {TOKEN}\\x00'"),
            r"\(ValueError: Illegal .* b'\*\*\*\)",
        ),
        (RuntimeError(""), r"\(RuntimeError: \); .* set HF_HUB_OFFLINE=1"),
    ],
)
def test_hub_that_cannot_be_reached(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(repo: str) -> list[str]:
        raise error

    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    with pytest.raises(SourceError, match=message) as caught:
        source.resolve("hf:o/r")
    assert TOKEN not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None
