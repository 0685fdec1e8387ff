// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {INodeRegistry} from "./interfaces/INodeRegistry.sol";
import {Ledger} from "./Ledger.sol";
import {ProofHub} from "./ProofHub.sol";
import {SessionLane} from "./SessionLane.sol";
import {JobLane} from "./JobLane.sol";

/// @title All the money of the marketplace
/// @notice Sessions paid by vouchers (SessionLane) and posted jobs (JobLane) over one book of credits (Ledger). There is no fee, no
/// upgrade and no way for the owner to touch what parties put in.
contract ComputeEscrow is SessionLane, JobLane {
    /// @param nodes_ The registry that was deployed for this contract's address.
    /// @param proofs_ Where jobs look up verifiers.
    /// @param owner_ Who may pause new jobs and sessions.
    constructor(INodeRegistry nodes_, ProofHub proofs_, address owner_)
        Ledger(nodes_, owner_)
        JobLane(proofs_)
        EIP712("fabstir", "1")
    {}
}
