// Deploys on a development chain of its own with deploy.mjs, calls every function that writes, and prints what each transaction cost.
//
//   node gas.mjs            prints
//   node gas.mjs --write    prints and writes gas.md
import { execFile, spawn } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { createTestClient, encodeAbiParameters, encodeFunctionData, getAddress, http, keccak256, parseEther, publicActions, toHex, walletActions, zeroAddress, zeroHash } from "viem";
import { mnemonicToAccount } from "viem/accounts";
import { foundry } from "viem/chains";
import { compile } from "./build.mjs";

const root = dirname(fileURLToPath(import.meta.url));
const arch = { x64: "amd64", arm64: "arm64" }[process.arch];
const anvil = createRequire(import.meta.url).resolve(`@foundry-rs/anvil-${process.platform}-${arch}/bin/anvil`);
const abi = (name) => JSON.parse(readFileSync(join(root, "artifacts", `${name}.json`), "utf8")).abi;

const chain = spawn(anvil, ["--port", "0", "--accounts", "10"], { stdio: ["ignore", "pipe", "inherit"] });
const url = await new Promise((resolve, reject) => {
  let seen = "";
  chain.stdout.on("data", (data) => {
    seen += data;
    const at = seen.match(/Listening on (\S+)/);
    if (at) resolve(`http://${at[1]}`);
  });
  chain.on("exit", () => reject(new Error(`anvil ended: ${seen}`)));
});

try {
  await main();
} finally {
  chain.removeAllListeners("exit");
  chain.kill();
}

async function main() {
  const { stdout } = await promisify(execFile)(process.execPath, [join(root, "deploy.mjs"), "--rpc", url, "--test-token"]);
  const at = JSON.parse(stdout);
  const c = createTestClient({ chain: foundry, mode: "anvil", transport: http(url), pollingInterval: 20 })
    .extend(publicActions)
    .extend(walletActions);
  const party = (addressIndex) =>
    mnemonicToAccount("test test test test test test test test test test test junk", { addressIndex });
  const [owner, client, hot, payout, other] = [0, 1, 2, 3, 4].map(party);
  const contract = {
    escrow: { address: at.escrow, abi: abi("ComputeEscrow") },
    nodes: { address: at.nodes, abi: abi("NodeRegistry") },
    models: { address: at.models, abi: abi("ModelRegistry") },
    proofs: { address: at.proofs, abi: abi("ProofHub") },
  };
  const read = (where, functionName, ...args) => c.readContract({ ...contract[where], functionName, args });
  if (getAddress(await read("nodes", "escrow")) !== at.escrow) throw new Error("the registry names another escrow");

  const rows = [];
  const call = async (label, account, where, functionName, args, value = 0n) => {
    const hash = await c.writeContract({ ...contract[where], functionName, args, account, value });
    const receipt = await c.waitForTransactionReceipt({ hash });
    if (receipt.status !== "success") throw new Error(`${functionName} (${label}) reverted`);
    if (label !== null) rows.push([`${where}.${functionName}`, label, receipt.gasUsed]);
  };
  const now = async () => (await c.getBlock()).timestamp;
  const pass = async (seconds) => {
    await c.increaseTime({ seconds });
    await c.mine({ blocks: 1 });
  };

  // A verifier and an arbiter for the measurement, from the tests.
  const path = "test/Parties.sol";
  const parties = compile({ [path]: readFileSync(join(root, path), "utf8") }).contracts[path];
  const helper = async (name) => {
    const hash = await c.deployContract({ abi: parties[name].abi, bytecode: `0x${parties[name].evm.bytecode.object}`, account: owner });
    return (await c.waitForTransactionReceipt({ hash })).contractAddress;
  };
  contract.verifier = { address: await helper("TestVerifier"), abi: parties.TestVerifier.abi };
  contract.arbiter = { address: await helper("TestArbiter"), abi: parties.TestArbiter.abi };
  const token = at.testToken;
  contract.token = {
    address: token,
    abi: [
      { type: "function", name: "mint", inputs: [{ type: "uint256" }], outputs: [], stateMutability: "nonpayable" },
      { type: "function", name: "approve", inputs: [{ type: "address" }, { type: "uint256" }], outputs: [{ type: "bool" }], stateMutability: "nonpayable" },
    ],
  };
  await call(null, client, "token", "mint", [10n ** 12n]);
  await call(null, client, "token", "approve", [at.escrow, 10n ** 12n]);

  const program = keccak256("0x01");
  const addrs = ["/ip4/192.0.2.1/udp/4001/quic-v1"];
  const peerId = toHex(new Uint8Array(38).fill(7));
  await call("one address", hot, "nodes", "register", [payout.address, peerId, keccak256("0x02"), addrs], parseEther("1"));
  await call(null, other, "nodes", "register", [owner.address, peerId, keccak256("0x02"), addrs], parseEther("1"));
  await call("", hot, "nodes", "update", [peerId, keccak256("0x03"), addrs]);
  await call("", other, "nodes", "addStake", [hot.address], parseEther("1"));
  await call("", client, "models", "registerModel", [keccak256("0x04"), zeroHash, "hf:owner/model/file.gguf", "A model"]);
  const modelId = keccak256(encodeAbiParameters([{ type: "bytes32" }, { type: "bytes32" }], [keccak256("0x04"), zeroHash]));
  await call("", owner, "models", "flag", [modelId, "licence"]);
  await call("", owner, "models", "unflag", [modelId, ""]);
  await call("", owner, "proofs", "setVerifier", [1, program, contract.verifier.address, "A test statement."]);

  // Lane A.
  const domain = { name: "fabstir", version: "1", chainId: at.chainId, verifyingContract: at.escrow };
  const fields = (text) => text.split(",").map((f) => ({ type: f.split(" ")[0], name: f.split(" ")[1] }));
  const offerType = fields("address host,address client,bytes32 modelId,address token,uint128 priceInPerMTok,uint128 priceOutPerMTok,uint64 expiry,uint64 settleWindowSecs,uint64 offerValidUntil,bytes32 nonce");
  const voucherType = fields("bytes32 sessionId,address host,uint128 cumulativeAmount,uint64 cumulativeIn,uint64 cumulativeOut,bytes32 transcriptRoot");
  let nonce = 0;
  const open = async (label, tokenAddress) => {
    const t = await now();
    const terms = {
      host: hot.address, client: client.address, modelId, token: tokenAddress, deposit: 1_000_000n, priceInPerMTok: 100_000n,
      priceOutPerMTok: 400_000n, expiry: t + 3600n, settleWindowSecs: 600n, offerValidUntil: t + 600n, nonce: toHex(++nonce, { size: 32 }),
    };
    const signature = await hot.signTypedData({ domain, types: { Offer: offerType }, primaryType: "Offer", message: terms });
    await call(label, client, "escrow", "openSession", [terms, signature], tokenAddress === zeroAddress ? terms.deposit : 0n);
    const words = ["uint256", "address", "address", "address", "bytes32"].map((type) => ({ type }));
    return keccak256(encodeAbiParameters(words, [BigInt(at.chainId), at.escrow, client.address, hot.address, terms.nonce]));
  };
  const voucher = async (sessionId, cumulativeAmount) => {
    const v = { sessionId, host: hot.address, cumulativeAmount, cumulativeIn: 1000n, cumulativeOut: 2000n, transcriptRoot: keccak256("0x05") };
    return [v, await client.signTypedData({ domain, types: { Voucher: voucherType }, primaryType: "Voucher", message: v })];
  };
  let id = await open("native", zeroAddress);
  await call("native", client, "escrow", "topUp", [id, 1000n], 1000n);
  await call("first of a host", other, "escrow", "settle", await voucher(id, 10n));
  await call("later", other, "escrow", "settle", await voucher(id, 20n));
  await call("after a settle", hot, "escrow", "settleAndClose", await voucher(id, 30n));
  id = await open("token", token);
  await call("token", client, "escrow", "topUp", [id, 1000n]);
  await call("token, the only settlement", hot, "escrow", "settleAndClose", await voucher(id, 30n));
  id = await open(null, token);
  await call("token, credits exist", hot, "escrow", "settleAndClose", await voucher(id, 30n));
  id = await open(null, zeroAddress);
  await call("by the host", hot, "escrow", "closeSession", [id]);
  id = await open(null, zeroAddress);
  await call("by the client", client, "escrow", "closeSession", [id]);
  await pass(601);
  await call("", other, "escrow", "finalizeSession", [id]);
  const many = [];
  for (let i = 0; i < 16; ++i) many.push(await voucher(await open(null, zeroAddress), 10n));
  await call("16 vouchers", other, "escrow", "settleMany", [many.map((m) => m[0]), many.map((m) => m[1])]);

  // Lane B.
  const post = async (label, change = {}) => {
    const terms = {
      modelId, token: zeroAddress, maxAmount: 1_000_000n, priceInPerMTok: 1_000_000n, priceOutPerMTok: 3_000_000n, maxInTokens: 4096n,
      maxOutTokens: 4096n, claimBy: (await now()) + 3600n, deliverSecs: 300n, proveSecs: 600n, challengeSecs: 900n, resolveSecs: 1200n,
      maxAttempts: 2, hostBond: 10n ** 15n, challengeBond: 10n ** 15n, proofKind: 0, programId: zeroHash, arbiter: zeroAddress, ...change,
    };
    const value = terms.token === zeroAddress ? terms.maxAmount : 0n;
    await call(label, client, "escrow", "postJob", [terms, keccak256("0x06"), "storage:0123456789abcdef0123456789abcdef"], value);
    return (await read("escrow", "nextJobId")) - 1n;
  };
  const deliver = (label, job) =>
    call(label, hot, "escrow", "submitResult", [job, keccak256("0x07"), zeroHash, 1000n, 2000n, "storage:0123456789abcdef0123456789abcdef"]);
  const proof = { proofKind: 1, programId: program };
  const arbiter = { arbiter: contract.arbiter.address };

  let job = await post("native, no proof", {});
  await call("first bond of a node", hot, "escrow", "claimJob", [job]);
  await deliver("", job);
  await call("", client, "escrow", "acceptResult", [job]);
  job = await post("token, proof and arbiter", { token, ...proof, ...arbiter });
  await call(null, hot, "escrow", "claimJob", [job]);
  await deliver(null, job);
  await call("empty verifier", hot, "escrow", "submitProof", [job, await read("escrow", "statementOf", job), toHex("good")]);
  await call("", client, "escrow", "challenge", [job, 1, keccak256("0x08")], 10n ** 15n);
  await call(null, owner, "arbiter", "decide", [true, true, 5000]);
  await call("host wins", other, "escrow", "resolve", [job]);
  job = await post(null, arbiter);
  await call(null, hot, "escrow", "claimJob", [job]);
  await deliver(null, job);
  await call(null, client, "escrow", "challenge", [job, 1, keccak256("0x08")], 10n ** 15n);
  await call(null, owner, "arbiter", "decide", [true, false, 5000]);
  await call("client wins, slash", other, "escrow", "resolve", [job]);
  job = await post(null);
  await call("", client, "escrow", "cancelJob", [job]);
  job = await post(null);
  await call("", hot, "escrow", "claimJob", [job]);
  await call("open again", hot, "escrow", "abandonJob", [job]);
  await call(null, other, "escrow", "claimJob", [job]);
  await pass(301);
  await call("claimed: slash and refund", client, "escrow", "expire", [job]);
  job = await post(null);
  await call(null, hot, "escrow", "claimJob", [job]);
  await deliver(null, job);
  await pass(901);
  await call("delivered: settle", client, "escrow", "expire", [job]);
  job = await post(null);
  await pass(3601);
  await call("open: refund", client, "escrow", "expire", [job]);

  // Money and keys.
  await call("native", client, "escrow", "withdraw", [zeroAddress, client.address]);
  await call("token, first of its receiver", payout, "escrow", "withdraw", [token, payout.address]);
  await call("", owner, "escrow", "pause", []);
  await call("", owner, "escrow", "unpause", []);
  await call("", payout, "nodes", "setHotKey", [hot.address, party(5).address]);
  await call("", payout, "nodes", "setPayout", [hot.address, party(6).address]);
  // Real keys and a real proof, those of the verifiers' tests, under the verifier alone: `submitProof` costs as much more.
  const { commitment: receipt } = JSON.parse(readFileSync(join(root, "test", "fixtures", "groth16.json"), "utf8"));
  const groth16 = JSON.parse(readFileSync(join(root, "artifacts", "Groth16Verifier.json"), "utf8"));
  const sent = async (label, to, data) => {
    // An estimate would find the least gas with which it does not revert, and a check that runs out of it only says no.
    const receipt = await c.waitForTransactionReceipt({ hash: await c.sendTransaction({ to, data, account: owner, gas: 3_000_000n }) });
    if (receipt.status !== "success") throw new Error(`${label} reverted`);
    rows.push(["groth16.verify", label, receipt.gasUsed]);
    return receipt.contractAddress;
  };
  const deployed = await sent("deployment, 2 public inputs", null, `${groth16.bytecode}${receipt.key.slice(2)}`);
  const functionName = "verify";
  const args = [receipt.program, receipt.publicInputs, receipt.proof];
  if (!(await c.readContract({ address: deployed, abi: groth16.abi, functionName, args }))) throw new Error("the fixture's proof does not hold");
  await sent("a receipt, 2 public inputs", deployed, encodeFunctionData({ abi: groth16.abi, functionName, args }));
  await call("", party(6), "nodes", "beginExit", [hot.address]);
  await pass(7 * 24 * 3600);
  await call("", client, "nodes", "finishExit", [hot.address]);
  await call("", party(6), "nodes", "withdraw", [party(6).address]);

  // A function that writes and was not called would be missing from the table unnoticed.
  const called = new Set(rows.map((r) => r[0]));
  const missing = ["escrow", "nodes", "models", "proofs"].flatMap((where) =>
    contract[where].abi
      .filter((f) => f.type === "function" && !["view", "pure"].includes(f.stateMutability))
      .map((f) => `${where}.${f.name}`)
      // OpenZeppelin's ownership, and what only the escrow calls (inside claimJob, acceptResult, abandonJob).
      .filter((n) => !/wnership$/.test(n) && !["nodes.lockBond", "nodes.unlockBond", "nodes.slash"].includes(n) && !called.has(n)),
  );
  if (missing.length) throw new Error(`not measured: ${missing.join(", ")}`);

  const lines = [
    "# Gas",
    "",
    "Gas used by one transaction of each function, calldata and the base cost of 21,000 included; the fee that a rollup charges for",
    "its data comes on top. Written by `npm run gas`, on anvil, with the bytecode in `artifacts/`.",
    "",
    "| function | case | gas |",
    "| --- | --- | ---: |",
    ...rows.map(([name, label, gas]) => `| \`${name}\` | ${label} | ${gas.toLocaleString("en")} |`),
    "",
  ];
  console.log(lines.join("\n"));
  if (process.argv.includes("--write")) writeFileSync(join(root, "gas.md"), lines.join("\n"));
}
