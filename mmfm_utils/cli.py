"""The command line: `mmfm doctor`, `mmfm run`, `mmfm report`, `mmfm course`.

Exit codes: 0 all ran and agreed with what is expected; 1 something ran and failed or disagreed; 2 the request was
wrong; 130 interrupted.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

from . import UsageError, __version__, findings, machine, root, say


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong request is one line, like every other."""

    def error(self, message: str):
        raise UsageError(f"{message} (`{self.prog} --help` lists what there is)")


def parser() -> Parser:
    main = Parser(prog="mmfm", description=__doc__.splitlines()[0], allow_abbrev=False)
    main.add_argument("--version", action="version", version=__version__)
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("doctor", help="say what this machine can run", allow_abbrev=False)
    command.set_defaults(call=lambda args: machine.doctor())

    command = commands.add_parser("run", help="run notebooks, check them, build the report", allow_abbrev=False)
    command.add_argument("names", nargs="*", metavar="NAME", help="a name, the start of one, or a path; none: all")
    command.add_argument("-p", dest="parameters", action="append", default=[], metavar="parameter=value")
    command.add_argument("--profile", choices=findings.PROFILES, default="tiny")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--jobs", type=int, metavar="N", help="notebooks at once (else one a core, four at most)")
    command.add_argument("--executor", default="local", metavar="local|dask://HOST:PORT")
    command.add_argument("--resume", action="store_true", help="keep results that succeeded and are still current")
    command.add_argument("--results", metavar="DIR", help="instead of results/; the profile's folder is made in it")
    command.add_argument("--cell-timeout", type=int, default=1800, metavar="SECONDS")
    command.add_argument("--write", action="store_true", help="commit outputs and values (the tiny reference run only)")
    command.set_defaults(call=run)

    command = commands.add_parser("report", help="build the report anew, or compare two ledgers", allow_abbrev=False)
    command.add_argument("--results", metavar="DIR", help="instead of results/")
    command.add_argument("--compare", nargs=2, metavar=("OLD", "NEW"), help="two ledger.json, or folders that hold one")
    command.set_defaults(call=report)

    command = commands.add_parser("course", help="make, check and grade an nbgrader course", allow_abbrev=False)
    steps = command.add_subparsers(dest="step", required=True, metavar="STEP")
    step = steps.add_parser("build", help="write source/ and release/ of an nbgrader course", allow_abbrev=False)
    step.add_argument("folder", metavar="DIR")
    step.add_argument("names", nargs="*", metavar="NAME", help="a name, the start of one, or a path; none: all")
    step.set_defaults(call=build)
    step = steps.add_parser("check", help="prove that the exercises of notebooks work", allow_abbrev=False)
    step.add_argument("names", nargs="*", metavar="NAME", help="a name, the start of one, or a path; none: all")
    step.set_defaults(call=check)
    step = steps.add_parser("grade", help="grade what students handed in, a table and feedback", allow_abbrev=False)
    step.add_argument("submissions", metavar="SUBMISSIONS", help="a folder with STUDENT/NAME.ipynb")
    step.add_argument("names", nargs="*", metavar="NAME", help="a name, or the start of one; none: all")
    step.add_argument("--course", metavar="DIR", help="what `build` made (else the folder that holds SUBMISSIONS)")
    step.add_argument(
        "--cell-timeout", type=int, default=300, metavar="SECONDS", help="then a cell is interrupted (300)"
    )
    step.add_argument("--timeout", type=int, default=1800, metavar="SECONDS", help="for a submission (1800)")
    step.add_argument("--memory", type=int, default=4000, metavar="MB", help="for a submission (4000)")
    step.add_argument("--no-sandbox", action="store_true", help="run students' code as you, where nothing can be lost")
    step.add_argument("--again", action="store_true", help="also what was graded before")
    step.set_defaults(call=grade)
    return main


# Each command imports what it needs: the runner takes seconds to import, and `mmfm doctor` does without it.
def run(args) -> int:
    from . import runner

    options = {key: value for key, value in vars(args).items() if key not in ("command", "call")}
    if options["jobs"] is None:
        options["jobs"] = runner.usual_jobs(args.profile, args.write)
    return runner.run(**options)


def report(args) -> int:
    from . import runner

    if args.compare:
        say(f"Comparing {args.compare[0]} (old) with {args.compare[1]} (new); nothing is written")
        lines = runner.changes(*args.compare)
        say("\n".join(lines) or "nothing changed beyond tolerance")
        return 1 if lines else 0
    base = Path(args.results or root() / "results")
    folders = [base / profile for profile in findings.PROFILES if any((base / profile).glob("*.json"))]
    if not folders:
        raise UsageError(f"no results in {base}: make some with `mmfm run`, or name their folder with --results DIR")
    say(f"Building the report from {', '.join(map(str, folders))}")
    pages = [runner.show(folder) for folder in folders]
    for page in filter(None, pages):
        say(f"report: {page}")
    return 0 if all(pages) else 1


def build(args) -> int:
    from . import course

    say(f"Writing the course into {args.folder}")
    for path in course.build(args.folder, args.names):
        say(f"  {path}")
    say(f"Hand out {args.folder}/release; nbgrader run in {args.folder} collects and grades")
    return 0


def check(args) -> int:
    from . import runner
    from .course import exercises

    paths, bad = runner.select(args.names), 0
    say(f"Checking the exercises of {len(paths)} notebooks; nothing is written")
    for path in paths:
        begun, nb, wrong = time.perf_counter(), runner.read(path), exercises.wrong_answers(path.stem)
        found = exercises.check(path)
        bad += bool(found)
        counts = f"{len(exercises.exercises(nb))} exercises, {sum(map(len, wrong.values()))} wrong answers"
        told = f"{len(found)} complaints" if found else "as they should be"
        say(f"{path.stem}: {counts}, {told} ({time.perf_counter() - begun:.0f} s)")
        for complaint in found:
            say(f"  {complaint}")
    return 1 if bad else 0


def grade(args) -> int:
    from . import grading

    limits = grading.Limits(args.cell_timeout, args.timeout, args.memory)
    return grading.grade(args.submissions, args.names, args.course, limits, not args.no_sandbox, args.again)


def main(argv: list[str] | None = None) -> int:
    begun = time.perf_counter()
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a sign gets its code, not a traceback
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell has switched SIGINT off
            signal.signal(number, signal.default_int_handler)
        args, rest = parser().parse_known_args(argv)
        if args.command == "run" and not any(word.startswith("-") for word in rest):
            args.names += rest  # names may also follow options
        elif rest:
            parser().error(f"unrecognized arguments: {' '.join(rest)}")
        code = args.call(args)
        if args.command != "run":  # whose last line says where the report is
            say(f"{args.command} took {time.perf_counter() - begun:.1f} s")
        return code
    except UsageError as error:
        print(f"mmfm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mmfm: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
