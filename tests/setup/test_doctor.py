"""The doctor: every finding on made-up files, and this machine's QEMU as it is."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from vmexit.setup import doctor, kernel
from vmexit.setup.doctor import Check
from vmexit.setup.elf import AARCH64, X86_64
from vmexit.targets import trace_instance

AGENT_SOURCE = "int qemu_plugin_version = 1;\nint qemu_plugin_install(void) { return 0; }\n"


def compile_c(path: Path, source: str, *flags: str) -> Path:
    """Compile one C source into `path`."""
    text = path.with_suffix(".c")
    text.write_text(source)
    subprocess.run(["gcc", *flags, "-o", path, text], check=True)
    return path


def fake_qemu(folder: Path, version: str, symbols: frozenset[str] = frozenset()) -> Path:
    """A program that says that it is a QEMU and exports these symbols."""
    functions = "".join(f"void {symbol}(void) {{}}\n" for symbol in sorted(symbols))
    main = f'int main(void) {{ puts("QEMU emulator version {version}"); return 0; }}\n'
    return compile_c(folder / "qemu", f"#include <stdio.h>\n{functions}{main}", "-rdynamic")


def all_needs() -> frozenset[str]:
    """Every symbol of the first choices, and of the plugin interface."""
    return frozenset({"qemu_plugin_register_vcpu_tb_trans_cb"}).union(*(choices[0] for choices in doctor._NEEDS.values()))


def test_agent(tmp_path: Path) -> None:
    path = tmp_path / "agent.so"
    missing = doctor.check_agent(path)
    assert (missing.ok, missing.detail) == (False, f"{path} is not there")
    assert missing.remedy is not None
    compile_c(path, "int x;\n", "-shared", "-fPIC")
    assert doctor.check_agent(path).detail == f"{path} is no QEMU plugin"
    compile_c(path, AGENT_SOURCE, "-shared", "-fPIC")
    assert doctor.check_agent(path) == Check("agent", True, str(path))
    data = bytearray(path.read_bytes())
    other = AARCH64 if platform.machine() == "x86_64" else X86_64
    data[18:20] = other.to_bytes(2, "little")
    path.write_bytes(data)
    assert doctor.check_agent(path).detail == f"{path} is for another kind of machine"
    path.write_text("text")
    assert doctor.check_agent(path).detail == f"{path}: not a 64-bit little-endian ELF file"


def test_qemu_that_can_do_everything(tmp_path: Path) -> None:
    results = doctor.check_qemu(fake_qemu(tmp_path, "8.2.1 (Debian 1:8.2.1)", all_needs()))
    assert [(check.name, check.ok) for check in results] == [
        ("QEMU", True),
        ("QEMU plugins", True),
        ("QEMU internals", True),
    ]
    assert results[0].detail == f"8.2.1, {tmp_path / 'qemu'}"


def test_qemu_without_plugins_or_internals(tmp_path: Path) -> None:
    version, plugins, internals = doctor.check_qemu(fake_qemu(tmp_path, "9.0.0"))
    assert (version.ok, plugins.ok, internals.ok) == (True, False, False)
    assert "cannot see a trap, change or skip a write, trap after the instruction, break, show memory" in internals.detail
    assert "x86_cpu_gdb_read_register" in internals.detail


def test_one_missing_symbol_is_named_with_what_it_is_for(tmp_path: Path) -> None:
    qemu = fake_qemu(tmp_path, "9.0.0", all_needs() - {"vm_stop"})
    assert doctor.check_qemu(qemu)[2].detail == "cannot break: it does not export vm_stop"


def test_official_calls_do_instead_of_internals() -> None:
    internals = {"x86_cpu_gdb_read_register", "x86_cpu_gdb_write_register"}
    exports = all_needs() - internals
    assert set(doctor.missing_symbols(exports)) == {"see a trap", "change or skip a write"}
    assert doctor.missing_symbols(exports | {"qemu_plugin_read_register", "qemu_plugin_write_register"}) == {}


def test_qemu_that_is_old(tmp_path: Path) -> None:
    (check,) = doctor.check_qemu(fake_qemu(tmp_path, "6.2.0"))
    assert (check.ok, check.detail) == (False, f"6.2.0, {tmp_path / 'qemu'}: too old")


def test_qemu_that_is_a_script(tmp_path: Path) -> None:
    script = tmp_path / "qemu"
    script.write_text("#!/bin/sh\necho QEMU emulator version 8.0.0\n")
    script.chmod(0o755)
    version, plugins, internals = doctor.check_qemu(script)
    assert version.ok is True
    assert (plugins.ok, internals.ok) == (None, None)
    assert plugins.detail.startswith("cannot be told")


def test_qemu_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (gone,) = doctor.check_qemu(tmp_path / "gone")
    assert gone == Check("QEMU", False, f"{tmp_path / 'gone'} is not there or cannot be run", "apt install qemu-system-x86")
    (other,) = doctor.check_qemu("/bin/true")
    assert other.ok is False
    assert "does not say that it is a QEMU (exit 0)" in other.detail
    hanging = tmp_path / "hanging"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(doctor, "_TIMEOUT_S", 0.2)
    start = time.monotonic()
    (stuck,) = doctor.check_qemu(hanging)
    assert stuck.ok is False
    assert "does not run" in stuck.detail
    assert time.monotonic() - start < 30


def test_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(kernel.VARIABLE, raising=False)
    assert doctor.check_kernel().ok is None
    image = bytearray(0x1000)
    image[0x202:0x206] = b"HdrS"
    path = kernel.cache_folder() / "1-1" / "vmlinuz"
    path.parent.mkdir(parents=True)
    path.write_bytes(image)
    assert doctor.check_kernel() == Check("kernel", True, f"unknown, {path}")
    monkeypatch.setenv(kernel.VARIABLE, str(path))
    assert doctor.check_kernel() == Check("kernel", True, f"unknown, {path} (VMEXIT_KERNEL)")
    monkeypatch.setenv(kernel.VARIABLE, str(tmp_path / "gone"))
    broken = doctor.check_kernel()
    assert broken.ok is False
    assert "gone: No such file" in broken.detail


def test_programs_and_devices(tmp_path: Path) -> None:
    assert doctor.check_program("shell", "sh", "runs things", "dash").ok is True
    assert doctor.check_program("x", "no-such-program", "for nothing", "none") == Check(
        "x", None, "none (for nothing)", "apt install none"
    )
    assert doctor.check_kvm(tmp_path / "kvm").detail == "not there; for guests that KVM runs (--accel kvm, --vmm, attach)"
    (tmp_path / "kvm").touch()
    assert doctor.check_kvm(tmp_path / "kvm").detail == "can be used; for guests that KVM runs (--accel kvm, --vmm, attach)"


class TestTracefs:
    """What 'vmexit host' and 'vmexit watch' look through."""

    POINTS = (("msr", "write_msr"), ("kvm", "kvm_msr"))

    def play(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
        """A tracefs with these tracepoints, and this one alone."""
        (folder / "instances").mkdir()
        for system, name in points:
            (folder / "events" / system / name).mkdir(parents=True)
            (folder / "events" / system / name / "enable").touch()
        monkeypatch.setattr(trace_instance, "_MOUNTED", (folder,))

    def test_usable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.play(tmp_path, monkeypatch, *self.POINTS)
        assert doctor.check_tracefs() == Check("tracefs", None, "can be used, for 'vmexit host' and 'vmexit watch'")
        assert not list((tmp_path / "instances").iterdir()), "it only looks"

    def test_without_kvm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.play(tmp_path, monkeypatch, *self.POINTS[:1])
        check = doctor.check_tracefs()
        assert check.detail == "can be used, for 'vmexit host'; no tracepoint kvm:kvm_msr for 'vmexit watch'"
        assert check.remedy is not None and check.remedy.startswith("modprobe kvm")

    def test_without_any(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.play(tmp_path, monkeypatch)
        assert doctor.check_tracefs().detail.startswith("can be used; no tracepoint msr:write_msr for 'vmexit host'; no")

    @pytest.mark.parametrize(
        ("number", "says"),
        [(errno.EPERM, "run vmexit "), (errno.ENODEV, "this kernel has no tracefs"), (errno.ENOSYS, "mount -t tracefs tracefs")],
    )
    def test_out_of_reach(self, number: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def mount(filesystem: str) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(trace_instance, "_MOUNTED", (tmp_path / "none",))
        monkeypatch.setattr(trace_instance, "mount_for_us", mount)
        check = doctor.check_tracefs()
        assert check.ok is None
        assert check.detail.startswith("for 'vmexit host' and 'vmexit watch', but ")
        assert says in check.detail


def test_whole_report_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    results = doctor.checks()
    named = {check.name: check for check in results}
    assert len(named) == len(results)
    if shutil.which(doctor.QEMU) is None:
        pytest.skip("no QEMU: apt install qemu-system-x86")
    assert named["QEMU"].ok
    assert list(tmp_path.iterdir()) == [], "nothing may be downloaded"


def test_report_without_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("vmexit.setup.initramfs._BUSYBOX", ())
    named = {check.name: check for check in doctor.checks()}
    assert named["QEMU"].ok is False
    assert named["busybox"] == Check(
        "busybox", False, "no static one for x86-64 (the demo needs it)", "apt install busybox-static"
    )
    assert named["C compiler"].ok is None


def test_render() -> None:
    text = doctor.render([Check("one", True, "fine"), Check("longer", False, "gone", "get it"), Check("x", None, "by the way")])
    assert text == ("ok       one     fine\nMISSING  longer  gone\n                 to do: get it\n-        x       by the way")
    assert doctor.render([]) == ""
