"""`pyhv migrate NAME URI`: moves a running VM to another host."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from pyhv.cli import options, output
from pyhv.cli.options import Command, Option
from pyhv.control.client import Client
from pyhv.errors import BadInput, HostError
from pyhv.migration import transport
from pyhv.migration.source import ON_TIMEOUT
from pyhv.migration.transport import SSH_VARIABLES

# What both sides of tls:// need; also for pyhv receive.
TLS_OPTIONS = (
    Option("--tls-cert", "for tls://: this side's certificate, in PEM", "FILE"),
    Option("--tls-key", "its key", "FILE"),
    Option("--tls-ca", "the authority that the other side's certificate must come from", "FILE"),
)


def _factor(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("is not a number") from None


COMMAND = Command(
    "migrate",
    "Move a running VM to another host, or another process, while it runs.",
    (
        Option("NAME", "as given to pyhv run --name; see pyhv ls"),
        Option(
            "URI",
            "to where: unix:PATH, tcp://HOST[:PORT], tls://HOST[:PORT], ssh://[USER@]HOST[:PORT], tty:PATH",
            required=False,
        ),
        Option("--cancel", "give up the migration of this VM that is under way: it stays here"),
        Option(
            "--downtime",
            "how long the guest may be paused at the end: 20ms, 0.05s; a number alone is milliseconds (default: 50)",
            "TIME",
            0.05,
            options.time("ms"),
        ),
        Option(
            "--bandwidth",
            "bytes a second while it runs, such as 100M (of 1024) or 100MB (of 1000) (default: no limit)",
            "RATE",
            0.0,
            options.rate,
        ),
        Option(
            "--timeout", "seconds that copying may take while it runs (default: no limit)", "S", 0.0, options.time("s")
        ),
        Option("--rounds", "copy at most N times what the guest has written (default: 30)", "N", 30, options.number),
        Option(
            "--on-timeout",
            "what to do when time or rounds are used up: cancel, and the VM stays here; or stop it for as long as the "
            "rest takes (default: cancel)",
            default="cancel",
            choices=ON_TIMEOUT,
        ),
        Option("--compress", "compress memory by zstd, for slow links"),
        Option("--strict-tsc", "refuse a host whose TSC runs at another rate, even if the guest was promised none"),
        Option(
            "--silence",
            "the link is broken after S seconds without a sign of life (default: 1)",
            "S",
            1.0,
            options.time("s"),
        ),
        Option(
            "--overrun",
            "the guest, paused at the end, goes on here if it is not handed over within N times the downtime, and two "
            "silences (default: 10)",
            "N",
            None,
            _factor,
        ),
        Option("--insecure", "allow tcp:// to other addresses than loopback: anybody on the way can read the memory"),
        *TLS_OPTIONS,
        Option(
            "--json",
            "print one JSON object: name, uri, downtime and total_time in seconds, one_clock, rounds, bytes, rate ...; "
            "on stderr one a line meanwhile: how far it is",
        ),
    ),
    """
The other side is asked first whether the guest can run there, and says every reason why not; nothing is moved then. Its
memory is copied while it runs, again and again what it has written meanwhile, until the rest is little. Then it stands
for a moment, and goes on there; here its run ends with status 0. Until that moment any failure, or Ctrl-C, leaves it
running here. With ssh:// the other side is started by itself (PYHV_REMOTE: how pyhv is called there).

examples:
  pyhv receive unix:m.sock          # in one terminal, or on another host with tls://
  pyhv migrate t unix:m.sock        # in another, in the same folder
""",
)


def main(arguments: list[str]) -> int:
    """The command. Returns the exit status."""
    given = COMMAND.parse(arguments)
    if given.cancel:
        return _cancel(given)
    if given.uri is None:
        raise BadInput("URI", "is missing", "say to where the VM is to go; pyhv migrate --help has the ways")
    address = transport.parse(given.uri, given.insecure)
    if address.scheme == "fd":
        raise BadInput(given.uri, "names descriptors of this process, which the VM's does not have", "name another URI")
    uri = given.uri
    if address.path:  # the VM's process has another working directory
        uri = f"{address.scheme}:{options.absolute(address.path)}"
    params: dict[str, Any] = {
        "downtime": given.downtime,
        "bandwidth": given.bandwidth,
        "timeout": given.timeout,
        "rounds": given.rounds,
        "on_timeout": given.on_timeout,
        "compress": given.compress,
        "insecure": given.insecure,
        "strict_tsc": given.strict_tsc,
        "silence": given.silence,
        "heartbeat": min(given.silence / 5, 0.2),
    }
    if given.overrun is not None:
        params["overrun"] = given.overrun
    for name in ("tls_cert", "tls_key", "tls_ca"):
        if path := getattr(given, name):
            params[name] = options.absolute(path)
    with Client(given.name) as client:
        client.status()  # does it answer at all?
        with _Progress(given.json) as progress:
            if address.scheme == "ssh":
                # As it is here, where the user has it, and not as it was when the VM was started.
                params["environment"] = {name: os.environ[name] for name in SSH_VARIABLES if name in os.environ}
            try:
                summary = client.migrate(uri, params, progress)
            except HostError as error:
                if "no parameter 'environment'" not in error.detail:
                    raise
                del params["environment"]  # a VM's of the version before, which has its own
                summary = client.migrate(uri, params, progress)
    if given.json:
        output.print_json({"name": given.name, "uri": given.uri, **summary})
    else:
        print(f"{given.name}: {_describe(summary)}")
    return 0


def _cancel(given: SimpleNamespace) -> int:
    if given.uri is not None:
        raise BadInput(given.uri, "cannot be combined with --cancel, which is about the VM", "leave it out")
    with Client(given.name) as client:
        client.cancel_migration()
    if given.json:
        output.print_json({"name": given.name})
    else:
        print(f"{given.name}: its migration is cancelled; it stays here")
    return 0


def _describe(summary: dict[str, Any]) -> str:
    """A summary for a person."""
    stood = f"{summary['downtime'] * 1e3:.1f} ms"
    if not summary["one_clock"]:
        stood = f"at most {stood}"
    return (
        f"migrated in {summary['total_time']:.2f} s, of which the guest stood {stood}; {summary['rounds']} rounds, "
        f"{output.size(summary['bytes'])} sent, at {output.size(int(summary['rate']))}/s"
    )


class _Progress(output.StatusLine):
    """Shows how far a migration is. Call it with the fields of migration.source.Progress."""

    def __init__(self, as_json: bool) -> None:
        super().__init__("migrate", as_json, 0.1, 0 if as_json else 1)

    def __call__(self, facts: dict[str, Any]) -> None:
        if not self.is_due():
            return
        total, left = facts["total"], facts["left"]
        where = f"round {facts['round']}" if facts["round"] else "hand-over"
        text = (
            f"{where} {output.bar(total - left if total else 0, total, 20)} {output.size(left)} left  "
            f"{output.size(int(facts['rate']))}/s  guest writes {output.size(int(facts['dirty_rate']))}/s  "
            f"would stand {facts['downtime'] * 1e3:.0f} ms"
        )
        self.show(text, facts)
