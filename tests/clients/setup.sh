#!/bin/sh
# Installs OpenAI's clients for Python and Node for the tests, in the versions of requirements.txt and package.json, and in a folder of its
# own another implementation of S5.
# Does nothing where they are installed already. Needs python3 with venv, node and npm.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
folder=${XDG_CACHE_HOME:-$HOME/.cache}/fabstir-node/clients
mkdir -p "$folder"

# The recipe is copied last: a copy that is the same means that everything before it worked.
if ! cmp -s "$here/requirements.txt" "$folder/requirements.txt"; then
    rm -rf "$folder/python"
    python3 -m venv "$folder/python"
    "$folder/python/bin/pip" install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    cp "$here/requirements.txt" "$folder/requirements.txt"
fi
# Installs what a package.json names beside a copy of it: into the second folder from the first.
node_packages() {
    if ! cmp -s "$1/package.json" "$2/package.json"; then
        staging=$2/node.new
        rm -rf "$staging"
        mkdir -p "$staging"
        cp "$1/package.json" "$staging/"
        npm install --prefix "$staging" --silent --no-audit --no-fund --no-package-lock
        rm -rf "$2/node_modules"
        mv "$staging/node_modules" "$2/node_modules"
        rm -rf "$staging"
        cp "$1/package.json" "$2/package.json"
    fi
}
node_packages "$here" "$folder"
node_packages "$here/s5" "$folder/s5"
