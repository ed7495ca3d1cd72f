"""The parts of a comparison: differences with verdicts, configurations, changed items, warnings."""
