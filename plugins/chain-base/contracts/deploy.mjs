// Deploys the four contracts and prints one JSON object with their addresses.
//
//   node deploy.mjs --rpc URL [--key-file FILE] [--owner ADDRESS] [--min-stake WEI] [--exit-delay-secs N] [--test-token]
//
// Without --key-file the first unlocked account of the node signs, which only development chains have. The owner (default: the
// deployer) can pause new work, flag models and name verifiers. --test-token adds an ERC-20 of which the deployer holds 1,000,000.
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { createPublicClient, createWalletClient, defineChain, getAddress, getContractAddress, http } from "viem";
import { privateKeyToAccount } from "viem/accounts";
import { compile } from "./build.mjs";

const root = dirname(fileURLToPath(import.meta.url));
export const artifact = (name) => JSON.parse(readFileSync(join(root, "artifacts", `${name}.json`), "utf8"));

/** Connects to `rpc`, and signs with the key of `key-file` or, on development chains, with the first unlocked account. */
export async function connect(args) {
  const transport = http(args.rpc);
  const reader = createPublicClient({ transport });
  const chainId = await reader.getChainId();
  const chain = defineChain({
    id: chainId,
    name: `chain ${chainId}`,
    nativeCurrency: { name: "Ether", symbol: "ETH", decimals: 18 },
    rpcUrls: { default: { http: [args.rpc] } },
  });
  let account;
  if (args["key-file"]) {
    const key = readFileSync(args["key-file"], "utf8").trim();
    account = privateKeyToAccount(key.startsWith("0x") ? key : `0x${key}`);
  } else {
    const unlocked = await reader.request({ method: "eth_accounts" });
    if (!unlocked.length) throw new Error(`chain ${chainId} has no unlocked account: pass --key-file`);
    account = getAddress(unlocked[0]);
  }
  const wallet = createWalletClient({ account, chain, transport });
  const deployer = account.address ?? account;

  const deploy = async (name, { abi, bytecode }, params) => {
    const hash = await wallet.deployContract({ abi, bytecode, args: params });
    const receipt = await reader.waitForTransactionReceipt({ hash, pollingInterval: 200 });
    if (receipt.status !== "success") throw new Error(`${name} was not deployed: transaction ${hash} reverted`);
    const code = await reader.getCode({ address: receipt.contractAddress });
    if (!code || code === "0x") throw new Error(`${name}: no code at ${receipt.contractAddress}`);
    return { address: getAddress(receipt.contractAddress), block: receipt.blockNumber };
  };
  return { chainId, reader, wallet, deployer, deploy };
}

export function fail(error) {
  console.error(error.shortMessage ?? error.message);
  process.exit(1);
}

async function main() {
  const { values: args } = parseArgs({
    options: {
      rpc: { type: "string" },
      "key-file": { type: "string" },
      owner: { type: "string" },
      "min-stake": { type: "string", default: "10000000000000000" },
      "exit-delay-secs": { type: "string", default: "604800" },
      "test-token": { type: "boolean", default: false },
    },
  });
  if (!args.rpc) throw new Error("--rpc URL is missing");

  const { chainId, reader, deployer, deploy } = await connect(args);
  const owner = getAddress(args.owner ?? deployer);

  const models = await deploy("ModelRegistry", artifact("ModelRegistry"), [owner]);
  const proofs = await deploy("ProofHub", artifact("ProofHub"), [owner]);
  // The registry and the escrow name each other for ever, so the registry is told where the escrow is going to be.
  const nonce = await reader.getTransactionCount({ address: deployer, blockTag: "pending" });
  const escrowAddress = getContractAddress({ from: deployer, nonce: BigInt(nonce + 1) });
  const nodes = await deploy("NodeRegistry", artifact("NodeRegistry"), [
    escrowAddress,
    BigInt(args["min-stake"]),
    BigInt(args["exit-delay-secs"]),
  ]);
  const escrow = await deploy("ComputeEscrow", artifact("ComputeEscrow"), [nodes.address, proofs.address, owner]);
  if (escrow.address !== escrowAddress) {
    throw new Error(`the escrow is at ${escrow.address}, the registry expects ${escrowAddress}: the account sent something else; deploy again`);
  }

  const result = {
    chainId,
    // The first block that can hold an event of any of them.
    block: Number(models.block),
    escrow: escrow.address,
    nodes: nodes.address,
    models: models.address,
    proofs: proofs.address,
  };
  if (args["test-token"]) {
    const path = "test/TestToken.sol";
    const { contracts } = compile({ [path]: readFileSync(join(root, path), "utf8") });
    const { abi, evm } = contracts[path].TestToken;
    const token = await deploy("TestToken", { abi, bytecode: `0x${evm.bytecode.object}` }, []);
    result.testToken = token.address;
  }
  console.log(JSON.stringify(result));
}

if (process.argv[1] === fileURLToPath(import.meta.url)) main().catch(fail);
