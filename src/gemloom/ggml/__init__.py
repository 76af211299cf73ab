"""The C boundary: no other folder imports ggml-python or speaks ctypes."""
