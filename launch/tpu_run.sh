#!/usr/bin/env bash
# Runs one calrec command on all workers of a Cloud TPU VM, through preemptions, to its end.
#
#   launch/tpu_run.sh --name NAME --zone ZONE [options] -- VERB [ARGUMENT...]
#
# Makes the TPU VM, or takes the one of this name; installs this checkout with its `tpu` extra; mounts a bucket, or
# copies data; starts `calrec VERB ARGUMENT...` on every worker; follows worker 0's log. When the VM was preempted it
# is made anew and the command started again: the run then resumes from its newest checkpoint, so MODEL_DIR should
# lie in the bucket. While a command runs on the VM, the script only follows it: safe to stop and to call again.
#
#   --name NAME        the TPU VM
#   --zone ZONE        its zone, such as us-west4-a
#   --type TYPE        accelerator type (default v5litepod-8)
#   --version VERSION  runtime version (default v2-alpha-tpuv5-lite)
#   --project PROJECT  Google Cloud project (default: gcloud's own setting)
#   --spot             a spot VM: cheaper, and may be preempted
#   --bucket gs://B    mounts the bucket on every worker at /mnt/calrec
#   --data FOLDER      copies a local folder into ~/calrec_data of every worker; the command runs in ~/calrec_source,
#                      so it finds it as ../calrec_data/FOLDER
#   --retries N        how many restarts are allowed, for lack of capacity too (default 50)
#   --poll SECONDS     how long to wait between looks at the VM (default 30)
#   --delete           deletes the VM when the command has ended well
#   --dry_run          prints every gcloud command, runs none
#
# Exit code: the command's own. 75 from the command means "interrupted, goes on from the newest checkpoint", as does its
# death by a signal: it is started again on all workers. 1: gcloud or the installation failed, 2: wrong usage, 3: too many
# restarts. Signing in is gcloud's affair (gcloud auth login); no secret is read or stored here.
# With several workers, gcloud's ssh key must be loaded: ssh-add ~/.ssh/google_compute_engine
#
# Example: stage I on a spot v5e-8
#   launch/tpu_run.sh --name calrec --zone us-west4-a --spot --bucket gs://my-bucket -- \
#     train --gin_file=gin/runs/stage1.gin --gin_file=gin/models/tiny.gin --gin.DATA_DIR='"/mnt/calrec/histories"' \
#     --gin.VOCABULARY='"/mnt/calrec/vocabulary.json"' --gin.MODEL_DIR='"/mnt/calrec/stage1"'
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name='' zone='' type=v5litepod-8 version=v2-alpha-tpuv5-lite project='' bucket='' data=''
spot=false delete=false dry_run=false retries=50 poll=30

usage_error() { echo "launch/tpu_run.sh: $1 (--help tells more)" >&2; exit 2; }

while (($#)); do
  case $1 in
    --help | -h)
      sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      exit 0 ;;
    --spot | --delete | --dry_run) declare "${1#--}=true"; shift ;;
    --name | --zone | --type | --version | --project | --bucket | --data | --retries | --poll)
      if (($# < 2)) || [[ -z $2 || $2 == --* ]]; then usage_error "$1 needs a value"; fi
      declare "${1#--}=$2"; shift 2 ;;
    --name=* | --zone=* | --type=* | --version=* | --project=* | --bucket=* | --data=* | --retries=* | --poll=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --) shift; break ;;
    *) usage_error "unknown argument '$1'; the command for the TPU comes after --" ;;
  esac
done
[[ -n $name ]] || usage_error '--name is missing'
[[ -n $zone ]] || usage_error '--zone is missing'
(($#)) || usage_error "no command for the TPU: add -- VERB [ARGUMENT...], such as -- train --gin_file=..."
[[ -z $bucket || $bucket =~ ^gs://[a-z0-9._-]+/?$ ]] || usage_error "--bucket '$bucket' is not of the form gs://NAME"
[[ -z $data || -d $data ]] || usage_error "--data '$data' is not a folder"
data=${data:+$(cd "$data" && pwd)}
[[ $retries =~ ^[0-9]+$ ]] || usage_error "--retries '$retries' is not a whole number"
[[ $poll =~ ^[0-9]+$ ]] || usage_error "--poll '$poll' is not a whole number of seconds"
$dry_run || command -v gcloud >/dev/null || usage_error 'gcloud is not installed: see https://cloud.google.com/sdk/docs/install'

where=(--zone "$zone" ${project:+--project "$project"})
if $dry_run; then
  scratch=/tmp
else
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
fi

say() { echo "# $*" >&2; }

# A word as a shell reads it back, with its line breaks left legible.
quote() {
  local quoted_quote="'\\''"
  if [[ $1 =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then printf %s "$1"; else printf "'%s'" "${1//\'/$quoted_quote}"; fi
}

# Runs a command, or prints it.
run() {
  local word line=''
  if ! $dry_run; then "$@"; return; fi
  for word in "$@"; do line+=" $(quote "$word")"; done
  echo "${line# }"
}

tpu() { run gcloud compute tpus tpu-vm "$1" "$name" "${where[@]}" "${@:2}"; }
remote() { tpu ssh --worker "$1" --command "$2"; }  # worker, script
copy() { run gcloud compute tpus tpu-vm scp "${@:2}" "$name:$1" "${where[@]}" --worker all; }  # target, source...

# The VM's state, ABSENT if there is none.
state() {
  if tpu describe --format 'value(state)' 2>"$scratch/describe"; then return; fi
  if grep -qi 'not_found\|not found' "$scratch/describe"; then echo ABSENT; return; fi
  cat "$scratch/describe" >&2
  return 1
}

create() {
  local flags=(--accelerator-type "$type" --version "$version")
  if $spot; then flags+=(--spot); fi
  tpu create "${flags[@]}"
}

# Brings the VM to READY, from whatever state it is in; fails if that cannot be done now (no capacity, say).
ensure_ready() {
  local now
  while :; do
    if $dry_run; then say 'the state of the VM'; tpu describe --format 'value(state)'; now=ABSENT; else now=$(state) || return; fi
    say "$name: $now"
    case $now in
      READY) return ;;
      ABSENT) create || return; if $dry_run; then return; fi ;;
      PREEMPTED | TERMINATED | UNKNOWN) tpu delete --quiet || return ;;  # a spot VM cannot be started again
      STOPPED) tpu start || return ;;
      *) sleep "$poll" ;;
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

# A checkpoint is committed by renaming its folder, which gcsfuse refuses for large folders unless told otherwise.
read -r -d '' mount_script <<'REMOTE' || true
set -eu
if mountpoint -q /mnt/calrec; then exit 0; fi
if ! command -v gcsfuse >/dev/null; then
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/gcsfuse.asc >/dev/null
  source=https://packages.cloud.google.com/apt
  echo "deb [signed-by=/usr/share/keyrings/gcsfuse.asc] $source gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
  sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -qq install -y gcsfuse
fi
sudo mkdir -p /mnt/calrec && sudo chown "$(id -u)" /mnt/calrec
REMOTE
mount_script+="
gcsfuse --implicit-dirs --rename-dir-limit 1000000 ${bucket#gs://} /mnt/calrec"

# The command outlives the ssh session; it holds the lock for as long as it runs, and leaves its exit code.
arguments=''
for word in "$@"; do arguments+=" $(quote "$word")"; done
read -r -d '' start_script <<REMOTE || true
set -eu
mkdir -p ~/calrec_run && cd ~/calrec_run && exec 9>lock
flock -w 300 9 || { echo 'another command still runs on this worker' >&2; exit 4; }
rm -f exit
nohup setsid bash -c 'cd ~/calrec_source && CALREC_DISTRIBUTED=1 ~/calrec_venv/bin/calrec "\$@"; echo \$? > ~/calrec_run/exit' \\
  calrec$arguments > log 2>&1 < /dev/null &
REMOTE
# shellcheck disable=SC2016  # these run on the worker
follow_script='cd ~/calrec_run && { tail -n +1 -F log & tail=$!; flock lock true; sleep 1; kill $tail; }'
# shellcheck disable=SC2016
outcome_script='cd ~/calrec_run 2>/dev/null || { echo none; exit; }
if flock -n lock true; then cat exit 2>/dev/null || echo none; else echo running; fi'
# The same of every worker, with its name.
# shellcheck disable=SC2016
outcomes_script='echo "$(hostname) $(
'"$outcome_script"'
)"'

install() {
  say 'this checkout, with the tpu extra, on all workers'
  run tar -czf "$scratch/calrec_source.tgz" --exclude=.git --exclude='.venv*' --exclude=./runs --exclude=./build \
    --exclude='*.egg-info' --exclude=__pycache__ --exclude='.*_cache' -C "$root" . || return
  copy calrec_source.tgz "$scratch/calrec_source.tgz" || return
  remote all "$install_script" || return
  if [[ -n $bucket ]]; then say 'the bucket'; remote all "$mount_script" || return; fi
  if [[ -n $data ]]; then say 'the data'; copy calrec_data --recurse "$data" || return; fi
}

bring_up() {
  ensure_ready && install || return
  say 'the command, on all workers'
  remote all "$start_script"
}

# What became of the command: its exit code, `running`, `none` (not started, or killed), or `lost` (no answer).
outcome() { remote 0 "$outcome_script" 2>/dev/null || echo lost; }

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

if $dry_run; then
  bring_up
  say "worker 0's log, until the command has ended"
  remote 0 "$follow_script"
  say 'how it ended: 0 is the end; 75, or a preempted VM, begins again with the first command'
  remote 0 "$outcome_script"
  say 'a preempted VM is deleted before it is made anew'
  tpu delete --quiet
  exit 0
fi

first_state=$(state)  # also fails early where gcloud is not signed in
ended=none
if [[ $first_state == READY ]]; then ended=$(outcome); fi
if [[ $ended != running ]]; then ended=none; fi

failures=0
for ((restarts = 0; ; restarts++)); do
  if ((restarts > retries)); then
    say "given up after $retries restarts; the log is on the VM in ~/calrec_run/log"
    exit 3
  fi
  if ((restarts)); then say "restart $restarts of at most $retries"; sleep "$poll"; fi
  if [[ $ended != running ]]; then
    if ! bring_up; then
      # The first ssh to a new VM may fail; an installation that fails thrice on a VM that is there will go on failing.
      if [[ $(state) == READY ]] && ((++failures >= 3)); then say 'the VM cannot be set up'; exit 1; fi
      continue
    fi
    failures=0
  fi
  remote 0 "$follow_script" || say 'the connection to worker 0 was lost'
  ended=$(outcome)
  case $ended in
    0) break ;;
    75 | 1[3-9][0-9] | 129)  # by SIGTERM, by a signal, or since another worker's process was
      say "interrupted (exit code $ended); its newest checkpoint is kept"
      cause=$(blame)
      if [[ -n $cause ]]; then exit "$cause"; fi ;;
    running | lost | none) say "the command is: $ended" ;;
    *)
      say "the command failed with exit code $ended"
      if [[ $(state) == READY ]]; then exit "$ended"; fi ;;  # else it was killed with its VM
  esac
done
say 'the command ended well'
if $delete; then tpu delete --quiet; fi
