"""`dsfp4 bench`: measurements of this machine, one module each."""

import argparse

from dsfp4.cli import bench_decode, bench_kernels, bench_storage


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command group."""
    parser = commands.add_parser(
        "bench",
        help="measure this machine",
        description="Measures what this machine reaches.",
        examples=("dsfp4 bench kernels --quick",),
    )
    measurements = parser.add_subparsers(title="measurements", metavar="WHAT", required=True)
    for measurement in (bench_kernels, bench_storage, bench_decode):
        measurement.add_command(measurements)
