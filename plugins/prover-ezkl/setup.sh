#!/bin/sh
# Installs ezkl into a Python environment of its own, where the plugin looks for it. Does nothing where it is installed already.
# Needs python3 with venv, on Linux with an x86-64 processor.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
folder=${XDG_CACHE_HOME:-$HOME/.cache}/fabstir-node/ezkl

# The recipe is copied last: a copy that is the same means that everything before it worked.
if ! cmp -s "$here/requirements.txt" "$folder/requirements.txt"; then
    rm -rf "$folder"
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r "$here/requirements.txt"
    cp "$here/requirements.txt" "$folder/requirements.txt"
fi
