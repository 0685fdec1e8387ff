// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

/// @notice Checks proofs of one kind.
interface IVerifier {
    /// @notice Whether `proof` proves the program for these public inputs. Called by the escrow, statically.
    /// @dev The escrow has checked that the first 32 bytes of `publicInputs` are the job's statement (`JobLane.statementOf`); the
    /// verifier must treat that word as a public input of the proof, otherwise a proof of another job would pass.
    /// Returning false and failing both mean "not proven".
    function verify(bytes32 programId, bytes calldata publicInputs, bytes calldata proof) external view returns (bool);
}
