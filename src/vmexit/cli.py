"""The ``vmexit`` command: run, attach, watch, host, record, report, eval, msr, demo, doctor."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmexit import command_line
from vmexit.command_line import DEFAULT_QEMU, TARGETS
from vmexit.errors import CommandError, UsageError, VmexitError

if TYPE_CHECKING:
    from vmexit.console.run import GivenCommand

USAGE_STATUS = 2
FAILED_STATUS = 1
INTERRUPTED_STATUS = 130
BROKEN_PIPE_STATUS = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the command line says; gives the exit status."""
    _occupy_standard_descriptors()
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except UsageError as error:
        return _failed(error, USAGE_STATUS)
    except VmexitError as error:
        return _failed(error, FAILED_STATUS)
    except KeyboardInterrupt:
        return INTERRUPTED_STATUS
    except BrokenPipeError:
        return _broken_pipe()
    except SystemExit as error:
        # argparse's own, after --help; or a signal's.
        if (number := getattr(error, "signal", None)) is not None:
            _failed(VmexitError(f"ended by {number.name}"), 0)
        return error.code if isinstance(error.code, int) else 0
    except Exception as error:
        return _failed(_unexpected(error), FAILED_STATUS)


def _main(argv: list[str]) -> int:
    split = argv.index("--") if "--" in argv else len(argv)
    options, rest = argv[:split], argv[split + 1 :] if split < len(argv) else None
    parsed = _parsed(options, has_rest=rest is not None)
    if parsed.version:
        from importlib.metadata import version

        print(f"vmexit {version('vmexit')}")
        return 0
    target = parsed.target if parsed.action == "record" else parsed.action
    if rest is not None and target != "run":
        raise UsageError("only 'vmexit run' takes arguments behind --")
    if target in TARGETS:
        return _on_target(parsed, target, rest)
    match parsed.action:
        case "record":
            raise UsageError("what is to be recorded? run, attach, watch or host (see vmexit record --help)")
        case "report":
            return _report(parsed)
        case "eval":
            from vmexit.script.evaluate import main_eval

            return main_eval(parsed)
        case "msr":
            return _msr(parsed.words)
        case "demo":
            from vmexit import demo

            return demo.run(parsed.kernel, parsed.record)
        case "doctor":
            from vmexit.setup import doctor

            results = doctor.checks(parsed.qemu)
            print(doctor.render(results), flush=True)
            return FAILED_STATUS if any(check.ok is False for check in results) else 0
        case _:
            raise UsageError(
                "what to do? run, attach, watch, host, record, report, eval, msr, demo or doctor (see vmexit --help)"
            )


def _parsed(options: list[str], *, has_rest: bool) -> argparse.Namespace:
    """``has_rest``: there are arguments behind --, which are a machine's that is to be started."""
    parser = command_line.parser(options[0] if options else "")
    parsed, unknown = parser.parse_known_args(options)
    if not unknown and parsed.action == "record" and parsed.target is None and has_rest:
        parsed, unknown = parser.parse_known_args([*options, "run"])
    if unknown:
        hint = "; QEMU's own arguments come behind --" if "run" in (parsed.action, getattr(parsed, "target", None)) else ""
        raise UsageError(f"unrecognized: {' '.join(unknown)}{hint} (see vmexit --help)")
    return parsed


def _on_target(parsed: argparse.Namespace, target: str, rest: list[str] | None) -> int:
    """A session: run, attach, watch or host, by itself or for ``record``."""
    options: dict[str, Any] = {}
    if parsed.action == "record":
        from vmexit.console.record import RecordTo

        if parsed.output is None:
            raise UsageError("where is the recording to go? vmexit record -o FILE ... (see vmexit record --help)")
        options["record"] = RecordTo(parsed.output, parsed.seconds)
    if target == "run":
        if rest is None:
            raise UsageError("QEMU's arguments are missing: vmexit run [options] -- QEMU ARGUMENTS")
        if parsed.vmm is not None and parsed.qemu != DEFAULT_QEMU:
            raise UsageError("--vmm and --qemu: one of them is started, not both")
        return _run(parsed, arguments=rest, qemu=parsed.qemu, accelerator=parsed.accel, vmm=parsed.vmm, **options)
    if target == "host":
        return _run(parsed, watch=True, **options)
    pid = _chosen(only_kvm=target == "watch") if parsed.pid is None else parsed.pid
    return 0 if pid is None else _run(parsed, pid=pid, watch=target == "watch", **options)


def _report(parsed: argparse.Namespace) -> int:
    from vmexit.console import report

    if parsed.html is not None and (parsed.traps or parsed.all):
        raise UsageError("--html writes a page; --all and --traps are about what is shown here")
    if parsed.html is not None:
        report.write_page(parsed.file, parsed.html)
    elif parsed.traps:
        report.show_traps(parsed.file)
    else:
        report.show_tables(parsed.file, everything=parsed.all)
    return 0


def _msr(words: list[str]) -> int:
    from vmexit.commands import msr_explain
    from vmexit.commands.command import Arguments
    from vmexit.commands.tokens import words_of

    if not words:
        print(msr_explain.overview(), flush=True)
        return 0
    try:
        print(msr_explain.explanation(Arguments(" ".join(("msr", *words)), words_of(("msr", *words)))), flush=True)
    except CommandError as error:
        raise UsageError(str(error)) from None
    return 0


def _chosen(*, only_kvm: bool = False) -> int | None:
    """Lists the machines, or just KVM's; the process number that a person has chosen, None where nobody can, or nothing is."""
    from vmexit.targets.attach import machines

    found = [machine for machine in machines() if machine.kvm or not only_kvm]
    if not found:
        others = "" if only_kvm else ", or that vmexit was in"
        raise VmexitError(f"there is no virtual machine here that KVM runs{others} (other users' are not seen)")
    print(f"{'PID':>8}  {'NAME':24}  {'VCPUS':>5}  {'MEMORY':>9}")
    for machine in found:
        vcpus = str(machine.vcpus) if machine.vcpus else "?"
        how = "" if machine.kvm else "  (emulated, with the agent)"
        print(f"{machine.pid:>8}  {machine.name:24.24}  {vcpus:>5}  {machine.memory >> 20:>6} MB{how}", flush=True)
    if not (os.isatty(0) and os.isatty(1)):
        return None
    try:
        typed = input(f"{'watch' if only_kvm else 'attach to'} which PID? ").strip()
    except EOFError:
        return None
    return _pid_typed(typed) if typed else None


def _pid_typed(text: str) -> int:
    try:
        return command_line.pid(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(str(error)) from None


def _run(parsed: argparse.Namespace, **options: Any) -> int:
    from vmexit.console.run import Options, run
    from vmexit.console.screen import OutputGoneError
    from vmexit.guest.system import Help

    for path in (parsed.image, parsed.system_map, parsed.pdb):
        if path is not None and not path.is_file():
            raise UsageError(f"there is no file {path}")
    everything = [*(getattr(parsed, "given_before", None) or []), *(parsed.given or [])]
    commands = [command for kind, value in everything for command in _given(kind, value)]
    batch = parsed.action == "record" or parsed.batch
    try:
        given = Help(parsed.image, parsed.system_map, parsed.pdb)
        return run(Options(commands=commands, batch=batch, given=given, recognises=not parsed.no_recognition, **options))
    except OutputGoneError as gone:
        if isinstance(gone.error, BrokenPipeError):
            return _broken_pipe()
        raise VmexitError(f"standard output: {gone.error.strerror}") from None


def _given(kind: str, value: str) -> list[GivenCommand]:
    """The commands of one -x or --script."""
    from vmexit.commands.tokens import commands_of
    from vmexit.console.run import GivenCommand

    if kind == "x":
        return [GivenCommand(text, "-x") for _, text in commands_of(value.split("\n"))]
    try:
        text = Path(value).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"--script {value}: {error.strerror}") from None
    return [GivenCommand(command, value, line) for line, command in commands_of(text.split("\n"))]


def _failed(error: VmexitError, status: int) -> int:
    with contextlib.suppress(OSError):
        print(f"vmexit: {error}", file=sys.stderr, flush=True)
    return status


def _unexpected(error: Exception) -> VmexitError:
    """A mistake of ours, in one line with the place where it came out."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})" if trace else ""
    return VmexitError(f"internal error: {type(error).__name__}: {error}{place}")


def _broken_pipe() -> int:
    # Python writes out what it still has for standard output when it ends; nobody wants it.
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return BROKEN_PIPE_STATUS


def _occupy_standard_descriptors() -> None:
    """Where one of the three is closed, a socket of ours would get its number, and the output would go into it."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
