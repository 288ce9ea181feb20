"""`python -m bench NAME [options]`: measurements, never part of the tests. `python -m bench --help` lists them."""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from bench.report import Unable

# Name -> module. Each has a docstring, `add_arguments(parser)` and `run(arguments) -> exit code`.
COMMANDS = {
    "decode": "decode",
    "prefill": "prefill",
    "vision": "vision",
    "pair": "pair",
    "same-answer": "same_answer",
    "load": "load",
    "startup": "startup",
    "mixed": "mixed",
    "http": "http_overhead",
    "pictures": "picture_soak",
    "memory": "memory",
    "snapshot": "snapshot",
    "bars": "bars",
}


def main(argv: list[str] | None = None) -> int:
    """:return: 0; 1 if requests failed; 2 if it could not be measured; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="NAME")
    run: Callable[[argparse.Namespace], int] | None = None
    for name, module_name in COMMANDS.items():
        text = _docstring(module_name)
        command = commands.add_parser(name, help=text.partition("\n\n")[0], description=text)
        if argv[:1] == [name]:
            # Only what is asked for is imported: a load's client has no use for torch, nor for its memory.
            module = importlib.import_module(f"bench.{module_name}")
            module.add_arguments(command)
            run = module.run
    arguments = parser.parse_args(argv, argparse.Namespace(argv=argv))
    assert run is not None  # the parser ends the program for any other name
    try:
        return run(arguments)
    except Unable as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _docstring(module_name: str) -> str:
    source = (Path(__file__).parent / f"{module_name}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""


if __name__ == "__main__":
    sys.exit(main())
