#!/usr/bin/env node
// Speaks the part of solc's command line that forge uses, over the solc of npm, so that forge downloads nothing.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const solc = createRequire(import.meta.url)("solc");
if (process.argv.includes("--version")) {
  console.log(`solc, the solidity compiler commandline interface\nVersion: ${solc.version().replace("Emscripten.clang", "Linux.g++")}`);
} else if (process.argv.includes("--standard-json")) {
  process.stdout.write(solc.compile(readFileSync(0, "utf8")));
} else {
  console.error(`not spoken here: ${process.argv.slice(2).join(" ")}`);
  process.exit(1);
}
