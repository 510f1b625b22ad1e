"""What a ragged layer is: counts, rows, packed words, and their sum in plain torch."""
