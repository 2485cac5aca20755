#!/bin/sh
# Sees that what the build needs from the distribution is there: installs it by apt as root, names the command otherwise.
set -eu

missing=
need() { missing="$missing $1"; }

command -v python3 >/dev/null || need "python3 python3-venv python3-dev"
if command -v python3 >/dev/null; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "prepare: python3 is $(python3 -V 2>&1 | cut -d' ' -f2); pyhv needs 3.11 or newer" >&2
        exit 1
    }
    python3 -c 'import venv, ensurepip' 2>/dev/null || need python3-venv
    python3 -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        need python3-dev
fi
command -v gcc >/dev/null && command -v ld >/dev/null || need gcc
[ -e /usr/include/stdio.h ] || need libc6-dev
[ -e /usr/include/linux/kvm.h ] || need linux-libc-dev
if [ "${CI:-}" = true ]; then # what tests compare with, and are skipped without
    command -v iasl >/dev/null || need acpica-tools
    command -v dmidecode >/dev/null || need dmidecode
    command -v cpio >/dev/null || need cpio
fi
[ -z "$missing" ] && exit 0

command="apt-get install -y --no-install-recommends$missing"
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "prepare: missing:$missing; run: sudo $command" >&2
    exit 1
fi
echo "prepare: $command" >&2
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086
apt-get install -y -q --no-install-recommends $missing >/dev/null 2>&1 || {
    apt-get update -q >/dev/null
    apt-get install -y -q --no-install-recommends $missing >/dev/null
}
