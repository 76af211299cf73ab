"""One measurement of llama.cpp in a process of its own; run by compare.py in its environment.

    python peer.py '{"model": "...", "threads": 2, "task": "speed", ...}'

Speaks to the library's C functions, so that no Python of the binding's is in the times. Set up
as llama.cpp's own tools do: batches of 2,048 in pieces of 512, flash attention where it can, the
sliding cache no larger than needed, f16 K/V. Prints one JSON object; must not import gemloom.
"""

import ctypes
import json
import random
import sys
from time import perf_counter

IMPORTING = perf_counter()
import llama_cpp as api  # noqa: E402

IMPORTED = perf_counter()
BATCH, PIECE = 2048, 512


class Peer:
    """A loaded model with a context for each of some sequences, ``layers`` of it on devices."""

    def __init__(
        self,
        path: str,
        threads: int,
        context: int,
        sequences: int = 1,
        layers: int = 0,
        piece: int = PIECE,
    ) -> None:
        api.llama_backend_init()
        loading = api.llama_model_default_params()
        loading.n_gpu_layers = layers
        self.model = api.llama_model_load_from_file(path.encode(), loading)
        if not self.model:
            sys.exit(f"error: llama.cpp cannot load {path}")
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = context * sequences, sequences
        params.n_batch, params.n_ubatch = BATCH, piece
        params.n_threads = params.n_threads_batch = threads
        params.swa_full = False
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            sys.exit(f"error: llama.cpp cannot make a context of {context}")
        vocabulary = api.llama_model_get_vocab(self.model)
        self.n_vocab = api.llama_vocab_n_tokens(vocabulary)
        self.batch = api.llama_batch_init(BATCH, 0, 1)
        self.random = random.Random(0)

    def close(self) -> None:
        """Free context and model."""
        api.llama_free(self.context)
        api.llama_model_free(self.model)

    def clear(self) -> None:
        """Forget every position."""
        api.llama_memory_clear(api.llama_get_memory(self.context), True)

    def evaluate(self, start: int, count: int, sequence: int = 0) -> None:
        """Compute ``count`` random tokens from position ``start``; logits of the last one only."""
        for first in range(0, count, BATCH):
            n = min(BATCH, count - first)
            last = first + n - 1 if first + n == count else -1
            self._fill([(start + i, sequence, i == last) for i in range(first, first + n)])
        api.llama_synchronize(self.context)

    def step(self, position: int, sequences: int) -> None:
        """Compute a random token of each sequence, with its logits."""
        self._fill([(position, sequence, True) for sequence in range(sequences)])
        api.llama_synchronize(self.context)

    def use(self, adapter: object) -> None:
        """Have this adapter act from now on, or none."""
        count = 0 if adapter is None else 1
        adapters = (api.llama_adapter_lora_p_ctypes * 1)(adapter)
        scales = (ctypes.c_float * 1)(1.0)
        if api.llama_set_adapters_lora(self.context, adapters, count, scales):
            sys.exit("error: llama.cpp cannot use the adapter")

    def timed(self, start: int, count: int) -> float:
        """Seconds of ``evaluate``, from nothing."""
        self.clear()
        begin = perf_counter()
        self.evaluate(start, count)
        return perf_counter() - begin

    def _fill(self, rows: list) -> None:
        """Have rows of (position, sequence, whether its logits are wanted) computed."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (position, sequence, wanted) in enumerate(rows):
            batch.token[i] = self.random.randrange(self.n_vocab)
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        if api.llama_decode(self.context, batch):
            sys.exit(f"error: llama.cpp cannot compute {len(rows)} tokens at {rows[0][0]}")


def speed(job: dict) -> dict:
    """Seconds of each prompt, and of decoding at each depth."""
    peer = Peer(job["model"], job["threads"], job["context"])
    peer.evaluate(0, 32)  # wakes the threads and brings the weights into memory
    prompts, decodes = {}, {}
    for n in sorted({*job["prompts"], *job["depths"]}):
        peer.clear()
        start = perf_counter()
        peer.evaluate(0, max(n, 1))
        prompts[n] = perf_counter() - start
        if n in job["depths"]:
            start = perf_counter()
            for i in range(job["decode"]):
                peer.evaluate(max(n, 1) + i, 1)
            decodes[n] = perf_counter() - start
    return {"prompt": {n: prompts[n] for n in job["prompts"]}, "decode": decodes}


def device(job: dict) -> dict:
    """Seconds of prompts in pieces of each size, and of decoding by one sequence and by several.

    As ``speed``, each repeated, with all layers on the device that llama.cpp prefers; decoding
    with pieces of the first size.
    """
    prompts: dict = {}
    decodes: dict = {}
    for chunk in job["chunks"]:
        most = max(job["sequences"])
        peer = Peer(job["model"], job["threads"], job["context"], most, job["layers"], chunk)
        peer.evaluate(0, 32)
        found = prompts[chunk] = {n: [] for n in job["prompts"]}
        for _ in range(job["repetitions"]):
            for n, seconds in found.items():
                seconds.append(peer.timed(0, n))
            for depth in job["depths"] if chunk == job["chunks"][0] else ():
                for count in job["sequences"]:
                    seconds = decodes.setdefault(f"{count} at {depth}", [])
                    seconds.append(_decoded(peer, count, max(depth, 1), job["decode"]))
        peer.close()
    return {"prompt": prompts, "decode": decodes}


def _decoded(peer: Peer, count: int, depth: int, tokens: int) -> float:
    """Seconds that so many sequences take to decode side by side after a prompt each."""
    peer.clear()
    for sequence in range(count):
        peer.evaluate(0, depth, sequence)
    start = perf_counter()
    for i in range(tokens):
        peer.step(depth + i, count)
    return perf_counter() - start


def start(job: dict) -> dict:
    """Seconds to load, and then to the logits after a prompt of one token."""
    begin = perf_counter()
    peer = Peer(job["model"], job["threads"], job["context"])
    loaded = perf_counter()
    peer.evaluate(0, 1)
    first = perf_counter()
    peer.evaluate(1, job["prompt"])  # so that whatever grows with use has grown
    peer.evaluate(1 + job["prompt"], 1)
    return {"import": IMPORTED - IMPORTING, "load": loaded - begin, "first": first - loaded}


def adapters(job: dict) -> dict:
    """Seconds with and without an adapter, by turns; of a switch; of loading one."""
    peer = Peer(job["model"], job["threads"], job["context"])
    loads, there = [], []
    for _ in range(job["requests"]):
        begin = perf_counter()
        there.append(api.llama_adapter_lora_init(peer.model, job["adapter"].encode()))
        loads.append(perf_counter() - begin)
        if not there[-1]:
            sys.exit(f"error: llama.cpp cannot load {job['adapter']}")
    both = {"base": None, "adapter": there[0]}
    prompts, decodes = {name: [] for name in both}, {name: [] for name in both}
    switch = {"same": [], "other": []}
    for turn in range(job["rounds"] + 1):  # the first wakes threads and weights
        for name in sorted(both, reverse=turn % 2 == 0):
            peer.use(both[name])
            prompts[name].append(peer.timed(0, job["prompt"]))
            begin = perf_counter()
            for i in range(job["decode"]):
                peer.evaluate(job["prompt"] + i, 1)
            decodes[name].append(perf_counter() - begin)
        for name in ("same", "other", "other", "same") * 4 if turn else ():
            peer.use(there[1] if name == "same" else there[0])
            peer.timed(0, 16)
            begin = perf_counter()
            peer.use(there[1])
            switch[name].append(perf_counter() - begin + peer.timed(0, 16))
    for seconds in (*prompts.values(), *decodes.values()):
        del seconds[0]
    return {"load": loads, "prompt": prompts, "decode": decodes, "switch": switch}


def version(job: dict) -> dict:
    """What is measured."""
    return {
        "llama-cpp-python": api.__version__,
        "features": api.llama_print_system_info().decode().strip(),
    }


@api.llama_log_callback
def _quiet(level: int, text: bytes, data: object) -> None:
    pass


if __name__ == "__main__":
    api.llama_log_set(_quiet, None)
    wanted = json.loads(sys.argv[1])
    tasks = {
        "speed": speed, "start": start, "adapters": adapters, "version": version,
        "device": device,
    }  # fmt: skip
    print(json.dumps(tasks[wanted["task"]](wanted)))
