"""What the ``vmexit`` command understands: its actions and their options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from vmexit.errors import UsageError

DEFAULT_QEMU = "qemu-system-x86_64"
TARGETS = ("run", "attach", "watch", "host")
"""The actions that are about a machine; ``record`` takes the same."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class _Given(argparse.Action):
    """Keeps -x (-e) and --script in the order in which they were given."""

    INTO = "given"

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.INTO, [*(getattr(namespace, self.INTO, None) or []), (self.dest, values)])


class _GivenBefore(_Given):
    """Those before the target of ``record``; what comes behind it is parsed by itself."""

    INTO = "given_before"


def parser(action: str) -> argparse.ArgumentParser:
    """``action``: the first word of the command line."""
    parser = Parser(
        prog="vmexit",
        description="Traps the MSR accesses of a whole x86 guest: see them, stop on them, change them or block them.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="show the version and leave")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", parser_class=Parser)
    _add_targets(actions)

    record = actions.add_parser(
        "record",
        help="record the traps of a machine into a file",
        usage="vmexit record -o FILE [options] run|attach|watch|host [the options of that] [-- ARGUMENTS]",
        description="Records what the events of -e trap, without a console: a guest that is started (run, which need not be "
        "named), a machine that runs already (attach, watch), or the host itself. Without an event every write is recorded but "
        "for those that are made all the time. Ctrl-C ends it.",
        epilog="vmexit record -o boot.rec -e '!msrwrite' run --accel kvm -- -m 512 disk.img; then: vmexit report boot.rec",
        allow_abbrev=False,
    )
    record.set_defaults(target=None, given_before=None)
    _add_record_options(record, _GivenBefore, default=None)
    _add_targets(record.add_subparsers(dest="target", metavar="TARGET", parser_class=Parser), recording=True)

    report = actions.add_parser(
        "report",
        help="show what a recording holds",
        description="Shows a recording of 'vmexit record' as tables: MSRs, cores, processes, and every change of an MSR.",
        allow_abbrev=False,
    )
    report.add_argument("file", metavar="FILE", type=Path, help="the recording; also one that is damaged, or still being made")
    report.add_argument("--html", metavar="OUT", type=Path, help="write one page for a browser instead, which needs nothing else")
    report.add_argument("--all", action="store_true", help="leave no row and no change out")
    report.add_argument("--traps", action="store_true", help="show each trap in a line of its own, instead of tables")

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
    demo.add_argument("--record", metavar="FILE", type=Path, help="record all of it, too, for 'vmexit report'")

    doctor = actions.add_parser(
        "doctor", help="look at what this machine can do, and what to install for the rest", allow_abbrev=False
    )
    doctor.add_argument("--qemu", metavar="PATH", help="the QEMU to look at")
    return parser


def _add_targets(actions: Any, *, recording: bool = False) -> None:
    """The actions that are about a machine (TARGETS); for ``record`` those that it takes."""

    def add(name: str, arguments: str, summary: str, description: str, epilog: str) -> argparse.ArgumentParser:
        before = "record -o FILE " if recording else ""
        parser: argparse.ArgumentParser = actions.add_parser(
            name,
            help=summary,
            usage=f"vmexit {before}{name} [options]{arguments}",
            description=description,
            epilog=None if recording else epilog,
            allow_abbrev=False,
        )
        _add_session_options(parser, recording)
        return parser

    run = add(
        "run",
        " -- ARGUMENTS",
        "start a guest in QEMU, or another VMM, and debug it",
        "Starts QEMU (or what --vmm names) with these arguments and the agent in it. The machine is halted before its first "
        "instruction.",
        "With commands (-x, --script) or --batch the guest then starts by itself, unless QEMU's -S is among its arguments. "
        "Without --batch the console opens.",
    )
    run.add_argument("--qemu", metavar="PATH", default=DEFAULT_QEMU, help=f"the QEMU to start (default: {DEFAULT_QEMU})")
    run.add_argument(
        "--accel", choices=("tcg", "kvm"), default="tcg", help="how QEMU runs the guest: emulated (tcg, the default), or by KVM"
    )
    run.add_argument("--vmm", metavar="PROGRAM", help="another VMM that uses KVM, instead of QEMU; it must be linked dynamically")

    attach = add(
        "attach",
        " [PID]",
        "debug a guest that runs already",
        "Loads the agent into the VMM with that process number, without the guest noticing, or finds it there. Without a number "
        "the machines are listed.",
        "The machine runs on when vmexit ends, as it did before.",
    )
    attach.add_argument("pid", metavar="PID", nargs="?", type=pid, help="of the VMM, as ps and 'vmexit attach' show it")

    watch = add(
        "watch",
        " [PID]",
        "look at a KVM guest that runs already, without touching it",
        "Shows the MSR accesses of a virtual machine that KVM runs, from the kernel's tracepoint kvm:kvm_msr. The VMM and the "
        "guest notice nothing; nothing can be stopped or changed. Needs root.",
        "Without a number the machines are listed. Ctrl-C ends it, or pauses it at the console.",
    )
    watch.add_argument("pid", metavar="PID", nargs="?", type=pid, help="of the VMM, as ps and 'vmexit watch' show it")

    add(
        "host",
        "",
        "look at the MSR accesses of this Linux host itself",
        "Shows the MSR accesses of the Linux kernel that vmexit itself runs on, from its tracepoints msr:write_msr and "
        "msr:read_msr. Nothing can be stopped or changed. Needs root.",
        "vmexit host -x '!msrwrite log' prints what is written.",
    )


def _add_record_options(parser: argparse.ArgumentParser, given: type[_Given], default: object) -> None:
    """Those of ``record`` itself, before its target and behind it."""
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, default=default, help="where the recording goes")
    parser.add_argument(
        "--seconds", metavar="N", type=_seconds, default=default, help="end it after so long; else when the machine ends"
    )
    parser.add_argument(
        "-e",
        "-x",
        dest="x",
        action=given,
        metavar="COMMAND",
        help="an event ('!msrwrite lstar'), or another command; may be repeated",
    )
    parser.add_argument("--script", dest="script", action=given, metavar="FILE", help="carry out the commands of a file first")


def _add_session_options(parser: argparse.ArgumentParser, recording: bool) -> None:
    parser.set_defaults(given=None)
    if recording:
        _add_record_options(parser, _Given, default=argparse.SUPPRESS)
    else:
        parser.add_argument("-x", dest="x", action=_Given, metavar="COMMAND", help="carry out a command first; can be repeated")
        parser.add_argument(
            "--script", dest="script", action=_Given, metavar="FILE", help="carry out the commands of a file first"
        )
        parser.add_argument(
            "--batch", action="store_true", help="no console: print everything, never wait, leave when the guest does"
        )
    kernel = parser.add_mutually_exclusive_group()
    kernel.add_argument("--kernel-image", dest="image", metavar="FILE", type=Path, help="the guest's Linux kernel (bzImage)")
    kernel.add_argument("--vmlinux", dest="image", metavar="FILE", type=Path, help="the same, unpacked")
    parser.add_argument("--system-map", metavar="FILE", type=Path, help="its System.map; none of them is needed as a rule")
    parser.add_argument("--pdb", metavar="FILE", type=Path, help="of a Windows guest's kernel: ntkrnlmp.pdb")
    parser.add_argument("--no-recognition", action="store_true", help="do not find out by itself which system the guest is")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


def pid(text: str) -> int:
    """The number of a process. Raises ArgumentTypeError."""
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is no process number")
    return int(text)
