"""Entry point of `python -m workbench`."""

from workbench.cli import main

main()
