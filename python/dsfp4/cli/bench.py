"""`dsfp4 bench`: measurements of this machine, one subcommand each."""

import argparse

from dsfp4.cli import bench_decode, bench_storage


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the group of subcommands."""
    parser = commands.add_parser("bench", help="measure this machine", allow_abbrev=False)
    group = parser.add_subparsers(title="measurements", metavar="WHAT", required=True)
    bench_storage.add_command(group)
    bench_decode.add_command(group)
