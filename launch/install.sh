#!/usr/bin/env bash
# Makes a virtual environment and installs this checkout into it, editable; at once when nothing changed.
#
#   launch/install.sh VENV [EXTRA]      EXTRA is one of setup.py's: dev, tpu, cuda, ...
#
# CALREC_PYTHON names the Python to make the environment with; it must be 3.11 or newer.
set -euo pipefail
if (($# < 1 || $# > 2)) || [[ $1 == -* ]]; then
  echo 'usage: launch/install.sh VENV [EXTRA]' >&2
  exit 2
fi
venv=$1
extra=${2:-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

find_python() {
  local candidate
  for candidate in ${CALREC_PYTHON:-python3 python3.13 python3.12 python3.11}; do
    # A name on PATH may be a version manager's stub, so each is tried.
    if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "No Python 3.11 or newer with its venv module (tried ${CALREC_PYTHON:-python3, python3.13, python3.12, python3.11})." \
    "Install one, or name it: CALREC_PYTHON=/path/to/python." >&2
  return 2
}

if [[ ! -x $venv/bin/python ]]; then
  python=$(find_python)
  echo "Making $venv with $("$python" --version)" >&2
  "$python" -m venv "$venv"
fi

fingerprint=$("$venv/bin/python" -c 'import hashlib, pathlib, sys
texts = [(pathlib.Path(sys.argv[1]) / name).read_bytes() for name in ("setup.py", "pyproject.toml")]
print(hashlib.sha256(b"\0".join([*texts, *map(str.encode, [sys.version, *sys.argv[1:]])])).hexdigest())' "$root" "$extra")
stamp=$venv/.calrec_installed${extra:+_$extra}
if [[ -e $stamp && $(<"$stamp") == "$fingerprint" ]]; then
  exit 0
fi
echo "Installing calrec_jax${extra:+[$extra]} and what it needs into $venv (minutes, the first time)" >&2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$root${extra:+[$extra]}"
echo "$fingerprint" >"$stamp"
