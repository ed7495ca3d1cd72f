"""The ground holds what every other folder uses: errors, files, documents, results, the project, trust and the net. It imports none of them."""
