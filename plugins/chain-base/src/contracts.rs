//! The market's contracts, as their committed ABI has them.

#![allow(clippy::too_many_arguments, clippy::enum_variant_names, clippy::large_enum_variant)]

pub mod escrow {
    ethers::contract::abigen!(ComputeEscrow, "contracts/artifacts/ComputeEscrow.json");
}

pub mod proofs {
    ethers::contract::abigen!(ProofHub, "contracts/artifacts/ProofHub.json");
}

pub mod nodes {
    ethers::contract::abigen!(NodeRegistry, "contracts/artifacts/NodeRegistry.json");
}
