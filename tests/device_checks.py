"""What must hold on any device: logits, cells and adapters as on the CPU alone.

Run with the CPU as further devices in ``test_devices.py``, with Vulkan in ``vulkan/``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import ggml
import numpy as np

import gemloom
import tiny
from conftest import Load, endless, prompt
from gemloom import testing
from gemloom.compute.batch import Chunk
from gemloom.testing import engine_of, parts_of
from random_lora import random_lora

Names = str | list[str]


@dataclass(frozen=True)
class Bound:
    """Of errors, in deviations of the logits."""

    mean: float
    most: float

    def close(self, got: np.ndarray, wanted: np.ndarray) -> None:
        error = np.abs(got - wanted) / wanted.std()
        assert error.mean() < self.mean and error.max() < self.most, (error.mean(), error.max())


BOUND = Bound(0.0004, 0.004)  # one graph or several round alike, but for other batches


@dataclass(frozen=True)
class Checks:
    """The checks on one device; ``options`` are those of every model on it.

    ``kernels`` are those of the CPU, where it computes all and where it has some of the layers.
    """

    load: Load
    device: Names
    bound: Bound
    kernels: str = "auto"

    def model(self, variant: str, **options: Any) -> gemloom.Model:
        options = {"device": self.device, "kernels": self.kernels, **options}
        model = self.load(variant, threads=1, **options)
        assert not model.placement.on_host and not model.fallbacks
        return model

    def host(self, variant: str, **options: Any) -> gemloom.Model:
        return self.load(variant, device="cpu", kernels=self.kernels, threads=1, **options)

    def layers(self, variant: str) -> None:
        """Any number of layers there, in one go."""
        ids, n = prompt(40), tiny.VARIANTS[variant].n_layer
        wanted = self.host(variant).logits(ids)
        for count in (1, n // 2, n):
            model = self.model(variant, gpu_layers=count)
            assert sum(index == 0 for index in model.placement.layers) == count
            self.bound.close(model.logits(ids), wanted)
            assert model.memory()["on_devices"] > 0 and not model.fallbacks
            model.close()

    def pieces(self, variant: str, **options: Any) -> None:
        """In one go, in chunks, and a token at a time."""
        ids = prompt(60)
        wanted = self.model(variant, **options).logits(ids)
        for chunk in (7, 17):
            self.bound.close(self.model(variant, chunk=chunk, **options).logits(ids), wanted)
        model = self.model(variant, chunk=32, **options)
        run(
            model,
            Chunk(slot=0, start=0, tokens=ids[:30]),
            Chunk(slot=0, start=30, tokens=ids[30:50]),
        )
        rows = [
            run(model, Chunk(slot=0, start=i, tokens=[ids[i]], wanted=[0])) for i in range(50, 60)
        ]
        self.bound.close(np.concatenate(rows), wanted[50:])

    def cells(self, variant: str, kv_type: str, bound: Bound) -> None:
        """K/V cells of other types, against those on the CPU."""
        ids = prompt(60)
        wanted = self.host(variant, kv_type=kv_type).logits(ids)
        bound.close(self.model(variant, kv_type=kv_type).logits(ids), wanted)

    def ragged(self, variant: str, **options: Any) -> None:
        """Prefill and decode rows of three sequences in a step: each as alone."""
        a, b, c = prompt(40, seed=1), prompt(70, seed=2), prompt(25, seed=3)
        model, host = self.model(variant, slots=3, chunk=64, **options), self.host(variant)
        run(
            model,
            Chunk(slot=0, start=0, tokens=a[:39]),
            Chunk(slot=2, start=0, tokens=c[:10], wanted=[9]),
        )
        run(
            model,
            Chunk(slot=1, start=0, tokens=b[:40], wanted=[5]),
            Chunk(slot=2, start=10, tokens=c[10:24]),
        )
        got = run(
            model,
            Chunk(slot=2, start=24, tokens=c[24:], wanted=[0]),
            Chunk(slot=0, start=39, tokens=a[39:], wanted=[0]),
            Chunk(slot=1, start=40, tokens=b[40:], wanted=[3, 29]),
        )
        alone = [host.logits(x) for x in (c, a, b)]
        wanted = np.stack([alone[0][24], alone[1][39], alone[2][43], alone[2][69]])
        self.bound.close(got, wanted)

    def adapters(self, variant: str, **options: Any) -> None:
        """Every kind of matrix changed, tables and head among them; then without again."""
        ids = prompt(40)
        model, host = self.model(variant, **options), self.host(variant)
        without = model.logits(ids)
        lora = random_lora(host)
        for opened in (model, host):
            opened.adapters.load("a", lora, 0.7)
        wanted = host.logits(ids, adapters={"a": None})
        assert np.abs(wanted - without).mean() > 0.05 * without.std()
        self.bound.close(model.logits(ids, adapters={"a": None}), wanted)
        assert np.array_equal(model.logits(ids), without) and not model.fallbacks
        model.adapters.unload("a")

    def together(self, variant: str, **options: Any) -> None:
        """Four requests at once, some with an adapter, one bounded: what the host would say."""
        model, host = self.model(variant, slots=4, chunk=32, **options), self.host(variant)
        for opened in (model, host):
            opened.adapters.load("a", random_lora(host), 0.7)
        on, greedy = {"adapters": {"a": None}}, {"max_tokens": 8, "temperature": 0}
        four = {"constraint": model.grammars.regex("[0-9]{4}")}
        asked = [(prompt(9 + 15 * i, seed=i), kind) for i, kind in enumerate([{}, on, four, on])]
        runs = [model.stream(ids, **greedy, **endless(model), **kind) for ids, kind in asked]
        done = [run.completion() for run in runs]
        assert re.fullmatch("[0-9]{4}", done[2].text)
        del asked[2], done[2]
        for (ids, kind), said in zip(asked, done, strict=True):
            assert len(said.tokens) == 8
            logits = host.logits([*ids, *said.tokens[:-1]], **kind)[-8:]
            logits[:, list(host.tokenizer.eog)] -= 100  # as endless() does
            self._chosen(logits, said.tokens)

    def _chosen(self, logits: np.ndarray, tokens: Sequence[int]) -> None:
        """Each the largest of its row, or as near to it as the errors of both may be."""
        short = logits.max(1) - logits[np.arange(len(tokens)), tokens]
        assert short.max() <= 2 * self.bound.most * logits.std(), short

    def state(self, variant: str, **options: Any) -> None:
        """Saved here it goes on here, and on the CPU, as if it had never been away."""
        ids, options = prompt(50), {"chunk": 16, **options}
        model = self.model(variant, **options)
        model.generate(ids, max_tokens=1, **endless(model), temperature=0)
        saved, cells = model.save_state(), self._cells(model, len(ids))
        wanted = model.logits([*ids, 5, 6, 7], rows="last")
        for other in (self.model(variant, **options), self.host(variant, chunk=16)):
            assert other.load_state(saved) == len(ids)
            assert self._cells(other, len(ids)) == cells
            rows = run(other, Chunk(slot=0, start=len(ids), tokens=[5, 6, 7], wanted=[2]))
            self.bound.close(rows, wanted)

    @staticmethod
    def _cells(model: gemloom.Model, count: int) -> list[bytes]:
        return [bytes(part) for part in parts_of(model).store.export(0, count)]

    def snapshots(self, variant: str, **options: Any) -> None:
        """Coming back to an earlier turn after the rings have wrapped."""
        model = self.model(variant, chunk=16, context=512, **options)
        first, greedy = prompt(60), {"temperature": 0, **endless(model)}
        said = model.generate(first, max_tokens=4, **greedy)
        model.generate([*first, *prompt(80, seed=4)], max_tokens=4, **greedy)
        again = model.generate([*first, *prompt(9, seed=5)], max_tokens=6, **greedy)
        assert again.usage.cached_tokens >= len(first) - 1 and said.tokens
        cold = self.model(variant, chunk=16, context=512, **options)
        assert cold.generate([*first, *prompt(9, seed=5)], max_tokens=6, **greedy).tokens == (
            again.tokens
        )

    def shift(self, variant: str, **options: Any) -> None:
        """Keys are turned back as on the CPU, from the same cells."""
        keep, drop, n = 4, 20, 60
        model, host = self.model(variant, chunk=64, **options), self.host(variant, chunk=64)
        run(model, Chunk(slot=0, start=0, tokens=prompt(n)))
        parts_of(host).store.restore(0, n, memoryview(b"".join(self._cells(model, n))))
        for opened in (model, host):
            call(opened, lambda opened=opened: parts_of(opened).program.shift(0, keep, drop, n))
        for got, wanted in zip(
            self._cells(model, n - drop), self._cells(host, n - drop), strict=True
        ):
            assert np.allclose(*(np.frombuffer(x, np.float32) for x in (got, wanted)), atol=1e-4)

    def goes_on(self, variant: str, **options: Any) -> None:
        """Past the end of the context."""
        model = self.model(variant, context=64, keep=4, chunk=8, **options)
        done = model.generate(prompt(40), max_tokens=60, temperature=0, **endless(model))
        assert done.usage.completion_tokens == 60


def call(model: gemloom.Model, function: Callable[[], Any]) -> Any:
    """In the thread that computes."""
    return engine_of(model).call(function)


def run(model: gemloom.Model, *chunks: Chunk) -> np.ndarray:
    """One step a time where chunks are of one slot, else one step."""
    if len({chunk.slot for chunk in chunks}) < len(chunks):
        return [run(model, chunk) for chunk in chunks][-1]
    return testing.run(model, chunks).logits


def copied(model: gemloom.Model) -> tuple[list[str], set[str]]:
    """Of the graph that is kept: the inputs that devices are sent, and what is copied besides.

    The latter by the scheduler, where a device cannot read the other's memory.
    """
    plan = parts_of(model).program._last
    assert plan
    names, graph = set(), plan.graph._graph
    for i in range(ggml.ggml_graph_n_nodes(graph)):
        for source in takewhile(bool, ggml.ggml_graph_node(graph, i).contents.src):
            if copy := re.fullmatch(r".+#(.*)#0", source.contents.name.decode()):
                names.add(copy[1])
    assert plan.graph._spreading
    return [each.name for upload in plan.graph._spreading.uploads for each in upload.inputs], names
