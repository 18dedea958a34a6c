"""``dropserve export``: the command line that turns a checkpoint into a verified bundle."""

import sys
from collections.abc import Sequence
from pathlib import Path

from dropserve.commandline import OneLineParser
from dropserve.export import bundle
from dropserve.export.pipeline import export
from dropserve.export.sites import ExportError
from dropserve.model import checkpoint


def build_parser(prog: str) -> OneLineParser:
    """Return the parser of ``export``."""
    parser = OneLineParser(prog, "Export a checkpoint as a verified bundle.")
    parser.add_argument("run", type=Path, help="directory of the checkpoint")
    parser.add_argument("--models", type=Path, required=True, help="folder of all bundles")
    parser.add_argument("--name", help="name of the model; default: name of the directory")
    parser.add_argument(
        "--half",
        action="store_true",
        help="compute in float16, for GPUs; the manifest records the loss of precision",
    )
    return parser


def command(arguments: Sequence[str], prog: str) -> int:
    """Run ``export`` with the arguments after its name; return the exit status."""
    args = build_parser(prog).parse_args(arguments)
    name = args.run.resolve().name if args.name is None else args.name
    try:
        place = export(args.run, args.models, name, half=args.half)
    except (checkpoint.CheckpointError, ExportError, bundle.BundleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {place}")
    return 0
