// Deploys the contract that checks a kind of proof, from the file that `fabstir-node proof contract` writes, and names it in ProofHub.
// Prints one JSON object with its address.
//
//   node verifier.mjs FILE --rpc URL --proofs ADDRESS [--key-file FILE]
//
// Signs as deploy.mjs does, and must be ProofHub's owner. A verifier is named once for a kind and a program, for ever.
import { readFileSync } from "node:fs";
import { parseArgs } from "node:util";
import { connect, fail, artifact } from "./deploy.mjs";

/** Chains whose money is worth nothing. */
const development = [31337, 1337];

async function main() {
  const { values: args, positionals } = parseArgs({
    allowPositionals: true,
    options: { rpc: { type: "string" }, proofs: { type: "string" }, "key-file": { type: "string" } },
  });
  if (positionals.length !== 1 || !args.rpc || !args.proofs) throw new Error("node verifier.mjs FILE --rpc URL --proofs ADDRESS");
  const file = JSON.parse(readFileSync(positionals[0], "utf8"));
  const { chainId, reader, wallet, deploy } = await connect(args);
  if (file.is_development && !development.includes(chainId)) {
    throw new Error(`the keys of this verifier were made for development: whoever made them could forge proofs, and chain ${chainId} is none for that`);
  }
  let address = "";
  for (const [at, code] of file.creation.entries()) {
    const tail = at === 0 ? "" : address.slice(2).toLowerCase().padStart(64, "0");
    ({ address } = await deploy(`${file.name} (${at + 1} of ${file.creation.length})`, { abi: [], bytecode: code + tail }, []));
  }
  const { abi } = artifact("ProofHub");
  const hash = await wallet.writeContract({
    address: args.proofs, abi, functionName: "setVerifier", args: [file.kind, file.program, address, file.statement],
  });
  const receipt = await reader.waitForTransactionReceipt({ hash, pollingInterval: 200 });
  if (receipt.status !== "success") throw new Error(`ProofHub has not taken the verifier: transaction ${hash} reverted`);
  console.log(JSON.stringify({ chainId, verifier: address, kind: file.kind, program: file.program }));
}

main().catch(fail);
