"""From scores to decisions: fitted routers, ties, thresholds, calibration copies and the record of a fit."""
