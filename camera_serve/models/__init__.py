"""A config goes in; what its family calls router, experts and shared experts comes out."""

from camera_serve.models.structure import MoeStructure, Projection, describe

__all__ = ["MoeStructure", "Projection", "describe"]
