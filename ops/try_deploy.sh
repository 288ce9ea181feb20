#!/usr/bin/env bash
# Tries `deploy.sh production` out for real, under a temporary prefix and without root or systemd: pip installs the
# pinned packages, the unit's own command line runs, the embedded models answer. Only systemctl has a stand-in.
# Before it: `make demo`. Takes minutes, 4 GB of disk and, for the packages, a network. `ops/try_deploy.sh [FOLDER]`;
# with a FOLDER of an earlier try its packages are used again. The last line says whether all went as it must.
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
export PATH="$PWD/.venv/bin:$PATH"

TRY=${1:-$(mktemp -d)}
readonly TRY
export DEPLOY_PREFIX="$TRY/host"
export DEPLOY_SYSTEMCTL="$PWD/.venv/bin/python $PWD/tests/systemctl_stand_in.py"
export DEPLOY_JOURNALCTL="$DEPLOY_SYSTEMCTL journal"
AVITO_PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export AVITO_PORT AVITO_ALLOW_DEMO=true AVITO_DEVICE=cpu AVITO_RATE_LIMIT="" AVITO_DRAIN_S=2
export AVIBE_MODEL_PATH="$PWD/vibe/demo" AVIBE_TOKENIZER_PATH="" AVISION_MODEL_PATH="$PWD/vision/demo"
readonly SETTINGS="$DEPLOY_PREFIX/etc/avito-ai/avito-ai.env"

failures=0

# A copy of the project that calls itself VERSION.
project() {
    rm -rf "${TRY:?}/$1"
    mkdir -p "$TRY/$1"
    tar --exclude=./.git --exclude=./.venv --exclude=./run --exclude='./vibe/*' --exclude='*_cache' -cf - . |
        tar -xf - -C "$TRY/$1"
    sed -i "s/^VERSION = .*/VERSION = \"$1\"/" "$TRY/$1/config.py"
    if [[ ! -f $TRY/$1/avito-ai.service ]]; then
        printf '%s\n' '[Service]' 'Type=exec' 'WorkingDirectory=/opt/avito-ai/current' \
            'ExecStart=/opt/avito-ai/current/.venv/bin/python -m gunicorn -c gunicorn_config.py' \
            'EnvironmentFile=/etc/avito-ai/avito-ai.env' 'TimeoutStopSec=150' >"$TRY/$1/avito-ai.service"
    fi
}

# Usage: deploy VERSION
deploy() { "$TRY/$1/deploy.sh" production; }

answering_version() {
    python3 -c "
import json, urllib.request
print(json.load(urllib.request.urlopen('http://127.0.0.1:$AVITO_PORT/api/health', timeout=60))['version'])" 2>/dev/null ||
        echo nobody
}

# Usage: expect WHAT VERSION: this version answers.
expect() {
    local version
    version=$(answering_version)
    if [[ $version == "$2" ]]; then
        echo "== $1: $version answers, as it must"
    else
        echo "== $1: $version answers instead of $2"
        failures=$((failures + 1))
    fi
}

# Usage: expect_refusal WHAT VERSION: it is not taken, and 2.0.0 answers.
expect_refusal() {
    if deploy "$2"; then
        echo "== $1: it was taken"
        failures=$((failures + 1))
    fi
    expect "$1" 2.0.0
}

traffic() {
    python3 - "$AVITO_PORT" "$TRY/traffic.stop" <<'PYTHON'
import http.client, json, pathlib, sys, time

port, stop = int(sys.argv[1]), pathlib.Path(sys.argv[2])
outcomes = []
while not stop.exists():
    begun = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        body = json.dumps({"prompt": "What is the capital of France?", "max_tokens": 16})
        connection.request("POST", "/api/v1/text/generate", body, {"Content-Type": "application/json"})
        answer = json.load(connection.getresponse())
        what = "ok" if answer.get("success") else answer["error"]["code"]
    except OSError as error:
        what = type(error).__name__
    connection.close()
    outcomes.append((begun, time.monotonic(), what))
    time.sleep(0.02)
bad = [index for index, (_, _, what) in enumerate(outcomes) if what != "ok"]
if bad:
    window_s = outcomes[bad[-1]][1] - outcomes[bad[0]][0]
    is_one = bad == list(range(bad[0], bad[-1] + 1))
    kinds = sorted({outcomes[index][2] for index in bad})
    print(f"== Traffic: {len(outcomes)} requests, {len(bad)} not answered ({', '.join(kinds)}), all in "
          f"{'one window' if is_one else 'SEVERAL windows'} of {window_s:.1f} s")
else:
    print(f"== Traffic: {len(outcomes)} requests, all answered")
PYTHON
}

finish() {
    touch "$TRY/traffic.stop"
    $DEPLOY_SYSTEMCTL stop
}

trap finish EXIT
# Earlier releases and settings would not fit; the packages do.
rm -rf "${DEPLOY_PREFIX:?}"/{etc,var,run} "$DEPLOY_PREFIX"/opt/avito-ai/{releases,current,state.json}
rm -rf "$TRY/traffic.stop" "$TRY/cut"
for version in 1.0.0 2.0.0 3.0.0 4.0.0; do project "$version"; done

echo "== First: 1.0.0"
time deploy 1.0.0
expect "first deployment" 1.0.0

echo "== Upgrade to 2.0.0 under traffic"
traffic &
time deploy 2.0.0
sleep 3
touch "$TRY/traffic.stop"
wait $!
expect upgrade 2.0.0

echo "== Broken: weights that are cut off, which only loading notices"
cp -r "$AVISION_MODEL_PATH" "$TRY/cut" && truncate -s 1000000 "$TRY/cut/model.safetensors"
cp "$SETTINGS" "$TRY/settings"
sed -i "s|^AVISION_MODEL_PATH=.*|AVISION_MODEL_PATH=$TRY/cut|" "$SETTINGS"
expect_refusal "bad weights" 3.0.0
sed -i "s|^AVISION_MODEL_PATH=.*|AVISION_MODEL_PATH=$TRY/nowhere|" "$SETTINGS"
expect_refusal "bad model path" 3.0.0
cp "$TRY/settings" "$SETTINGS"

echo "== Broken: crashes at its start"
echo 'raise RuntimeError("broken on purpose")' >>"$TRY/3.0.0/app_production.py"
expect_refusal "crash at start" 3.0.0

echo "== Broken: fails its trial"
project 3.0.0
sed -i 's|@bp.get("/metrics")|@bp.get("/metrics-elsewhere")|' "$TRY/3.0.0/health.py"
expect_refusal "failed trial" 3.0.0

echo "== Broken: not ready in time"
project 3.0.0
DEPLOY_READY_TIMEOUT_S=1 expect_refusal "never ready" 3.0.0

echo "== Killed at ten random points"
for number in 1 2 3 4 5 6 7 8 9 10; do
    version=$((number % 2 * 2 + 2)).0.0 # 4.0.0 and 2.0.0 in turn
    after_s=$((RANDOM % 15)).$((RANDOM % 10))
    timeout --signal=KILL "$after_s" "$TRY/$version/deploy.sh" production >"$TRY/killed" 2>&1 || true
    echo "   killed after $after_s s, at: $(tail -n 1 "$TRY/killed" | cut -c 1-90)"
    deploy "$version" >"$TRY/mended" 2>&1 || tail -n 5 "$TRY/mended"
    expect "the run after it" "$version"
done

"$TRY/2.0.0/deploy.sh" releases
"$TRY/2.0.0/deploy.sh" rollback
"$TRY/2.0.0/deploy.sh" uninstall --yes --purge
expect "uninstalled" nobody
if [[ $failures -eq 0 ]]; then
    echo "All went as it must"
else
    echo "$failures things went wrong"
    exit 1
fi
