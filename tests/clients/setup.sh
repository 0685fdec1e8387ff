#!/bin/sh
# Installs OpenAI's clients for Python and Node for the tests, in the versions of requirements.txt and package.json.
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
if ! cmp -s "$here/package.json" "$folder/package.json"; then
    staging=$folder/node.new
    rm -rf "$staging"
    mkdir "$staging"
    cp "$here/package.json" "$staging/"
    npm install --prefix "$staging" --silent --no-audit --no-fund --no-package-lock
    rm -rf "$folder/node_modules"
    mv "$staging/node_modules" "$folder/node_modules"
    rm -rf "$staging"
    cp "$here/package.json" "$folder/package.json"
fi
