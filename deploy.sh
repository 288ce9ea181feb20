#!/usr/bin/env bash
# Runs Avito AI API out of this folder: as the user who calls it, touching nothing outside.
# `./deploy.sh help` lists the commands. What needs JSON or HTTP is in tools/, in Python, because a
# fresh machine has neither curl nor jq.
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"

readonly PYTHON=.venv/bin/python
readonly LOG=run/avito-ai.log
readonly PID_FILE=run/avito-ai.pid
readonly DEMO_AVIBE=vibe/demo
readonly READY_TIMEOUT_S=${DEPLOY_READY_TIMEOUT_S:-300}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

started_pid=""  # of a service that we started and that has not proved itself yet

usage() {
    cat <<'END'
Usage: ./deploy.sh COMMAND

  development   install what is missing, start the service in the background, try it out
  stop          let accepted requests finish, then end the service
  restart       stop it, start it with the present code and settings, try it out
  status        is it running, is it ready (exit code 0: ready, 1: not ready, 3: not running)
  logs          follow its log (--no-follow: only print the end)
  check         print the settings in effect, or what is wrong with them
  venv          only make .venv (--dev: with what the tests need)
  production    on this host, under systemd: check it, install this version as a release of its own, make it
                current, try it out; go back by itself if that fails (--dry-run: only say what would be done)
  rollback      make the previous release current again, or the one named (--dry-run)
  releases      list the releases on this host
  uninstall     take the service off this host; settings, logs and state stay (--purge: they go too;
                --yes: do not ask; --dry-run)
  help          print this

Settings come from the environment, then from .env (see .env.example); those of production from
/etc/avito-ai/avito-ai.env alone.
END
}

say() { printf '%s\n' "$*"; }

die() {
    printf 'Error: %s\n' "$*" >&2
    exit 1
}

# ---------------------------------------------------------------------------- what is on this machine

can_make_venv() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate newest=""
    for candidate in python3.13 python3.12 python3.11 python3; do
        command -v "$candidate" >/dev/null || continue
        if can_make_venv "$candidate"; then
            echo "$candidate"
            return
        fi
        newest=${newest:-$("$candidate" -c 'import platform; print(platform.python_version())' 2>/dev/null)}
    done
    if [[ -z $newest ]]; then
        die "Python 3.11 or newer is needed and there is none here: apt install python3 python3-venv"
    elif [[ $(printf '%s\n' 3.11 "$newest" | sort -V | head -n 1) == 3.11 ]]; then
        die "Python $newest is here, but it cannot make virtual environments: apt install python3-venv"
    fi
    die "Python 3.11 or newer is needed, and the newest here is $newest"
}

# A setting while there is no .venv yet to ask config.py with: the environment first, then .env.
early_setting() {
    local name=$1
    if [[ -n ${!name+set} ]]; then
        echo "${!name}"
    elif [[ -f .env ]]; then
        sed -n -E "s/^[[:space:]]*(export[[:space:]]+)?${name}[[:space:]]*=[[:space:]]*//p" .env | tail -n 1 |
            sed -E "s/[[:space:]]+#.*$//; s/[[:space:]]*$//; s/^(['\"])(.*)\1$/\2/"
    fi
}

setting() { "$PYTHON" -m config --get "$1"; }

is_port_taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

port_owner() {
    local owner=""
    if command -v ss >/dev/null; then
        owner=$(ss -ltnpH "sport = :$1" | sed -n -E 's/.*users:\(\("([^"]+)",pid=([0-9]+).*/\1, pid \2/p' | head -n 1)
    fi
    echo "${owner:-another process}"
}

require_free_port() {
    if is_port_taken "$1"; then
        die "Port $1 is in use by $(port_owner "$1"): stop that, or set another AVITO_PORT"
    fi
}

describe_machine() {
    local python=$1 port gpu pid
    say "System:  $(sed -n 's/^PRETTY_NAME="\?\([^"]*\).*/\1/p' /etc/os-release), $(uname -m)"
    say "Python:  $("$python" -c 'import platform; print(platform.python_version())')"
    say "CPU:     $(nproc) cores, $(awk '/^MemTotal/ { printf "%.0f", $2 / 1e6 }' /proc/meminfo) GB memory"
    gpu=$(nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2>/dev/null) || gpu=""
    say "GPU:     ${gpu:-none, the models run on the CPU}"
    say "Disk:    $(df -h --output=avail . | tail -n 1 | tr -d ' ') free"
    port=$(early_setting AVITO_PORT)
    port=${port:-8085}
    if pid=$(service_pid); then
        say "Service: running already (pid $pid), it will be restarted"
    elif [[ $port =~ ^[0-9]+$ ]]; then # a port that is no number is for config.py to refuse
        require_free_port "$port"
        say "Port:    $port is free"
    fi
}

# ------------------------------------------------------------------------------------------ installing

# Two runs at once must not build the same .venv or start the same service. The service itself does
# not inherit the lock, see start_service.
lock_this_folder() {
    mkdir -p run
    exec 9>run/deploy.lock
    if ! flock --nonblock 9; then
        say "Another deploy.sh is at work in this folder; waiting for it"
        flock 9
    fi
}

ensure_env_file() {
    [[ -f .env ]] && return
    [[ -f .env.example ]] || die ".env.example is missing: this copy of the project is not complete"
    (umask 077 && cp .env.example .env) # it may come to hold a token
    say "Wrote .env from .env.example"
}

pip_install() {
    "$PYTHON" tools/download_size.py "$@"
    # Of pip's many lines, those that show that it is alive.
    "$PYTHON" -m pip install "$@" | sed -u -n -E \
        -e 's/^ *Downloading (.*\([0-9.]+ [MG]B\)).*/  \1/p' \
        -e 's/^Installing collected packages:.*/  unpacking (minutes, on a slow disk)/p'
}

# What .venv must have been made from to be left alone.
venv_stamp() {
    { cat "$@"; "$PYTHON" -V; } | sha256sum
}

# Usage: ensure_venv runtime|dev. Makes no network call when .venv is as it should be.
ensure_venv() {
    local kind=$1 files=(requirements.txt) index torch_mark python was_whole=""
    [[ $kind == runtime ]] || files+=(requirements-dev.txt)
    index=$(early_setting AVITO_TORCH_INDEX_URL)
    torch_mark=$(printf '%s' "$index" | sha256sum) # hashed, for the URL may hold a password

    # A pip that was killed leaves half a package that the next pip takes for a whole one, so an
    # unfinished .venv is made anew; pip's cache spares the downloads. So is one whose Python has gone,
    # or whose torch comes from another index than the one asked for now.
    if [[ -e .venv/.unfinished ]] || ! "$PYTHON" -c 'import pip' 2>/dev/null ||
        { [[ -n $index ]] && [[ $(cat .venv/.torch-index 2>/dev/null) != "$torch_mark" ]]; }; then
        rm -rf .venv
    fi
    if [[ -f .venv/.installed-$kind ]] && [[ $(<".venv/.installed-$kind") == "$(venv_stamp "${files[@]}")" ]]; then
        return
    fi

    if [[ -d .venv ]]; then
        was_whole=yes
    else
        python=$(find_python)
        say "Making .venv"
        mkdir .venv
    fi
    touch .venv/.unfinished
    if [[ -z $was_whole ]]; then
        "$python" -m venv .venv
        printf '%s\n' "$torch_mark" >.venv/.torch-index
    fi
    install_requirements "$index" "${files[-1]}" || {
        [[ -z $was_whole ]] || rm -f .venv/.unfinished # pip has put back what it had replaced
        die "The packages could not be installed; pip's message is above"
    }
    venv_stamp requirements.txt >.venv/.installed-runtime
    [[ $kind == runtime ]] || venv_stamp "${files[@]}" >.venv/.installed-dev
    rm .venv/.unfinished
}

install_requirements() {
    local index=$1 file=$2
    if [[ -n $index ]]; then
        say "torch comes from AVITO_TORCH_INDEX_URL"
        # Without its dependencies: they are pinned, and such an index rarely has those versions.
        pip_install --index-url "$index" --no-deps "$(grep '^torch==' requirements.txt)" || return
    fi
    pip_install -r "$file"
}

require_sound_settings() {
    "$PYTHON" -m config >/dev/null || die "Mend these settings (environment or .env), then run it again"
}

# Gunicorn's configuration looks into the model folders. What it would refuse is better known before the
# running service is stopped for it.
require_sound_models() {
    "$PYTHON" -c 'import gunicorn_config' || die "The service would not start like this"
}

ensure_demo_model() {
    local path
    path=$(setting AVIBE_MODEL_PATH)
    if [[ -n $path && $(realpath -m -- "$path") == "$PWD/$DEMO_AVIBE" ]]; then
        "$PYTHON" tools/prepare_demo_avibe.py --output "$DEMO_AVIBE" || die "Avibe's embedded model is missing"
    fi
}

# --------------------------------------------------------------------------------- starting, stopping

# Prints the pid of the service if it runs. A pid file can outlive its process and its number be given
# to another, so the process must be a Gunicorn with our configuration in our folder.
service_pid() {
    local pid
    pid=$(cat "$PID_FILE" 2>/dev/null) && is_ours "$pid" && echo "$pid"
}

is_ours() {
    [[ $1 =~ ^[0-9]+$ && $(readlink "/proc/$1/cwd" 2>/dev/null) == "$PWD" ]] &&
        tr '\0' ' ' 2>/dev/null <"/proc/$1/cmdline" | grep -q 'gunicorn.* gunicorn_config\.py'
}

# Usage: wait_for_end PID SECONDS
wait_for_end() {
    local tenths
    for ((tenths = 0; tenths < $2 * 10; tenths++)); do
        is_ours "$1" || return 0
        sleep 0.1
    done
    return 1
}

kill_service() { kill -KILL -- "-$1" 2>/dev/null || true; } # its whole group: the workers too

start_service() {
    local port
    port=$(setting AVITO_PORT)
    require_free_port "$port"
    touch "$LOG"
    log_begin=$(($(stat -c %s "$LOG") + 1))
    rm -f "$PID_FILE"
    # setsid: Ctrl-C here and the end of this terminal are not its business.
    setsid "$PYTHON" -m gunicorn -c gunicorn_config.py --pid "$PID_FILE" >>"$LOG" 2>&1 </dev/null 9>&- &
    started_pid=$!
    disown
    say "Starting (pid $started_pid, log $LOG)"
    "$PYTHON" -m tools.service_client wait --pid "$started_pid" --timeout-s "$READY_TIMEOUT_S" || fail_start
    "$PYTHON" -m tools.service_client try || fail_start
    started_pid=""
}

fail_start() {
    say "The end of $LOG:" >&2
    tail -c "+$log_begin" "$LOG" | tail -n 30 | sed 's/^/  /' >&2
    exit 1 # the service is stopped by end_unproved_service
}

end_unproved_service() {
    [[ -n $started_pid ]] || return 0
    kill -TERM "$started_pid" 2>/dev/null || true
    wait_for_end "$started_pid" 10 || kill_service "$started_pid"
}

stop_service() {
    local pid grace begun=$SECONDS
    if ! pid=$(service_pid); then
        say "Not running"
        return
    fi
    # Settings that were broken since the start must not keep it from being stopped.
    "$PYTHON" -m tools.service_client drain || true
    grace=$(setting AVITO_GRACE_S 2>/dev/null) || grace=135
    say "Stopping (pid $pid): accepted requests are answered first, for at most $grace s"
    kill -TERM "$pid"
    # Gunicorn itself ends what has not finished after the grace time; if even that hangs, we do.
    if ! wait_for_end "$pid" $((${grace%.*} + 10)); then
        kill_service "$pid"
        rm -f "$PID_FILE"
        die "It did not end within $grace s and was killed"
    fi
    say "Stopped after $((SECONDS - begun)) s"
}

bring_up() {
    local port label="Ask    "
    require_sound_settings
    ensure_demo_model
    require_sound_models
    if service_pid >/dev/null; then stop_service; fi
    start_service
    port=$(setting AVITO_PORT)
    say ""
    say "Open    http://localhost:$port"
    if [[ -n $(setting AVIBE_MODEL_PATH) ]]; then
        say "$label curl -s http://localhost:$port/api/v1/text/generate -H 'Content-Type: application/json'" \
            "-d '{\"prompt\": \"What is the capital of France?\"}'"
        label="       "
    fi
    if [[ -n $(setting AVISION_MODEL_PATH) ]]; then
        say "$label curl -s http://localhost:$port/api/v1/image/analyze -F image=@static/samples/shapes.png" \
            "-F 'prompt=Describe the picture.'"
    fi
    say "Stop    ./deploy.sh stop"
}

# ------------------------------------------------------------------------------------------- commands

cmd_development() {
    local python=$PYTHON
    lock_this_folder
    ensure_env_file
    "$python" -c '' 2>/dev/null || python=$(find_python)
    describe_machine "$python"
    ensure_venv runtime
    bring_up
}

cmd_restart() {
    lock_this_folder
    ensure_env_file
    ensure_venv runtime
    bring_up
}

cmd_stop() {
    lock_this_folder
    stop_service
}

cmd_status() {
    local pid up
    if ! pid=$(service_pid); then
        say "Not running"
        exit 3
    fi
    up=$(($(date +%s) - $(stat -c %Y "$PID_FILE")))
    say "Running: pid $pid, for $((up / 3600)) h $((up / 60 % 60)) min $((up % 60)) s"
    "$PYTHON" -m tools.service_client status
}

cmd_logs() {
    [[ -f $LOG ]] || die "There is no log yet: the service was never started here"
    case ${1:-} in
        "") exec tail -n 100 -F "$LOG" ;;
        --no-follow) exec tail -n 100 "$LOG" ;;
    esac
}

cmd_check() {
    [[ -x $PYTHON ]] || die "There is no .venv yet: ./deploy.sh venv makes it"
    exec "$PYTHON" -m config
}

cmd_venv() {
    lock_this_folder
    case ${1:-} in
        "") ensure_venv runtime ;;
        --dev) ensure_venv dev ;;
    esac
}

# ---------------------------------------------------------------------------------------- production

# All four: tools/deploy_production.py, with the Python that the release's .venv is made from. Neither this
# folder's .venv nor its .env has a part in it.
run_production_command() {
    local python
    python=$(find_python)
    PYTHONDONTWRITEBYTECODE=1 exec "$python" -m tools.deploy_production "$@"
}

cmd_production() { run_production_command production "$@"; }
cmd_rollback() { run_production_command rollback "$@"; }
cmd_releases() { run_production_command releases "$@"; }
cmd_uninstall() { run_production_command uninstall "$@"; }

refuse() {
    printf "Error: %s; './deploy.sh help' lists what there is\n" "$1" >&2
    exit 2
}

main() {
    trap end_unproved_service EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    case ${1:-} in
        logs | venv | production | rollback | uninstall) ;;
        *) [[ $# -le 1 ]] || refuse "the command '$1' takes no argument" ;;
    esac
    case "$*" in
        development | restart | stop | status | check) "cmd_$1" ;;
        logs | 'logs --no-follow' | venv | 'venv --dev') "cmd_$1" "${@:2}" ;;
        production | production\ * | rollback | rollback\ * | releases | uninstall | uninstall\ *) "cmd_$1" "${@:2}" ;;
        help | -h | --help) usage ;;
        "") refuse "which command?" ;;
        logs* | venv*) refuse "unknown arguments '$*'" ;;
        *) refuse "unknown command '$1'" ;;
    esac
}

main "$@"
