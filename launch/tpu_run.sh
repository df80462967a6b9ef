#!/usr/bin/env bash
# Runs one calrec command on all workers of a Cloud TPU VM or pod slice, through preemptions, to its end.
#
#   launch/tpu_run.sh --name NAME --zone ZONE [options] -- VERB [ARGUMENT...]
#   launch/tpu_run.sh --name NAME --zone ZONE [--fetch FOLDER LOCAL] [--delete]     no command: only what is left to do
#
# Makes the TPU VM, or takes the one of this name; installs this checkout with its `tpu` extra; copies data; starts
# `calrec VERB ARGUMENT...` on every worker; follows worker 0's log, through lost connections. When the VM was preempted it is
# made anew and the command started again: the run then resumes from its newest checkpoint, so MODEL_DIR should lie in a
# bucket (gs://...). While a command runs on the VM, the script only follows it: safe to stop and to call again. At the end it
# fetches results, and asks whether to delete the VM; a VM that it leaves is named in its last line.
#
#   --name NAME        the TPU VM
#   --zone ZONE        its zone, such as us-west4-a
#   --type TYPE        accelerator type (default v5litepod-8)
#   --version VERSION  runtime version (default v2-alpha-tpuv5-lite)
#   --project PROJECT  Google Cloud project (default: gcloud's own setting)
#   --spot             a spot VM: cheaper, and may be preempted
#   --queued           asks by a queued resource of the same name, which waits until there is capacity: as pod slices need
#   --data FOLDER      copies a local folder into ~/calrec_data of every worker; the command runs in ~/calrec_source,
#                      so it finds it as ../calrec_data/FOLDER
#   --fetch FOLDER LOCAL  copies a folder, as the command names it, into the local folder LOCAL when the command has ended
#                      well, without its checkpoints; from worker 0, or a gs:// one from its bucket; may be repeated
#   --retries N        how many restarts are allowed, for lack of capacity too (default 50)
#   --poll SECONDS     how long to wait between looks at the VM (default 30)
#   --delete           deletes the VM without asking: when the command has ended, well or not, or was given up
#   --dry_run          prints every gcloud command, runs none
#
# At the end nothing is deleted where there is no terminal to ask on and no --delete, on a signal, or when results could not
# be fetched.
#
# Exit code: the command's own. 75 from the command means "interrupted, goes on from the newest checkpoint", as does its
# death by a signal: it is started again on all workers. 1: gcloud, the installation or fetching failed, 2: wrong usage,
# 3: too many restarts, or no answer, 129, 130, 143: a signal. Lack of quota or of a permission ends the script, lack of
# capacity does not.
# Signing in is gcloud's affair (gcloud auth login); no secret is read or stored here.
# With several workers, gcloud's ssh key must be loaded: ssh-add ~/.ssh/google_compute_engine
#
# Example: stage I on a spot v5e-8
#   launch/tpu_run.sh --name calrec --zone us-west4-a --spot -- \
#     train --gin_file=gin/runs/stage1.gin --gin_file=gin/models/tiny.gin --gin.DATA_DIR='"gs://my-bucket/data"' \
#     --gin.VOCABULARY='"gs://my-bucket/vocabulary.json"' --gin.MODEL_DIR='"gs://my-bucket/stage1"'
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name='' zone='' type=v5litepod-8 version=v2-alpha-tpuv5-lite project='' data='' fetch=()
spot=false queued=false delete=false dry_run=false retries=50 poll=30

usage_error() { echo "launch/tpu_run.sh: $1 (--help tells more)" >&2; exit 2; }

while (($#)); do
  case $1 in
    --help | -h)
      sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      exit 0 ;;
    --spot | --queued | --delete | --dry_run) declare "${1#--}=true"; shift ;;
    --fetch)
      if (($# < 3)) || [[ -z $2 || -z $3 || $2 == --* || $3 == --* ]]; then usage_error '--fetch needs FOLDER and LOCAL'; fi
      [[ ! -e $3 || -d $3 ]] || usage_error "--fetch: '$3' is not a folder"
      fetch+=("$2" "$3"); shift 3 ;;
    --name | --zone | --type | --version | --project | --data | --retries | --poll)
      if (($# < 2)) || [[ -z $2 || $2 == --* ]]; then usage_error "$1 needs a value"; fi
      declare "${1#--}=$2"; shift 2 ;;
    --name=* | --zone=* | --type=* | --version=* | --project=* | --data=* | --retries=* | --poll=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --)
      shift
      (($#)) || usage_error 'no command for the TPU after --'
      break ;;
    *) usage_error "unknown argument '$1'; the command for the TPU comes after --" ;;
  esac
done
[[ -n $name ]] || usage_error '--name is missing'
[[ -n $zone ]] || usage_error '--zone is missing'
if (($# == 0)) && ((${#fetch[@]} == 0)) && ! $delete; then
  usage_error 'no command for the TPU: add -- VERB [ARGUMENT...], such as -- train --gin_file=...'
fi
[[ -z $data || -d $data ]] || usage_error "--data '$data' is not a folder"
data=${data:+$(cd "$data" && pwd)}
[[ $retries =~ ^[0-9]+$ ]] || usage_error "--retries '$retries' is not a whole number"
[[ $poll =~ ^[0-9]+$ ]] || usage_error "--poll '$poll' is not a whole number of seconds"
$dry_run || command -v gcloud >/dev/null || usage_error 'gcloud is not installed: see https://cloud.google.com/sdk/docs/install'

where=(--zone "$zone" ${project:+--project "$project"})
child=''
over=false  # whether nothing on the VM is needed any more

say() { echo "# $*" >&2; }

# A word as a shell reads it back, with its line breaks left legible.
quote() {
  local quoted_quote="'\\''"
  if [[ $1 =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then printf %s "$1"; else printf "'%s'" "${1//\'/$quoted_quote}"; fi
}

# A command as a shell reads it back.
quoted() {
  local word line=''
  for word in "$@"; do line+=" $(quote "$word")"; done
  echo "${line# }"
}

# Runs a command or function as a child, so that a signal to this script is heard while it is waited for.
attend() {
  local code=0
  (trap - INT; "$@") <&0 &  # a child in the background would not hear the keyboard
  child=$!
  wait "$child" || code=$?
  child=''
  return "$code"
}

# Runs a command, or prints it.
run() { if $dry_run; then quoted "$@"; else attend "$@"; fi; }

pause() { attend sleep "$poll"; }
tpu() { run gcloud compute tpus tpu-vm "$1" "$name" "${where[@]}" "${@:2}"; }
queue() { run gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }
# Worker, script. A VM that has gone says no more, not even that the connection ends.
remote() { tpu ssh --worker "$1" --ssh-flag=-oServerAliveInterval=30 --command "$2"; }
copy() { run gcloud compute tpus tpu-vm scp "${@:2}" "$name:$1" "${where[@]}" --worker all; }  # target, source...

# Sets `found` to what gcloud tells of the VM or the queued resource, ABSENT if there is none: tpu or queue, format.
ask() {
  if "$1" describe --format "$2" >"$scratch/found" 2>"$scratch/message"; then found=$(<"$scratch/found"); return 0; fi
  if grep -qi 'not_found\|not found' "$scratch/message"; then found=ABSENT; return 0; fi
  cat "$scratch/message" >&2
  return 1
}

# Sets `state` to that of the VM or, before there is one, of the queued resource that is to become it; ABSENT without either.
look() {
  ask tpu 'value(state)' || return 1
  if [[ $found == ABSENT ]]; then ask queue 'value(state.state)' || return 1; fi
  state=$found
}

# Sets `removal` to the command that deletes the VM: with the queued resource that it belongs to, if there is one.
find_removal() {
  if $queued; then found=ASSUMED; else found=ABSENT; fi
  $dry_run || ask queue 'value(state.state)' 2>/dev/null || true
  removal=(gcloud compute tpus tpu-vm delete "$name" "${where[@]}")
  if [[ $found != ABSENT ]]; then removal=(gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force); fi
}

remove() { find_removal && run "${removal[@]}" --quiet; }

# Ends a process and all that it began: gcloud begins ssh.
end() {
  local pid begun
  begun=$(pgrep -P "$1" 2>/dev/null) || true
  kill "$1" 2>/dev/null || true
  for pid in $begun; do end "$pid"; done
}

may_delete() {
  local answer=''
  if $delete || ! $over; then $over; return $?; fi
  if [[ ! -t 0 || ! -t 2 ]]; then return 1; fi
  read -r -p "# Delete the TPU VM $name ($state)? It costs money as long as it exists. [y/N] " answer
  [[ $answer == [yY]* ]]
}

# Every way out: deletes the VM, or says that it is still there. In what a trap calls, a bare `return` would give the code from
# before the trap.
leave() {
  local code=$? exists='still exists' costs='costs money'
  set +e
  trap : INT TERM HUP  # heard by the commands below, not by this function
  if [[ -n $child ]]; then end "$child"; fi
  if ! look 2>/dev/null; then state='gcloud does not answer' exists='may still exist'; fi
  if [[ $state != ABSENT ]] && (may_delete); then
    say "$name is being deleted"
    if remove; then state=ABSENT; elif ((code == 0)); then code=1; fi
  fi
  if [[ $state == ABSENT ]]; then
    say "no TPU VM $name is left"
  else
    if [[ $state =~ ^(ACCEPTED|WAITING_FOR_RESOURCES)$ ]]; then costs='will cost money'; fi
    if [[ $state =~ ^(FAILED|SUSPENDED|PREEMPTED)$ ]]; then costs='holds quota'; fi
    find_removal
    say "the TPU VM $name $exists ($state) and $costs; this deletes it: $(quoted "${removal[@]}")"
  fi
  rm -rf "$scratch"
  exit "$code"
}

stop() {
  say 'stopped; what runs on the VM goes on, and the same call follows it again'
  exit "$1"
}

if $dry_run; then
  scratch=/tmp
else
  scratch=$(mktemp -d)
  trap leave EXIT
  trap 'stop 129' HUP
  trap 'stop 130' INT
  trap 'stop 143' TERM
fi

# Ends the script where asking again is of no use, by what gcloud said: for lack of quota or of a permission. Capacity comes
# back, and so does the number of requests a minute.
stop_if_refused() {
  local refused='permission|forbidden|unauthenticated|not been used|disabled|billing|invalid|unrecognized'
  if grep -Eqi 'capacity|stockout|per minute' "$scratch/refusal"; then return; fi
  if grep -qi quota "$scratch/refusal"; then
    say "the project's quota does not allow $type in $zone$($spot && echo ' as a spot VM'); ask for more" \
      '(https://console.cloud.google.com/iam-admin/quotas), or choose another --type or --zone'
  elif grep -Eqi "$refused" "$scratch/refusal"; then
    say 'gcloud refuses to make this VM and would do so again; see its message above'
  else
    return 0
  fi
  over=true
  exit 1
}

create() {
  local tier=() code=0
  if $spot; then tier=(--spot); fi
  if $queued; then
    set -- queue create --node-id "$name" --accelerator-type "$type" --runtime-version "$version"
  else
    set -- tpu create --accelerator-type "$type" --version "$version"
  fi
  set -- "$@" ${tier[@]+"${tier[@]}"}
  if $dry_run; then "$@"; return; fi
  "$@" >"$scratch/refusal" 2>&1 || code=$?
  cat "$scratch/refusal" >&2
  if ((code)); then stop_if_refused; fi
  return "$code"
}

# Brings the VM to READY, from whatever state it is in; fails if that cannot be done now (no capacity, say).
ensure_ready() {
  local before='' made=false
  while :; do
    if $dry_run; then say 'the state of the VM'; tpu describe --format 'value(state)'; state=ABSENT; else look || return; fi
    if [[ $state != "$before" ]]; then say "$name: $state"; before=$state; fi
    case $state in
      READY) return ;;
      ABSENT)
        if $made; then return 1; fi
        create || return
        made=true
        if $dry_run; then return; fi ;;
      FAILED | SUSPENDED | PREEMPTED | TERMINATED | UNKNOWN)  # a spot VM, or a request, cannot be started again
        if [[ $state == FAILED ]]; then
          ask queue 'value(state.failedData.error.message)' && say "${found:=gcloud does not say why}"
          echo "$found" >"$scratch/refusal"
        fi
        remove || return
        if [[ $state == FAILED ]]; then stop_if_refused; fi
        if $made; then return 1; fi ;;
      STOPPED) tpu start || return ;;
      *) pause ;;
    esac
  done
}

# The runtime images come with an older Python than 3.11.
read -r -d '' install_script <<'REMOTE' || true
set -eu
rm -rf ~/calrec_source && mkdir -p ~/calrec_source ~/calrec_data && tar -xzf ~/calrec_source.tgz -C ~/calrec_source
if ! python3.11 -c 'import ensurepip' 2>/dev/null; then
  sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
  sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -qq install -y python3.11 python3.11-venv
fi
CALREC_PYTHON=python3.11 ~/calrec_source/launch/install.sh ~/calrec_venv tpu
REMOTE

# The command outlives the ssh session; it holds the lock for as long as it runs, and leaves its exit code.
read -r -d '' start_script <<REMOTE || true
set -eu
mkdir -p ~/calrec_run && cd ~/calrec_run && exec 9>lock
flock -w 300 9 || { echo 'another command still runs on this worker' >&2; exit 4; }
rm -f exit
nohup setsid bash -c 'cd ~/calrec_source && CALREC_DISTRIBUTED=1 ~/calrec_venv/bin/calrec "\$@"; echo \$? > ~/calrec_run/exit' \\
  $(quoted calrec "$@") > log 2>&1 < /dev/null &
REMOTE
# From a line on (the first is 1), to the command's end.
follow_script() {
  echo "cd ~/calrec_run && { tail -n +$1 -F log & tail=\$!; flock lock true; sleep 1; kill \$tail; }"
}
# shellcheck disable=SC2016  # these run on the worker
outcome_script='cd ~/calrec_run 2>/dev/null || { echo none; exit; }
if flock -n lock true; then cat exit 2>/dev/null || echo none; else echo running; fi'
# The same of every worker, with its name.
# shellcheck disable=SC2016
outcomes_script='echo "$(hostname) $(
'"$outcome_script"'
)"'

install() {
  say 'this checkout, with the tpu extra, on all workers'
  run tar -czf "$scratch/calrec_source.tgz" --exclude=.git --exclude='.venv*' --exclude=./runs --exclude=./data \
    --exclude=./build --exclude='*.egg-info' --exclude=__pycache__ --exclude='.*_cache' -C "$root" . || return
  copy calrec_source.tgz "$scratch/calrec_source.tgz" || return
  remote all "$install_script" || return
  if [[ -n $data ]]; then say 'the data'; copy calrec_data --recurse "$data" || return; fi
}

bring_up() {
  ensure_ready && install || return
  say 'the command, on all workers'
  remote all "$start_script"
}

# Sets `ended` to what became of the command: its exit code, `running`, `none` (not started, or killed), or `lost` (no answer).
find_outcome() {
  ended=lost
  if remote 0 "$outcome_script" >"$scratch/outcome" 2>/dev/null; then ended=$(tail -n 1 "$scratch/outcome"); fi
  if [[ ! $ended =~ ^([0-9]+|running|none)$ ]]; then ended=lost; fi
}

# After a lost connection: whether the command was started on all workers all the same.
runs_everywhere() {
  remote all "$outcomes_script" >"$scratch/outcome" 2>/dev/null && ! grep -qv ' running$' "$scratch/outcome"
}

# Worker 0's log, from where it was last seen.
follow() { remote 0 "$(follow_script $(($(wc -l <"$scratch/log") + 1)))" | tee -a "$scratch/log"; }

# Follows the command, through lost connections, for as long as the VM is there; then sets `ended`.
follow_to_the_end() {
  local whole unanswered=0
  while :; do
    whole=true
    attend follow || whole=false
    find_outcome
    case $ended in
      running) unanswered=0 ;;
      lost)
        if ((++unanswered > retries)); then say 'worker 0 does not answer; the command may still run'; exit 3; fi
        if look && [[ $state != READY ]]; then return; fi ;;
      none) return ;;
      *) if $whole || ((++unanswered > 3)); then return; fi ;;  # else the end of the log is still to come
    esac
    say 'the connection to worker 0 was lost; trying again'
    pause
  done
}

# Why worker 0 was interrupted, where another worker's process failed or died first: that one's exit code, after a line
# about it. JAX ends the others within a minute, by a signal (134).
blame() {
  local worker code answers
  answers=$(remote all "$outcomes_script" 2>/dev/null) || return 0
  while read -r worker code; do
    if [[ ! $code =~ ^[0-9]+$ ]] || ((code == 0 || code == 75 || code == 134)); then continue; fi
    if ((code > 128)); then
      say "on worker $worker the process died of signal $((code - 128)); the others end too"
    else
      say "on worker $worker the process failed with exit code $code; see its ~/calrec_run/log"
      echo "$code"
      return
    fi
  done <<<"$answers"
}

# Runs the command to its end, on one VM after the other if need be; exits unless it ended well.
run_command() {
  local restarts failures=0 cause ended=none
  look  # also fails early where gcloud is not signed in
  if [[ $state == READY ]]; then find_outcome; fi
  if [[ $ended == lost ]]; then ended=running; fi  # it may, so nothing is touched
  for ((restarts = 0; ; restarts++)); do
    if ((restarts > retries)); then
      over=true
      say "given up after $retries restarts; the log is on the VM in ~/calrec_run/log"
      exit 3
    fi
    if ((restarts)); then say "restart $restarts of at most $retries"; pause; fi
    : >"$scratch/log"
    if [[ $ended != running ]]; then
      ended=none
      if ! bring_up; then
        # The first ssh to a new VM may fail; an installation that fails thrice on a VM that is there will go on failing.
        if ! look || [[ $state != READY ]]; then continue; fi
        if ! runs_everywhere; then
          if ((++failures >= 3)); then over=true; say 'the VM cannot be set up'; exit 1; fi
          continue
        fi
      fi
      failures=0
    fi
    follow_to_the_end
    case $ended in
      0) say 'the command ended well'; return ;;
      75 | 1[3-9][0-9] | 129)  # by SIGTERM, by a signal, or since another worker's process was
        say "interrupted (exit code $ended); its newest checkpoint is kept"
        cause=$(blame)
        if [[ -n $cause ]]; then over=true; exit "$cause"; fi ;;
      lost | none) say "the command is: $ended" ;;
      *)
        say "the command failed with exit code $ended"
        if ! look || [[ $state == READY ]]; then over=true; exit "$ended"; fi ;;  # else it was killed with its VM
    esac
  done
}

# Copies a folder into a local one, without checkpoints: from a bucket, or packed from worker 0.
fetch_folder() {
  say "$1 into $2"
  run mkdir -p "$2" || return
  if [[ $1 == gs://* ]]; then
    run gcloud storage rsync --recursive --exclude '(.*/)?checkpoints/.*' "$1" "$2" \
      ${project:+--project "$project"}
  else
    remote 0 "tar -czf ~/calrec_fetched.tgz --exclude=./checkpoints -C ~/calrec_source -C $(quote "$1") ." || return
    run gcloud compute tpus tpu-vm scp "$name:calrec_fetched.tgz" "$scratch/fetched.tgz" "${where[@]}" --worker 0 || return
    run tar -xzf "$scratch/fetched.tgz" -C "$2"
  fi
}

if (($#)) && $dry_run; then
  bring_up
  say "worker 0's log, until the command has ended"
  remote 0 "$(follow_script 1)"
  say 'how it ended: 0 is the end; 75, or a preempted VM, which is deleted, begins again with the first command'
  remote 0 "$outcome_script"
elif (($#)); then
  run_command
fi
for ((i = 0; i < ${#fetch[@]}; i += 2)); do
  if ! fetch_folder "${fetch[i]}" "${fetch[i + 1]}"; then
    say "${fetch[i]} could not be fetched; the same call without the command tries again"
    exit 1
  fi
done
if $dry_run; then say 'at the end, with --delete or after a yes'; remove; fi
over=true
