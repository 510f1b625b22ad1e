"""Text goes in; token windows, and what every layer of the model is given of them, come out."""
