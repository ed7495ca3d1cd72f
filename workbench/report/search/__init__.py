"""Reports of searches: their page and their Markdown."""
