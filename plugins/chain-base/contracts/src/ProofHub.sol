// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

import {Ownable, Ownable2Step} from "@openzeppelin/contracts/access/Ownable2Step.sol";

/// @title Which contract checks which kind of proof
/// @notice One verifier per kind and program, named once and never replaced. A job copies the verifier's address when it is posted,
/// so nothing that happens here later touches it.
contract ProofHub is Ownable2Step {
    uint256 public constant MAX_STATEMENT_BYTES = 2048;

    mapping(uint8 kind => mapping(bytes32 programId => address)) private _verifiers;
    mapping(uint8 kind => mapping(bytes32 programId => string)) private _statements;

    event VerifierSet(uint8 indexed kind, bytes32 indexed programId, address verifier, string statement);

    error KindZero();
    error VerifierAlreadySet(uint8 kind, bytes32 programId, address verifier);
    error NoCodeAt(address verifier);
    error StatementLength(uint256 bytes_, uint256 max);

    constructor(address owner_) Ownable(owner_) {}

    /// @notice Names the verifier of a pair. Called by the owner, once per pair; kind 0 means "no proof" and has none.
    /// @param statement What an accepted proof says, and what it does not, in plain words for people; 1 to 2,048 bytes.
    function setVerifier(uint8 kind, bytes32 programId, address verifier, string calldata statement) external onlyOwner {
        if (kind == 0) revert KindZero();
        address set = _verifiers[kind][programId];
        if (set != address(0)) revert VerifierAlreadySet(kind, programId, set);
        // A call to an address without code succeeds on the EVM, which would read as "proven".
        if (verifier.code.length == 0) revert NoCodeAt(verifier);
        uint256 length = bytes(statement).length;
        if (length == 0 || length > MAX_STATEMENT_BYTES) revert StatementLength(length, MAX_STATEMENT_BYTES);
        _verifiers[kind][programId] = verifier;
        _statements[kind][programId] = statement;
        emit VerifierSet(kind, programId, verifier, statement);
    }

    /// @notice The verifier of a pair, or zero.
    function verifierOf(uint8 kind, bytes32 programId) external view returns (address) {
        return _verifiers[kind][programId];
    }

    /// @notice What an accepted proof of this pair says; empty when there is no verifier.
    function statementOf(uint8 kind, bytes32 programId) external view returns (string memory) {
        return _statements[kind][programId];
    }
}
