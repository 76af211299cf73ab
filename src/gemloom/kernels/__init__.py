"""Matrix products of our own, where they are faster than ggml's: docs/kernels.md.

``native/`` is C++, ``build.py`` compiles it, ``library.py`` is its one caller.
"""
