"""llama.cpp's perplexity of a text and the mean squares its products meet, by its own library.

    .venv-peer/bin/python benchmarks/quality_peer.py MODEL FILE [--context N] [--windows N]

Counts as its llama-perplexity and llama-imatrix do. Prints one JSON object: perplexity, its
standard error, tokens, and by matrix the mean over all its columns of the squares of what met it.
Runs in the environment that ``make bench`` compiles; must not import gemloom.
"""

import argparse
import ctypes
import json
import sys
from pathlib import Path

import llama_cpp as api
import numpy as np

MUL_MAT = 29  # ggml's number of the operation, in the version that llama-cpp-python 0.3.36 has
F32 = 0
_Ask = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)


class Tensor(ctypes.Structure):
    """ggml_tensor, as far as it is read here."""


Tensor._fields_ = [
    ("type", ctypes.c_int), ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10), ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t), ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64),
]  # fmt: skip


class Peer:
    """A loaded model that computes a window at a time."""

    def __init__(self, path: str, context: int) -> None:
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not self.model:
            sys.exit(f"error: llama.cpp cannot load {path}")
        self.squares: dict[str, np.ndarray] = {}
        self._seen = _Ask(self._on_tensor)  # kept alive as long as the context
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.cb_eval = ctypes.cast(self._seen, type(params.cb_eval))
        self.context = api.llama_init_from_model(self.model, params)
        self.batch, self.size = api.llama_batch_init(context, 0, 1), context
        self.vocabulary = api.llama_model_get_vocab(self.model)
        self.n_vocab = api.llama_vocab_n_tokens(self.vocabulary)

    def tokens(self, text: bytes) -> list[int]:
        """With BOS; one newline at the end does not count."""
        text = text.removesuffix(b"\n")
        buffer = (api.llama_token * (len(text) + 1))()
        n = api.llama_tokenize(self.vocabulary, text, len(text), buffer, len(buffer), True, False)
        return list(buffer[:n])

    def losses(self, window: list[int]) -> list[float]:
        """Of the second half of a window, which begins with BOS, whatever it is given."""
        window = [api.llama_vocab_bos(self.vocabulary), *window[1:]]
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        self.batch.n_tokens = self.size
        for i, token in enumerate(window):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, i, True
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
        if api.llama_decode(self.context, self.batch):
            sys.exit("error: llama.cpp cannot compute a window")
        return [self._loss(i, window[i + 1]) for i in range(self.size // 2, self.size - 1)]

    def _loss(self, row: int, token: int) -> float:
        logits = api.llama_get_logits_ith(self.context, row)
        wide = np.ctypeslib.as_array(logits, (self.n_vocab,)).astype(np.float64)
        return float(np.log(np.exp(wide - wide.max()).sum()) + wide.max() - wide[token])

    def _on_tensor(self, pointer: int, ask: bool, _data: int) -> bool:
        """Wanted, and then summed: the second operand of every product with a weight."""
        made = ctypes.cast(pointer, ctypes.POINTER(Tensor)).contents
        if made.op != MUL_MAT:
            return not ask
        name, x = made.src[0].contents.name.decode(), made.src[1].contents
        if not name.endswith(".weight") or x.type != F32:
            return not ask
        if not ask:
            address = ctypes.cast(x.data, ctypes.POINTER(ctypes.c_float))
            rows = np.ctypeslib.as_array(address, (x.ne[1], x.ne[0])).astype(np.float64)
            self.squares[name] = self.squares.get(name, 0) + (rows**2).sum(axis=0)
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description="llama.cpp's perplexity and mean squares.")
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=2)
    options = parser.parse_args()
    peer = Peer(options.model, options.context)
    ids = peer.tokens(options.text.read_bytes())
    count = min(options.windows, len(ids) // options.context)
    windows = [ids[i * options.context : (i + 1) * options.context] for i in range(count)]
    losses = np.array([loss for window in windows for loss in peer.losses(window)])
    perplexity, rows = float(np.exp(losses.mean())), count * options.context
    squares = {name: float(sums.mean() / rows) for name, sums in sorted(peer.squares.items())}
    error = perplexity * float(losses.std() / np.sqrt(len(losses) - 1))
    found = {"perplexity": perplexity, "error": error, "tokens": len(losses)}
    print(json.dumps(found | {"windows": count, "mean_squares": squares}))


if __name__ == "__main__":
    main()
