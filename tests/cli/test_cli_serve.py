"""``gemloom serve``: how it starts, and how signals end it."""

import signal
import socket
from pathlib import Path

import httpx
import pytest

from command_line import call, served, write
from conftest import until
from gemloom.cli.serve import ServerOptions
from http_serving import http

ENDLESS = {"prompt": "a", "max_tokens": 20_000, "regex": "[a-z]{30000}", "stream": True}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models"))


def test_only_a_strict_server_refuses_unknown_fields() -> None:
    assert ServerOptions(strict=True).settings("a.gguf").strict
    assert not ServerOptions().settings("a.gguf").strict


def test_a_signal_drains(file: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# of two people\nfirst  # hers\nsecond\n")
    with served(file, "--name", "mine", "--api-key-file", keys, "--context", "30000") as (
        process,
        url,
    ):
        bearer = {"Authorization": "Bearer second"}
        with http(url, headers=bearer) as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
            assert client.get("/slots").json()["slots"] == 4
            assert (
                client.get("/v1/models", headers={"Authorization": "Bearer x"}).status_code == 401
            )
            asked = {**ENDLESS, "max_tokens": 600}
            with (
                client.stream("POST", "/v1/completions", json=ENDLESS) as other,
                client.stream("POST", "/v1/completions", json=asked) as answer,
            ):
                waited_for = other.iter_lines()  # without end, but for the client's
                next(waited_for)
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                until(lambda: stopping(url))
                refused = client.post("/v1/completions", json=asked)
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "server_stopping"
                told = list(lines)
        assert "data: [DONE]" in told
        out, error = process.communicate(timeout=60)
        told_first = WAITING.replace("1 request", "2 requests").format(30)
        assert (process.returncode, out, error) == (0, "", told_first)


WAITING = "waiting for 1 request, up to {} s; a second signal ends at once\n"


def stopping(url: str) -> bool:
    """Whether /health says that the server drains."""
    answer = httpx.get(f"{url}/health", trust_env=False, timeout=60)
    return answer.status_code == 503 and answer.json()["error"]["code"] == "server_stopping"


def test_a_server_without_requests_ends_at_once_and_says_nothing(file: Path) -> None:
    with served(file) as (process, url), http(url) as client:
        assert client.get("/health").status_code == 200  # the connection stays open
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=10)
        assert (process.returncode, out, error) == (0, "", "")


def test_on_the_loopback_only_its_names_are_answered(file: Path) -> None:
    with served(file) as (_, url), http(url) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers={"Host": "localhost:1"}).status_code == 200
        assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403


@pytest.mark.parametrize(
    ("options", "warned"),
    [((), True), (("--api-key", "k"), False), (("--host", "127.0.0.1"), False)],
)
def test_a_server_for_all_without_a_key_says_so(
    file: Path, options: tuple[str, ...], warned: bool
) -> None:
    with served(file, "--host", "0.0.0.0", *options) as (process, url):
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    port = url.rpartition(":")[2]
    told = f"other machines can reach http://0.0.0.0:{port}, and need no key: give --api-key\n"
    assert error == (told if warned else "")


def test_what_does_not_drain_in_time_is_told(file: Path) -> None:
    with (
        served(file, "--drain", "0.2", "--context", "30000") as (process, url),
        http(url) as client,
        client.stream("POST", "/v1/completions", json=ENDLESS) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        last = [line for line in lines if line][-1]
        assert '"code":"server_stopping"' in last
        out, error = process.communicate(timeout=60)
        assert (process.returncode, out, error) == (0, "", WAITING.format(0.2))


def test_a_second_signal_ends_at_once(file: Path) -> None:
    with (
        served(file, "--context", "30000") as (process, url),
        http(url) as client,
        client.stream("POST", "/v1/completions", json=ENDLESS) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        until(lambda: stopping(url))
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM


def test_a_port_in_use_is_one_line(file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = call("serve", file, "--port", str(port))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert f"127.0.0.1:{port}: Address already in use" in result.stderr


@pytest.mark.parametrize("keys", ["", "# none\n\n"])
def test_a_file_without_keys_is_an_error(file: Path, tmp_path: Path, keys: str) -> None:
    path = tmp_path / "keys"
    path.write_text(keys)
    result = call("serve", file, "--api-key-file", path)
    assert result.exit_code == 2
    assert "has no API key" in result.stderr
    assert call("serve", file, "--api-key", " ").exit_code == 2
    assert call("serve", file, "--api-key-file", tmp_path / "none").exit_code == 2
