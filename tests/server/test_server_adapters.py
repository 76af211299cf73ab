"""Adapters over HTTP: who acts on which request, what is listed, loaded, sent and refused."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

import gemloom
import tiny
from gemloom.adapters.gguf_lora import write_gguf
from gemloom.server.adapters import AdapterFile, ServedAdapters
from http_serving import NAME, endless, http, serving
from random_lora import random_lora

IDS = [2, *range(40, 60)]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 10}
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    with open_model() as model:
        for seed, name in enumerate(("law", "style", "late"), 1):
            write_gguf(random_lora(model, seed), "gemma4", folder / f"{name}.gguf")
    return {path.stem: path for path in folder.iterdir()}


def open_model() -> gemloom.Model:
    data = tiny.gguf_bytes(tiny.VARIANTS["e2b"])
    return gemloom.load(data, kv_type="f32", context=512, slots=4, threads=1)


@pytest.fixture
def model(files: dict[str, Path]) -> Iterator[gemloom.Model]:
    with open_model() as model:
        yield model


@pytest.fixture
def registered(files: dict[str, Path]) -> dict[str, AdapterFile]:
    return {"law": AdapterFile(files["law"]), "style": AdapterFile(files["style"], 0.5)}


def test_adapters_that_go_while_a_model_is_loaded_again(
    model: gemloom.Model, registered: dict[str, AdapterFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = ServedAdapters(model, registered)
    with open_model() as again:
        load = again.adapters.load

        def meanwhile(name: str, *args: Any) -> Any:
            if name == "law":
                served.unload("style")
            return load(name, *args)

        monkeypatch.setattr(again.adapters, "load", meanwhile)
        served.move(again)
        assert [info.name for info in served.there()] == ["law"]


@pytest.fixture
def url(model: gemloom.Model, registered: dict[str, AdapterFile]) -> Iterator[str]:
    with serving(model, adapters=registered, aliases=("a:b",)) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def said(model: gemloom.Model, adapters: dict[str, float | None]) -> str:
    bias = {int(token): value for token, value in endless(model).items()}
    return model.generate(IDS, adapters=adapters, logit_bias=bias, **GREEDY).text


def complete(client: OpenAI, model: gemloom.Model, name: str = NAME, **extra: Any) -> Any:
    return client.completions.create(
        model=name, prompt=IDS, logit_bias=endless(model), extra_body=extra, **GREEDY
    )


def test_each_way_to_name_adapters(client: OpenAI, model: gemloom.Model) -> None:
    def text(name: str = NAME, **extra: Any) -> str:
        return complete(client, model, name, **extra).choices[0].text

    expected = {scale: said(model, {"law": scale}) for scale in (0.0, 0.5, 1.0)}
    both = said(model, {"law": 1.0, "style": 0.5})
    assert len({*expected.values(), both, said(model, {"style": None})}) == 5
    assert text() == expected[0.0]
    assert text(adapters={"law": 1}) == expected[1.0]
    assert text(adapters={"law": 0.5, "style": 0}) == expected[0.5]
    assert text(adapters={"law": None, "style": None}) == both
    assert text(f"{NAME}:law") == text("a:b:law") == expected[1.0]
    assert text(f"{NAME}:style") == said(model, {"style": 0.5})
    assert text(f"{NAME}:law", adapters={"style": 0.5}) == both
    assert text(f"{NAME}:law", adapters={"law": 0.5}) == expected[0.5]
    assert text(lora=[{"id": 0, "scale": 0.5}]) == expected[0.5]
    assert text(lora=[{"id": 1, "scale": 0.5}, {"id": 0, "scale": 1}]) == both
    assert text(lora=[]) == expected[0.0]


def test_every_kind_of_request_takes_them(client: OpenAI, model: gemloom.Model) -> None:
    messages: list[Any] = [{"role": "user", "content": "hello"}]
    bias = endless(model)
    extra = {"extra_body": {"adapters": {"law": 2.0}}}

    def chats(**more: Any) -> tuple[str | None, ...]:
        chat = client.chat.completions.create(
            model=NAME, messages=messages, logit_bias=bias, **GREEDY, **more
        )
        chunks = client.chat.completions.create(
            model=NAME, messages=messages, logit_bias=bias, stream=True, **GREEDY, **more
        )
        streamed = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
        return chat.choices[0].message.content, streamed

    prompt = model.chat_prompt(messages)
    call = model.tokenizer.id_of("<|tool_call>")
    own = {int(token): value for token, value in bias.items()} | {call: -100.0}
    for more, on in (({}, {}), (extra, {"law": 2.0})):
        expected = model.generate(prompt, adapters=on, logit_bias=own, **GREEDY).text
        assert chats(**more) == (expected, expected)
    plain, changed = (
        client.responses.create(model=name, input="hello", temperature=0, max_output_tokens=10)
        for name in (NAME, f"{NAME}:law")
    )
    assert plain.output_text != changed.output_text
    assert changed.model == f"{NAME}:law"
    vectors = [client.embeddings.create(model=NAME, input=[IDS], **more).data[0].embedding
               for more in ({}, extra)]  # fmt: skip
    assert vectors[1] == pytest.approx(model.embed(IDS, adapters={"law": 2.0}).tolist())
    assert vectors[0] == pytest.approx(model.embed(IDS).tolist())


def test_what_is_listed(client: OpenAI, url: str, model: gemloom.Model) -> None:
    names = [entry.id for entry in client.models.list()]
    assert names == [NAME, "a:b", f"{NAME}:law", f"{NAME}:style"]
    assert client.models.retrieve(f"{NAME}:law").id == f"{NAME}:law"
    assert complete(client, model, f"{NAME}:style").model == f"{NAME}:style"
    with http(url) as plain:
        law, style = plain.get("/v1/adapters").json()["data"]
        text = plain.get("/metrics").text
    assert (law["name"], law["scale"], law["requests"]) == ("law", 1.0, 0)
    assert (style["name"], style["scale"], style["requests"]) == ("style", 0.5, 1)
    assert law["bytes"] + style["bytes"] == model.memory()["adapters"]
    assert law["rank"] == 4 and law["matrices"] > 80 and law["norm"] > 0 and law["running"] == 0
    assert "gemloom_adapters 2.0" in text
    assert 'gemloom_adapter_requests_total{adapter="style"} 1.0' in text
    assert f'gemloom_memory_bytes{{kind="adapters"}} {float(model.memory()["adapters"])}' in text


def test_default_scales_as_llama_cpp_has_them(
    client: OpenAI, url: str, model: gemloom.Model
) -> None:
    with http(url) as plain:
        assert plain.get("/lora-adapters").json() == [
            {"id": 0, "name": "law", "scale": 0.0}, {"id": 1, "name": "style", "scale": 0.0}
        ]  # fmt: skip
        done = plain.post("/lora-adapters", json=[{"id": 0, "scale": 0.5}])
        assert done.json() == {"success": True}
        assert [entry["scale"] for entry in plain.get("/lora-adapters").json()] == [0.5, 0.0]
        half = said(model, {"law": 0.5})
        assert complete(client, model).choices[0].text == half
        assert complete(client, model, lora=[]).choices[0].text == said(model, {})
        assert complete(client, model, adapters={}).choices[0].text == said(model, {})
        for wrong in ({"id": 0, "scale": 1}, [{"id": 0}], [{"id": 7, "scale": 1}], [3], "x"):
            assert plain.post("/lora-adapters", json=wrong).status_code == 400
        assert complete(client, model).choices[0].text == half
        plain.delete("/v1/adapters/law").raise_for_status()
        assert plain.get("/lora-adapters").json() == [{"id": 1, "name": "style", "scale": 0.0}]
        assert complete(client, model).choices[0].text == said(model, {})
        plain.post("/v1/adapters", json={"name": "law"}).raise_for_status()
        assert plain.get("/lora-adapters").json()[0] == {"id": 0, "name": "law", "scale": 0.0}


def test_loaded_again_from_the_operators_file(
    client: OpenAI, url: str, model: gemloom.Model, files: dict[str, Path]
) -> None:
    before = said(model, {"law": 1.0})
    kept = files["law"].read_bytes()
    try:
        other = files["late"].read_bytes()
        files["law"].unlink()  # the old one may be mapped
        files["law"].write_bytes(other)
        with http(url) as plain:
            info = plain.post("/v1/adapters", json={"name": "law", "scale": 0.7}).json()
        assert (info["version"], info["scale"]) == (3, 0.7)
        assert said(model, {"law": 1.0}) != before
    finally:
        files["law"].unlink()
        files["law"].write_bytes(kept)


def test_running_requests_keep_what_they_began_with(
    client: OpenAI, url: str, model: gemloom.Model
) -> None:
    bias = {int(token): value for token, value in endless(model).items()}
    whole = model.generate(
        IDS, adapters={"law": 1}, logit_bias=bias, temperature=0, max_tokens=60
    ).text
    chunks = client.completions.create(
        model=f"{NAME}:law", prompt=IDS, logit_bias=endless(model), temperature=0,
        max_tokens=60, stream=True,
    )  # fmt: skip
    text = next(chunks).choices[0].text
    with http(url) as plain:
        plain.post("/v1/adapters", json={"name": "law", "scale": 5}).raise_for_status()
        plain.delete("/v1/adapters/law").raise_for_status()
    with pytest.raises(openai.NotFoundError, match="loaded: style"):
        complete(client, model, f"{NAME}:law")
    assert text + "".join(chunk.choices[0].text for chunk in chunks) == whole


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        ({"adapters": {"x": 1}}, 404, "adapter_not_found", "loaded: law, style"),
        ({"model": f"{NAME}:x"}, 404, "adapter_not_found", "loaded: law, style"),
        ({"model": "x:law"}, 404, "model_not_found", "not served here"),
        ({"adapters": {"law": 1e39}}, 400, "invalid_option", "finite"),
        ({"adapters": {"law": "1"}}, 400, "invalid_field", "adapters"),
        ({"adapters": ["law"]}, 400, "invalid_field", "adapters"),
        ({"adapters": {"../law.gguf": 1}}, 404, "adapter_not_found", "loaded"),
        ({"lora": [{"id": 5, "scale": 1}]}, 400, "invalid_field", "there are: 0, 1"),
        ({"lora": [{"id": 0}]}, 400, "invalid_field", "scale"),
        ({"lora": [], "adapters": {}}, 400, "invalid_field", "send one of them"),
    ],
)
def test_bad_requests(url: str, body: Any, status: int, code: str, message: str) -> None:
    with http(url) as plain:
        answer = plain.post("/v1/completions", json={"prompt": IDS, "max_tokens": 1, **body})
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert message in answer.json()["error"]["message"]


def test_infinite_scales_are_no_json(url: str) -> None:
    with http(url) as plain:
        for number in ("NaN", "Infinity", "1e999"):
            content = f'{{"prompt": [2], "max_tokens": 1, "adapters": {{"law": {number}}}}}'
            assert plain.post("/v1/completions", content=content).status_code == 400


def test_no_request_names_a_file(url: str, files: dict[str, Path]) -> None:
    with http(url) as plain:
        for name in (str(files["late"]), "late", "..", "a/b"):
            answer = plain.post("/v1/adapters", json={"name": name})
            assert answer.status_code == 404
            assert "there are: law, style" in answer.json()["error"]["message"]
        for extra in ({"path": str(files["late"])}, {"source": "late"}, {"scale": "1"}):
            answer = plain.post("/v1/adapters", json={"name": "law", **extra})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_field")
        assert plain.delete("/v1/adapters/late").status_code == 404
        assert plain.delete("/v1/adapters/..%2Fx").status_code == 404


def test_sending_is_off_without_flag_and_key(model: gemloom.Model, files: dict[str, Path]) -> None:
    data = files["late"].read_bytes()
    for settings in ({}, {"adapter_upload": True}, {"api_keys": ("secret",)}):
        with serving(model, **settings) as url, http(url, headers=KEY) as plain:
            answer = plain.put("/v1/adapters/late", content=data)
            assert answer.status_code == 403
            assert "--adapter-upload" in answer.json()["error"]["message"]
    assert model.adapters.list() == []


def test_sending_an_adapter(model: gemloom.Model, files: dict[str, Path]) -> None:
    data = files["late"].read_bytes()
    options: Any = {"adapter_upload": True, "api_keys": ("secret",), "max_adapter": len(data)}
    with serving(model, **options) as url, http(url) as plain:
        assert plain.put("/v1/adapters/late", content=data).status_code == 401
        for path, content, status in (
            ("late", data + b"x", 413),
            ("late", data[:-40], 400),
            ("late", b"", 400),
            ("l%20te", data, 400),
            ("late?scale=nan", data, 400),
            ("late?scale=x", data, 400),
        ):
            answer = plain.put(f"/v1/adapters/{path}", content=content, headers=KEY)
            assert (answer.status_code, path) == (status, path), answer.text
            assert model.adapters.list() == []
        sent = plain.put("/v1/adapters/late?scale=0.5", content=data, headers=KEY)
        assert (sent.status_code, sent.json()["scale"]) == (200, 0.5)
        assert plain.post("/v1/adapters", json={"name": "late"}, headers=KEY).status_code == 404
        body = {"prompt": IDS, "model": f"{NAME}:late", "max_tokens": 1}
        assert plain.post("/v1/completions", json=body, headers=KEY).status_code == 200


def test_changes_need_a_key_or_this_machine(
    model: gemloom.Model, registered: dict[str, AdapterFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemloom.server.service.is_local", lambda request: False)
    with serving(model, adapters=registered) as url, http(url) as plain:
        assert plain.post("/v1/adapters", json={"name": "law"}).status_code == 403
        assert plain.delete("/v1/adapters/law").status_code == 403
        assert plain.post("/lora-adapters", json=[]).status_code == 403
        assert len(plain.get("/v1/adapters").json()["data"]) == 2
    with serving(model, adapters=registered, api_keys=("secret",)) as url, http(url) as plain:
        assert plain.get("/v1/adapters").status_code == 401
        assert plain.get("/lora-adapters").status_code == 401
        assert plain.delete("/v1/adapters/law", headers=KEY).status_code == 200


def test_requests_with_different_adapters_at_once(client: OpenAI, model: gemloom.Model) -> None:
    """Eight over four slots, each as it is alone."""
    choices: list[Any] = [{}, {"law": 1}, {"style": 1}, {"law": 0.5, "style": -0.5}] * 2
    expected = [said(model, on) for on in choices]
    got: dict[int, str] = {}

    def ask(i: int) -> None:
        got[i] = complete(client, model, adapters=choices[i]).choices[0].text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(choices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(len(choices))] == expected
