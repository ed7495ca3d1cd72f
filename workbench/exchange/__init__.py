"""Take in scores from elsewhere: samples of lm-eval, and the stores of other projects and machines."""
