"""Entry point of `workbench` and of `python -m workbench`."""

import gc


def main() -> None:
    """Run the command line."""
    # Imports create many objects that live until the end. Scanning them repeatedly costs 0.1 s at every start.
    gc.set_threshold(20_000, 10, 10)
    from workbench.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
