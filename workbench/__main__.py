"""Entry point of `python -m workbench`."""

from workbench.cli.__main__ import main

if __name__ == "__main__":
    main()
