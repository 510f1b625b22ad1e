"""A machine with a GPU goes in; times of layers, servers and analysis there come out."""
