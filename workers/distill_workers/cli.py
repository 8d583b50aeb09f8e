"""`distill`: run, validate and report. Exit codes: 0 done, 1 invalid or failed, 75 try again, 78 configuration."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from distill_api.job import InvalidManifest, load_job, parse_job
from distill_api.wire import ExitCode, ProgressReport


def validate(args: argparse.Namespace) -> int:
    """Says what the API server would say, without one."""
    status = 0
    for path in args.file:
        try:
            job = load_job(path)
            print(f"{path}: DistillationJob {job.metadata.name} is valid")
        except InvalidManifest as error:
            status = 1
            for problem in error.problems:
                print(f"{path}: {problem}", file=sys.stderr)
    return status


def run(args: argparse.Namespace) -> int:
    """Runs a job on this machine."""
    from distill_workers.local_run import LocalRun, with_volumes

    load_job(args.file)
    manifest = with_volumes(yaml.safe_load(args.file.read_text()), dict(args.volume))
    local = LocalRun(parse_job(manifest))
    print(f"distill run: {local.job.metadata.name}, results and logs in {local.folder.root}", flush=True)
    code = local.run(progress_printer())
    report = local.exit_report()
    if code == ExitCode.DONE:
        from distill_workers.report import write_report

        write_report(local.folder.root, local.job)
        print(f"done: model {local.folder.model}, curve {local.folder.root / 'report.html'}")
    else:
        why = f"{report.reason.value}: {report.message}" if report else f"see {local.folder.root / 'logs'}"
        print(f"failed: {why}", file=sys.stderr)
    return code


def report(args: argparse.Namespace) -> int:
    """Draws the curve of a run folder again."""
    import json

    from distill_workers.report import write_report

    job = parse_job(json.loads((args.folder / "run.json").read_text())["job"])
    write_report(args.folder, job)
    print(args.folder / "report.html")
    return 0


def progress_printer() -> Callable[[ProgressReport], None]:
    """Prints a line for each new step or phase, and one for each new evaluation."""
    shown: set[str] = set()
    begin = time.monotonic()

    def show(report: ProgressReport) -> None:
        for line in (*evaluation_lines(report), progress_line(report)):
            if line not in shown:
                shown.add(line)
                print(f"[{time.monotonic() - begin:6.1f} s] {line}", flush=True)

    return show


def evaluation_lines(report: ProgressReport) -> list[str]:
    return [
        f"{'Evaluation':<10} step {e.step}: {e.name}, "
        + ", ".join(
            f"{what} {value}"
            for what, value in (("score", e.score), ("reverse KL", e.reverse_kl), ("teacher's score", e.teacher_score))
            if value is not None
        )
        for e in report.progress.evaluations
    ]


def progress_line(report: ProgressReport) -> str:
    p = report.progress
    parts = [f"{report.phase.value:<10} step {p.step}/{p.total_steps}"]
    if p.reverse_kl is not None:
        parts.append(f"reverse KL {p.reverse_kl}")
    if p.reward is not None:
        parts.append(f"reward {p.reward}")
    if p.estimated_remaining_seconds is not None and p.step < p.total_steps:
        parts.append(f"{p.estimated_remaining_seconds} s to go, {p.bottleneck} is slowest")
    return ", ".join(parts)


def volume(text: str) -> tuple[str, str]:
    mount, _, folder = text.partition("=")
    if not mount.startswith("/") or not folder:
        raise argparse.ArgumentTypeError(f"{text}: must be /MOUNT=FOLDER, such as /models=./models")
    return mount, str(Path(folder).expanduser().resolve())


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="distill", description="On-policy distillation.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    c = commands.add_parser("validate", help="check manifests, offline")
    c.add_argument("-f", "--file", type=Path, action="append", required=True)
    c.set_defaults(call=validate)
    c = commands.add_parser("run", help="run a job on this machine, without a cluster")
    c.add_argument("-f", "--file", type=Path, required=True)
    c.add_argument(
        "--volume",
        type=volume,
        action="append",
        default=[],
        help="/MOUNT=FOLDER: where a mounted volume of the job is here",
    )
    c.set_defaults(call=run)
    c = commands.add_parser("report", help="draw the curve of a run folder")
    c.add_argument("folder", type=Path)
    c.set_defaults(call=report)
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return int(args.call(args))
    except InvalidManifest as error:
        print("\n".join(error.problems), file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"distill: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
