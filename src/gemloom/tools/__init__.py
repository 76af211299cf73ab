"""Offline work on files: converting, quantizing, adapters as files, measuring."""
