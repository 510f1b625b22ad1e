"""A layer's activations go in; energies, their ranking, and what a plan selects come out."""
