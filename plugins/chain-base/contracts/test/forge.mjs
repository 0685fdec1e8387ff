// Runs forge of npm with the arguments given. The settings are in foundry.toml.
import { spawnSync } from "node:child_process";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const root = join(dirname(fileURLToPath(import.meta.url)), "..");
const arch = { x64: "amd64", arm64: "arm64" }[process.arch];
const forge = createRequire(import.meta.url).resolve(`@foundry-rs/forge-${process.platform}-${arch}/bin/forge`);
const { status } = spawnSync(forge, process.argv.slice(2), { cwd: root, stdio: "inherit" });
process.exit(status ?? 1);
