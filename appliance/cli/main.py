"""The command ``appliance``: analyze, demo, serve and the tools of the technician. Errors are handled once, in ``main``."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Final

from appliance import __version__
from appliance.cli import audit, keys, models, studies, tls, tune, user, wipe
from appliance.cli.terminal import UsageError, explain, say
from appliance.core.errors import ApplianceError
from appliance.core.process import limit_memory, make_data_dir, start_logging
from appliance.core.settings import Settings
from model_sync import messages
from model_sync.messages import choose_language

if TYPE_CHECKING:
    from appliance.cli.analyze import Analysed

EXIT_OK: Final = 0
EXIT_ERROR: Final = 1
EXIT_USAGE: Final = 2
EXIT_FAILED: Final = 3
EXIT_NOTHING: Final = 4
_USAGE_CODES: Final = ("settings.invalid", "settings.missing", "box.busy", "box.port", "box.none", "model.precision")
_VIEWS: Final = {"frontal": "", "PA": "PA", "AP": "AP", "lateral": "LL"}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 error, 2 usage, 3 some scan failed, 4 nothing found or analysed)."""
    arguments = _parser().parse_args(argv)
    start_logging(os.environ.get("APPLIANCE_LOG_LEVEL", "INFO"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the terminal cannot show becomes a question mark
        sys.stdout.reconfigure(errors="replace")
    os.umask(0o077)  # files with patient data must be readable by the owner only
    command: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return command(arguments)
    except UsageError as error:
        return _print_error(error.what, error.hint, EXIT_USAGE)
    except ApplianceError as error:
        return _print_error(explain(error.code, error.detail), _hint(error), EXIT_USAGE if error.code in _USAGE_CODES else EXIT_ERROR)
    except BrokenPipeError:
        return EXIT_ERROR
    except OSError as error:
        what = f"{error.strerror or type(error).__name__}" + (f": {error.filename}" if error.filename else "")
        what = what if choose_language() == "en" else explain("store.failed", what)  # the system's own text is English
        return _print_error(what, messages.hint("store.failed", choose_language(), "technician"), EXIT_USAGE)
    except KeyboardInterrupt:
        return 130


def _print_error(what: str, hint: str, exit_code: int) -> int:
    print(messages.error_lines(what, hint, choose_language()), file=sys.stderr)
    return exit_code


def _hint(error: ApplianceError) -> str:
    """Return the hint of an error for the command line, where nothing is sent; a hint of its own exists in English only."""
    language = choose_language()
    is_own_hint = error.hint != messages.hint(error.code, "en")
    return error.hint if is_own_hint and language == "en" else messages.hint(error.code, language, "technician")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="appliance", description="Edge inference box: scans in, localised findings out, offline.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, *, data_dir: bool = True, aliases: Sequence[str] = ()
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        for alias in aliases:  # deprecated names: accepted, but not listed in the help
            commands.choices[alias] = sub
        if data_dir:
            sub.add_argument("--data-dir", type=Path, required=True, help="the box's data directory")
        sub.set_defaults(run=run)
        return sub

    analyze = command("analyze", _analyze, "Analyse files, folders or ZIP archives without a server.", data_dir=False)
    analyze.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    analyze.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    analyze.add_argument("--data-dir", type=Path, help="keep everything in this data directory (default: a temporary one)")
    analyze.add_argument("--view", choices=_VIEWS, default="frontal", help="view of PNG and JPEG pictures (default: frontal)")
    analyze.add_argument(
        "--require-analysed", action="store_true", help="exit with 4 when no scan at all was analysed, not only when no file was found"
    )
    command("serve", _serve, "Run the box: worker, DICOM receiver and web page under one supervisor.")
    worker = command("worker", _worker, "Run the worker alone.")
    worker.add_argument("--until-idle", action="store_true", help="stop when nothing is left to do")
    command("send-audit", _send_audit, "Send the audit to the syslog server alone.")
    command("receive", _receive, "Run the DICOM receiver alone.")
    studies.add_arguments(command("studies", studies.run, "List the studies of this box with their patients, states and findings."))
    models.add_arguments(command("models", models.run, "List the models of this box, activate one, roll back, or show the history."))
    self_test = command("self-test", models.run_self_test, "Self-test a model (started by the box itself).", aliases=("prove",))
    models.add_self_test_arguments(self_test)
    tune.add_arguments(command("tune", tune.run, "Measure the candidates of the active models, or show the last measurement."))
    urgent = command("urgent", _urgent, "STAT: analyse the waiting images of a study before everything else.")
    urgent.add_argument("study", help="the study's accession number, Study Instance UID or number on this box")
    urgent.add_argument("--undo", action="store_true", help="cancel it: the study is no longer first")
    user.add_arguments(command("user", user.run, "List accounts, create, disable or enable one, change its role, password or sessions."))
    audit.add_arguments(command("audit", audit.run, "Verify the audit, print it, or acknowledge what was found."))
    keys.add_arguments(command("keys", keys.run, "Check the keys of the box, copy them into escrow, restore them.", data_dir=False))
    wipe.add_arguments(command("wipe", wipe.run, "Destroy the keys and all data of a box that leaves the clinic; two persons approve it."))
    tls.add_arguments(command("tls", tls.run, "Show the certificates of the box: names, end, who trusts them."))
    command("settings", _settings, "Print every setting with its value and meaning.")
    demo = command("demo", _demo, "Create a demo box, start it and analyse sample scans.")
    demo.add_argument("--samples", type=Path, required=True, help="folder of sample scans")
    demo.add_argument("--data", type=Path, help="a folder of your own scans, analysed first")
    demo.add_argument("--once", action="store_true", help="stop the box and exit when the scans are analysed")
    demo.add_argument("--lan", action="store_true", help="serve the local network over TLS with a self-signed certificate")
    demo.add_argument("--new-password", action="store_true", help="give the demo account a new one-time password")
    return parser


def _analyze(arguments: argparse.Namespace) -> int:
    from appliance.cli.analyze import print_table

    _check_paths(arguments.paths, say("check the path; nothing was analysed"))
    logging.getLogger().setLevel(logging.ERROR)  # refusals are in the result; the log would repeat them
    data = arguments.data_dir
    with nullcontext(data) if data else tempfile.TemporaryDirectory(prefix="appliance-") as data_dir:
        results = _analyse_in(arguments, Path(data_dir))
    if arguments.json:
        print(json.dumps([item.to_json() for item in results], ensure_ascii=False, indent=1))
    elif results:
        print_table(results)
    if not results:
        print(say("no file was found in {paths}", paths=", ".join(map(str, arguments.paths))), file=sys.stderr)
        return EXIT_NOTHING
    if arguments.require_analysed and not any(item.status == "analysed" for item in results):
        return EXIT_NOTHING
    return EXIT_FAILED if any(item.status == "failed" for item in results) else EXIT_OK


def _check_paths(paths: Sequence[Path], hint: str) -> None:
    """Raise UsageError where some of these paths do not exist."""
    if missing := ", ".join(str(path) for path in paths if not path.exists()):
        raise UsageError(messages.text("word.no_path", choose_language(), paths=missing), hint)


def _analyse_in(arguments: argparse.Namespace, data_dir: Path) -> list[Analysed]:
    from appliance.cli.analyze import analyse
    from appliance.core.domain import PictureForm
    from appliance.store.store import Store

    if not data_dir.is_file():  # a settings file contains the path of its data directory
        make_data_dir(data_dir)
    # These files must not wait for a measurement; a box that is started here later measures when it is idle.
    settings = Settings.load(data_dir, tune_at_activation=False)
    limit_memory(settings.process_memory_max_bytes)
    with closing(Store(settings)) as store:
        form = PictureForm(view=_VIEWS[arguments.view])
        return analyse(store, arguments.paths, form, lambda line: print(line, file=sys.stderr), data_dir)


def _serve(arguments: argparse.Namespace) -> int:
    from appliance.service.supervisor import serve

    serve(arguments.data_dir)
    return EXIT_OK


def _worker(arguments: argparse.Namespace) -> int:
    from appliance.inference.worker import run

    settings = Settings.load(arguments.data_dir)
    limit_memory(settings.process_memory_max_bytes)
    run(settings, until_idle=arguments.until_idle)
    return EXIT_OK


def _receive(arguments: argparse.Namespace) -> int:
    from appliance.dicom.receiver import run

    run(Settings.load(arguments.data_dir))
    return EXIT_OK


def _send_audit(arguments: argparse.Namespace) -> int:
    from appliance.service.audit_sender import run

    run(Settings.load(arguments.data_dir))
    return EXIT_OK


def _urgent(arguments: argparse.Namespace) -> int:
    from appliance.core.wakeup import wake
    from appliance.store.store import open_box

    with closing(open_box(arguments.data_dir)) as store:
        studies = store.queue.find_studies(arguments.study)
        change = store.queue.make_routine if arguments.undo else store.queue.make_urgent
        concerned = sum(change(number, "cli", "cli") or 0 for number in studies)
        standing = {store.queue.study_progress(number) for number in studies}
        wake(store.settings)
    if arguments.undo:
        print(say("{count} no longer first", count=concerned))
    elif concerned:
        print(say("{count} will be analysed first", count=concerned))
    elif "waits" in standing:
        print(say("nothing more is brought forward: it is first already, or once all images are here"))
    else:
        print(say("nothing waits; that does not mean that it was analysed"))
    return EXIT_OK


def _settings(arguments: argparse.Namespace) -> int:
    settings = Settings.load(arguments.data_dir)
    for name, field in Settings.model_fields.items():
        print(f"# {field.description}\n{name} = {json.dumps(getattr(settings, name), default=str)}")
    return EXIT_OK


def _demo(arguments: argparse.Namespace) -> int:
    from appliance.cli.demo import run

    _check_paths([path for path in (arguments.data, arguments.samples) if path], say("check the path; nothing was started"))
    return run(
        arguments.data_dir, arguments.samples, arguments.data, once=arguments.once, lan=arguments.lan, new_password=arguments.new_password
    )
