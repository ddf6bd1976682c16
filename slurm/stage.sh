#!/usr/bin/env bash
# stage.sh FROM TO: copy a folder of shards to a local disk. TO appears when it is complete. An existing TO is kept.
set -euo pipefail
from=$1 to=$2
[ ! -e "$to/dataset.json" ] || exit 0
part=$(dirname "$to")/.$(basename "$to").$$
trap 'rm -rf "$part"' EXIT
mkdir -p "$(dirname "$to")"
cp -r "$from" "$part"
mv -T "$part" "$to" 2>/dev/null || [ -e "$to/dataset.json" ] # another process may have been faster
