"""Vectors of real sentences, for the bench `vectors`: those of the documentation of Rust packages on this machine.

    python3 benches/embed.py http://127.0.0.1:8080 all-minilm 100500 vectors.bin

asks a running node that serves an embedding model, and writes little-endian 32-bit floats, one vector after the other. Run it again to go on.
"""

import hashlib
import json
import os
import pathlib
import re
import struct
import sys
import urllib.request

BATCH = 64


def sentences(count):
    """So many different sentences, in an order that depends on nothing but their words."""
    home = pathlib.Path(os.environ.get("CARGO_HOME", pathlib.Path.home() / ".cargo"))
    found = {}
    for path in sorted(home.glob("registry/src/*/*/**/*.rs")):
        # Lines of documentation that follow each other are one text.
        text = path.read_text(errors="replace")
        for block in re.findall(r"(?:^[ \t]*//[/!].*\n)+", text, re.M):
            lines = (re.sub(r"^\s*//[/!]\s?", "", line) for line in block.splitlines())
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(lines)):
                sentence = " ".join(sentence.split())
                if 25 <= len(sentence) <= 240 and re.fullmatch(r"[A-Z][^<>{}|=\\]+[.!?]", sentence):
                    found[hashlib.sha256(sentence.encode()).digest()] = sentence
        if len(found) >= 3 * count:
            break
    chosen = [found[key] for key in sorted(found)][:count]
    if len(chosen) < count:
        sys.exit(f"there are only {len(chosen)} sentences on this machine, {count} were asked for")
    return chosen


def embed(url, model, texts):
    body = json.dumps({"model": model, "input": texts}).encode()
    request = urllib.request.Request(f"{url}/v1/embeddings", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as reply:
        return [datum["embedding"] for datum in json.load(reply)["data"]]


def main(url, model, count, path):
    texts = sentences(int(count))
    with open(path, "ab") as out:
        size = len(embed(url, model, texts[:1])[0])
        done = out.tell() // (4 * size)
        out.truncate(done * 4 * size)
        for at in range(done, len(texts), BATCH):
            for vector in embed(url, model, texts[at : at + BATCH]):
                out.write(struct.pack(f"<{size}f", *vector))
            if at // BATCH % 50 == 0:
                print(f"{at} of {len(texts)}", flush=True)
    print(f"{len(texts)} vectors of {size} numbers in {path}")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
