// Makes Halo2VerifierReusable.json: the verifier that ezkl generates for all circuits alike, compiled.
//
//   node make.mjs PYTHON        writes it; PYTHON is an interpreter with the ezkl of requirements.txt (`make ezkl`)
//   node make.mjs PYTHON --check    exits 1 if it is not what is committed
//
// Needs the npm packages of the contracts (`make chain`). ezkl asks for a solc after it has written the source, only for the ABI;
// without one it fails at that point, and the source is there.
import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const solc = createRequire(join(here, "../../chain-base/contracts/build.mjs"))("solc");
const [python, check] = process.argv.slice(2);

// Any circuit does: this one is a sum of two numbers.
const generate = `
import asyncio, ezkl, os, struct, sys
def field(id, bytes): return chr(id << 3 | 2).encode() + chr(len(bytes)).encode() + bytes
def tensor(name): return field(1, name) + field(2, field(1, b"\\x08\\x01" + field(2, field(1, b"\\x08\\x01"))))
node = field(1, b"a") + field(1, b"a") + field(2, b"b") + field(4, b"Add")
graph = field(1, node) + field(2, b"g") + field(11, tensor(b"a")) + field(12, tensor(b"b"))
open("onnx", "wb").write(b"\\x08\\x08" + field(7, graph) + field(8, b"\\x10\\x0d"))
args = ezkl.PyRunArgs()
args.logrows, args.decomp_base, args.ignore_range_check_inputs_outputs = 10, 128, True
ezkl.gen_settings("onnx", "settings", args)
ezkl.compile_circuit("onnx", "circuit", "settings")
ezkl.gen_srs("srs", 10)
ezkl.setup("circuit", "vk", "pk", "srs", None, False)
async def verifier():
    try:
        await ezkl.create_evm_verifier("vk", "settings", "verifier.sol", "abi", "srs", True)
    except RuntimeError as error:
        if not os.path.exists("verifier.sol"): raise
asyncio.run(verifier())
`;
const settings = {
  // The legacy code generator: the source relies on where it puts things in memory.
  optimizer: { enabled: true, runs: 1 },
  evmVersion: "cancun",
  metadata: { bytecodeHash: "none", appendCBOR: false },
};

const work = mkdtempSync(join(tmpdir(), "ezkl-verifier-"));
let source;
try {
  execFileSync(python, ["-I", "-c", generate], { cwd: work, stdio: ["ignore", "ignore", "inherit"] });
  source = readFileSync(join(work, "verifier.sol"), "utf8");
} finally {
  rmSync(work, { recursive: true });
}
const output = JSON.parse(
  solc.compile(
    JSON.stringify({
      language: "Solidity",
      sources: { "verifier.sol": { content: source } },
      settings: { ...settings, outputSelection: { "*": { "*": ["evm.bytecode.object", "evm.deployedBytecode.object"] } } },
    }),
  ),
);
const errors = (output.errors ?? []).filter((e) => e.severity === "error");
if (errors.length) throw new Error(errors.map((e) => e.formattedMessage).join("\n"));
const { evm } = output.contracts["verifier.sol"].Halo2VerifierReusable;
const artifact = {
  source: `create_evm_verifier(reusable=True) of ezkl 23.0.5, SPDX-License-Identifier: MIT`,
  sourceSha256: createHash("sha256").update(source).digest("hex"),
  compiler: solc.version(),
  settings,
  bytecode: `0x${evm.bytecode.object}`,
};
const text = `${JSON.stringify(artifact, null, 1)}\n`;
const path = join(here, "Halo2VerifierReusable.json");
if (!check) writeFileSync(path, text);
else if (readFileSync(path, "utf8") !== text) {
  console.error("Halo2VerifierReusable.json is not what ezkl generates: run `node make.mjs PYTHON` and commit it");
  process.exit(1);
}
console.log(`Halo2VerifierReusable ${evm.deployedBytecode.object.length / 2} bytes, source ${artifact.sourceSha256}`);
