"""``vmexit record`` and ``vmexit report`` with real machines: what is recorded, and what is left when it all ends badly."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.console.vmexits import TIME_S, children, is_alive, run, vmexit
from tests.guests.build import OK_STATUS, build
from tests.machines import guest_arguments, linux_arguments, need_kvm
from tests.outputs.peers import wait_until
from tests.vmm import build_vmm, vmm_arguments
from vmexit.report.fileformat import RecordingError
from vmexit.report.reader import RecordingFile
from vmexit.targets.attach import machines

STAR = 0xC000_0081


@pytest.fixture(scope="module")
def sequence() -> list[str]:
    return guest_arguments("sequence")[1]


@pytest.fixture(scope="module")
def endless() -> list[str]:
    """A guest that writes STAR as fast as it can, for hours."""
    return guest_arguments("loop", COUNT=0xFFFF_FFFF)[1]


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Those in here, and what they have started, are ended with the test."""
    started: list[subprocess.Popen[str]] = []
    left: list[int] = []
    yield started
    for one in started:
        left += children(one.pid)
        one.kill()
        one.communicate()
    for pid in left:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def columns(path: Path, *names: str) -> tuple[dict[str, list[int]], RecordingFile]:
    """Some columns of all traps in a recording, and its file."""
    with RecordingFile(path) as file:
        chunks = list(file.chunks())
    return {name: [number for chunk in chunks for number in chunk[name].tolist()] for name in names}, file


def wait_for(path: Path, traps: int) -> None:
    """Until so many are in the file."""
    deadline = time.monotonic() + TIME_S
    while True:
        assert time.monotonic() < deadline, "too few traps"
        try:
            with RecordingFile(path) as file:
                if file.total >= traps:
                    return
        except RecordingError:
            pass  # it has not begun
        time.sleep(0.05)


def test_a_guest_to_its_end(sequence: list[str], tmp_path: Path) -> None:
    """All that log would have printed is in the file, and the guest's own output on the screen."""
    path = tmp_path / "r"
    done = run("record", "-o", str(path), "-e", "!msrwrite", "run", "-e", "!msrread stage post", "--", *sequence)
    assert done.returncode == OK_STATUS
    assert "event 0 records each wrmsr of every MSR (stage pre, all cores)" in done.stdout
    assert "event 1 records each rdmsr" in done.stdout and "msr=c0000082 value=ffff923344556677" in done.stdout
    assert "pre   wrmsr" not in done.stdout
    found, file = columns(path, "msr", "value", "access", "event", "sequence", "time_ns")
    count = len(found["msr"])
    size = path.stat().st_size
    told = f"{size / 1000:.1f} kB"
    assert done.stderr.splitlines() == [
        f"recorded {count} traps into {path} ({told}); none lost",
        f"QEMU ended with status {OK_STATUS}",
    ]
    assert file.is_whole and file.end is not None
    assert (file.end["reason"], file.end["exit_status"], file.end["traps"]) == ("the machine ended", OK_STATUS, count)
    assert (0xC000_0082, 0xFFFF_9233_4455_6677) in zip(found["msr"], found["value"], strict=True)
    assert set(found["access"]) == {1, 2} and set(found["event"]) == {1, 2}
    assert found["sequence"] == sorted(found["sequence"]) and found["time_ns"][0] >= file.info["clock"]["started_ns"]
    assert {number: event["text"] for number, event in file.info["events"].items()} == {
        "0": "!msrwrite",
        "1": "!msrread stage post",
    }
    assert file.info["machine"]["target"] == "run" and file.info["machine"]["arguments"] == sequence

    logged = run("run", "--batch", "-x", "!msrwrite log", "-x", "!msrread stage post log", "--", *sequence).stdout
    lines = run("report", "--traps", str(path)).stdout.splitlines()
    traps = [line.split(None, 1)[1] for line in logged.splitlines() if re.match(r" +\d+\.\d{6}  0", line)]
    assert [line.split(None, 1)[1] for line in lines[1:]] == traps


def test_without_an_event_every_write_is_recorded(sequence: list[str], tmp_path: Path) -> None:
    path = tmp_path / "r"
    done = run("record", "-o", str(path), "--", *sequence)
    assert done.returncode == OK_STATUS and "event 0 records each wrmsr of every MSR" in done.stdout
    assert set(columns(path, "access")[0]["access"]) == {1}


def test_events_that_do_something_else(sequence: list[str], tmp_path: Path) -> None:
    """A script runs, code is asked, and what a condition lets through is recorded."""
    path = tmp_path / "r"
    script = '!msrwrite c0000082 script { printf("seen %llx\\n", $value); }'
    done = run(
        "record",
        "-o",
        str(path),
        "-e",
        script,
        "-e",
        "!msrwrite c0000081 condition { 31c0c3 }",
        "-e",
        "!msrwrite c0000084",
        "--",
        *sequence,
    )
    assert "seen ffff923344556677" in done.stdout
    assert set(columns(path, "msr")[0]["msr"]) == {0xC000_0084}


def test_a_real_linux_boots(tmp_path: Path) -> None:
    """Every change of EFER as the tables and the page tell it."""
    path, page = tmp_path / "boot.rec", tmp_path / "boot.html"
    done = run("record", "-o", str(path), "-e", "!msrwrite", "--", *linux_arguments("echo it is up"))
    assert done.returncode == 0 and "it is up" in done.stdout
    found, file = columns(path, "msr", "vcpu")
    assert file.is_whole and {0xC000_0080, 0xC000_0082, 0xC000_0084} <= set(found["msr"]) and set(found["vcpu"]) == {0, 1}
    shown = run("report", "--all", str(path)).stdout
    assert f"{path}: {len(found['msr'])} traps in " in shown and "EFER 0x" in shown and " +SCE" in shown
    assert re.search(r"c0000082  LSTAR +wrmsr +pre +2 ", shown)
    done = run("report", str(path), "--html", str(page))
    assert done.stdout.startswith(f"{page}: a page of {len(found['msr'])} traps (") and done.returncode == 0
    data = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])
    assert data["meta"]["total"] == len(found["msr"]) == len(data["traps"][0])
    assert any("+SCE" in text for text in data["texts"])


def test_the_recorder_is_killed(endless: list[str], tmp_path: Path, processes: list[subprocess.Popen[str]]) -> None:
    """In mid-traffic: what was written up to then is there, whole and without a gap, and the guest runs on."""
    path = tmp_path / "r"
    recorder = subprocess.Popen(
        vmexit("record", "-o", str(path), "-e", "!msrwrite c0000081", "--", *endless),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    processes.append(recorder)
    wait_for(path, 100_000)
    (qemu,) = children(recorder.pid)
    recorder.kill()
    recorder.wait()
    try:
        assert is_alive(qemu)
        with RecordingFile(path) as file:
            values = np.concatenate([chunk["value"] for chunk in file.chunks()])
            assert file.end is None and not file.damaged and len(values) >= 100_000
            assert file.notes()[0].startswith("it was cut off, or its recorder was killed")
        # The loop counts down by one with each write.
        assert (np.diff(values.astype(np.int64)) == -1).all() and values[0] & 0xFFFF_FFFF == 0xFFFF_FFFF
        shown = run("report", str(path))
        assert shown.returncode == 0 and f"{len(values):,} traps in" in shown.stdout and "note: it was cut off" in shown.stdout
    finally:
        os.kill(qemu, signal.SIGKILL)


@pytest.mark.parametrize(
    ("number", "status", "reason"),
    [(signal.SIGINT, 0, "interrupted"), (signal.SIGTERM, 143, "interrupted")],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_it_is_ended(
    endless: list[str], tmp_path: Path, processes: list[subprocess.Popen[str]], number: signal.Signals, status: int, reason: str
) -> None:
    """In mid-traffic: the file has its end, and everything that the guest did up to then."""
    path = tmp_path / "r"
    command = vmexit("record", "-o", str(path), "-e", "!msrwrite c0000081", "--", *endless)
    recorder = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes.append(recorder)
    wait_for(path, 100_000)
    (qemu,) = children(recorder.pid)
    recorder.send_signal(number)
    _, errors = recorder.communicate(timeout=TIME_S)
    assert recorder.returncode == status
    found, file = columns(path, "value", "sequence")
    assert file.is_whole and file.end is not None and file.end["reason"] == reason
    assert (np.diff(found["value"]) == -1).all() and found["sequence"] == list(range(len(found["sequence"])))
    lines = errors.splitlines()
    assert lines[0].startswith(f"recorded {len(found['value']):,} traps into {path} (") and lines[0].endswith("; none lost")
    assert lines[1:] == ([] if status == 0 else ["vmexit: ended by SIGTERM"])
    assert not is_alive(qemu)


def test_for_so_many_seconds(endless: list[str], tmp_path: Path) -> None:
    for seconds in (0.5, 2, 8, 32):  # as the machine is busy, the guest has not begun to write after a short time
        path = tmp_path / f"{seconds}"
        before = time.monotonic()
        done = run("record", "-o", str(path), "--seconds", f"{seconds}", "-e", "!msrwrite c0000081", "--", *endless)
        took = time.monotonic() - before
        assert done.returncode == 0 and "none lost" in done.stderr
        found, file = columns(path, "time_ns")
        assert file.end is not None and file.end["reason"] == "the recording was ended"
        if found["time_ns"]:
            break
    assert seconds < took
    assert 0 < found["time_ns"][-1] - file.info["clock"]["started_ns"] < 1e9 * took


def test_lost_records_are_told(endless: list[str], tmp_path: Path) -> None:
    """With a guest that waits for nobody."""
    path = tmp_path / "r"
    commands = ("-x", "settings overflow drop", "-e", "!msrwrite c0000081", "-x", "g")
    done = run("record", "-o", str(path), "--seconds", "2", *commands[:4], "--", *endless)
    found, file = columns(path, "value")
    if file.lost == 0:
        pytest.skip("this machine takes records faster than its guest makes them")
    values = np.array(found["value"])
    assert f"; {file.lost:,} lost: they came faster than they were taken" in done.stderr
    assert int((np.diff(values) != -1).sum()) > 0
    gaps = int((values[:-1] - values[1:] - 1).sum())
    assert gaps <= file.lost
    assert f"note: {file.lost:,} records lost" in run("report", str(path)).stdout


def test_a_file_that_cannot_grow(endless: list[str], tmp_path: Path, processes: list[subprocess.Popen[str]]) -> None:
    """As on a full disk: one line, the machine is ended, and what is in the file can be read."""
    path = tmp_path / "r"
    command = vmexit("record", "-o", str(path), "-e", "!msrwrite c0000081", "--", *endless)
    recorder = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes.append(recorder)
    wait_for(path, 1)
    most = path.stat().st_size + 1_000_000
    resource.prlimit(recorder.pid, resource.RLIMIT_FSIZE, (most, most))
    (qemu,) = children(recorder.pid)
    _, errors = recorder.communicate(timeout=TIME_S)
    found, file = columns(path, "value")
    assert recorder.returncode == 1 and not is_alive(qemu)
    assert errors == f"vmexit: {path}: File too large; the {len(found['value']):,} traps up to then are in it\n"
    assert file.end is None and file.problem is None and (np.diff(found["value"]) == -1).all()
    assert path.stat().st_size <= most


def test_a_command_that_is_wrong_leaves_the_file_alone(sequence: list[str], tmp_path: Path) -> None:
    path = tmp_path / "r"
    done = run("record", "-o", str(path), "-e", "!msrwrite lsttar", "--", *sequence)
    assert done.returncode == 1 and "did you mean LSTAR" in done.stderr and not path.exists()
    assert run("record", "-o", str(path), "--", *sequence).returncode == OK_STATUS
    before = path.read_bytes()
    for arguments in (("-e", "!msrwrite lsttar", "--", *sequence), ("--", "-no-such-option"), ("attach", str(os.getpid()))):
        assert run("record", "-o", str(path), *arguments).returncode in (1, 2)
        assert path.read_bytes() == before


def test_the_demonstration_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "demo.rec"
    done = run("demo", "--record", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    found, file = columns(path, "msr")
    assert file.is_whole and f"recorded {len(found['msr'])} traps into {path}" in done.stdout.splitlines()[-1]


@pytest.mark.skipif(os.geteuid() != 0, reason="tracepoints are for root")
def test_the_host(tmp_path: Path) -> None:
    path = tmp_path / "host.rec"
    done = run("record", "-o", str(path), "--seconds", "1", "host", "-e", "!msrwrite 0-ffffffff")
    if done.returncode != 0 and "tracefs" in done.stderr + done.stdout:
        pytest.skip(f"the host cannot be looked at here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found, file = columns(path, "msr", "stage")
    assert file.is_whole and file.info["machine"]["target"] == "host" and set(found["stage"]) <= {2}
    assert run("report", str(path)).returncode == 0


@pytest.mark.parametrize("target", ["attach", "watch"])
def test_a_machine_of_kvms_that_runs_already(target: str, tmp_path: Path, processes: list[subprocess.Popen[str]]) -> None:
    need_kvm()
    path = tmp_path / "machine.rec"
    command = [str(build_vmm()), *vmm_arguments(build("loop", COUNT=0xFFFF_FFFF), 1)]
    vmm = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
    processes.append(vmm)
    wait_until(lambda: any(machine.pid == vmm.pid and machine.vcpus for machine in machines()), "the machine")
    done = run("record", "-o", str(path), "--seconds", "2", "-e", "!msrwrite", target, str(vmm.pid))
    if done.returncode != 0 and any(word in done.stderr + done.stdout for word in ("tracefs", "pyinjector", "root")):
        pytest.skip(f"not possible here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert vmm.poll() is None
    found, file = columns(path, "msr", "value")
    assert file.is_whole and file.info["machine"]["target"] == target
    assert len(found["msr"]) > 1 and set(found["msr"]) == {STAR}
    assert {after - before for before, after in pairwise(found["value"])} == {-1}


# ---- what makes no sense ----


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["record"], "what is to be recorded? run, attach, watch or host (see vmexit record --help)"),
        (["record", "--", "x"], "where is the recording to go? vmexit record -o FILE ... (see vmexit record --help)"),
        (["record", "host"], "where is the recording to go?"),
        (["record", "-o"], "argument -o/--output: expected one argument"),
        (["record", "-o", "f", "run"], "QEMU's arguments are missing"),
        (["record", "-o", "f", "walk"], "argument TARGET: invalid choice: 'walk'"),
        (["record", "-o", "f", "host", "--", "x"], "only 'vmexit run' takes arguments behind --"),
        (["record", "-o", "f", "--seconds", "0", "--", "x"], "argument --seconds: '0' is no number of seconds"),
        (["record", "-o", "f", "--seconds", "nan", "--", "x"], "argument --seconds: 'nan' is no number of seconds"),
        (["record", "-o", "f", "run", "--batch", "--"], "unrecognized: --batch"),
        (["record", "-o", "f", "attach", "x"], "argument PID: 'x' is no process number"),
        (["report"], "the following arguments are required: FILE"),
        (["report", "f", "--html", "o", "--all"], "--html writes a page; --all and --traps are about what is shown here"),
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str], error: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"vmexit: {error}") and done.stderr.count("\n") == 1


def test_files_that_make_no_sense(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"precious")
    for arguments, error in (
        (["record", "-o", str(image), "--", "x"], f"{image} is there already and is no recording: it is not overwritten"),
        (["report", str(image)], f"{image} is no recording of vmexit"),
        (["report", str(tmp_path / "none")], f"{tmp_path}/none: No such file or directory"),
        (["record", "-o", "/none/r", "--", "x"], "/none/r: No such file or directory"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stderr) == (1, f"vmexit: {error}\n")
    assert image.read_bytes() == b"precious"


def test_a_page_that_cannot_be_written(sequence: list[str], tmp_path: Path) -> None:
    path = tmp_path / "r"
    run("record", "-o", str(path), "--", *sequence)
    before = path.read_bytes()
    for out, error in (
        (path, f"{path} is the recording itself: the page goes into another file"),
        (Path("/none/p"), "/none/p: No such"),
    ):
        done = run("report", str(path), "--html", str(out))
        assert done.returncode == 1 and done.stderr.startswith(f"vmexit: {error}") and done.stderr.count("\n") == 1
    assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == ["r"]
