"""What every folder stands on: errors, files and documents, results, the project, what may run, the net. It imports no other folder."""
