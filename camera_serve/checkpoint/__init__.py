"""Tensors, layout and recipe go in; the folder on disk comes out, and back."""
