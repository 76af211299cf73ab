"""Models spread over workers: the same logits as in one process; the command that lends."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import ggml
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

import tiny
from command_line import ENVIRONMENT, call, fine, write
from conftest import Load, endless, prompt
from device_checks import BOUND, copied, run
from fake_worker import FakeWorker
from gemloom.compute import fitting
from gemloom.compute.batch import Chunk
from gemloom.errors import DeviceError
from gemloom.files import gguf
from gemloom.files.source import resolve
from gemloom.ggml import relay, rpc
from gemloom.ggml.graph import F32, Graph
from gemloom.options import Options
from gemloom.testing import parts_of
from random_lora import random_lora
from worker_processes import Worker, needs_rpc, worker

TCP = Path("/proc/net/tcp")


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Worker, Worker]]:
    with worker() as first, worker() as second:
        yield first, second


@needs_rpc
@pytest.mark.parametrize("variant", sorted(tiny.VARIANTS))
def test_two_workers_compute_what_one_process_does(
    load: Load, pair: tuple[Worker, Worker], variant: str
) -> None:
    """To the bit: it is the same arithmetic, one thread and one set of kernels."""
    alone = load(variant, device="cpu", kernels="plain", threads=1, chunk=16)
    spread = load(variant, device=[w.device for w in pair], threads=1, chunk=16)
    assert set(spread.placement.layers) == {0, 1}
    assert spread.placement.head == 1
    assert spread.backends[:2] == [w.device for w in pair]
    ids = prompt(40)
    np.testing.assert_array_equal(alone.logits(ids), spread.logits(ids))
    texts = [model.generate(ids[:9], max_tokens=20, temperature=0) for model in (alone, spread)]
    assert texts[0].tokens == texts[1].tokens


@needs_rpc
def test_together_with_this_machine_and_with_adapters(
    load: Load, pair: tuple[Worker, Worker]
) -> None:
    device, ids = [pair[0].device, "cpu"], prompt(40)
    alone = load("e2b", device="cpu", kernels="plain", threads=1)
    spread = load("e2b", device=device, gpu_layers=4, kernels="plain", threads=1)
    assert set(spread.placement.layers) == {0, 1}
    for model in (alone, spread):
        model.adapters.load("style", random_lora(alone, 3))
    want = alone.logits(ids, adapters={"style": 0.7})
    assert np.abs(want - alone.logits(ids)).max() > 0.1
    # An adapter's product is another operation on a device, so sums differ in their last bits.
    BOUND.close(spread.logits(ids, adapters={"style": 0.7}), want)


@needs_rpc
@pytest.mark.parametrize(("variant", "rows"), [("e2b", 2), ("gemma3", 1)])
def test_besides_the_inputs_only_rows_of_tables_are_copied(
    load: Load, pair: tuple[Worker, Worker], variant: str, rows: int
) -> None:
    model = load(variant, device=pair[0].device, slots=3, threads=1)
    for step in range(2):
        run(model, *(Chunk(slot=slot, start=step, tokens=[5], wanted=[0]) for slot in range(3)))
    inputs, copies = copied(model)
    assert len(inputs) == 3 + 2 * 3
    assert len(copies) == rows and not copies & set(inputs)


@needs_rpc
def test_a_worker_serves_one_model_after_another(
    load: Load, pair: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "GREETING", 0.3)
    model = load("e2b", device=pair[0].device, threads=1)
    with pytest.raises(DeviceError, match="is it busy with another model, or off"):
        load("e2b", device=pair[0].device, threads=1)
    model.close()
    monkeypatch.undo()
    assert load("e2b", device=pair[0].device, threads=1).generate(prompt(3), max_tokens=2).text


@needs_rpc
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers here")
def test_signals_do_not_end_the_process(load: Load, pair: tuple[Worker, Worker]) -> None:
    """ggml takes an interrupted system call for a lost worker, and aborts: none may reach it."""
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        model = load("e2b", device=[w.device for w in pair], threads=1)
        model.generate(prompt(20), max_tokens=20, **endless(model))
        model.close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(rung) > 50


@needs_rpc
def test_signals_wait_while_doctor_asks_a_worker(
    pair: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    placed, blocked = fitting.place, list[bool]()

    def watched(*args: Any) -> Any:
        blocked.append(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        return placed(*args)

    monkeypatch.setattr(fitting, "place", watched)
    file = gguf.read(resolve(tiny.gguf_bytes(tiny.VARIANTS["e2b"])))
    for device in (pair[0].device, "cpu"):
        fitting.propose(file, Options(device=device, context=256))
    assert blocked == [True, False]


@needs_rpc
def test_what_a_cpu_lacks_is_known_of_a_worker_too(load: Load, pair: tuple[Worker, Worker]) -> None:
    """ggml says that workers can do everything; they end at what they cannot."""
    model = load("e2b", device=pair[0].device, threads=1)
    assert parts_of(model).program.ranks
    with closing(Graph(parts_of(model).device, 8)) as g:
        x = g.input("x", F32, 256)
        for kind, can in ((GGMLQuantizationType.Q4_K, True), (GGMLQuantizationType.IQ2_XS, False)):
            copy = ggml.ggml_cpy(g._context, x.pointer, g.input("y", kind, 256).pointer)
            assert parts_of(model).device.supports(0, copy) is can
            assert ggml.ggml_backend_dev_supports_op(parts_of(model).device.found[0].pointer, copy)


@needs_rpc
def test_a_device_of_which_nothing_is_known_gets_no_more_than_it_must(load: Load) -> None:
    with closing(FakeWorker()) as fake:  # its addresses are not a CPU's
        model = load("e2b", device=f"rpc:127.0.0.1:{fake.port}")
        assert set(model.placement.layers) == {0}
        assert not parts_of(model).device.knows(0)
        assert not parts_of(model).program.ranks


@needs_rpc
def test_doctor_says_where_to_ask(pair: tuple[Worker, Worker], tmp_path: Path) -> None:
    asked = ("doctor", write(tmp_path), "--device", pair[0].device, "--context", "256")
    told = f"what {pair[0].device} lacks cannot be asked from here: gemloom doctor there tells"
    assert told in fine(*asked).stdout
    assert json.loads(fine(*asked, "--json").stdout)["workers"] == [pair[0].device]


# -- the command -----------------------------------------------------------------------------------


@needs_rpc
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_says_what_it_lends_and_ends_at_once(number: signal.Signals) -> None:
    with worker() as started, closing(rpc.Worker("127.0.0.1", started.port)):
        assert started.said.startswith("lending cpu (")
        started.process.send_signal(number)
        asked = time.monotonic()
        assert started.process.wait(10) == -number
        assert time.monotonic() - asked < 1
        assert started.process.communicate() == ("", "")


@needs_rpc
def test_a_worker_for_others_warns() -> None:
    with worker(host="0.0.0.0") as started:
        started.process.kill()
        told = started.process.communicate()[1]
    assert told == (
        f"anyone who reaches 0.0.0.0:{started.port} can use this machine: "
        "there is no authentication\n"
    )


@needs_rpc
def test_who_lends_a_gpu_is_warned() -> None:
    """The CPU in its place: nothing else is here for sure."""
    code = (
        "from gemloom.ggml import backends; backends._KINDS.clear()\n"
        "from gemloom.__main__ import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "worker", "--device", "cpu", "--listen", "127.0.0.1:0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline().startswith("lending cpu")
    process.kill()
    assert process.communicate()[1] == (
        "cpu: an operation that it lacks ends this worker; "
        "gemloom doctor MODEL shows whether it lacks any\n"
    )


@needs_rpc
@pytest.mark.skipif(not TCP.exists(), reason="only Linux shows the timers of connections")
def test_both_sides_ask_for_a_sign_of_life() -> None:
    """Or a worker would wait for ever for a client that was switched off, and take no other."""
    with worker() as started, closing(rpc.Worker("127.0.0.1", started.port)):
        port, timers = f":{started.port:04X}", []
        for _, local, remote, state, _, timer, *_ in map(str.split, TCP.read_text().splitlines()):
            if state == "01" and (local.endswith(port) or remote.endswith(port)):
                timers.append(timer[:2])
    assert timers == ["02", "02"]  # keep-alive


@needs_rpc
def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = call("worker", "--listen", f"127.0.0.1:{port}")
    assert result.exit_code == 1
    assert result.stderr == (
        f"gemloom: 127.0.0.1:{port}: Address already in use; try another --listen\n"
    )


@needs_rpc
def test_what_a_worker_cannot_lend() -> None:
    result = call("worker", "--device", "cuda7", "--listen", "127.0.0.1:0")
    assert result.exit_code == 1
    assert "there is no device 'cuda7'; here: cpu" in result.stderr
    for listen in ("127.0.0.1", ":1", "127.0.0.1:x", "127.0.0.1:99999"):
        assert call("worker", "--listen", listen).exit_code == 2


def test_without_rpc_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch, load: Load) -> None:
    monkeypatch.setattr(ggml, "GGML_USE_RPC", False)
    with pytest.raises(DeviceError, match=r"has no RPC.*CMAKE_ARGS=.-DGGML_RPC=ON. pip install"):
        load("e2b", device="rpc:127.0.0.1:1")
    assert "has no RPC" in call("worker", "--listen", "127.0.0.1:0").stderr
