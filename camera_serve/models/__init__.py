"""A config goes in; what its family calls things, and how originals store them, comes out."""

from camera_serve.models.structure import MoeStructure, Projection, describe

__all__ = ["MoeStructure", "Projection", "describe"]
