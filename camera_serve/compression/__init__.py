"""A selection goes in; the tensors of a checkpoint come out, layer by layer."""
