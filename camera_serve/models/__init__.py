"""What each model family calls its router, experts and shared experts."""

from camera_serve.models.structure import MoeStructure, Projection, describe

__all__ = ["MoeStructure", "Projection", "describe"]
