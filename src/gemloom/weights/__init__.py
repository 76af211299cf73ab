"""A file's tensors as ggml tensors."""
