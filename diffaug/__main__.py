"""python -m diffaug report [group=choice] [key=value ...]: what a recipe is, in numbers, before it is trained.

report            the schedule at several times, terminal SNR, prior KL, and what times and weight train on
report --all      every schedule of the package, a line each
"""

import argparse
import sys
from collections.abc import Sequence

from diffaug import report
from diffaug.config import composed, made, schedule_names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    parser = argparse.ArgumentParser(
        "python -m diffaug", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("report", help="a recipe in numbers")
    one.add_argument("--all", action="store_true", help="every schedule, a line each")
    one.add_argument("overrides", nargs="*", help="group=choice and key=value, as for train.py")
    options = parser.parse_args(arguments)
    if options.all:
        print(
            report.table(
                {name: made(composed([*options.overrides, f"schedule={name}"]).schedule) for name in schedule_names()}
            )
        )
    else:
        print(report.page(made(composed(options.overrides).process)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
