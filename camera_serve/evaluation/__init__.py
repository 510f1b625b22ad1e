"""A compressed model and its original go in; what differs comes out."""
