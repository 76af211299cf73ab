"""A secret in the name of a source is in no output: messages, model ids, metrics, files, state."""

import traceback
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gemloom
import tiny
from command_line import GREEDY, call
from gemloom.cli.serve import ServerOptions
from gemloom.errors import GemloomError
from gemloom.files import source
from gemloom.files.names import cleaned, is_url, model_id, shown
from gemloom.server.app import create_app
from shelf import Shelf

BEGINNING, END = "Xq9", "Zk7"  # of every secret here, and of nothing else


def secret(letters: str) -> st.SearchStrategy[str]:
    return st.text(letters, max_size=6).map(lambda middle: f"{BEGINNING}{middle}{END}")


PASSWORDS = secret("a:@%+!")
QUERIES = secret("a:/@?#&=%+;,")
SCHEMES = st.sampled_from(["memory", "http", "https", "s3", "zip://m.gguf::https"])
PATHS = st.sampled_from(["m.gguf", "a/m-00001-of-00002.gguf", "a@1/m.gguf.sealed", "", "m b.gguf"])


@st.composite
def urls(draw: st.DrawFn, schemes: st.SearchStrategy[str] = SCHEMES) -> str:
    """A URL with secrets wherever it may have some."""
    user = draw(st.sampled_from(["", "me:{}@", "{}@", "{}:x@"])).format(draw(PASSWORDS))
    query = draw(st.sampled_from(["", "?sig={}", "#{}", "?st=16:46:47Z&sig={}", "?{}::b://{}"]))
    query = query.replace("{}", draw(QUERIES))
    return f"{draw(schemes)}://{user}host:80/{draw(PATHS)}{query}"


def hidden(text: str) -> bool:
    return BEGINNING not in text and END not in text


@given(urls())
@example("https://host/m.gguf?st=2026-11-28T16:46:47Z&sig=Xq9Zk7")
@example("https://me:Xq9/Zk7@host/m.gguf")
@example("https://me:Xq9?Zk7@host/m.gguf")
@example("zip://m.gguf::https://me:Xq9Zk7@host/m.zip?Xq9:Zk7")
@example("hf:owner/repo:m.gguf?token=Xq9Zk7")
@example("hf:me:Xq9Zk7@owner/repo")
def test_names_hide_secrets(url: str) -> None:
    assert hidden(shown(url)) and hidden(model_id(url))
    assert not is_url(url) or hidden(cleaned(f"cannot read {url}"))
    assert shown(shown(url)) == shown(url)


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("https://host/a/m.gguf.sealed", "m"),
        ("https://host:8443/a@1/m.gguf", "m"),
        ("https://[::1]:80/m.gguf", "m"),
        ("zip://in/m.gguf::https://host/m.zip", "m"),
        ("simplecache::https://host/m.gguf", "m"),
        ("hf:owner/repo", "owner/repo"),
        ("hf:owner/repo:Q4_K_M", "owner/repo:Q4_K_M"),
        ("models/what? a #1 at@home.gguf", "what? a #1 at@home"),
        ("gemma-3-270m", "gemma-3-270m"),
    ],
)
def test_what_is_not_secret_is_shown(name: str, id: str) -> None:
    assert shown(name) == name
    assert model_id(name) == id


def test_a_token_in_the_text_of_an_error_is_hidden() -> None:
    assert cleaned("bad header b'Bearer abc def'\nhf_abc") == "bad header b'***\n***"
    assert cleaned("what now? try again # later") == "what now? try again # later"


COMMANDS = (
    ["run", "{}", "x"], ["chat", "{}", "x"], ["inspect", "{}"], ["inspect", "{}", "--checksum"],
    ["tokenize", "{}", "x"], ["bench", "{}"], ["convert", "{}", "out.gguf"],
    ["quantize", "{}", "out.gguf", "Q8_0"], ["imatrix", "{}", "TEXT", "out.gguf"],
    ["perplexity", "{}", "TEXT"], ["compare", "{}", "{}", "TEXT"],
    ["seal", "{}", "out.sealed", "--new-key", "key"], ["unseal", "{}", "out.gguf"],
    ["adapter", "inspect", "{}"], ["adapter", "convert", "{}", "out.gguf"],
    ["adapter", "merge", "{}", "{}", "out.gguf"], ["adapter", "extract", "{}", "{}", "out.gguf"],
    ["serve", "{}", "--port", "0"], ["run", "MODEL", "x", "--adapter", "{}", *GREEDY],
    ["serve", "MODEL", "--port", "0", "--adapter", "{}"],
    ["serve", "MODEL", "--port", "0", "--adapter", "name={}"],
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("names")
    (made / "model.gguf").write_bytes(tiny.gguf_bytes(tiny.VARIANTS["e2b"]))
    (made / "text").write_text("some words\n" * 9)
    return made


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:3]))
def test_commands_hide_secrets(words: list[str], folder: Path) -> None:
    at = {"MODEL": folder / "model.gguf", "TEXT": folder / "text"}

    @settings(max_examples=4, deadline=None)
    @given(urls(st.just("memory")))
    @example("memory://me:Xq9Zk7@host/m.gguf?st=16:46:47Z&sig=Xq9Zk7")
    @example("memory://me:Xq9/Zk7@host/m.gguf")
    @example("file:///none.gguf?sig=Xq9Zk7")
    @example("hf:me:Xq9Zk7@owner/repo")
    @example("memory://host/m b.gguf?sig=Xq9 Zk7")
    def told(url: str) -> None:
        given = [str(at.get(word) or word.format(url)) for word in words]
        if "serve" in words and hidden(url):
            return  # that would be served
        result = call(*(str(folder / word) if word.startswith("out.") else word for word in given))
        assert result.exit_code in (1, 2), result.output
        assert hidden(result.output), result.output

    told()


@given(urls(st.just("memory")))
@settings(max_examples=20, deadline=None)
def test_errors_and_their_traces_hide_secrets(url: str) -> None:
    with pytest.raises(GemloomError) as caught:
        source.resolve(url)
    assert hidden("".join(traceback.format_exception(caught.value)))


@pytest.fixture
def signed(shelf: Shelf) -> str:
    shelf.files = {"/m.gguf": tiny.gguf_bytes(tiny.VARIANTS["gemma3_scaled"])}
    return f"{shelf.url}/m.gguf?st=2026-11-28T16:46:47Z&sig=Xq9:Zk7"


def test_a_server_hides_what_its_model_came_from(signed: str) -> None:
    told = ServerOptions().settings(signed)
    assert (told.name, is_url(signed)) == ("m", True)
    with gemloom.load(signed, threads=1, context=64) as model:
        with TestClient(create_app(model, told), base_url="http://localhost") as client:
            asked = {"prompt": "a", "max_tokens": 2}
            paths = ("/v1/models", "/metrics", "/health", "/slots", "/openapi.json", "/v1/adapters")
            answers = [client.get(path).text for path in paths]
            answers += [client.post("/v1/completions", json=asked).text]
            answers += [client.post("/v1/completions", json=asked | {"model": "x"}).text]
        answers += [model.name, repr(model), model.save_state().decode("latin-1")]
    assert all(map(hidden, answers))
