"""From prompts to decisions: hidden states, calibration samples, fits with ties and thresholds, and checks of a router."""
