"""The ``vmexit`` command: run, attach, watch, host, eval, msr, demo, doctor."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from vmexit.errors import CommandError, UsageError, VmexitError

if TYPE_CHECKING:
    from vmexit.console.run import GivenCommand

USAGE_STATUS = 2
FAILED_STATUS = 1
INTERRUPTED_STATUS = 130
BROKEN_PIPE_STATUS = 141

_DEFAULT_QEMU = "qemu-system-x86_64"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class _Given(argparse.Action):
    """Keeps -x and --script in the order in which they were given."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.given = [*(namespace.given or []), (self.dest, values)]


def _parser(action: str) -> argparse.ArgumentParser:
    """``action``: the first word of the command line."""
    parser = _Parser(
        prog="vmexit",
        description="Traps the MSR accesses of a whole x86 guest: see them, stop on them, change them or block them.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="show the version and leave")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", parser_class=_Parser)

    run = actions.add_parser(
        "run",
        help="start a guest in QEMU, or another VMM, and debug it",
        usage="vmexit run [options] -- ARGUMENTS",
        description="Starts QEMU (or what --vmm names) with these arguments and the agent in it. The machine is halted before "
        "its first instruction.",
        epilog="With commands (-x, --script) or --batch the guest then starts by itself, unless QEMU's -S is among its "
        "arguments. Without --batch the console opens.",
        allow_abbrev=False,
    )
    _add_session_options(run)
    run.add_argument("--qemu", metavar="PATH", default=_DEFAULT_QEMU, help=f"the QEMU to start (default: {_DEFAULT_QEMU})")
    run.add_argument(
        "--accel", choices=("tcg", "kvm"), default="tcg", help="how QEMU runs the guest: emulated (tcg, the default), or by KVM"
    )
    run.add_argument("--vmm", metavar="PROGRAM", help="another VMM that uses KVM, instead of QEMU; it must be linked dynamically")

    attach = actions.add_parser(
        "attach",
        help="debug a guest that runs already",
        usage="vmexit attach [options] [PID]",
        description="Loads the agent into the VMM with that process number, without the guest noticing, or finds it there. "
        "Without a number the machines are listed.",
        epilog="The machine runs on when vmexit ends, as it did before.",
        allow_abbrev=False,
    )
    _add_session_options(attach)
    attach.add_argument("pid", metavar="PID", nargs="?", type=_pid, help="of the VMM, as ps and 'vmexit attach' show it")

    watch = actions.add_parser(
        "watch",
        help="look at a KVM guest that runs already, without touching it",
        usage="vmexit watch [options] [PID]",
        description="Shows the MSR accesses of a virtual machine that KVM runs, from the kernel's tracepoint kvm:kvm_msr. "
        "The VMM and the guest notice nothing; nothing can be stopped or changed. Needs root.",
        epilog="Without a number the machines are listed. Ctrl-C ends it, or pauses it at the console.",
        allow_abbrev=False,
    )
    _add_session_options(watch)
    watch.add_argument("pid", metavar="PID", nargs="?", type=_pid, help="of the VMM, as ps and 'vmexit watch' show it")

    host = actions.add_parser(
        "host",
        help="look at the MSR accesses of this Linux host itself",
        usage="vmexit host [options]",
        description="Shows the MSR accesses of the Linux kernel that vmexit itself runs on, from its tracepoints msr:write_msr "
        "and msr:read_msr. Nothing can be stopped or changed. Needs root.",
        epilog="vmexit host -x '!msrwrite log' prints what is written.",
        allow_abbrev=False,
    )
    _add_session_options(host)

    evaluate = actions.add_parser("eval", help="compile and run a script without any machine", allow_abbrev=False)
    if action == "eval":
        # What knows its arguments takes a while to load.
        from vmexit.script.evaluate import add_arguments

        add_arguments(evaluate)

    msr = actions.add_parser(
        "msr",
        help="explain an MSR, a value of it, or a change",
        usage="vmexit msr [MSR [VALUE | OLD NEW]]",
        description="Shows what an MSR is, what a value of it says, or what differs between two values; without an MSR a line "
        "for each that is known. Numbers are hexadecimal.",
        allow_abbrev=False,
    )
    msr.add_argument("words", metavar="MSR, VALUE", nargs="*", help="as the command 'msr' of the console has them")

    demo = actions.add_parser("demo", help="boot a real Linux kernel and trap its MSR writes", allow_abbrev=False)
    demo.add_argument("--kernel", metavar="PATH", type=Path, help="a kernel image (bzImage) to boot instead of Debian's")

    doctor = actions.add_parser(
        "doctor", help="look at what this machine can do, and what to install for the rest", allow_abbrev=False
    )
    doctor.add_argument("--qemu", metavar="PATH", help="the QEMU to look at")
    return parser


def _add_session_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(given=None)
    parser.add_argument("-x", dest="x", action=_Given, metavar="COMMAND", help="carry out a command first; can be repeated")
    parser.add_argument("--script", dest="script", action=_Given, metavar="FILE", help="carry out the commands of a file first")
    parser.add_argument(
        "--batch", action="store_true", help="no console: print everything, never wait, leave when the guest does"
    )
    kernel = parser.add_mutually_exclusive_group()
    kernel.add_argument("--kernel-image", dest="image", metavar="FILE", type=Path, help="the guest's Linux kernel (bzImage)")
    kernel.add_argument("--vmlinux", dest="image", metavar="FILE", type=Path, help="the same, unpacked")
    parser.add_argument("--system-map", metavar="FILE", type=Path, help="its System.map; none of them is needed as a rule")
    parser.add_argument("--pdb", metavar="FILE", type=Path, help="of a Windows guest's kernel: ntkrnlmp.pdb")
    parser.add_argument("--no-recognition", action="store_true", help="do not find out by itself which system the guest is")


def _pid(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is no process number")
    return int(text)


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
    options, has_rest = argv[:split], split < len(argv)
    parsed, unknown = _parser(options[0] if options else "").parse_known_args(options)
    if unknown:
        hint = "; QEMU's own arguments come behind --" if parsed.action == "run" else ""
        raise UsageError(f"unrecognized: {' '.join(unknown)}{hint} (see vmexit --help)")
    if parsed.version:
        from importlib.metadata import version

        print(f"vmexit {version('vmexit')}")
        return 0
    if has_rest and parsed.action != "run":
        raise UsageError("only 'vmexit run' takes arguments behind --")
    match parsed.action:
        case "run":
            if not has_rest:
                raise UsageError("QEMU's arguments are missing: vmexit run [options] -- QEMU ARGUMENTS")
            if parsed.vmm is not None and parsed.qemu != _DEFAULT_QEMU:
                raise UsageError("--vmm and --qemu: one of them is started, not both")
            return _run(parsed, arguments=argv[split + 1 :], qemu=parsed.qemu, accelerator=parsed.accel, vmm=parsed.vmm)
        case "attach":
            pid = _chosen() if parsed.pid is None else parsed.pid
            return 0 if pid is None else _run(parsed, pid=pid)
        case "watch":
            pid = _chosen(only_kvm=True) if parsed.pid is None else parsed.pid
            return 0 if pid is None else _run(parsed, pid=pid, watch=True)
        case "host":
            return _run(parsed, watch=True)
        case "eval":
            from vmexit.script.evaluate import main_eval

            return main_eval(parsed)
        case "msr":
            return _msr(parsed.words)
        case "demo":
            from vmexit import demo

            return demo.run(parsed.kernel)
        case "doctor":
            from vmexit.setup import doctor

            results = doctor.checks(parsed.qemu)
            print(doctor.render(results), flush=True)
            return FAILED_STATUS if any(check.ok is False for check in results) else 0
        case _:
            raise UsageError("what to do? run, attach, watch, host, eval, msr, demo or doctor (see vmexit --help)")


def _msr(words: list[str]) -> int:
    from vmexit.commands import msr_explain
    from vmexit.commands.command import Arguments
    from vmexit.console.tokens import words_of

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
        return _pid(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(str(error)) from None


def _run(parsed: argparse.Namespace, **options: Any) -> int:
    from vmexit.console.run import Options, run
    from vmexit.console.screen import OutputGoneError
    from vmexit.guest.system import Help

    for path in (parsed.image, parsed.system_map, parsed.pdb):
        if path is not None and not path.is_file():
            raise UsageError(f"there is no file {path}")
    commands = [command for kind, value in parsed.given or [] for command in _given(kind, value)]
    try:
        given = Help(parsed.image, parsed.system_map, parsed.pdb)
        return run(Options(commands=commands, batch=parsed.batch, given=given, recognises=not parsed.no_recognition, **options))
    except OutputGoneError as gone:
        if isinstance(gone.error, BrokenPipeError):
            return _broken_pipe()
        raise VmexitError(f"standard output: {gone.error.strerror}") from None


def _given(kind: str, value: str) -> list[GivenCommand]:
    """The commands of one -x or --script."""
    from vmexit.console.run import GivenCommand
    from vmexit.console.tokens import commands_of

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
