#!/bin/sh
# Make sure that the system has what pip cannot bring: by apt when root, otherwise say in one line what to install.
#   need.sh venv PYTHON    Python >= 3.10 with venv
#   need.sh lan            nginx, which serves the page to the network (make demo ARGS=--lan)
#   need.sh test           what the tests talk to: Chromium, Chinese fonts, dcmtk, nginx, PostgreSQL, SoftHSM, FAT tools
set -eu

install() { # install WHY PACKAGE...
    why=$1; shift
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "Installing $* ($why) ..."
        apt-get update -q >/dev/null
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" >/dev/null
    else
        echo "Please install ($why): sudo apt-get install $*" >&2
        exit 1
    fi
}

case $1 in
venv)
    python=$2
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; try: make PYTHON=python3.11" >&2; exit 1; }
    "$python" -c 'import ensurepip, venv' 2>/dev/null || install "Python's venv" python3-venv
    ;;
lan)
    command -v nginx >/dev/null || [ -x /usr/sbin/nginx ] || install "serves the page to the network" nginx-light
    ;;
test)
    missing=
    command -v chromium >/dev/null || command -v chromium-browser >/dev/null || missing="$missing chromium"
    command -v storescu >/dev/null || missing="$missing dcmtk"
    fc-list 2>/dev/null | grep -qi 'noto.*cjk' || missing="$missing fonts-noto-cjk fontconfig"
    command -v softhsm2-util >/dev/null || missing="$missing softhsm2"
    command -v nginx >/dev/null || [ -x /usr/sbin/nginx ] || missing="$missing nginx-light"
    command -v mkfs.vfat >/dev/null || [ -x /usr/sbin/mkfs.vfat ] || missing="$missing dosfstools"
    command -v mcopy >/dev/null || missing="$missing mtools"
    command -v faketime >/dev/null || missing="$missing faketime"
    ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || missing="$missing postgresql"
    # shellcheck disable=SC2086 # a list of words is meant
    [ -z "$missing" ] || install "for the tests" $missing
    # Half the processor time of Chromium with its windows. Chromium does as well, so a machine without a network is not stopped.
    if [ "$(id -u)" = 0 ] && ! command -v chromium-headless-shell >/dev/null && apt-cache show chromium-headless-shell >/dev/null 2>&1; then
        (install "a quicker browser for the tests" chromium-headless-shell) || echo "Not installed: the tests use Chromium itself."
    fi
    ;;
*)
    echo "usage: need.sh venv PYTHON | lan | test" >&2; exit 2 ;;
esac
