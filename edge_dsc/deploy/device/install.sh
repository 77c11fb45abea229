#!/bin/sh
# Made by edge-dsc deploy bundle. Builds the engine on this device, runs it once, tests the device, and starts the service.
#
#   sudo sh install.sh                     everything
#   sudo SOURCE=rtsp://... sh install.sh   another source than the bundle was packed for; also PORT=...
#   SERVICE=no PLACE=/a/folder sh install.sh  the engine alone
#   sudo SELFTEST=no sh install.sh         without edge-dsc selftest, which takes some minutes
set -eu

NAME='@NAME@'
PLACE=${PLACE:-/opt/edge-dsc/$NAME}
SERVICE=${SERVICE:-yes}
SELFTEST=${SELFTEST:-yes}
PORT=${PORT:-@PORT@}
if [ -z "${SOURCE:-}" ]; then
    SOURCE=@SOURCE@
fi

fail() {
    echo "error: $1" >&2
    exit "${2:-1}"
}

cd "$(dirname "$0")"
HERE=$(pwd)
# The README of edge-dsc says how it is installed on a Jetson; nothing is installed or downloaded here.
EDGE_DSC=${EDGE_DSC:-$(command -v edge-dsc || true)}
[ -n "$EDGE_DSC" ] || fail "there is no edge-dsc here: install version @EDGE_DSC@ first, or name it with EDGE_DSC=PATH" 3
[ "$SERVICE" != yes ] || [ "$(id -u)" = 0 ] || fail "the service needs root: sudo sh install.sh, or SERVICE=no" 3

mkdir -p "$PLACE"
for file in model.onnx labels.txt record.json calibration.json bundle.json; do
    [ ! -f "$file" ] || cp "$file" "$PLACE/$file"
done
cd "$PLACE"
"$EDGE_DSC" build-engine model.onnx @BUILD@ --out "$NAME.engine"
"$EDGE_DSC" inspect "$NAME.engine" --layers >layers.txt
if [ "$SELFTEST" = yes ] && "$EDGE_DSC" selftest --help >/dev/null 2>&1; then
    "$EDGE_DSC" selftest --out selftest || fail "selftest found a fault: see $PLACE/selftest" 1
fi
cd "$HERE"
[ "$SERVICE" = yes ] || { echo "$PLACE/$NAME.engine"; exit 0; }

# The source may hold a password: only root reads it.
umask 077
mkdir -p /etc/edge-dsc
printf 'SOURCE=%s\nPORT=%s\n' "$SOURCE" "$PORT" >"/etc/edge-dsc/$NAME.env"
umask 022
sed -e "s|/usr/bin/edge-dsc|$EDGE_DSC|" -e "s|/opt/edge-dsc/$NAME|$PLACE|" \
    edge-dsc.service >"/etc/systemd/system/edge-dsc-$NAME.service"
systemctl daemon-reload
systemctl enable --now "edge-dsc-$NAME.service"
echo "edge-dsc-$NAME runs: journalctl -u edge-dsc-$NAME -f, and http://127.0.0.1:$PORT/"
