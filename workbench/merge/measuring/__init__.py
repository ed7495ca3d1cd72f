"""What merge methods measure before the first tensor: Grams, losses, spectra."""
