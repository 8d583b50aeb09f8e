"""`distill`: run, validate, evaluate and report.

Exit codes: 0 done, 1 invalid or failed, 75 stopped or try again, 78 configuration, 130 ended by a second Ctrl-C.
"""

import argparse
import sys
from pathlib import Path

from distill_api.job import InvalidManifest, load_job, parse_job
from distill_api.manifest import read_manifest
from distill_api.wire import ExitCode


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
    from rich.console import Console

    from distill_workers.console import view
    from distill_workers.local_run import INTERRUPTED, LocalRun, with_volumes
    from distill_workers.overrides import with_overrides
    from distill_workers.report import write_report

    load_job(args.file)
    manifest = with_overrides(read_manifest(args.file.read_text(encoding="utf-8")), args.set)
    parse_job(manifest)
    local = LocalRun(parse_job(with_volumes(manifest, dict(args.volume))))
    local.claim(args.resume)
    print(f"distill run: {local.job.metadata.name}, results and logs in {local.folder.root}", flush=True)
    with view(Console(), local.folder.root / "metrics.jsonl") as shown:
        code = local.run(shown.show, shown.say)
    report = local.exit_report()
    if (local.folder.root / "metrics.jsonl").exists():
        write_report(local.folder.root, local.job)
    if code == ExitCode.DONE:
        if report and report.final and report.final.result and report.final.result.stopped_by:
            print(report.message)
        print(f"done: model {local.folder.model}, curve {local.folder.root / 'report.html'}")
    elif code == INTERRUPTED:
        print("ended at once; --resume goes on from the newest checkpoint, if there is one", file=sys.stderr)
    elif local.interrupts:
        newest = local.folder.latest_checkpoint()
        kept = f"at step {newest[1]['step']}; --resume goes on from there" if newest else "before the first step"
        print(f"stopped {kept}", file=sys.stderr)
    else:
        why = f"{report.reason.value}: {report.message}" if report else f"see {local.folder.root / 'logs'}"
        print(f"failed: {why}", file=sys.stderr)
    return code


def evaluate(args: argparse.Namespace) -> int:
    """Measures a model as a run of the job would."""
    import asyncio
    import dataclasses
    import json

    from rich.console import Console

    from distill_workers.engine import EngineUnavailable
    from distill_workers.evaluate import evaluate, table
    from distill_workers.failures import Failure
    from distill_workers.local_run import with_volumes
    from distill_workers.server import ServerFailed
    from distill_workers.teacher import TeacherUnreachable

    load_job(args.file)
    spec = parse_job(with_volumes(read_manifest(args.file.read_text()), dict(args.volume))).spec
    try:
        measured = asyncio.run(evaluate(spec, args.model, args.evaluation, args.teacher))
    except (Failure, EngineUnavailable, ServerFailed, TeacherUnreachable) as error:
        print(f"distill: {error}", file=sys.stderr)
        return 1
    if args.output == "json":
        found = [dataclasses.asdict(m) for m in measured]
        print(json.dumps({"model": args.model, "evaluations": found}, indent=1))
    else:
        Console().print(table(args.model, measured))
    return 0


def report(args: argparse.Namespace) -> int:
    """Draws the curve of a run folder again."""
    import json

    from distill_workers.report import write_report

    job = parse_job(json.loads((args.folder / "run.json").read_text())["job"])
    write_report(args.folder, job)
    print(args.folder / "report.html")
    return 0


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
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="another value than the file's, such as spec.schedule.steps=10 or spec.evaluation.math500.maxPrompts=8",
    )
    c.add_argument("--resume", action="store_true", help="go on with the run that the folder holds")
    c.add_argument(
        "--volume",
        type=volume,
        action="append",
        default=[],
        help="/MOUNT=FOLDER: where a mounted volume of the job is here",
    )
    c.set_defaults(call=run)
    c = commands.add_parser("evaluate", help="measure a model by the evaluations of a job")
    c.add_argument("--model", required=True, help="folder of the model, such as a run's model/, or a hub id")
    c.add_argument("-f", "--file", type=Path, required=True, help="the job")
    c.add_argument("--evaluation", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    c.add_argument(
        "--teacher",
        nargs="?",
        const="here",
        metavar="HOST:PORT",
        help="measure the reverse KL too, with the teacher served on this machine, or by one that already serves",
    )
    c.add_argument("--volume", type=volume, action="append", default=[], help="/MOUNT=FOLDER, as of run")
    c.add_argument("--output", choices=["table", "json"], default="table")
    c.set_defaults(call=evaluate)
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
