"""The command kit: options that commands share, what prints on the terminal, and errors of the system as messages.

The commands of the core, in `workbench/cli`, and those of parts stand on it.
"""
