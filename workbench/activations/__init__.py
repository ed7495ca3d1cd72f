"""Reading and changing activations of a live model: sites of neurons, sets of them, texts, losses, and feed-forward layers as experts."""
