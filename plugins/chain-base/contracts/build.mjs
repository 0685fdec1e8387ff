// Compiles src/ and writes one artifact per deployable contract.
//
//   node build.mjs           writes artifacts/
//   node build.mjs --check   exits 1 if artifacts/ is not what src/ compiles to
import { mkdirSync, readFileSync, readdirSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const root = dirname(fileURLToPath(import.meta.url));
const require = createRequire(import.meta.url);
const contracts = [
  "NodeRegistry", "ModelRegistry", "ComputeEscrow", "ProofHub", "verifiers/EzklVerifier", "verifiers/Groth16Verifier", "verifiers/HeadVerifier",
];
/** The largest contract a chain accepts (EIP-170). */
const maxCode = 24_576;

// No metadata hash: it would make the bytecode depend on comments and paths.
export const settings = {
  optimizer: { enabled: true, runs: 500 },
  viaIR: true,
  evmVersion: "cancun",
  metadata: { bytecodeHash: "none", appendCBOR: false },
};

/** Compiles `sources` ({path: text}) and returns solc's `contracts`; fails on any error or warning. */
export function compile(sources) {
  const solc = require("solc");
  const input = {
    language: "Solidity",
    sources: Object.fromEntries(Object.entries(sources).map(([path, content]) => [path, { content }])),
    settings: { ...settings, outputSelection: { "*": { "*": ["abi", "evm.bytecode.object", "evm.deployedBytecode.object"] } } },
  };
  const read = (path) => {
    try {
      return { contents: readFileSync(path.startsWith("@") ? join(root, "node_modules", path) : join(root, path), "utf8") };
    } catch (error) {
      return { error: error.message };
    }
  };
  const output = JSON.parse(solc.compile(JSON.stringify(input), { import: read }));
  // Warnings about OpenZeppelin's own files are theirs to judge; in ours a warning is an error.
  const ours = (output.errors ?? []).filter((e) => e.severity === "error" || !e.sourceLocation?.file.startsWith("@"));
  if (ours.length) throw new Error(ours.map((e) => e.formattedMessage).join("\n"));
  return { contracts: output.contracts, compiler: solc.version() };
}

function main() {
  const check = process.argv.includes("--check");
  const sources = {};
  for (const file of readdirSync(join(root, "src"), { recursive: true }).filter((f) => f.endsWith(".sol")).sort()) {
    sources[`src/${file}`] = readFileSync(join(root, "src", file), "utf8");
  }
  const { contracts: built, compiler } = compile(sources);
  mkdirSync(join(root, "artifacts"), { recursive: true });
  let stale = 0;
  for (const contract of contracts) {
    const name = contract.split("/").pop();
    const { abi, evm } = built[`src/${contract}.sol`][name];
    const size = evm.deployedBytecode.object.length / 2;
    if (size > maxCode) throw new Error(`${name} has ${size} bytes, the limit is ${maxCode}`);
    const artifact = {
      abi,
      bytecode: `0x${evm.bytecode.object}`,
      deployedBytecode: `0x${evm.deployedBytecode.object}`,
      compiler,
      settings,
    };
    const text = `${JSON.stringify(artifact, null, 1)}\n`;
    const path = join(root, "artifacts", `${name}.json`);
    if (!check) writeFileSync(path, text);
    else {
      let committed = "";
      try {
        committed = readFileSync(path, "utf8");
      } catch {}
      if (committed !== text) {
        console.error(`artifacts/${name}.json is not what src/ compiles to: run \`npm run build\` and commit it`);
        stale = 1;
      }
    }
    console.log(`${name.padEnd(14)} ${String(size).padStart(6)} bytes`);
  }
  process.exit(stale);
}

if (process.argv[1] === fileURLToPath(import.meta.url)) main();
