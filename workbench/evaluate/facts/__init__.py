"""Facts as suites of lm-eval tasks: efficacy, paraphrases, neighbors, portability, generated answers, entropy and perplexity."""
