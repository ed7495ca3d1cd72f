"""Implementation of the commands on bricks, facts and the machine, one file per command."""
