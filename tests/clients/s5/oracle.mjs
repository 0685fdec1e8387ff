// What @lumeweb/libs5, another implementation of S5, makes of names and pointers. Reads one JSON value and writes one.
import { CID } from "@lumeweb/libs5";
import { deserializeRegistryEntry, serializeRegistryEntry, verifyRegistryEntry } from "@lumeweb/libs5/lib/service/registry.js";

const hex = (bytes) => Buffer.from(bytes).toString("hex");
const bytes = (text) => Uint8Array.from(Buffer.from(text, "base64url"));

let text = "";
for await (const piece of process.stdin) text += piece;
const asked = JSON.parse(text);

const names = asked.blobs.map(({ id, size, name }) => {
  const theirs = CID.fromHash(Uint8Array.from([0x1f, ...Buffer.from(id, "hex")]), size);
  const read = CID.decode(name);
  return {
    base58: theirs.toBase58(),
    hex: theirs.toHex(),
    base32: theirs.toBase32(),
    read: { id: hex(read.hash.hashBytes), size: read.size },
  };
});

const pointers = asked.pointers.map(({ pk, revision, data, signature }) => {
  const entry = { pk: bytes(pk), revision, data: bytes(data), signature: bytes(signature) };
  const back = deserializeRegistryEntry(serializeRegistryEntry(entry));
  return { valid: verifyRegistryEntry(entry), revision: back.revision, data: hex(back.data) };
});

console.log(JSON.stringify({ names, pointers }));
