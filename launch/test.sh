#!/usr/bin/env bash
# Installs the `dev` extra, checks the style with ruff, and runs the whole test suite, on up to four cores. Arguments go to pytest.
#
#   launch/test.sh                      everything
#   launch/test.sh -m 'not slow'        without the slow tests
#   launch/test.sh tests/ranking -x     one folder, until the first failure
#   launch/test.sh -m beam              the tests of Apache Beam alone
#   launch/test.sh -n 0 --pdb           in one process, such as for a debugger
#
# The tests marked `beam` run first, in VENV-beam: Beam holds packages back that the others are tested with. They are left out
# where -m, -k or a path chooses others.
#
# CALREC_VENV names the virtual environment (default: .venv-test in the checkout).
set -euo pipefail
if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
  exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${CALREC_VENV:-$PWD/.venv-test}
words=" $* "
if [[ $words == ' -m beam ' || ! $words =~ ' -m '|' -k '|' tests'|'.py' ]]; then
  launch/install.sh "$venv-beam" beamtest
  mapfile -t files < <(grep -rl 'pytest.mark.beam' tests --include='test_*.py' | sort)
  "$venv-beam/bin/python" -m pytest -q -m beam "${files[@]}"
  if [[ $words == ' -m beam ' ]]; then exit; fi
fi
launch/install.sh "$venv" dev
"$venv/bin/ruff" check .
exec "$venv/bin/python" -m pytest -n logical --maxprocesses 4 --dist loadfile "$@"
