"""A published shape goes in; a model of that shape with random weights comes out."""
