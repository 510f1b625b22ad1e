"""Codes for micro-experts: the grid of a group, the solver that chooses them, their packing."""
