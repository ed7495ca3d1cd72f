"""Reports of comparisons and searches: one offline HTML page, Markdown, and the result as JSON."""
