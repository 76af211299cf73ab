"""Gemloom."""
