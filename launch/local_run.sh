#!/usr/bin/env bash
# Runs one calrec command in several processes of this machine, as a pod would: to try a distributed run before launching it.
#
#   launch/local_run.sh --processes N [options] -- VERB [ARGUMENT...]
#
#   --processes N      how many
#   --devices D        simulated CPU devices of each process (default 1)
#   --grace SECONDS    how long the others may go on after one has ended badly (default 40)
#
# CALREC_VENV names the virtual environment (default: .venv in the checkout, else python3).
# Exit code: 0 when all ended well. 75: interrupted, the same command goes on, with as many processes as you like: SIGTERM
# to any of the processes saves in all; a process that was killed takes the others along. Else the code of the failure.
#
# Example:
#   launch/local_run.sh --processes 2 --devices 4 -- train --gin_file=gin/models/tiny.gin --gin_file=gin/runs/stage1.gin \
#     --gin.DATA_DIR='"data"' --gin.VOCABULARY='"data/vocabulary.json"' --gin.MODEL_DIR='"runs/two"' --gin.TRAIN_STEPS=100
set -euo pipefail

usage_error() { echo "launch/local_run.sh: $1 (--help tells more)" >&2; exit 2; }

processes='' devices=1 grace=40
while (($#)); do
  case $1 in
    --help | -h)
      sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      exit 0 ;;
    --processes | --devices | --grace)
      if (($# < 2)); then usage_error "$1 needs a value"; fi
      if [[ ! $2 =~ ^[1-9][0-9]*$ ]]; then usage_error "$1 '$2' is not a whole number above 0"; fi
      declare "${1#--}=$2"; shift 2 ;;
    --processes=* | --devices=* | --grace=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --) shift; break ;;
    *) usage_error "unknown argument '$1'; the command comes after --" ;;
  esac
done
[[ -n $processes ]] || usage_error '--processes is missing'
(($#)) || usage_error 'no command: add -- VERB [ARGUMENT...], such as -- train --gin_file=...'

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${CALREC_VENV:-$root/.venv}/bin/python
[[ -x $python ]] || python=python3
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

export CALREC_DISTRIBUTED=1 CALREC_NUM_PROCESSES=$processes JAX_COORDINATOR_ADDRESS=127.0.0.1:$port
export JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# The last flag of a name counts.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"

declare -A number_of=()
# A child's own process id, not that of the one that marks its lines.
for ((i = 0; i < processes; i++)); do
  CALREC_PROCESS_ID=$i "$python" -m calrec_jax.cli "$@" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
  number_of[$!]=$i
done
trap 'kill -TERM "${!number_of[@]}" 2>/dev/null || true' TERM INT

outcome=0 deadline=''
while ((${#number_of[@]})); do
  ended='' code=0
  if [[ -z $deadline ]]; then
    wait -n -p ended "${!number_of[@]}" || code=$?
    if [[ -z $ended ]]; then continue; fi  # a signal came
  else
    for pid in "${!number_of[@]}"; do
      if ! kill -0 "$pid" 2>/dev/null; then ended=$pid; wait "$pid" || code=$?; break; fi
    done
    if [[ -z $ended ]]; then
      if ((SECONDS >= deadline)); then kill -KILL "${!number_of[@]}" 2>/dev/null || true; fi
      sleep 0.2
      continue
    fi
  fi
  i=${number_of[$ended]}
  unset "number_of[$ended]"
  if ((code == 0)); then continue; fi
  if [[ -z $deadline ]]; then
    deadline=$((SECONDS + grace))
    if ((code > 128)); then
      echo "launch/local_run.sh: process $i died of signal $((code - 128)); the others end too. The same command goes on from" \
        'the newest checkpoint.' >&2
    elif ((code != 75)); then
      echo "launch/local_run.sh: process $i failed with exit code $code; the others end too." >&2
    fi
    outcome=$((code > 128 ? 75 : code))
  elif ((code != 75 && code < 128 && outcome == 75)); then
    outcome=$code
  fi
done
exit "$outcome"
