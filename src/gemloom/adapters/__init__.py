"""LoRA adapters: reading and checking their files, and keeping them while requests run."""
