"""Adapters as files: merged into a model, extracted from one, written as PEFT has them."""
