"""The C boundary: no other folder imports ggml-python or speaks ctypes."""

import os

# Before ggml is loaded. A thread that waits for the others spins this often before it sleeps:
# libgomp's own default starves whatever else runs on the same cores, another of its teams or
# OpenBLAS among it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
