#!/usr/bin/env bash
# Installs the `dev` extra, checks the style with ruff, and runs the whole test suite, on up to four cores. Arguments go to pytest.
#
#   launch/test.sh                      everything
#   launch/test.sh -m 'not slow'        without the slow tests
#   launch/test.sh tests/ranking -x     one folder, until the first failure
#   launch/test.sh -n 0 --pdb           in one process, such as for a debugger
#
# CALREC_VENV names the virtual environment (default: .venv-test in the checkout).
set -euo pipefail
if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
  exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${CALREC_VENV:-$PWD/.venv-test}
launch/install.sh "$venv" dev
"$venv/bin/ruff" check .
exec "$venv/bin/python" -m pytest -n logical --maxprocesses 4 --dist loadfile "$@"
