"""The bytes of models: where they come from, and GGUF read and written."""
