"""`python -m bench NAME [options]`: measurements, never part of the tests. `python -m bench --help` lists them."""

from __future__ import annotations

import argparse
import sys

from bench import http_overhead, picture_soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    http_overhead.add_arguments(commands.add_parser("http", help=http_overhead.__doc__))
    picture_soak.add_arguments(commands.add_parser("pictures", help=picture_soak.__doc__))
    arguments = parser.parse_args()
    run = {"http": http_overhead.run, "pictures": picture_soak.run}[arguments.command]
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
