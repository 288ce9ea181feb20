#!/usr/bin/env bash
# Everything that has to be shown on a card, in one go: tests, benchmarks in process and over HTTP, memory; and at the
# end one table of the bars. Needs nothing but to be started; each step has a time limit and a log of its own, and one
# that fails does not keep the others from running.
#
#   tools/gpu_run.sh                    all steps, on true shapes with random weights; under 20 minutes on an H200
#   tools/gpu_run.sh STEP...            only these, beside what is in the folder already
#   tools/gpu_run.sh --tiny [STEP...]   tiny shapes and small numbers, on any machine: tries the script itself out
#   tools/gpu_run.sh --list             the steps
#
# PYTHON    what runs it (.venv/bin/python)
# FOLDER    logs, figures and the report (run/gpu; run/gpu-tiny with --tiny)
# SNAPSHOTS where the two snapshots are written, 33 GB, and left for the next run (FOLDER/snapshots)
# OUT       also leave report.md and results.tar.gz there after each step, so that a run cut short leaves something
# TOTAL_S   no step begins or goes on after so many seconds (1200)
set -uo pipefail
cd "$(dirname "$0")/.." || exit

STEPS=(environment tests decode decode-sampled prefill vision pair same-answer snapshots startup http cpu)

is_tiny=false
wanted=()
for argument in "$@"; do
    case "$argument" in
        --tiny) is_tiny=true ;;
        --list) printf '%s\n' "${STEPS[@]}"; exit 0 ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        *)
            if [[ " ${STEPS[*]} " != *" $argument "* ]]; then
                echo "$0: there is no step $argument; --list shows them" >&2
                exit 2
            fi
            wanted+=("$argument")
            ;;
    esac
done

PYTHON=${PYTHON:-.venv/bin/python}
if $is_tiny; then
    FOLDER=${FOLDER:-run/gpu-tiny}
else
    FOLDER=${FOLDER:-run/gpu}
fi
SNAPSHOTS=${SNAPSHOTS:-$FOLDER/snapshots}
TOTAL_S=${TOTAL_S:-1200}
export PYTHONUNBUFFERED=1
mkdir -p "$FOLDER" "$SNAPSHOTS"
FOLDER=$(cd "$FOLDER" && pwd)
SNAPSHOTS=$(cd "$SNAPSHOTS" && pwd)

if [[ ${#wanted[@]} -eq 0 ]]; then
    wanted=("${STEPS[@]}")
    # The bars of a machine without a card are shown on such a machine: it would take minutes of the card's time.
    $is_tiny || wanted=("${wanted[@]/cpu/}")
fi

failed=()
server=""

# Only ever the server that was started here.
stop_server() {
    if [[ -n "$server" ]]; then
        kill -TERM "$server" 2>/dev/null
        for _ in {1..100}; do # its worker ends with it
            kill -0 "$server" 2>/dev/null || break
            sleep 0.2
        done
        kill -KILL "$server" 2>/dev/null
        wait "$server" 2>/dev/null
        server=""
    fi
}
trap stop_server EXIT
trap 'exit 130' INT TERM

wants() { [[ " ${wanted[*]} " == *" $1 "* ]]; }

# step NAME LIMIT_S COMMAND...: its output goes to NAME.log
step() {
    local name=$1 limit_s=$2 left_s=$((TOTAL_S - SECONDS)) begun_s=$SECONDS code
    shift 2
    if ((left_s < 5)); then
        echo "$name: not begun, the $TOTAL_S s are over"
        failed+=("$name")
        return 1
    fi
    rm -f "$FOLDER/$name.json" # or an old figure would stand for this run's
    timeout -k 15 "$((left_s < limit_s ? left_s : limit_s))" "$@" >"$FOLDER/$name.log" 2>&1
    code=$?
    if ((code == 0)); then
        echo "$name: ok, $((SECONDS - begun_s)) s"
    else
        failed+=("$name")
        echo "$name: FAILED with exit code $code after $((SECONDS - begun_s)) s; the end of $name.log:"
        tail -n 5 "$FOLDER/$name.log" | sed 's/^/    /'
    fi
    pack
    return "$code"
}

# bench NAME LIMIT_S BENCHMARK OPTIONS...: its figures go to NAME.json
bench() {
    local name=$1 limit_s=$2
    shift 2
    step "$name" "$limit_s" "$PYTHON" -m bench "$@" --json "$FOLDER/$name.json"
}

report() {
    local options=()
    $is_tiny && options=(--tried-out)
    "$PYTHON" -m bench bars "$FOLDER" "${options[@]}"
}

pack() {
    [[ -n "${OUT:-}" ]] || return 0
    mkdir -p "$OUT"
    report >"$OUT/report.md" 2>/dev/null
    (cd "$FOLDER" && find . -maxdepth 1 \( -name '*.log' -o -name '*.json' -o -name '*.md' \) -print0 |
        tar -czf "$OUT/results.tar.gz" --null -T -)
}

show_environment() {
    nvidia-smi || echo "no nvidia-smi"
    "$PYTHON" - <<'END'
import platform, torch, transformers
print("python", platform.python_version(), "torch", torch.__version__, "transformers", transformers.__version__)
for index in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_properties(index))
END
    git log -1 --oneline 2>/dev/null || true
    df -h "$SNAPSHOTS"
}

run_tests() {
    if [[ ! -d tests/gpu ]]; then
        echo "there is no tests/gpu"
        return 1
    fi
    "$PYTHON" -m pytest -p no:cacheprovider -ra tests/gpu
}

# A snapshot that was begun and not finished is no snapshot.
write_snapshot() {
    local shape=$1
    if [[ -d "$SNAPSHOTS/$shape" ]]; then
        echo "$SNAPSHOTS/$shape is there"
        return 0
    fi
    rm -rf "$SNAPSHOTS/$shape.part"
    "$PYTHON" -m bench snapshot --shape "$shape" "$SNAPSHOTS/$shape.part" && mv "$SNAPSHOTS/$shape.part" "$SNAPSHOTS/$shape"
}

write_snapshots() { write_snapshot "$text_shape" && write_snapshot "$picture_shape"; }

export PYTHON SNAPSHOTS text_shape picture_shape
export -f show_environment run_tests write_snapshot write_snapshots

# The numbers. Those without --tiny are the ones that the bars were measured with.
# shellcheck disable=SC2054  # the commas are the options' own
if $is_tiny; then
    text_shape=tiny picture_shape=tiny-vl
    decode=(--batch 1,8 --context 40 --tokens 8 --rounds 2)
    prefill=(--prompts 1,8 --prompt-tokens 64 --long-tokens 400 --rounds 1)
    vision=(--requests 1,8 --batch 1,8 --tokens 8 --pictures 112x84 --rounds 1)
    pair=(--text-streams 4 --image-streams 2 --duration 1 --rounds 1 --prompt-tokens 32 --answer-tokens 16 --pictures 112x84)
    same=(--batch 8 --prompt-tokens 32 --tokens 16)
    load=(--concurrency 1,16 --requests 16 --prompt-tokens 64 --answer-tokens 16)
    load_pictures=(--concurrency 1,8 --requests 8 --prompt-tokens 16 --answer-tokens 16 --pictures 112x84)
    mixed=(--text-streams 4 --image-streams 2 --duration 1 --prompt-tokens 64 --answer-tokens 16 --pictures 112x84)
    cpu=(--batch 1,16 --context 64 --tokens 8 --rounds 1 --generate-limit 1)
else
    text_shape=qwen3-8b picture_shape=qwen2.5-vl-7b
    decode=(--batch 1,8,32,64,128 --generate-rounds 1)
    prefill=()
    vision=()
    pair=(--duration 8)
    same=()
    load=(--concurrency 1,16,64,128)
    load_pictures=(--concurrency 1,8,32 --prompt-tokens 16)
    mixed=(--duration 12)
    cpu=(--batch 1,16 --context 128 --tokens 32 --rounds 3 --generate-limit 1)
fi

if wants environment; then step environment 60 bash -c show_environment; fi
if wants tests; then step tests 420 bash -c run_tests; fi
if wants decode; then bench decode 240 decode --shape "$text_shape" "${decode[@]}"; fi
if wants decode-sampled; then
    bench decode-sampled 150 decode --shape "$text_shape" --sampled --no-generate "${decode[@]}"
fi
if wants prefill; then bench prefill 150 prefill --shape "$text_shape" "${prefill[@]}"; fi
if wants vision; then bench vision 180 vision --shape "$picture_shape" "${vision[@]}"; fi
if wants pair; then bench pair 240 pair --shape "$text_shape" --picture-shape "$picture_shape" "${pair[@]}"; fi
if wants same-answer; then bench same-answer 180 same-answer --shape "$text_shape" "${same[@]}"; fi
if wants snapshots; then step snapshots 240 bash -c write_snapshots; fi

# What stands in .env or the environment is for another service than this one.
while IFS='=' read -r name _; do
    case "$name" in AVITO_* | AVIBE_* | AVISION_*) unset "$name" ;; esac
done < <(env)
export AVIBE_MODEL_PATH="$SNAPSHOTS/$text_shape" AVISION_MODEL_PATH="$SNAPSHOTS/$picture_shape"
export AVITO_ENV=development AVITO_HOST=127.0.0.1 AVITO_RATE_LIMIT="" AVITO_LOG_FILE="" AVITO_OPS_TOKEN=""

# Of its own, so that the first start is one that compiles.
export AVITO_COMPILE_CACHE="$FOLDER/compile"
if wants startup; then
    rm -rf "$FOLDER/compile"
    bench startup 240 startup --runs 2
fi

if wants http; then
    AVITO_PORT=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    export AVITO_PORT
    url=http://127.0.0.1:$AVITO_PORT
    "$PYTHON" -m gunicorn -c gunicorn_config.py >"$FOLDER/server.log" 2>&1 &
    server=$!
    if step ready 180 "$PYTHON" -m tools.service_client wait --pid "$server" --timeout-s 170; then
        bench memory 30 memory --url "$url"
        bench load 150 load --url "$url" --api avito --model avibe "${load[@]}"
        bench load-pictures 150 load --url "$url" --api avito --model avision "${load_pictures[@]}"
        bench mixed 150 mixed --url "$url" --api avito --model avibe --picture-model avision "${mixed[@]}"
    fi
    stop_server
fi

if wants cpu; then bench cpu 400 decode --device cpu "${cpu[@]}"; fi

report | tee "$FOLDER/report.md"
pack
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
