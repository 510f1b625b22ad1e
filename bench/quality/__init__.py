"""A model and texts go in; what removal, quantization and ablations cost comes out."""
