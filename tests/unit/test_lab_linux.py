"""What is known beforehand of the Linux guest that the lab moves (tests/lab/guest/ride.c), and what judges it."""

from __future__ import annotations

import re
import struct
from typing import Any

import pytest

from tests.lab import linux
from tests.lab.outside import test_linux_ride as judge

SOURCE = (linux.HERE / "guest" / "ride.c").read_text()


def known(name: str) -> int:
    (value,) = re.findall(rf"#define {name} +(0x[0-9a-f]+|\d+)", SOURCE)
    return int(value, 0)


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_what_the_workers_compare_with_is_right() -> None:
    x, data = 1, bytearray()
    for _ in range(known("SIZE")):
        x = (x * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        data.append(x >> 56)
    assert crc32c(b"123456789") == 0xE3069283  # the published check value of CRC-32C
    assert known("KNOWN_CRC32C") == crc32c(data)
    assert known("KNOWN_ONES") == sum(byte.bit_count() for byte in data)
    assert known("KNOWN_PAIRS") == sum(a * b for a, b in zip(data[::2], data[1::2], strict=True))
    total = 0.0
    for number in range(1, 1001):
        total += 1 / number
    assert known("KNOWN_SUM") == struct.unpack("<Q", struct.pack("<d", total))[0]


# -- the judge ---------------------------------------------------------------------------------------------------

SECOND = 10**9
FLAGS = "fpu de pse tsc msr pae cx8 apic sep cmov mmx fxsr sse sse2 syscall nx lm pni cx16 hypervisor lahf_lm"


class Guest:
    """One that does all that it should, in no time."""

    def __init__(self, host: str, saved: bool) -> None:
        self.number, self.round, self.saved = 0, 0, saved
        self.monotonic = 50 * SECOND
        self.real = 1_800_000_000 * SECOND
        self.stays: list[judge.Stay] = []
        self.moves: list[dict[str, Any]] = []
        self.console = "linux: cpus 4\r\n"
        self.say("ifunc 1000=2000")
        for _ in range(judge.CPUS["amd"]):
            self.say(f"flags {FLAGS}")
        self.say("ready")
        self.arrive(host)

    def say(self, words: str) -> None:
        self.number += 1
        self.console += f"ride: {self.number} {words}\n"

    def pass_time(self, seconds: int) -> None:
        self.monotonic += seconds * SECOND
        self.real += seconds * SECOND
        self.round += 5

    def ask(self) -> dict[str, Any]:
        rounds = ",".join([str(self.round)] * judge.CPUS["amd"])
        real = self.real - (7200 * SECOND if self.behind else 0)
        clocks = f"{self.monotonic} {real} {self.real // SECOND}"
        self.say(f"answer w {clocks} kvm-clock 12345678 {rounds} 0,0,0,0 100,200,300,400")
        line = self.console.splitlines()[-1]
        here = [self.real, self.monotonic]
        return {"line": line, "before": here, "after": here, "began": here}

    def arrive(self, host: str) -> None:
        self.behind = self.saved and bool(self.stays)
        self.host, self.answers = host, [self.ask()]

    def leave(self) -> None:
        self.pass_time(2)
        for clock in ("monotonic", "realtime"):
            self.say(f"timer {clock} {self.monotonic} {self.monotonic + 1000}")
        self.answers.append(self.ask())
        self.behind = False
        self.answers.append(self.ask())
        end = {"console": self.console, "tables": 1, "profile": "hyperv-r2", "intercept": "kernel", "notes": []}
        self.stays.append(judge.Stay(self.host, self.answers, end))
        self.console = ""

    def move(self, host: str) -> None:
        self.leave()
        self.moves.append({"stood": [self.real, self.monotonic]} if self.saved else {"summary": {}})
        if self.saved:
            self.real += 7200 * SECOND
        self.arrive(host)


def ride(saved: bool) -> judge.Ride:
    guest = Guest("amd-epyc", saved)
    guest.move("amd-opteron-g2")
    guest.move("amd-epyc")
    guest.leave()
    return judge.Ride(guest.stays, guest.moves, {"cause": "power-off", "status": 0, "message": ""})


@pytest.mark.parametrize("saved", [False, True])
def test_the_judge_finds_each_fault_and_no_other(saved: bool) -> None:
    assert judge.faults(ride(saved)) == []
    for name, (change, sign) in (judge.CHANGES | (judge.SAVED if saved else {})).items():
        one = ride(saved)
        change(one)
        assert any(sign in text for text in judge.faults(one)), (name, judge.faults(one))


def test_the_judge_finds_a_feature_that_is_not_hidden() -> None:
    assert judge.shown_faults(ride(False).stays) == []
    for name in ("popcnt", "sse4_2", "avx512f", "amx_tile", "nonstop_tsc"):
        one = ride(False)
        one.stays[0].end["console"] = one.stays[0].end["console"].replace(FLAGS, f"{FLAGS} {name}", 1)
        assert judge.shown_faults(one.stays) == [f"its /proc/cpuinfo shows {name}"]


def test_variants_are_named_by_the_programs_symbols() -> None:
    symbols = "0000000000001000 i memcpy\n0000000000002000 t __memmove_avx_unaligned_erms\n"
    found = judge.chosen(ride(False).stays, symbols)
    assert found == {"memcpy": "__memmove_avx_unaligned_erms"}
    assert judge.BEYOND.search(found["memcpy"])
    assert not judge.BEYOND.search("__memmove_sse2_unaligned")
