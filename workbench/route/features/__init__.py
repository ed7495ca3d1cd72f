"""What routers see of a prompt: pooled hidden states with their statistics, n-grams of its text, losses under each brick."""
