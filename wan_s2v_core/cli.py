"""The command line: `python -m wan_s2v_core COMMAND`.

Results go to stdout (with `--json` exactly one JSON object), logs to stderr. Exit 0: fine; 1: a check failed; 2: wrong
usage or unreadable input.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import WanS2VError

FINE, CHECK_FAILED, UNUSABLE = 0, 1, 2


def run_verify(options: argparse.Namespace) -> int:
    from .verify import verify

    results = verify(options.folder, options.device)
    passed = sum(result.passed for result in results)
    failed = len(results) - passed
    if options.json:
        cases = [result.to_dict() for result in results]
        print(
            json.dumps(
                {"device": options.device, "dtype": "float32", "cases": cases, "passed": passed, "failed": failed}
            )
        )
    else:
        for result in results:
            print(result.line())
        print(f"{passed} passed, {failed} failed")
    return CHECK_FAILED if failed else FINE


def run_inspect(options: argparse.Namespace) -> int:
    from .inspection import inspect_path, is_complete, render

    report = inspect_path(options.path)
    print(json.dumps(report) if options.json else render(report))
    return FINE if is_complete(report) else CHECK_FAILED


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m wan_s2v_core", description="Wan2.2-S2V: speech to video.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    common.add_argument("--verbose", action="store_true", help="log what is chosen, on stderr")

    check = commands.add_parser("verify", parents=[common], help="compare with golden tensors of the reference")
    check.add_argument("folder", type=Path, help="folder with golden cases, searched to any depth")
    check.add_argument("--device", default="cpu", help="torch device; the limits are for cpu (default)")
    check.set_defaults(run=run_verify)

    look = commands.add_parser("inspect", parents=[common], help="say what a weights file or folder is")
    look.add_argument("path", type=Path, help="weights file or checkpoint folder")
    look.set_defaults(run=run_inspect)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, stream=sys.stderr)
    try:
        return options.run(options)
    except WanS2VError as error:
        print(f"error: {error}", file=sys.stderr)
        if options.json:
            print(json.dumps({"error": str(error)}))
        return UNUSABLE
