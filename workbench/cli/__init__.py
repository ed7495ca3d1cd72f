"""The command line.

A process imports the file of the command that it runs, and no other. Commands import heavy libraries in their bodies, so that `--help`,
which imports all of them, loads no torch.
"""
