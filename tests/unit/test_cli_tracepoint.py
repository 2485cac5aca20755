"""Reading the kernel's trace: lines as Linux 5.4 to 6.18 write them, on hosts of both vendors."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyhv.accel import tracepoint
from pyhv.accel.tracepoint import Parser, Traced

LEAF1 = "func 1 idx 0 rax a10f11 rbx 20800 rcx f7f83203 rdx 178bfbff, cpuid entry found"
ANSWER = (0xA10F11, 0x20800, 0xF7F83203, 0x178BFBFF)


def line(event: str, fields: str, thread: int = 4242, name: str = "python3") -> str:
    return f"         {name}-{thread}   [001] d..1.  2670.198740: {event}: {fields}"


@pytest.mark.parametrize(
    ("exit", "vcpu", "rip"),
    [
        ("vcpu 3 reason CPUID rip 0xffffffff81066a32 info1 0x0000000000000000 info2 0x0000000000000000 intr_info "
         "0x00000000 error_code 0x00000000 requests 0x0000000000000000", 3, 0xFFFFFFFF81066A32),
        ("vcpu 0 reason cpuid rip 0x100014 info1 0x0000000000000000 info2 0x0000000000000000", 0, 0x100014),
        ("reason CPUID rip 0x100014 info 0 0", None, 0x100014),
    ],
)  # fmt: skip
def test_exit_tells_rip_and_vcpu(exit: str, vcpu: int | None, rip: int) -> None:
    parser = Parser()
    assert parser.feed(line("kvm_exit", exit)) is None
    assert parser.feed(line("kvm_cpuid", LEAF1)) == Traced(4242, vcpu, rip, 1, 0, ANSWER)
    # An answer that no exit stands before is the kernel's own.
    assert parser.feed(line("kvm_cpuid", LEAF1)) == Traced(4242, None, None, 1, 0, ANSWER)


def test_interpreted_instruction_tells_rip() -> None:
    parser = Parser()
    assert parser.feed(line("kvm_emulate_insn", "f0000:1006:66 0f a2 (real)")) is None
    assert parser.feed(line("kvm_cpuid", LEAF1)) == Traced(4242, None, 0xF1006, 1, 0, ANSWER)
    parser.feed(line("kvm_emulate_insn", "0:1000:b8 0f 00 00 00 (prot64)"))
    assert parser.feed(line("kvm_cpuid", LEAF1)) == Traced(4242, None, None, 1, 0, ANSWER)


def test_threads_are_kept_apart() -> None:
    parser = Parser()
    parser.feed(line("kvm_exit", "vcpu 0 reason CPUID rip 0x1 info1 0x0", 100))
    parser.feed(line("kvm_exit", "vcpu 1 reason CPUID rip 0x2 info1 0x0", 200))
    assert parser.feed(line("kvm_cpuid", LEAF1, 200)) == Traced(200, 1, 2, 1, 0, ANSWER)
    assert parser.feed(line("kvm_cpuid", LEAF1, 100)) == Traced(100, 0, 1, 1, 0, ANSWER)


def test_names_of_threads_may_be_anything() -> None:
    for name in ("vcpu-0", "a b-1 [002] c", "x: kvm_cpuid: y", "<...>"):
        traced = Parser().feed(line("kvm_cpuid", LEAF1, 77, name))
        assert traced is not None
        assert (traced.thread, traced.guest) == (77, ANSWER)


def test_older_kernels_have_no_index() -> None:
    fields = "func 80000001 rax 1 rbx 2 rcx 3 rdx 4, cpuid entry not found"
    assert Parser().feed(line("kvm_cpuid", fields)) == Traced(4242, None, None, 0x80000001, 0, (1, 2, 3, 4))


def test_upper_halves_are_not_the_answer() -> None:
    fields = "func 7 idx ffffffff rax ffffffff00000001 rbx 2 rcx 3 rdx 4, cpuid entry found"
    assert Parser().feed(line("kvm_cpuid", fields)) == Traced(4242, None, None, 7, 0xFFFFFFFF, (1, 2, 3, 4))


def test_lost_events_are_counted() -> None:
    parser = Parser()
    for text in ("CPU:0 [LOST 12 EVENTS]", "CPU:1 [LOST EVENTS]"):
        assert parser.feed(text) is None
    assert parser.lost == 13


@given(st.text() | st.from_regex(re.compile(r"\A.*-\d+ +\[\d+\].* kvm_(cpuid|exit|emulate_insn): .*\Z")))
def test_other_lines_are_passed_over(text: str) -> None:
    traced = Parser().feed(text)
    assert traced is None or all(0 <= register <= 0xFFFFFFFF for register in traced.guest)


def test_mounted_tracefs_is_found(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    mounts = "proc /proc proc rw 0 0\ntracefs /mnt/a\\040b\\134c tracefs rw 0 0\n"
    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: io.StringIO(mounts))
    found = tracepoint._find_mounted()
    monkeypatch.undo()
    assert found == "/mnt/a b\\c"
