"""Write a page about graded models: python -m studies.report out/compare/ctrl-500 out/run

A folder is a study of studies.sweep.compare, or a run that eval.rollout.ttf graded. The page
report.html embeds its figures, which are also written as PNG files.
"""

import sys
from pathlib import Path

from eval.command import command_parser
from studies.report.report import write_report
from studies.stats.records import AnalysisError


def main(argv: list[str]) -> int:
    parser = command_parser("studies.report", __doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="studies or graded runs")
    parser.add_argument("--out", type=Path, default=Path("out/report"), help="folder of the page")
    about = (
        "number of planned comparisons, including those not on the page; stars need p < 0.05 / N"
    )
    parser.add_argument("--comparisons", type=int, default=0, metavar="N", help=about)
    arguments = parser.parse_args(argv)
    try:
        if arguments.comparisons < 0:
            raise AnalysisError(f"--comparisons={arguments.comparisons}: must not be negative")
        print(write_report(arguments.folders, arguments.out, arguments.comparisons))
    except (AnalysisError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
