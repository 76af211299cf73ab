"""Smaller files: types of tensors, importances, and what was lost."""
